"""Drawing completions: one small engine protocol and its implementations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

import medbridge.model  # noqa: F401  (first: it prepares torchvision before transformers is imported)
from medbridge.rollout.engine import GREEDY, Engine, Graded, Request, Rollout, SamplingSettings
from medbridge.rollout.transformers import TransformersEngine


class RolloutSettings(SamplingSettings):
    """Engine and sampling of measurements; sharpening takes its temperature from `rl`."""

    engine: Literal["transformers"] = Field(
        "transformers", description="Engine that draws completions: transformers (in this process)."
    )
    batch_size: int = Field(
        512, ge=1, description="Completions decoded together: as many items as fit, one item at least."
    )


__all__ = [
    "GREEDY", "Engine", "Graded", "Request", "Rollout", "RolloutSettings", "SamplingSettings",
    "TransformersEngine",
]  # fmt: skip
