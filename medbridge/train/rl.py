"""Sharpening: GRPO on items whose answers the model can already reach.

Each step samples a group of completions per item, rewards them, and moves probability towards those that did
better than their group. What is simplified so far: one process trains.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from medbridge.data.images import ImageCache
from medbridge.data.items import Item
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.policy import ModelSettings, Policy
from medbridge.rollout.engine import SamplingSettings
from medbridge.train.groups import GroupSampler, Rollouts
from medbridge.train.learner import Learner
from medbridge.train.optimization import OptimizerSettings, Trainable
from medbridge.train.pipelining import Pipeline
from medbridge.train.schedule import ScheduleName
from medbridge.train.sft import TOKENS, OnStep
from medbridge_kernels import LossConfig


class RlSettings(OptimizerSettings):
    """How a sharpen stage trains. The defaults are the paper's where it states them (arXiv 2603.01301)."""

    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate.")
    schedule: ScheduleName = Field(
        "constant", description="Learning rate after the warm-up: constant, or a cosine or straight line to a tenth."
    )
    checkpoint_every: int = Field(10, ge=1, description="Steps between checkpoints.")
    steps: int = Field(100, ge=1, description="Optimizer steps of one sharpen stage.")
    reserved_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training items that bridging never sees and sharpening uses alone. Answers that "
        "SFT has memorised are right in every sample, and a group without a difference teaches nothing.",
    )
    prompts_per_step: int = Field(16, ge=1, description="Items a step: as many groups.")
    completions: int = Field(8, ge=2, description="Completions sampled per item: the group.")
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="Groups whose rewards are all equal teach nothing. Above 0 they are replaced by groups of the next "
        "items, in at most so many further rounds a step; then the step goes on with the groups that it has.",
    )
    mask_truncated: bool = Field(
        False,
        description="Completions cut off at max_new_tokens count in their group's baseline and in the step's "
        "normaliser, and give no gradient: what a cut answer would have earned isn't known.",
    )
    micro_batch_tokens: int = Field(8192, ge=1, description=TOKENS)
    micro_batch_size: int | None = Field(
        None, ge=1, description="Completions in memory at once at most, whatever their length; null sets no such limit."
    )
    updates_per_batch: int = Field(
        1, ge=1, description="Optimizer updates from one batch of rollouts; above 1 the clip takes effect."
    )
    temperature: float = Field(1.0, gt=0, le=10, description="Sampling temperature; the loss uses the same.")
    correction: Literal["none", "truncate", "mask"] = Field(
        "truncate",
        description="Rollouts come from an engine whose probabilities differ from the trainer's by rounding, and by "
        "their age. truncate: a token's (or sequence's) gradient is weighted by the ratio of trainer over engine, up "
        "to the cap. mask: the same, and 0 beyond the cap or below the floor. none: the difference is only logged.",
    )
    correction_level: Literal["token", "sequence"] = Field(
        "token", description="That ratio per token, or per sequence (their product: unbiased, and far noisier)."
    )
    correction_cap: float = Field(2.0, gt=0, description="Largest ratio of the correction.")
    correction_floor: float = Field(0.0, ge=0, description="Smallest ratio of the correction.")
    off_policy_threshold: float | None = Field(
        None,
        ge=0,
        description="Leave out completions with a negative advantage that were a mean of so many nats a token "
        "likelier when they were sampled than they are now; null keeps all.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus mass kept when sampling. The gradient is that of the whole policy, the samples are then "
        "those of the cut one: below 1 it needs a correction, and tokens outside of the nucleus are never tried.",
    )
    staleness: int = Field(
        0,
        ge=0,
        le=8,
        description="Steps by which a batch's weights are behind. Above 0 the next batches are sampled while the "
        "present one is trained on, in engines of their own; 0 is strictly on policy.",
    )
    sync_every: int = Field(
        1, ge=1, description="Steps between two transfers of weights to the rollout engines; divides checkpoint_every."
    )
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo"] = Field(
        "grpo", description="Loss preset of medbridge_kernels: surrogate, ratio, clip and how it is normalised."
    )
    loss_impl: Literal["auto", "reference", "native", "triton"] = Field(
        "auto",
        description="Back end of the loss: native (C++) on a CPU, triton on a GPU, reference (plain torch, slow).",
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the stage's first model; above 0 keeps a copy."
    )
    format_weight: float = Field(0.1, ge=0, description="Reward for the answer form, beside 1 for being right.")

    @field_validator("top_p")
    @classmethod
    def _is_corrected(cls, top_p: float, info: ValidationInfo) -> float:
        if top_p < 1 and info.data.get("correction") == "none":
            raise ValueError(
                "below 1 the samples are not the policy's own: the gradient is biased towards what the nucleus keeps. "
                "Set correction to truncate or mask, or top_p to 1"
            )
        return top_p

    @field_validator("sync_every")
    @classmethod
    def _divides_checkpoints(cls, every: int, info: ValidationInfo) -> int:
        saved = info.data.get("checkpoint_every", every)
        if saved % every:
            raise ValueError(
                f"checkpoint_every is {saved}, and {every} doesn't divide it: a run that resumes from a checkpoint "
                "could not sample from the weights that the engines had then"
            )
        return every

    @model_validator(mode="after")
    def _is_a_loss(self) -> RlSettings:
        self.loss_config()
        return self

    def loss_config(self) -> LossConfig:
        return LossConfig.preset(
            self.loss, kl_coef=self.kl_coefficient, correction=self.correction, correction_level=self.correction_level,
            correction_cap=self.correction_cap, correction_floor=self.correction_floor,
            off_policy_threshold=self.off_policy_threshold,
        )  # fmt: skip

    def version(self, step: int) -> int:
        """The step after which the weights were taken that the batch of `step` is sampled from; 0: the first ones."""
        newest = max(0, step - 1 - self.staleness)
        return newest - newest % self.sync_every


def train_rl(
    policy: Policy,
    items: Sequence[Item],
    settings: RlSettings,
    rollouts: Rollouts,
    *,
    model: ModelSettings,
    prompts: PromptSettings,
    images: ImageCache,
    rollout: SamplingSettings,
    seed: int,
    checkpoints: Path,
    on_start: Callable[[int], None],
    on_step: OnStep,
    say: Callable[[str], None] = warnings.warn,
) -> None:
    """Train `policy` in place with GRPO; resumes from the latest checkpoint under `checkpoints`.

    Of `rollout` the length and the stop texts are read; temperature and nucleus are the settings' own. `on_start` is
    told the step from which training goes on, `say` of skipped steps and damaged checkpoints.

    Raises:
        MedbridgeError: sampling ahead from weights that are trained meanwhile; rollouts of other weights than promised.
    """
    if rollouts.shares_weights and (settings.staleness or settings.sync_every > 1):
        raise MedbridgeError(
            f"rl.staleness is {settings.staleness} and rl.sync_every {settings.sync_every}, and the transformers "
            "engine samples from the very weights that are trained: it can't keep older ones, nor sample while they "
            "change. Set them to 0 and 1, or rollout.engine to vllm."
        )
    sampling = SamplingSettings(
        temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=rollout.max_new_tokens, stop=rollout.stop
    )
    learner = Learner(policy, settings, prompts, images, rollout.max_new_tokens)
    trainable = Trainable(policy, model, settings, settings.steps, seed=seed, say=say)
    start = trainable.restore(checkpoints)
    on_start(start)
    position = int(trainable.extra.get("position", 0))
    sampler = GroupSampler(items, settings, rollouts, sampling, seed=seed, position=position)
    with Pipeline(sampler, settings, start=start) as pipeline:
        for step in range(start + 1, settings.steps + 1):
            batch = pipeline.take(step)
            began = time.perf_counter()
            trainable.begin(step)
            learner.loss.comparing = step == 1  # not again in a run that resumes
            metrics = learner.update(step, batch, trainable)
            metrics["seconds_training"] = time.perf_counter() - began - metrics.pop("seconds_comparing", 0.0)
            pipeline.trained(step)
            on_step(step, metrics | pipeline.take_seconds(), [group.request.item.id for group in batch.groups])
            if step % settings.checkpoint_every == 0 and step < settings.steps:
                trainable.save(checkpoints, step, {"position": batch.position})
    trainable.finish()
