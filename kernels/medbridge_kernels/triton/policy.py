"""The policy terms in Triton: what of the loss has the size of its tokens, from log-probabilities and entropies.

One program per sequence, then one per metric to join what they left. The helpers stand in the order of `reference`,
whose maths they are; each term's derivative stands beside it.
"""

# Triton's kernels carry no types but tl.constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from medbridge_kernels.config import LossConfig
from medbridge_kernels.triton.launch import LAUNCHES, on_device

INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

SUMS = (
    "loss", "tokens", "clip_low", "clip_high", "ratio_mean", "ratio_max", "ratio_sum", "ratio_squares", "kl",
    "rollout_ratio_mean", "rollout_ratio_max", "rollout_ratio_sum", "rollout_ratio_squares", "rollout_kl", "corrected",
    "off_policy",
)  # fmt: skip
"""What a sequence leaves, one row each of [sums, sequences]. "ratio_sum" and "ratio_squares", also of the rollouts',
are relative to the largest; the mean comes of ratios as they are."""
LOSS = tl.constexpr(SUMS.index("loss"))
TOKENS = tl.constexpr(SUMS.index("tokens"))
CLIP_LOW = tl.constexpr(SUMS.index("clip_low"))
CLIP_HIGH = tl.constexpr(SUMS.index("clip_high"))
RATIO_MEAN = tl.constexpr(SUMS.index("ratio_mean"))
RATIO_MAX = tl.constexpr(SUMS.index("ratio_max"))
RATIO_SUM = tl.constexpr(SUMS.index("ratio_sum"))
RATIO_SQUARES = tl.constexpr(SUMS.index("ratio_squares"))
KL = tl.constexpr(SUMS.index("kl"))
ROLLOUT_RATIO_MEAN = tl.constexpr(SUMS.index("rollout_ratio_mean"))
ROLLOUT_RATIO_MAX = tl.constexpr(SUMS.index("rollout_ratio_max"))
ROLLOUT_RATIO_SUM = tl.constexpr(SUMS.index("rollout_ratio_sum"))
ROLLOUT_RATIO_SQUARES = tl.constexpr(SUMS.index("rollout_ratio_squares"))
ROLLOUT_KL = tl.constexpr(SUMS.index("rollout_kl"))
CORRECTED = tl.constexpr(SUMS.index("corrected"))
OFF_POLICY = tl.constexpr(SUMS.index("off_policy"))


class Choices(NamedTuple):
    """What of the configuration decides which code is compiled."""

    surrogate: str
    ratio_level: str
    kl_estimator: str
    kl_term: bool
    kl_bias: bool
    entropy_term: bool
    correction: str
    correction_level: str
    off_policy: bool
    normalize: str
    per_token: bool


class Limits(NamedTuple):
    """The numbers of the configuration."""

    ratio_low: float
    ratio_high: float
    delta: float
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float
    correction_floor: float
    correction_cap: float
    off_policy_threshold: float


class Tokens(NamedTuple):
    """Where the inputs of size [tokens] lie."""

    logprobs: Tensor | None
    entropy: Tensor | None
    keep: Tensor | None
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None


# --- tokens of a sequence ---


@triton.jit
def first_token(sequence_ids_ptr, n_tokens, sequence, PROBES: tl.constexpr):
    """Index of the first token whose sequence id is at least this: a search by PROBES points at a time."""
    low = 0
    span = n_tokens
    while span > 0:
        step = tl.cdiv(span, PROBES)
        offset = tl.arange(0, PROBES).to(tl.int64) * step
        ids = tl.load(sequence_ids_ptr + low + offset, mask=offset < span, other=sequence)
        below = tl.sum((ids < sequence).to(tl.int32), axis=0)
        # It lies behind the last probe that is below, and not behind the next one.
        passed = tl.maximum((below - 1) * step + 1, 0)
        span = tl.where(below > 0, tl.minimum(step - 1, span - passed), 0)
        low += passed
    return low


@triton.jit
def load_kept(pointer, index, kept):
    """Values in float32 of the tokens that count, 0 elsewhere."""
    return tl.load(pointer + index, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def load_keep(tokens, index, end):
    """Which tokens of a tile count."""
    kept = index < end
    if tokens.keep is not None:
        kept = kept & tl.load(tokens.keep + index, mask=kept, other=False)
    return kept


@triton.jit
def finite(x):
    """torch.nan_to_num: 0 for NaN, the largest float for infinities."""
    return tl.where(x == x, tl.clamp(x, -LARGEST, LARGEST), 0.0)


@triton.jit
def log_importance_ratio(logprob, tokens, index, kept):
    """logprob - old logprob."""
    if tokens.old is None:
        return logprob - logprob
    else:
        return logprob - load_kept(tokens.old, index, kept)


# --- the terms, and their derivatives ---


@triton.jit
def surrogate(ratio, logprob, advantage, limits, CHOICES: tl.constexpr):
    """The policy term, and its derivatives by the log-ratio and by the log-probability itself."""
    clipped = tl.clamp(ratio, limits.ratio_low, limits.ratio_high, propagate_nan=tl.PropagateNan.ALL)
    none = tl.full(ratio.shape, 0.0, tl.float32)
    if CHOICES.surrogate == "cispo":
        return -clipped * advantage * logprob, none, -clipped * advantage
    elif CHOICES.surrogate == "sapo":
        tau = tl.where(advantage > 0.0, limits.tau_positive, limits.tau_negative)
        gate = tl.sigmoid(tau * (ratio - 1.0))
        return -gate * 4.0 / tau * advantage, -4.0 * gate * (1.0 - gate) * advantage * ratio, none
    else:
        free = tl.minimum(ratio, limits.delta, propagate_nan=tl.PropagateNan.ALL)
        term = tl.minimum(free * advantage, clipped * advantage, propagate_nan=tl.PropagateNan.ALL)
        flat = (free * advantage > clipped * advantage) | (ratio > limits.delta)
        return -term, tl.where(flat, 0.0, -ratio * advantage), none


@triton.jit
def exponential_remainder(x):
    """exp(x) - 1 - x without cancellation: Taylor's series, up to 1 its error is below float32's rounding."""
    series = 1.0 / 6227020800.0
    series = series * x + 1.0 / 479001600.0
    series = series * x + 1.0 / 39916800.0
    series = series * x + 1.0 / 3628800.0
    series = series * x + 1.0 / 362880.0
    series = series * x + 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 1.0, series * x * x, tl.exp(x) - 1.0 - x)


@triton.jit
def kl_estimate(logprob, ref, ESTIMATOR: tl.constexpr):
    """k1, k2 or k3, and its derivative by the log-probability."""
    d = logprob - ref
    if ESTIMATOR == "k1":
        return d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        return d * d / 2.0, d
    else:
        remainder = exponential_remainder(-d)
        return remainder, d - remainder  # 1 - exp(-d)


@triton.jit
def rollout_log_ratio(logprob, tokens, index, kept):
    """old logprob - rollout logprob; 0 where the engine gave none."""
    old = logprob
    if tokens.old is not None:
        old = load_kept(tokens.old, index, kept)
    return finite(old - load_kept(tokens.rollout, index, kept))


@triton.jit
def drift(logprob, tokens, index, kept):
    """rollout logprob - logprob, or old - logprob where there is no rollout: what the off-policy mask looks at."""
    if tokens.rollout is not None:
        return finite(load_kept(tokens.rollout, index, kept) - logprob)
    elif tokens.old is not None:
        return finite(load_kept(tokens.old, index, kept) - logprob)
    else:
        return tl.full(logprob.shape, -INFINITY, tl.float32)


@triton.jit
def corrected_weight(q, limits, CORRECTION: tl.constexpr):
    """The factor that the importance correction makes of q, and whether it cuts it."""
    outside = (q > limits.correction_cap) | (q < limits.correction_floor)
    if CORRECTION == "truncate":
        return tl.clamp(q, limits.correction_floor, limits.correction_cap), outside
    else:
        return tl.where(outside, 0.0, q), outside


@triton.jit
def max_or_nan(values):
    """The largest; NaN if there is one."""
    nans = tl.sum((values != values).to(tl.int32), axis=0)
    return tl.where(nans > 0, float("nan"), tl.max(values, axis=0))


@triton.jit(do_not_specialize=["n_tokens", "n_sequences"])
def policy_terms_kernel(
    tokens,
    sequence_ids_ptr,
    n_tokens,
    n_sequences,
    advantages_ptr,
    limits,
    normalizer,
    normalizer_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    sums_ptr,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The terms of one sequence: derivatives of its tokens, and its sums for loss and metrics."""
    sequence = tl.program_id(0).to(tl.int64)
    start = first_token(sequence_ids_ptr, n_tokens, sequence, TILE)
    end = first_token(sequence_ids_ptr, n_tokens, sequence + 1, TILE)
    lane = tl.arange(0, TILE)
    zero = tl.full((TILE,), 0.0, tl.float32)

    # What all tokens of the sequence need: its length, and sums and largest of its log-ratios.
    length = zero
    log_ratio_sum = zero
    log_ratio_max = zero - INFINITY
    rollout_sum = zero
    rollout_max = zero - INFINITY
    drift_sum = zero
    for first in range(start, end, TILE):
        index = first + lane
        kept = load_keep(tokens, index, end)
        logprob = load_kept(tokens.logprobs, index, kept)
        log_ratio = log_importance_ratio(logprob, tokens, index, kept)
        length += kept.to(tl.float32)
        log_ratio_sum += tl.where(kept, log_ratio, 0.0)
        log_ratio_max = tl.maximum(
            log_ratio_max, tl.where(kept, log_ratio, -INFINITY), propagate_nan=tl.PropagateNan.ALL
        )
        if tokens.rollout is not None:
            rollout = rollout_log_ratio(logprob, tokens, index, kept)
            rollout_sum += tl.where(kept, rollout, 0.0)
            rollout_max = tl.maximum(rollout_max, tl.where(kept, rollout, -INFINITY))
        if CHOICES.off_policy:
            drift_sum += tl.where(kept, drift(logprob, tokens, index, kept), 0.0)
    n_kept = tl.sum(length, axis=0)
    divisor = tl.maximum(n_kept, 1.0)
    mean_log_ratio = tl.sum(log_ratio_sum, axis=0) / divisor
    if CHOICES.ratio_level == "sequence":
        ratio_max = tl.where(n_kept > 0.0, tl.exp(mean_log_ratio), 0.0)
    else:
        ratio_max = tl.exp(max_or_nan(log_ratio_max))
    rollout_log_sum = tl.sum(rollout_sum, axis=0)
    rollout_ratio_max = tl.exp(tl.max(rollout_max, axis=0))
    near = tl.where(tl.sum(drift_sum, axis=0) / divisor <= limits.off_policy_threshold, 1.0, 0.0)

    sums_ptr += sequence
    tl.store(sums_ptr + TOKENS * n_sequences, n_kept)
    tl.store(sums_ptr + RATIO_MAX * n_sequences, ratio_max)
    tl.store(sums_ptr + ROLLOUT_RATIO_MAX * n_sequences, rollout_ratio_max)

    if normalizer_ptr is not None:
        normalizer = tl.load(normalizer_ptr).to(tl.float32)
    weight = 1.0 / normalizer
    if CHOICES.normalize == "sequences":
        weight = 1.0 / divisor / normalizer
    sequence_advantage = 0.0
    if not CHOICES.per_token:
        sequence_advantage = tl.load(advantages_ptr + sequence).to(tl.float32)

    # A token of no sequence has no advantage: better no loss at all than one without it.
    stray = ((sequence == 0) & (start > 0)) | ((sequence == n_sequences - 1) & (end < n_tokens))
    loss = zero + tl.where(stray, float("nan"), 0.0)
    by_log_ratio_sum = zero
    clip_low = zero
    clip_high = zero
    ratio_mean = zero
    ratio_sum = zero
    ratio_squares = zero
    kl_sum = zero
    rollout_ratio_sum = zero
    rollout_relative_sum = zero
    rollout_squares = zero
    rollout_kl = zero
    corrected = zero
    off_policy = zero
    for first in range(start, end, TILE):
        index = first + lane
        kept = load_keep(tokens, index, end)
        logprob = load_kept(tokens.logprobs, index, kept)
        if CHOICES.ratio_level == "sequence":
            ratio = tl.exp(zero + mean_log_ratio)
        else:
            ratio = tl.exp(log_importance_ratio(logprob, tokens, index, kept))
        if CHOICES.per_token:
            advantage = load_kept(advantages_ptr, index, kept)
        else:
            advantage = tl.where(kept, sequence_advantage, 0.0)

        term, by_log_ratio, by_logprob = surrogate(ratio, logprob, advantage, limits, CHOICES)
        if tokens.rollout is not None:
            log_q = rollout_log_ratio(logprob, tokens, index, kept)
            rollout_ratio = tl.exp(log_q)
            relative = tl.where(kept, rollout_ratio / tl.maximum(rollout_ratio_max, TINY), 0.0)
            rollout_ratio_sum += tl.where(kept, rollout_ratio, 0.0)
            rollout_relative_sum += relative
            rollout_squares += relative * relative
            rollout_kl += tl.where(kept, exponential_remainder(log_q), 0.0)
        if CHOICES.correction != "none":
            q = tl.exp(zero + rollout_log_sum) if CHOICES.correction_level == "sequence" else rollout_ratio
            factor, outside = corrected_weight(q, limits, CHOICES.correction)
            term *= factor
            by_log_ratio *= factor
            by_logprob *= factor
            corrected += (kept & outside).to(tl.float32)
        if CHOICES.off_policy:
            on_policy = tl.where(advantage >= 0.0, 1.0, near)
            term *= on_policy
            by_log_ratio *= on_policy
            by_logprob *= on_policy
            off_policy += tl.where(kept, 1.0 - on_policy, 0.0)
        if tokens.ref is not None:
            kl, kl_by_logprob = kl_estimate(logprob, load_kept(tokens.ref, index, kept), CHOICES.kl_estimator)
            if CHOICES.kl_bias:
                kl *= ratio
                kl_by_logprob *= ratio
                by_log_ratio += limits.kl_coef * kl
            kl_sum += tl.where(kept, kl, 0.0)
            if CHOICES.kl_term:
                term += limits.kl_coef * kl
                by_logprob += limits.kl_coef * kl_by_logprob
        if CHOICES.entropy_term:
            term -= limits.entropy_coef * load_kept(tokens.entropy, index, kept)
            by_entropy = tl.where(kept, -limits.entropy_coef * weight, 0.0)
            tl.store(grad_entropy_ptr + index, by_entropy, mask=index < end)

        loss += tl.where(kept, term * weight, 0.0)
        if CHOICES.ratio_level == "sequence":
            by_log_ratio_sum += tl.where(kept, by_log_ratio * weight, 0.0)
        else:
            by_logprob += by_log_ratio
        tl.store(grad_logprobs_ptr + index, tl.where(kept, by_logprob * weight, 0.0), mask=index < end)

        clip_low += (kept & (ratio < limits.ratio_low) & (advantage < 0.0)).to(tl.float32)
        clip_high += (kept & (ratio > limits.ratio_high) & (advantage > 0.0)).to(tl.float32)
        ratio_mean += tl.where(kept, ratio, 0.0)
        relative = tl.where(kept, ratio / tl.maximum(ratio_max, TINY), 0.0)
        ratio_sum += relative
        ratio_squares += relative * relative

    if CHOICES.ratio_level == "sequence":
        # The ratio's derivative is spread over the tokens whose mean it is of.
        share = tl.sum(by_log_ratio_sum, axis=0) / divisor
        tl.debug_barrier()
        for first in range(start, end, TILE):
            index = first + lane
            kept = load_keep(tokens, index, end)
            by_logprob = tl.load(grad_logprobs_ptr + index, mask=kept, other=0.0)
            tl.store(grad_logprobs_ptr + index, by_logprob + share, mask=kept)

    tl.store(sums_ptr + LOSS * n_sequences, tl.sum(loss, axis=0))
    tl.store(sums_ptr + CLIP_LOW * n_sequences, tl.sum(clip_low, axis=0))
    tl.store(sums_ptr + CLIP_HIGH * n_sequences, tl.sum(clip_high, axis=0))
    tl.store(sums_ptr + RATIO_MEAN * n_sequences, tl.sum(ratio_mean, axis=0))
    tl.store(sums_ptr + RATIO_SUM * n_sequences, tl.sum(ratio_sum, axis=0))
    tl.store(sums_ptr + RATIO_SQUARES * n_sequences, tl.sum(ratio_squares, axis=0))
    tl.store(sums_ptr + KL * n_sequences, tl.sum(kl_sum, axis=0))
    tl.store(sums_ptr + ROLLOUT_RATIO_MEAN * n_sequences, tl.sum(rollout_ratio_sum, axis=0))
    tl.store(sums_ptr + ROLLOUT_RATIO_SUM * n_sequences, tl.sum(rollout_relative_sum, axis=0))
    tl.store(sums_ptr + ROLLOUT_RATIO_SQUARES * n_sequences, tl.sum(rollout_squares, axis=0))
    tl.store(sums_ptr + ROLLOUT_KL * n_sequences, tl.sum(rollout_kl, axis=0))
    tl.store(sums_ptr + CORRECTED * n_sequences, tl.sum(corrected, axis=0))
    tl.store(sums_ptr + OFF_POLICY * n_sequences, tl.sum(off_policy, axis=0))


# --- the joint ---


@triton.jit
def row_sum(row_ptr, n_sequences, TILE: tl.constexpr):
    """Sum over the sequences, always in the same order."""
    total = tl.full((TILE,), 0.0, tl.float64)
    for first in range(0, n_sequences, TILE):
        index = first + tl.arange(0, TILE)
        total += tl.load(row_ptr + index, mask=index < n_sequences, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def row_max(row_ptr, n_sequences, TILE: tl.constexpr):
    """Largest over the sequences, at least 0."""
    largest = tl.full((TILE,), 0.0, tl.float32)
    for first in range(0, n_sequences, TILE):
        index = first + tl.arange(0, TILE)
        value = tl.load(row_ptr + index, mask=index < n_sequences, other=0.0)
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    return max_or_nan(largest)


@triton.jit
def effective_sample_size(max_ptr, sum_ptr, squares_ptr, n_sequences, count, TILE: tl.constexpr):
    """(sum r)^2 / (count sum r^2) of ratios r whose sums are relative to the largest of their sequence."""
    largest = tl.maximum(row_max(max_ptr, n_sequences, TILE), TINY)
    total = tl.full((TILE,), 0.0, tl.float64)
    squares = tl.full((TILE,), 0.0, tl.float64)
    for first in range(0, n_sequences, TILE):
        index = first + tl.arange(0, TILE)
        here = index < n_sequences
        scale = (tl.load(max_ptr + index, mask=here, other=0.0) / largest).to(tl.float64)
        total += scale * tl.load(sum_ptr + index, mask=here, other=0.0)
        squares += scale * scale * tl.load(squares_ptr + index, mask=here, other=0.0)
    total_all = tl.sum(total, axis=0)
    denominator = count * tl.sum(squares, axis=0)
    return total_all * total_all / tl.where(denominator < 1.0, 1.0, denominator)


@triton.jit(do_not_specialize=["n_sequences"])
def join_sums_kernel(sums_ptr, n_sequences, results_ptr, TILE: tl.constexpr):
    """One row of the sums, over all sequences."""
    row = tl.program_id(0)
    row_ptr = sums_ptr + row.to(tl.int64) * n_sequences
    if (row == RATIO_MAX) | (row == ROLLOUT_RATIO_MAX):
        result = row_max(row_ptr, n_sequences, TILE).to(tl.float64)
    else:
        count = tl.maximum(row_sum(sums_ptr + TOKENS * n_sequences, n_sequences, TILE), 1.0)
        if (row == RATIO_SUM) | (row == ROLLOUT_RATIO_SUM):
            result = effective_sample_size(
                row_ptr - n_sequences, row_ptr, row_ptr + n_sequences, n_sequences, count, TILE
            )
        else:
            result = row_sum(row_ptr, n_sequences, TILE)
            if row != LOSS:
                result = result / count
    tl.store(results_ptr + row, result.to(tl.float32))


def policy_terms(
    logprobs: Tensor,
    entropy: Tensor,
    sequence_ids: Tensor,
    n_sequences: int,
    advantages: Tensor,
    per_token: bool,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    keep: Tensor | None,
    normalizer: float | Tensor | None,
    config: LossConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and metrics from log-probabilities and entropies, as `reference.policy_terms`, and the loss's derivatives.

    Sequence ids that don't rise from 0 to `n_sequences` - 1, which can't be checked on a GPU without waiting for it,
    make the loss or derivatives NaN.

    Args:
        logprobs, entropy: float32 [tokens].
        keep: bool [tokens]; None: all.
        normalizer: None: the counts of this call.
        the rest: see `reference.PolicyInputs`.

    Returns:
        The loss; its derivatives by log-probability and, empty without an entropy term, by entropy, [tokens]; the
        metrics in the order of `reference.loss_metrics`.
    """
    tokens = Tokens(*(
        None if tensor is None else tensor.contiguous()
        for tensor in (
            logprobs, entropy if config.entropy_coef != 0 else None, keep, old_logprobs, ref_logprobs, rollout_logprobs
        )
    ))  # fmt: skip
    by_logprob = torch.full_like(logprobs, float("nan"))
    by_entropy = torch.full_like(logprobs, float("nan")) if config.entropy_coef != 0 else logprobs.new_empty(0)
    sums = logprobs.new_empty(len(SUMS), n_sequences)
    results = logprobs.new_empty(len(SUMS))
    if normalizer is None:
        normalizer = _count(sequence_ids, n_sequences, per_token, keep, config)
    terms, join = LAUNCHES["policy_terms", 4], LAUNCHES["policy_sums", 4]
    with on_device(logprobs):
        if n_sequences:
            policy_terms_kernel[(n_sequences,)](
                tokens, sequence_ids.contiguous(), logprobs.numel(), n_sequences, advantages.contiguous(),
                limits_of(config), 1.0 if isinstance(normalizer, Tensor) else float(normalizer),
                normalizer if isinstance(normalizer, Tensor) else None, by_logprob,
                by_entropy if config.entropy_coef != 0 else None, sums,
                CHOICES=choices_of(config, per_token), TILE=terms.tile, num_warps=terms.warps(),
            )  # fmt: skip
        join_sums_kernel[(len(SUMS),)](sums, n_sequences, results, TILE=join.tile, num_warps=join.warps())
    names = ["clip_low", "clip_high", "ratio_mean", "ratio_max", "ratio_sum"]
    if ref_logprobs is not None:
        names.append("kl")
    if rollout_logprobs is not None:
        names += ["rollout_ratio_mean", "rollout_ratio_max", "rollout_ratio_sum", "rollout_kl"]
    if config.correction != "none":
        names.append("corrected")
    if config.off_policy_threshold is not None:
        names.append("off_policy")
    metrics = torch.stack([results[SUMS.index(name)] for name in names])
    return results[LOSS.value], by_logprob, by_entropy, metrics


def choices_of(config: LossConfig, per_token: bool) -> Choices:
    """What of a configuration is compiled in."""
    return Choices(
        surrogate=config.surrogate,
        ratio_level=config.ratio_level,
        kl_estimator=config.kl_estimator,
        kl_term=config.kl_coef != 0,
        kl_bias=config.kl_bias_correction,
        entropy_term=config.entropy_coef != 0,
        correction=config.correction,
        correction_level=config.correction_level,
        off_policy=config.off_policy_threshold is not None,
        normalize="sequences" if config.normalize == "sequences" else "total",
        per_token=per_token,
    )


def limits_of(config: LossConfig) -> Limits:
    """The numbers of a configuration; no limit is infinity."""
    unlimited = float("inf")
    return Limits(
        ratio_low=1 - config.clip_low,
        ratio_high=1 + config.clip_high,
        delta=unlimited if config.delta is None else config.delta,
        tau_positive=config.sapo_temperature_positive,
        tau_negative=config.sapo_temperature_negative,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        correction_floor=config.correction_floor,
        correction_cap=config.correction_cap,
        off_policy_threshold=unlimited if config.off_policy_threshold is None else config.off_policy_threshold,
    )


def _count(
    sequence_ids: Tensor, n_sequences: int, per_token: bool, keep: Tensor | None, config: LossConfig
) -> float | Tensor:
    """The normalizer of `reference.token_weights` where the caller gives none."""
    if config.normalize == "tokens":
        return max(1, sequence_ids.numel()) if keep is None else keep.sum().clamp(min=1)
    if not per_token:
        return max(1, n_sequences)
    return sequence_ids.diff().ne(0).sum() + 1
