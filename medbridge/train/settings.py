"""Settings that both training stages share, and those of a bridge stage; `rl_settings` has those of a sharpen stage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medbridge.train.schedule import ScheduleName, rate_factor

TOKENS = (
    "Tokens in memory at once; the gradient is the same. A prompt counts once for all completions that share it, and "
    "a patch of an image as layers x width of the vision tower over the text model's. A longer row is taken by itself."
)
"""Description of `micro_batch_tokens`."""


class OptimizerSettings(BaseModel):
    """AdamW and its schedule; the part that bridging and sharpening share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    vision_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of the vision tower; null is the same."
    )
    schedule: ScheduleName = Field(
        "cosine",
        description="Learning rate after the warm-up: constant, or down to a tenth along half a cosine or a line.",
    )
    warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises from 0.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="AdamW with float32 states, or with 8-bit ones at a quarter of the memory (bitsandbytes, GPU).",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay; of matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient average.")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's decay of the squared-gradient average.")
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    max_skipped_steps: int = Field(
        3,
        ge=1,
        description="An update whose loss or gradient is not finite is skipped; so many in a row stop the run.",
    )
    checkpoint_every: int = Field(
        50, ge=1, description="Steps between checkpoints: what a killed stage has to train again at most."
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Newest checkpoints kept. With 1 there is none to fall back to when its file is damaged."
    )

    def factor(self, step: int, steps: int) -> float:
        """Share of each parameter group's peak rate at optimizer step `step` (counted from 1) of `steps`."""
        return rate_factor(self.schedule, step, steps, self.warmup_steps)


class SftSettings(OptimizerSettings):
    """How a bridge stage trains."""

    steps: int = Field(200, ge=1, description="Optimizer steps of one bridge stage.")
    batch_size: int = Field(32, ge=1, description="Examples a step.")
    micro_batch_tokens: int = Field(8192, ge=1, description=TOKENS)
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples in memory at once at most, whatever their length; null sets no such limit."
    )
    source: Literal["auto", "answers", "traces", "rejection"] = Field(
        "auto",
        description="What is imitated: auto (the item's trace where it has one, else the bare answer), answers, "
        "traces (items that have one), or rejection (the model's own correct samples).",
    )
    rejection_samples: int = Field(
        8, ge=1, description="With source rejection: samples drawn per training item to find correct ones."
    )
    replay_share: float = Field(
        0.0, ge=0, lt=1, description="Share of each batch from strata not being bridged, against forgetting."
    )
