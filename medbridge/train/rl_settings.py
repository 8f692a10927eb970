"""Settings of a sharpen stage, and what cannot go together among them. What they do stands where they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from medbridge.errors import MedbridgeError
from medbridge.train.schedule import ScheduleName
from medbridge.train.settings import TOKENS, OptimizerSettings

if TYPE_CHECKING:
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
        0.0, ge=0, description="Weight of the KL divergence from the reference policy (kl_reference)."
    )
    kl_reference: Literal["first", "ema"] = Field(
        "first",
        description="What the KL term pulls towards. first: the model that the stage began with (a copy of what is "
        "trained; with adapters the model without them). ema: the moving average of what is trained (ema_decay).",
    )
    advantage: Literal["group", "pkpo", "pass_at_k"] = Field(
        "group",
        description="What a completion is credited with. group: its reward against its group's, as the loss preset "
        "has it. pkpo, pass_at_k: what it adds to the best of pass_k completions, so that rare right answers are "
        "not given up for sure ones; pkpo without the group's standard deviation (for dr_grpo, arXiv 2505.15201), "
        "pass_at_k over it (for all other losses, arXiv 2508.10751).",
    )
    pass_k: int | Literal["diagnosed"] = Field(
        "diagnosed",
        description="The k that pkpo and pass_at_k begin with, at least 2; diagnosed is the one that the verdict on "
        "the stage's strata named (at most what the group allows). At k = 1 both are the group's advantage.",
    )
    anneal_share: float | None = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the stage's steps in which pass_k comes down to 1, by one at a time and for equally "
        "long each; null keeps it.",
    )
    consistency_weight: float = Field(
        0.0,
        ge=0,
        description="Bonus of a right completion whose reasoning makes its answer about as likely as the group's other "
        "right ones do, or more, under the moving average of the model (GRPO-CARE, arXiv 2506.16141, with 0.5). What "
        "dynamic_sampling replaces is decided before it.",
    )
    consistency_margin: float = Field(
        0.01, ge=0, lt=1, description="Probability by which the answer's may lie below the mean of those right ones."
    )
    ema_decay: float = Field(
        0.995, ge=0, lt=1, description="Decay d of the moving average: d average + (1 - d) weights at each movement."
    )
    ema_every: int = Field(
        1,
        ge=1,
        description="Steps between movements of the average; GRPO-CARE's code has 10. It moves with each "
        "update of such a step.",
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

    @model_validator(mode="after")
    def _is_a_best_of_k(self) -> RlSettings:
        """Over the standard deviation or not: the same before and behind the annealing, and as the loss has it."""
        if self.advantage == "group":
            return self
        scaled = self.loss_config().scale != "none"
        if self.advantage == "pkpo" and scaled:
            raise ValueError(
                f"advantage is pkpo, whose weights are the gradient of the best of k as they are, and loss {self.loss} "
                "divides by the group's standard deviation. Set loss to dr_grpo, or advantage to pass_at_k"
            )
        if self.advantage == "pass_at_k" and not scaled:
            raise ValueError(
                f"advantage is pass_at_k, which divides by a standard deviation, and loss {self.loss} is meant not to. "
                "Set advantage to pkpo, or another loss"
            )
        if self.pass_k != "diagnosed" and not 2 <= self.pass_k <= self.largest_k:
            raise ValueError(
                f"pass_k is {self.pass_k}, and {self.advantage} with {self.completions} completions takes 2 to "
                f"{self.largest_k}. Set it within, or more completions"
            )
        if self.largest_k < 2:
            raise ValueError("advantage is pass_at_k, which needs at least 3 completions to tell the best of 2 apart")
        return self

    @model_validator(mode="after")
    def _is_read(self) -> RlSettings:
        """Refuse what would be ignored."""
        unread = []
        if self.advantage == "group":
            unread += [(name, "advantage is group") for name in ("pass_k", "anneal_share")]
        if not self.consistency_weight:
            unread.append(("consistency_margin", "consistency_weight is 0"))
        if not self.kl_coefficient:
            unread.append(("kl_reference", "kl_coefficient is 0"))
        if not self.keeps_average:
            reason = "neither consistency_weight nor kl_reference ema asks for a moving average"
            unread += [(name, reason) for name in ("ema_decay", "ema_every")]
        for name, reason in unread:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}, and isn't read: {reason}. Leave it out")
        return self

    def loss_config(self) -> LossConfig:
        from medbridge_kernels import LossConfig  # brings torch with it

        return LossConfig.preset(
            self.loss, kl_coef=self.kl_coefficient, correction=self.correction, correction_level=self.correction_level,
            correction_cap=self.correction_cap, correction_floor=self.correction_floor,
            off_policy_threshold=self.off_policy_threshold,
        )  # fmt: skip

    @property
    def keeps_average(self) -> bool:
        """Whether something is read off a moving average of what is trained."""
        return self.consistency_weight > 0 or (self.kl_coefficient > 0 and self.kl_reference == "ema")

    @property
    def largest_k(self) -> int:
        """The largest k of which a group can say something: the best of all n is the same for each completion."""
        return self.completions - 1 if self.advantage == "pass_at_k" else self.completions

    def first_k(self, diagnosed: int | None, say: Callable[[str], None]) -> int:
        """The k of the first step, 1 for the group's advantage; `say` is told where the diagnosed one is too large.

        Raises:
            MedbridgeError: it is to be the diagnosed one, and none was.
        """
        if self.advantage == "group":
            return 1
        if self.pass_k != "diagnosed":
            return self.pass_k
        if diagnosed is None:
            raise MedbridgeError(
                f"rl.pass_k is diagnosed, and no diagnosis has named a k for these strata. Run `medbridge diagnose` "
                f"first, or set rl.pass_k to a number from 2 to {self.largest_k}."
            )
        if diagnosed > self.largest_k:
            say(
                f"the diagnosed k is {diagnosed}, and {self.advantage} with {self.completions} completions a group "
                f"(rl.completions) takes {self.largest_k} at most: that is taken."
            )
        return max(1, min(diagnosed, self.largest_k))

    def k_at(self, step: int, first: int) -> int:
        """The k of a step (from 1): `first` at first, one less after each of equal spans of steps, and 1 at last."""
        if self.anneal_share is None:
            return first
        annealing = round(self.anneal_share * self.steps)
        return 1 if step > annealing else first - (step - 1) * (first - 1) // annealing

    def version(self, step: int) -> int:
        """The step after which the weights were taken that the batch of `step` is sampled from; 0: the first ones."""
        newest = max(0, step - 1 - self.staleness)
        return newest - newest % self.sync_every
