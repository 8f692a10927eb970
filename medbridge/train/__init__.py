"""The two training stages: bridge (supervised fine-tuning) and sharpen (GRPO), and what both stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import medbridge.model  # noqa: F401  (first: it prepares torchvision before transformers is imported)
from medbridge.lazy import lazy
from medbridge.train.rl_settings import RlSettings
from medbridge.train.settings import OptimizerSettings, SftSettings

if TYPE_CHECKING:
    from medbridge.train.groups import Rollouts
    from medbridge.train.rl import train_rl
    from medbridge.train.sft import Example, Supervision, train_sft

__getattr__ = lazy(
    __name__, {"Example": "sft", "Rollouts": "groups", "Supervision": "sft", "train_rl": "rl", "train_sft": "sft"}
)

__all__ = [
    "Example",
    "OptimizerSettings",
    "RlSettings",
    "Rollouts",
    "SftSettings",
    "Supervision",
    "train_rl",
    "train_sft",
]
