"""The definitions: group advantage, log-probability, entropy and the GRPO loss in plain torch, right in
float64.

The only place where this maths is written down. Fast back ends are tested against it; it isn't tuned for
speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medbridge_kernels.config import Baseline, KLEstimator, LossConfig, Scale

_CHUNK_BYTES = 64 << 20
"""Without gradients, logits are read in blocks of rows whose float copy has about this size."""


# --- group advantage ---


@torch.no_grad()
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
    # Not z - logsumexp(z): the rounding of a large sum would be an error of all of the row's probabilities. Nor is the
    # entropy lse - sum_j p_j z_j, whose two halves cancel where the distribution is peaked. A token that is ruled out
    # (logit -inf) adds 0 to it and to its gradient, not -inf * 0.
    all_logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(torch.exp(all_logprobs) * all_logprobs.masked_fill(all_logprobs == -torch.inf, 0.0)).sum(dim=-1)
    return _of_labels(all_logprobs, token_ids), entropy


def _of_labels(values: Tensor, token_ids: Tensor) -> Tensor:
    """The value of each label, [...]."""
    return values.gather(-1, token_ids[..., None]).squeeze(-1)


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
    logprobs = _of_labels(torch.log_softmax(z, dim=-1), token_ids)
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
            logprobs[part] = _of_labels(torch.log_softmax(z, dim=-1), ids[part])
        else:
            logprobs[part], entropies[part] = logprobs_and_entropy(z, ids[part])
    shape = token_ids.shape
    return logprobs.reshape(shape), None if entropies is None else entropies.reshape(shape)


# --- the loss: everything of size [tokens] ---


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What the loss needs beside log-probabilities and entropy.

    Attributes:
        sequence_ids: int64 [tokens], never decreasing, each from 0 to n_sequences - 1.
        n_sequences: how many sequences there may be.
        advantages: [n_sequences], or [tokens] where `per_token`.
        old_logprobs, ref_logprobs, rollout_logprobs: [tokens] or None. A NaN among the last says that the engine gave
            none; its ratio is then 1.
        keep: bool [tokens], the tokens that count. Everything of the others may hold any value.
    """

    sequence_ids: Tensor
    n_sequences: int
    advantages: Tensor
    per_token: bool
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    keep: Tensor

    def rows(self, part: slice) -> PolicyInputs:
        """The same of a range of tokens."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[part]

        return replace(
            self,
            sequence_ids=self.sequence_ids[part],
            advantages=self.advantages[part] if self.per_token else self.advantages,
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
            rollout_logprobs=cut(self.rollout_logprobs),
            keep=self.keep[part],
        )

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence's tokens, [n_sequences]."""
        return values.new_zeros(self.n_sequences).index_add_(0, self.sequence_ids, values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Means over each sequence's tokens that count, given back to each of its tokens, [tokens]."""
        length = self.sequence_sum(self.keep.to(values.dtype)).clamp(min=1)
        return (self.sequence_sum(values.where(self.keep, 0.0)) / length)[self.sequence_ids]

    def advantage(self, dtype: torch.dtype) -> Tensor:
        """The advantage of each token, [tokens]."""
        advantages = self.advantages.to(dtype)
        return (advantages if self.per_token else advantages[self.sequence_ids]).where(self.keep, 0.0)


def importance_ratio(logprobs: Tensor, inputs: PolicyInputs, config: LossConfig) -> Tensor:
    """exp(logprob - old logprob), [tokens]; at the sequence level of the mean over the sequence (GSPO)."""
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs.to(logprobs.dtype)
    log_ratio = (logprobs - old).where(inputs.keep, 0.0)
    if config.ratio_level == "sequence":
        log_ratio = inputs.sequence_mean(log_ratio)
    return torch.exp(log_ratio)


def surrogate(ratio: Tensor, logprobs: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """The policy term of each token, [tokens]; see `LossConfig`."""
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.surrogate == "cispo":
        return -clipped.detach() * advantage * logprobs
    if config.surrogate == "sapo":
        positive, negative = config.sapo_temperature_positive, config.sapo_temperature_negative
        tau = torch.where(advantage > 0, positive, negative).to(ratio.dtype)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    free = ratio if config.delta is None else ratio.clamp(max=config.delta)
    free, clipped = free * advantage, clipped * advantage
    # Not torch.minimum, which shares a tie's gradient between both: on policy, where they tie, it is the free term's.
    return -torch.where(free <= clipped, free, clipped)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own samples (Schulman's k1, k2, k3)."""
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d


def kl_term(ratio: Tensor, logprobs: Tensor, inputs: PolicyInputs, config: LossConfig) -> Tensor:
    """The KL estimate of each token as the loss has it, [tokens]."""
    assert inputs.ref_logprobs is not None
    ref = inputs.ref_logprobs.to(logprobs.dtype).where(inputs.keep, 0.0)
    estimate = kl_estimate(logprobs, ref, config.kl_estimator)
    return estimate * ratio if config.kl_bias_correction else estimate


def rollout_log_ratio(logprobs: Tensor, inputs: PolicyInputs) -> Tensor:
    """old logprob - rollout logprob, [tokens]: how far the trainer's sampling policy is from the engine's."""
    assert inputs.rollout_logprobs is not None
    old = logprobs if inputs.old_logprobs is None else inputs.old_logprobs.to(logprobs.dtype)
    return (old - inputs.rollout_logprobs.to(logprobs.dtype)).where(inputs.keep, 0.0).nan_to_num(nan=0.0)


def correction_ratio(logprobs: Tensor, inputs: PolicyInputs, config: LossConfig) -> Tensor:
    """q of the importance correction before it is truncated or masked, [tokens]."""
    log_ratio = rollout_log_ratio(logprobs, inputs)
    if config.correction_level == "sequence":
        log_ratio = inputs.sequence_sum(log_ratio)[inputs.sequence_ids]
    return torch.exp(log_ratio)


def corrected_weight(ratio: Tensor, config: LossConfig) -> Tensor:
    """The factor of the surrogate that the correction makes of q, [tokens]."""
    if config.correction == "truncate":
        return ratio.clamp(config.correction_floor, config.correction_cap)
    inside = (ratio >= config.correction_floor) & (ratio <= config.correction_cap)
    return ratio.where(inside, 0.0)


def on_policy(logprobs: Tensor, inputs: PolicyInputs, config: LossConfig) -> Tensor:
    """Which tokens the off-policy mask keeps, bool [tokens] (arXiv 2512.02556, equation 9)."""
    sampled = inputs.old_logprobs if inputs.rollout_logprobs is None else inputs.rollout_logprobs
    if sampled is None:
        return torch.ones_like(inputs.keep)
    assert config.off_policy_threshold is not None
    drift = (sampled.to(logprobs.dtype) - logprobs).nan_to_num(nan=0.0)
    return (inputs.advantage(logprobs.dtype) >= 0) | (inputs.sequence_mean(drift) <= config.off_policy_threshold)


def surrogate_factor(logprobs: Tensor, inputs: PolicyInputs, config: LossConfig) -> Tensor | None:
    """What the surrogate is multiplied by, [tokens] without a gradient: correction and off-policy mask."""
    logprobs = logprobs.detach()
    factor = None
    if config.correction != "none":
        factor = corrected_weight(correction_ratio(logprobs, inputs, config), config)
    if config.off_policy_threshold is not None:
        kept = on_policy(logprobs, inputs, config).to(logprobs.dtype)
        factor = kept if factor is None else factor * kept
    return factor


def token_weights(
    inputs: PolicyInputs, normalizer: float | Tensor | None, config: LossConfig, dtype: torch.dtype
) -> Tensor:
    """Weight of each token in the sum, [tokens]: the mask over the normalizer.

    For "sequences" also over the sequence's own length.
    """
    mask = inputs.keep.to(dtype)
    if normalizer is None:
        normalizer = mask.sum().clamp(min=1) if config.normalize == "tokens" else _count_sequences(inputs)
    if config.normalize == "sequences":
        mask = mask / inputs.sequence_sum(mask).clamp(min=1)[inputs.sequence_ids]
    return mask / normalizer


def _count_sequences(inputs: PolicyInputs) -> float | Tensor:
    if not inputs.per_token:
        return max(1, inputs.n_sequences)
    starts = inputs.sequence_ids.diff().ne(0).sum() + 1  # advantages per token don't say how many sequences there are
    return starts.clamp(min=1)


def weighted_loss(
    logprobs: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    inputs: PolicyInputs,
    config: LossConfig,
) -> Tensor:
    """sum_t w_t (factor_t surrogate_t + kl_coef KL_t - entropy_coef H_t), a scalar."""
    per_token = surrogate(ratio, logprobs, inputs.advantage(logprobs.dtype), config)
    if factor is not None:
        per_token = per_token * factor
    if config.kl_coef != 0:
        per_token = per_token + config.kl_coef * kl_term(ratio, logprobs, inputs, config)
    if config.entropy_coef != 0:
        per_token = per_token - config.entropy_coef * entropy
    return (per_token * weight).sum()


def policy_terms(
    logprobs: Tensor, entropy: Tensor, inputs: PolicyInputs, config: LossConfig, normalizer: float | Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics from log-probabilities and entropies [tokens], which are 0 outside `keep`."""
    ratio = importance_ratio(logprobs, inputs, config)
    factor = surrogate_factor(logprobs, inputs, config)
    weight = token_weights(inputs, normalizer, config, logprobs.dtype)
    loss = weighted_loss(logprobs, entropy, ratio, factor, weight, inputs, config)
    return loss, loss_metrics(logprobs.detach(), inputs, config)


def loss_metrics(logprobs: Tensor, inputs: PolicyInputs, config: LossConfig) -> dict[str, Tensor]:
    """What a trainer watches, as scalars on the device of the logits; of no token at all, 0."""
    keep, dtype = inputs.keep, logprobs.dtype
    count = keep.to(dtype).sum().clamp(min=1)

    def share(chosen: Tensor) -> Tensor:
        return (chosen & keep).to(dtype).sum() / count

    ratio, advantage = importance_ratio(logprobs, inputs, config), inputs.advantage(dtype)
    kept = ratio.where(keep, 0.0)
    ratio_max, sample_size = _spread(kept, count)
    metrics = {
        "clip_low": share((ratio < 1 - config.clip_low) & (advantage < 0)),
        "clip_high": share((ratio > 1 + config.clip_high) & (advantage > 0)),
        "ratio_mean": kept.sum() / count,
        "ratio_max": ratio_max,
        "effective_sample_size": sample_size,
    }
    if inputs.ref_logprobs is not None:
        metrics["kl"] = kl_term(ratio, logprobs, inputs, config).where(keep, 0.0).sum() / count
    if inputs.rollout_logprobs is not None:
        log_ratio = rollout_log_ratio(logprobs, inputs)
        ratio = torch.exp(log_ratio).where(keep, 0.0)
        metrics["rollout_ratio_mean"] = ratio.sum() / count
        metrics["rollout_ratio_max"], metrics["rollout_effective_sample_size"] = _spread(ratio, count)
        # Sampled by the engine, so this is k3 of KL(engine || trainer).
        metrics["rollout_kl"] = (torch.expm1(log_ratio) - log_ratio).where(keep, 0.0).sum() / count
    if config.correction != "none":
        q = correction_ratio(logprobs, inputs, config)
        metrics["corrected"] = share((q > config.correction_cap) | (q < config.correction_floor))
    if config.off_policy_threshold is not None:
        metrics["off_policy"] = share(~on_policy(logprobs, inputs, config))
    return metrics


def _spread(kept: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Largest ratio, and the effective sample size as a share: (sum r)^2 / (count * sum r^2).

    It is 1 while all ratios are equal and 1 / count when a single token has all the weight.
    """
    largest = kept.amax() if kept.numel() else kept.sum()
    relative = kept / largest.clamp(min=torch.finfo(kept.dtype).tiny)  # its square can't overflow
    return largest, relative.sum().square() / (count * relative.square().sum()).clamp(min=1.0)


# --- the whole ---


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    inputs: PolicyInputs,
    masked: bool,
    temperature: float | Tensor,
    config: LossConfig,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, log-probabilities, entropy and metrics; see `medbridge_kernels.grpo_loss`.

    `masked` says whether `keep` may hold a False.
    """
    # Tokens outside the mask may carry any label (-100 is customary), any logits and any log-probability.
    if masked:
        logits = logits.masked_fill(~inputs.keep[:, None], 0.0)
    logprobs, entropy = token_logprobs(
        logits, token_ids.where(inputs.keep, 0), temperature, entropy=True, entropy_grad=config.entropy_coef != 0
    )
    assert entropy is not None
    logprobs, entropy = logprobs.where(inputs.keep, 0.0), entropy.where(inputs.keep, 0.0)
    loss, metrics = policy_terms(logprobs, entropy, inputs, config, normalizer)
    return loss, logprobs.detach(), entropy.detach(), metrics


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, banned_ids: Tensor | None
) -> Tensor:
    """Logits of hidden states, [tokens, vocab].

    ``scale (hidden weight^T + bias)``, soft-capped to ``softcap tanh(logits / softcap)``, and -inf at banned tokens.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if banned_ids is not None:
        logits = logits.index_fill(-1, banned_ids, float("-inf"))
    return logits
