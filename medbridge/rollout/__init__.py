"""Drawing completions: one small engine protocol and its implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import medbridge.model  # noqa: F401  (first: it prepares torchvision before transformers is imported)
from medbridge.lazy import lazy
from medbridge.rollout.engine import (
    GREEDY,
    Engine,
    EngineFailure,
    EngineStats,
    Graded,
    Request,
    Rollout,
    SamplingSettings,
)
from medbridge.rollout.settings import FailureSettings, RolloutSettings, ServerSettings, VllmSettings

if TYPE_CHECKING:
    from medbridge.rollout.pool import Pool
    from medbridge.rollout.transformers import TransformersEngine

__getattr__ = lazy(__name__, {"Pool": "pool", "TransformersEngine": "transformers"})

__all__ = [
    "GREEDY", "Engine", "EngineFailure", "EngineStats", "FailureSettings", "Graded", "Pool", "Request", "Rollout",
    "RolloutSettings", "SamplingSettings", "ServerSettings", "TransformersEngine", "VllmSettings",
]  # fmt: skip
