"""The two training stages: bridge (supervised fine-tuning) and sharpen (GRPO), and what both stand on."""

from __future__ import annotations

from medbridge.train.groups import Rollouts
from medbridge.train.optimization import OptimizerSettings
from medbridge.train.rl import RlSettings, train_rl
from medbridge.train.sft import Example, SftSettings, train_sft

__all__ = ["Example", "OptimizerSettings", "RlSettings", "Rollouts", "SftSettings", "train_rl", "train_sft"]
