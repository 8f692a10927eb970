"""Which policy loss is computed: one frozen record, with named presets. The formulas stand in reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Baseline = Literal["mean", "loo", "none"]
Scale = Literal["std", "batch_std", "none"]
KLEstimator = Literal["k1", "k2", "k3"]
Normalize = Literal["tokens", "sequences", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """A GRPO-style loss with token-level importance ratios.

    Attributes:
        clip_low: the ratio is clipped below at ``1 - clip_low``; from 0 to 1.
        clip_high: the ratio is clipped above at ``1 + clip_high``; at least 0.
        delta: upper limit of the ratio in the term that isn't clipped, which bounds the loss where the
            advantage is negative (two-sided clipping); above ``1 + clip_high``. None: no limit.
        kl_coef: weight of the KL term; above 0 it needs reference log-probabilities.
        kl_estimator: with d = logprob - reference logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
            k1's gradient has mean 0 on samples of the policy itself: it estimates the KL, but doesn't hold
            the policy back.
        entropy_coef: weight of the entropy, which is subtracted from the loss.
        normalize: "tokens" (sum over tokens / number of tokens), "sequences" (mean over the tokens of each
            sequence, summed / number of sequences) or "constant" (sum over tokens / a constant that the
            caller gives).
        baseline, scale: how the advantages that go with this loss are made; read through
            :meth:`advantage_options`.

    Raises:
        ValueError: a value out of its range or choices.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    normalize: Normalize = "sequences"
    baseline: Baseline = "mean"
    scale: Scale = "std"

    def __post_init__(self) -> None:
        """Refuse values that no formula is defined for."""
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low = {self.clip_low}, must be from 0 to 1")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high = {self.clip_high}, must be at least 0")
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ValueError(f"delta = {self.delta}, must be above 1 + clip_high = {1 + self.clip_high}")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef = {self.kl_coef}, must be at least 0")
        for name, choices in (
            ("kl_estimator", KLEstimator),
            ("normalize", Normalize),
            ("baseline", Baseline),
            ("scale", Scale),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} = {getattr(self, name)!r}, must be one of {', '.join(get_args(choices))}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """A published variant by name (see PRESETS), with `changes` to single fields.

        Raises:
            ValueError: an unknown name; the message lists those there are.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, must be one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def advantage_options(self) -> dict[str, Any]:
        """Keyword arguments for `group_advantages` that belong to this loss."""
        return {"baseline": self.baseline, "scale": self.scale}


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300, equation 3, without its KL term, which is kl_coef = 0.04 and needs a reference policy.
    "grpo": {"normalize": "sequences"},
    # Each token counts the same, whatever the length of its sequence.
    "bnpo": {"normalize": "tokens"},
    # arXiv 2503.20783: neither a sequence's length nor the spread of its group's rewards reweights it. The
    # constant is the number of sequences times the longest completion that is allowed.
    "dr_grpo": {"normalize": "constant", "scale": "none"},
    # arXiv 2503.14476: token mean over the whole step, and more room upwards, so that unlikely tokens can
    # gain.
    "dapo": {"normalize": "tokens", "clip_high": 0.28},
}
