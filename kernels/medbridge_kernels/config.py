"""Which policy loss is computed: one frozen record, with named presets. The formulas stand in reference."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

Baseline = Literal["mean", "loo", "none"]
Scale = Literal["std", "batch_std", "none"]
Surrogate = Literal["clip", "cispo", "sapo"]
Level = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]
Normalize = Literal["tokens", "sequences", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """A GRPO-style policy loss.

    With r the importance ratio exp(logprob - old logprob) and A the advantage, the surrogate of a token is

    - "clip": ``-min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)``
    - "cispo": ``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprob``, sg stopping the gradient
    - "sapo": ``-4 sigmoid(tau (r - 1)) / tau A``, tau by the sign of A

    Attributes:
        surrogate: see above.
        ratio_level: "token", or "sequence" for GSPO's ratio: the exponential of the mean log-ratio over the
            sequence's tokens, shared by all of them and with its gradient spread over them.
        clip_low: the ratio is clipped below at ``1 - clip_low``; from 0 to 1, and 1 is no limit.
        clip_high: the ratio is clipped above at ``1 + clip_high``; at least 0 (above -1 for "cispo", whose cap
            needs not be above 1). "sapo" clips nothing: there both only set where the metrics count a ratio as cut.
        delta: upper limit of the ratio in the term that isn't clipped, which bounds the loss where the
            advantage is negative (two-sided clipping); above ``1 + clip_high``. None: no limit. For "clip" only.
        sapo_temperature_positive, sapo_temperature_negative: tau where A > 0, and elsewhere; above 0.
        kl_coef: weight of the KL term; above 0 it needs reference log-probabilities.
        kl_estimator: with d = logprob - reference logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
            k1's gradient has mean 0 on samples of the policy itself: it estimates the KL, but doesn't hold
            the policy back.
        kl_bias_correction: multiply the KL term by r, with r's gradient: the tokens are samples of the old policy,
            and the estimators are unbiased on samples of the present one (arXiv 2512.02556, equation 7).
        entropy_coef: weight of the entropy, which is subtracted from the loss.
        correction: what is done about samples of an engine whose probabilities differ from the trainer's. With
            q = exp(old logprob - rollout logprob) the surrogate is multiplied by clip(q, correction_floor,
            correction_cap) for "truncate", and by q where it lies between the two and 0 elsewhere for "mask".
            Needs rollout log-probabilities.
        correction_level: q per "token", or per "sequence": the product over the sequence's tokens.
        correction_cap, correction_floor: see above; ``0 <= correction_floor < correction_cap``.
        off_policy_threshold: leaves out the surrogate of sequences with a negative advantage whose mean of
            (rollout logprob - logprob) over the tokens is above this (old logprobs where no rollout logprobs are given;
            a NaN among them counts as no difference): they come from too different a policy to learn from. None: keeps
            all.
        normalize: "tokens" (sum over tokens / number of tokens), "sequences" (mean over the tokens of each
            sequence, summed / number of sequences) or "constant" (sum over tokens / a constant that the
            caller gives).
        baseline, scale: how advantages are made from rewards where the loss is given these; read through
            :meth:`advantage_options`.

    Raises:
        ValueError: a value out of its range or choices, or one that this loss wouldn't read.
    """

    surrogate: Surrogate = "clip"
    ratio_level: Level = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    correction: Correction = "none"
    correction_level: Level = "token"
    correction_cap: float = 2.0
    correction_floor: float = 0.0
    off_policy_threshold: float | None = None
    normalize: Normalize = "sequences"
    baseline: Baseline = "mean"
    scale: Scale = "std"
    key: str = field(init=False, repr=False, compare=False)
    """All fields as one string: how a configuration passes through an operator of torch.library."""

    def __post_init__(self) -> None:
        """Refuse values that no formula is defined for, and those that would be ignored."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} = {getattr(self, name)!r}, must be one of {', '.join(get_args(choices))}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low = {self.clip_low}, must be from 0 to 1")
        if self.surrogate == "cispo":
            if not (self.clip_high > -1 and 1 + self.clip_high >= 1 - self.clip_low):
                raise ValueError(f"clip_high = {self.clip_high}, must be above -1 and at least -clip_low")
        elif not self.clip_high >= 0:
            raise ValueError(f"clip_high = {self.clip_high}, must be at least 0")
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ValueError(f"delta = {self.delta}, must be above 1 + clip_high = {1 + self.clip_high}")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef = {self.kl_coef}, must be at least 0 and finite")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef = {self.entropy_coef}, must be finite")
        for name in ("sapo_temperature_positive", "sapo_temperature_negative"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}, must be above 0")
        if not 0 <= self.correction_floor < self.correction_cap:
            raise ValueError(
                f"correction_floor = {self.correction_floor} and correction_cap = {self.correction_cap}: "
                "must be 0 <= floor < cap"
            )
        if self.off_policy_threshold is not None and not self.off_policy_threshold >= 0:
            raise ValueError(f"off_policy_threshold = {self.off_policy_threshold}, must be at least 0")
        self._refuse_unread()
        object.__setattr__(self, "key", json.dumps({f.name: getattr(self, f.name) for f in fields(self) if f.init}))

    def _refuse_unread(self) -> None:
        unread = []
        if self.surrogate != "clip":
            unread += [("delta", f"surrogate = {self.surrogate!r}")]
        if self.surrogate != "sapo":
            reason = f"surrogate = {self.surrogate!r}"
            unread += [("sapo_temperature_positive", reason), ("sapo_temperature_negative", reason)]
        if self.correction == "none":
            reason = "correction = 'none'"
            unread += [("correction_level", reason), ("correction_cap", reason), ("correction_floor", reason)]
        if self.kl_coef == 0:
            unread += [("kl_bias_correction", "kl_coef = 0")]
        defaults = {f.name: f.default for f in fields(self)}
        for name, reason in unread:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} = {getattr(self, name)!r} isn't read with {reason}: leave it out")

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


@lru_cache(maxsize=256)
def config_of(key: str) -> LossConfig:
    """The configuration whose `key` this is."""
    return LossConfig(**json.loads(key))


_CHOICES: dict[str, Any] = {
    "surrogate": Surrogate,
    "ratio_level": Level,
    "kl_estimator": KLEstimator,
    "correction": Correction,
    "correction_level": Level,
    "normalize": Normalize,
    "baseline": Baseline,
    "scale": Scale,
}

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
    # arXiv 2506.13585: clips the weight and not the update, so that no token loses its gradient. The cap of 5 is
    # that of arXiv 2510.13786.
    "cispo": {"surrogate": "cispo", "normalize": "tokens", "clip_low": 1.0, "clip_high": 4.0},
    # arXiv 2507.18071: rewards are given to sequences, so the ratio and its clip are a sequence's too.
    "gspo": {"ratio_level": "sequence", "normalize": "sequences", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2511.20347: a soft gate in place of the clip, steeper for negative advantages.
    "sapo": {"surrogate": "sapo", "normalize": "sequences"},
}
