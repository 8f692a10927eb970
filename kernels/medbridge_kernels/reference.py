"""The definitions: group advantage, log-probability, entropy and the GRPO loss in plain torch, right in
float64.

The only place where this maths is written down. Fast back ends are tested against it; it isn't tuned for
speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medbridge_kernels.config import Baseline, KLEstimator, LossConfig, Scale

_CHUNK_BYTES = 64 << 20
"""Without gradients, logits are read in blocks of rows whose float copy has about this size."""


# --- group advantage ---


def group_advantages(
    rewards: Tensor, group_offsets: Tensor, baseline: Baseline, scale: Scale, unbiased: bool, eps: float
) -> Tensor:
    """Advantage of each sequence within its group; see `medbridge_kernels.group_advantages`."""
    n_groups = group_offsets.numel() - 1
    group = torch.repeat_interleave(
        torch.arange(n_groups, device=rewards.device), group_offsets.diff(), output_size=rewards.numel()
    )
    valid = ~rewards.isnan()
    # Rewards are few: float64 keeps the deviations of nearly equal rewards.
    reward = rewards.double().where(valid, 0.0)

    def group_sum(values: Tensor) -> Tensor:
        return reward.new_zeros(n_groups).index_add_(0, group, values)

    count = group_sum(valid.double())
    deviation, square_sum = _centred(reward, valid, group, n_groups)
    equal = _group_extreme(reward, valid, group, n_groups, "amax") == _group_extreme(
        reward, valid, group, n_groups, "amin"
    )

    advantage = reward
    if baseline != "none":
        advantage = deviation
        if baseline == "loo":  # r - mean of the others = (r - mean) * count / (count - 1)
            advantage = deviation * (count / (count - 1).clamp(min=1))[group]
    if scale == "std":
        variance = square_sum / (count - int(unbiased)).clamp(min=1)
        advantage = advantage / (variance.sqrt()[group] + eps)
    elif scale == "batch_std":
        one_group = torch.zeros_like(group)
        _, batch_square_sum = _centred(reward, valid, one_group, 1)
        variance = batch_square_sum / (valid.sum() - int(unbiased)).clamp(min=1)
        advantage = advantage / (variance.sqrt() + eps)
    if baseline != "none" or scale == "std":
        # (r - mean) / (std + eps) of equal rewards is rounding noise, not 0. A singleton is such a group.
        advantage = advantage.masked_fill(equal[group], 0.0)
    return advantage.where(valid, 0.0).to(rewards.dtype)


def _centred(reward: Tensor, valid: Tensor, group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Deviations from the group's mean [sequences] and the sums of their squares [groups], in two passes."""
    count = reward.new_zeros(n_groups).index_add_(0, group, valid.double()).clamp(min=1)
    deviation = reward
    for _ in range(2):  # the second pass takes out what rounding left of the mean
        mean = reward.new_zeros(n_groups).index_add_(0, group, deviation) / count
        deviation = (deviation - mean[group]).where(valid, 0.0)
    return deviation, reward.new_zeros(n_groups).index_add_(0, group, deviation.square())


def _group_extreme(reward: Tensor, valid: Tensor, group: Tensor, n_groups: int, which: str) -> Tensor:
    """Largest ("amax") or smallest ("amin") valid reward of each group; without any, 0 for both."""
    no_value = float("-inf") if which == "amax" else float("inf")
    start = reward.new_full((n_groups,), no_value)
    extreme = start.scatter_reduce(0, group, reward.masked_fill(~valid, no_value), which)
    return extreme.masked_fill(extreme == no_value, 0.0)


# --- log-probability and entropy ---


def scaled_logits(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits over temperature, in float32 at least: half precision can't hold a log-sum over a vocabulary."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, Tensor):
        return logits / temperature.to(logits.dtype)[..., None]
    return logits if temperature == 1.0 else logits / temperature


def logprobs_and_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """From scaled logits z [..., vocab]: ``z_label - lse(z)`` and ``-sum_j p_j log p_j``, each [...]."""
    lse = torch.logsumexp(logits, dim=-1)
    # Not lse - sum_j p_j z_j, whose two halves cancel where the distribution is peaked. A token that is ruled
    # out (logit -inf) adds 0 to the entropy, not -inf * 0.
    all_logprobs = logits - lse[..., None]
    entropy = -(torch.exp(all_logprobs) * all_logprobs.clamp(min=torch.finfo(logits.dtype).min)).sum(dim=-1)
    return label_logits(logits, token_ids) - lse, entropy


def label_logits(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The logit of each label, [...]."""
    return logits.gather(-1, token_ids[..., None]).squeeze(-1)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor, entropy: bool, entropy_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and, where asked for, entropies; see `medbridge_kernels.token_logprobs`.

    `entropy_grad=False` computes the entropy outside the graph, which then holds nothing for it.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _token_logprobs_in_blocks(logits, token_ids, temperature, entropy)
    z = scaled_logits(logits, temperature)
    if entropy and entropy_grad:
        return logprobs_and_entropy(z, token_ids)
    logprobs = label_logits(z, token_ids) - torch.logsumexp(z, dim=-1)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, _token_logprobs_in_blocks(logits, token_ids, temperature, entropy=True)[1]


def _token_logprobs_in_blocks(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    ids = token_ids.reshape(-1)
    per_row = temperature.reshape(-1) if isinstance(temperature, Tensor) else None
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(rows.shape[0], dtype=dtype, device=logits.device)
    entropies = torch.empty_like(logprobs) if entropy else None
    block = max(1, _CHUNK_BYTES // (dtype.itemsize * max(1, vocab)))
    for start in range(0, rows.shape[0], block):
        part = slice(start, start + block)
        z = scaled_logits(rows[part], temperature if per_row is None else per_row[part])
        if entropies is None:
            logprobs[part] = label_logits(z, ids[part]) - torch.logsumexp(z, dim=-1)
        else:
            logprobs[part], entropies[part] = logprobs_and_entropy(z, ids[part])
    shape = token_ids.shape
    return logprobs.reshape(shape), None if entropies is None else entropies.reshape(shape)


# --- the loss ---


def surrogate(ratio: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r at most delta in the first term."""
    free = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -torch.minimum(free * advantage, clipped * advantage)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own samples (Schulman's k1, k2, k3)."""
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d


def token_weights(mask: Tensor, sequence_ids: Tensor, n_sequences: int, config: LossConfig) -> Tensor:
    """Weight of each token in the sum, [tokens]: the mask, over the sequence's own length for "sequences"."""
    if config.normalize != "sequences":
        return mask
    length = mask.new_zeros(n_sequences).index_add_(0, sequence_ids, mask)
    return mask / length.clamp(min=1)[sequence_ids]


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    config: LossConfig,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, log-probabilities, entropy and metrics; see `medbridge_kernels.grpo_loss`."""
    keep = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
    # Tokens outside the mask may carry any label (-100 is customary) and any log-probability.
    logprobs, entropy = token_logprobs(
        logits, token_ids.where(keep, 0), temperature, entropy=True, entropy_grad=config.entropy_coef != 0
    )
    assert entropy is not None
    logprobs, entropy = logprobs.where(keep, 0.0), entropy.where(keep, 0.0)
    dtype = logprobs.dtype
    weight = keep.to(dtype)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.to(dtype).where(keep, 0.0)
    advantage = advantages.to(dtype)[sequence_ids]

    ratio = torch.exp(logprobs - old)
    per_token = surrogate(ratio, advantage, config)
    kl = None
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs.to(dtype).where(keep, 0.0), config.kl_estimator)
        if config.kl_coef != 0:
            per_token = per_token + config.kl_coef * kl
    if config.entropy_coef != 0:
        per_token = per_token - config.entropy_coef * entropy

    if normalizer is None:
        normalizer = weight.sum().clamp(min=1) if config.normalize == "tokens" else max(1, advantages.numel())
    loss = (per_token * token_weights(weight, sequence_ids, advantages.numel(), config)).sum() / normalizer
    metrics = loss_metrics(ratio.detach(), advantage, None if kl is None else kl.detach(), keep, config)
    return loss, logprobs.detach(), entropy.detach(), metrics


def loss_metrics(
    ratio: Tensor, advantage: Tensor, kl: Tensor | None, keep: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """What a trainer watches, as scalars on the device of the logits; of no token at all, 0."""
    weight = keep.to(ratio.dtype)
    count = weight.sum().clamp(min=1)
    kept = ratio * weight
    ratio_max = kept.amax() if kept.numel() else kept.sum()
    relative = kept / ratio_max.clamp(min=torch.finfo(kept.dtype).tiny)  # its square can't overflow
    low = (ratio < 1 - config.clip_low) & (advantage < 0) & keep
    high = (ratio > 1 + config.clip_high) & (advantage > 0) & keep
    metrics = {
        "clip_low": low.to(ratio.dtype).sum() / count,
        "clip_high": high.to(ratio.dtype).sum() / count,
        "ratio_max": ratio_max,
        # (sum r)^2 / (count * sum r^2): 1 while all ratios are equal, 1 / count when a single token has all
        # the weight.
        "effective_sample_size": relative.sum().square() / (count * relative.square().sum()).clamp(min=1.0),
    }
    if kl is not None:
        metrics["kl"] = (kl * weight).sum() / count
    return metrics
