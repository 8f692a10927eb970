"""Group advantages, token log-probabilities and the GRPO loss for any trainer: needs torch, nothing of medbridge."""

from medbridge_kernels.advantages import group_advantages
from medbridge_kernels.config import PRESETS, LossConfig
from medbridge_kernels.grpo import LossOutputs, grpo_loss
from medbridge_kernels.linear_grpo import linear_grpo_loss, linear_token_logprobs
from medbridge_kernels.logprobs import token_logprobs

__all__ = [
    "PRESETS",
    "LossConfig",
    "LossOutputs",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "token_logprobs",
]
