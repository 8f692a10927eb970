"""The two training stages: bridge (supervised fine-tuning) and sharpen (GRPO), and what both stand on."""

from __future__ import annotations

from medbridge.train.groups import Rollouts
from medbridge.train.optimization import OptimizerSettings
from medbridge.train.rl import train_rl
from medbridge.train.rl_settings import RlSettings
from medbridge.train.sft import Example, SftSettings, Supervision, train_sft

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
