"""The GRPO loss from logits of packed rows: checks the input and picks the back end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medbridge_kernels import ops, reference
from medbridge_kernels.advantages import group_advantages
from medbridge_kernels.config import Level, LossConfig
from medbridge_kernels.impl import Impl, choose
from medbridge_kernels.logprobs import check_logits
from medbridge_kernels.reference import PolicyInputs


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """What the loss computed on its way, detached from the graph and on the device of the logits.

    Attributes:
        logprobs: log-probability of each token, [tokens], 0 outside the mask.
        entropy: entropy in nats of each token's distribution, [tokens], 0 outside the mask.
        metrics: scalars over the tokens in the mask: "clip_low" and "clip_high" (share of tokens whose ratio
            is cut, by the sign of the advantage), "ratio_mean", "ratio_max", "effective_sample_size" (of the
            ratios, as a share of the tokens, 0 to 1); with reference log-probabilities "kl" (mean of the configured
            estimator); with rollout log-probabilities "rollout_ratio_mean", "rollout_ratio_max",
            "rollout_effective_sample_size" (of old over rollout probability) and "rollout_kl" (k3 of
            KL(engine || trainer)); with a correction "corrected" (share of tokens whose ratio it truncates or masks);
            with an off-policy threshold "off_policy" (share of tokens left out).
    """

    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    *,
    sequence_ids: Tensor,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_offsets: Tensor | None = None,
    advantage_level: Level = "sequence",
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: LossConfig,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, LossOutputs]:
    """Policy loss over packed completion tokens, ``sum_t w_t loss_t / normalizer``.

    With the surrogate of `config` (see `LossConfig`), and f_t the importance correction and off-policy mask::

        loss_t = f_t surrogate_t + kl_coef KL_t - entropy_coef H_t

    w_t is the mask, divided by the number of the sequence's tokens in the mask for ``normalize="sequences"``.
    A step that is split into micro-batches of whole sequences gives each the same `normalizer`, the count of
    the whole step, and adds the losses up.

    With g = d loss / d logprob and h = d loss / d H of a token, p its distribution and T its temperature, the gradient
    is ``d loss / d logit_j = (g 1[j = token] - p_j (g + h (log p_j + H))) / T``. A row with g = h = 0 (outside the
    mask, or without advantage and with no KL or entropy term) is not read for it.

    Args:
        logits: floating point [tokens, vocab]; row t is the distribution of token t (already shifted). No
            padding. A logit of -inf rules a token out.
        token_ids: int64 [tokens]; outside the mask any value.
        sequence_ids: int64 [tokens], the row of `advantages` that each token belongs to; never decreasing.
        advantages: floating point [sequences], or [tokens] with ``advantage_level="token"``.
        rewards, group_offsets: in place of `advantages`: rewards [sequences] and offsets [groups + 1], from which
            `group_advantages` makes the advantages with the baseline and scale of `config`.
        advantage_level: what `advantages` has one value for.
        old_logprobs: [tokens], of the policy that sampled; None: the current one, so that the ratio is 1.
        ref_logprobs: [tokens], of the reference policy; needed where kl_coef is above 0, otherwise only for
            the metric.
        rollout_logprobs: [tokens], as the sampling engine reported them, NaN where it gave none; needed for a
            correction, read by the off-policy mask and the metrics.
        mask: bool, or integer 0 and 1, [tokens]; None: every token counts.
        temperature: of the policy, a number or [tokens].
        config: which loss.
        normalizer: number of tokens ("tokens") or sequences ("sequences") of the whole step, or the constant
            ("constant"), above 0. None: the counts of this call, where "sequences" counts the rows of `advantages`
            (the sequences that have a token, with advantages per token).
        inplace: the backward pass writes the gradient over the logits, which must not be needed any more: autograd
            refuses a second use, reading them by hand can't be seen. Under torch.compile the compiler plans the memory
            and this is not needed.
        impl: back end: "auto", "reference", "native" (CPU) or "triton" (GPU).

    Returns:
        The loss, a differentiable scalar in float32 (float64 for float64 logits), and the outputs.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that don't fit; not exactly one of advantages and rewards; a KL term without `ref_logprobs`,
            a correction without `rollout_logprobs`; "constant" without `normalizer`; sequence ids that decrease or
            have no advantage (seen for CPU tensors only: on a GPU the check would wait for the device); `inplace` for
            logits that are a leaf of the graph, or with the reference.
        NotImplementedError: a back end that isn't available.
    """
    chosen = choose(impl, logits)
    check_logits(logits, token_ids, temperature)
    if logits.ndim != 2:
        raise ValueError(f"logits must be packed rows [tokens, vocab], got shape {tuple(logits.shape)}")
    inputs = policy_inputs(
        token_ids, sequence_ids, advantages, rewards, group_offsets, advantage_level, old_logprobs, ref_logprobs,
        rollout_logprobs, mask, config, normalizer, impl,
    )  # fmt: skip
    masked = mask is not None
    if inplace:
        _check_inplace(logits, chosen)
    if chosen == "reference":
        loss, logprobs, entropy, metrics = reference.grpo_loss(
            logits, token_ids, inputs, masked, temperature, config, normalizer
        )
        return loss, LossOutputs(logprobs, entropy, metrics)
    logprobs, entropy, _ = ops.vocabulary_sweep(
        logits if logits.stride(-1) == 1 else logits.contiguous(), token_ids.contiguous(),
        inputs.keep if masked else None,
        *ops.split_temperature(temperature), True, config.entropy_coef != 0,
        inplace and not torch.compiler.is_compiling(), chosen,
    )  # fmt: skip
    loss, metrics = policy_loss(logprobs, entropy, inputs, masked, config, normalizer, chosen)
    return loss, LossOutputs(logprobs.detach(), entropy.detach(), metrics)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    inputs: PolicyInputs,
    masked: bool,
    config: LossConfig,
    normalizer: float | Tensor | None,
    chosen: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics from log-probabilities and entropies: in kernels on a GPU, in plain torch elsewhere."""
    if chosen == "triton":
        return ops.policy_loss(logprobs, entropy, inputs, masked, config, normalizer)
    return reference.policy_terms(logprobs, entropy, inputs, config, normalizer)


def policy_inputs(
    token_ids: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_offsets: Tensor | None,
    advantage_level: Level,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    mask: Tensor | None,
    config: LossConfig,
    normalizer: float | Tensor | None,
    impl: Impl,
) -> PolicyInputs:
    """Checks everything of a loss that has the size of its tokens, and makes advantages of rewards."""
    _check_rows(token_ids, sequence_ids, old_logprobs, ref_logprobs, rollout_logprobs, mask)
    _check_needs(config, ref_logprobs, rollout_logprobs, normalizer)
    advantages = _advantages(advantages, rewards, group_offsets, advantage_level, token_ids, config, impl)
    per_token = advantage_level == "token"
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_order(sequence_ids, None if per_token else advantages.numel())
    n_sequences = advantages.numel()
    if per_token and n_sequences:  # numbered anew: the numbers needn't start at 0 or be without gaps
        sequence_ids = torch.cat([sequence_ids.new_zeros(1), sequence_ids.diff().ne(0).long().cumsum(0)])
    return PolicyInputs(
        sequence_ids=sequence_ids,
        n_sequences=n_sequences,
        advantages=advantages,
        per_token=per_token,
        old_logprobs=None if old_logprobs is None else old_logprobs.detach(),
        ref_logprobs=None if ref_logprobs is None else ref_logprobs.detach(),
        rollout_logprobs=None if rollout_logprobs is None else rollout_logprobs.detach(),
        keep=torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool().contiguous(),
    )


def _check_rows(
    token_ids: Tensor,
    sequence_ids: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    mask: Tensor | None,
) -> None:
    if sequence_ids.dtype != torch.int64:
        raise TypeError(f"sequence_ids must be int64, got {sequence_ids.dtype}")
    logprobs = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs}
    for name, tensor in {"sequence_ids": sequence_ids, "mask": mask, **logprobs}.items():
        if tensor is not None and tensor.shape != token_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be [tokens] = {tuple(token_ids.shape)}")
    for name, tensor in logprobs.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        raise TypeError(f"mask must be bool or an integer 0 and 1, got {mask.dtype}: tokens can't be weighted by it")


def _check_needs(
    config: LossConfig,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    normalizer: float | Tensor | None,
) -> None:
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef = {config.kl_coef} needs ref_logprobs")
    if config.correction != "none" and rollout_logprobs is None:
        raise ValueError(f"correction = {config.correction!r} needs rollout_logprobs")
    if config.normalize == "constant" and normalizer is None:
        raise ValueError("normalize = 'constant' needs normalizer (Dr. GRPO: sequences times the longest completion)")
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise ValueError(f"normalizer = {normalizer}, must be above 0")


def _advantages(
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_offsets: Tensor | None,
    advantage_level: Level,
    token_ids: Tensor,
    config: LossConfig,
    impl: Impl,
) -> Tensor:
    if (advantages is None) == (rewards is None):
        given = "neither" if rewards is None else "both"
        raise ValueError(f"give either advantages or rewards with group_offsets, got {given}")
    if (rewards is None) != (group_offsets is None):
        raise ValueError("rewards and group_offsets go together, got one of them")
    if advantage_level not in ("sequence", "token"):
        raise ValueError(f"advantage_level = {advantage_level!r}, must be sequence or token")
    if rewards is not None and group_offsets is not None:
        if advantage_level == "token":
            raise ValueError("advantage_level = 'token' goes with advantages: rewards are of sequences")
        return group_advantages(rewards, group_offsets, **config.advantage_options(), impl=impl)
    assert advantages is not None
    if not advantages.is_floating_point():
        raise TypeError(f"advantages must be floating point, got {advantages.dtype}")
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be [sequences] or [tokens], got shape {tuple(advantages.shape)}")
    if advantage_level == "token" and advantages.shape != token_ids.shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, must be [tokens] = {tuple(token_ids.shape)} with "
            "advantage_level = 'token'"
        )
    return advantages.detach()


def _check_order(sequence_ids: Tensor, n_sequences: int | None) -> None:
    if not sequence_ids.numel():
        return
    falls = (sequence_ids.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0]) + 1
        raise ValueError(
            f"sequence_ids[{at}] = {int(sequence_ids[at])} after {int(sequence_ids[at - 1])}: they must not decrease"
        )
    first, last = int(sequence_ids[0]), int(sequence_ids[-1])
    if n_sequences is not None and (first < 0 or last >= n_sequences):
        raise ValueError(f"sequence_ids from {first} to {last}, must be from 0 to {n_sequences - 1} (advantages)")


def _check_inplace(logits: Tensor, chosen: str) -> None:
    if chosen == "reference":
        raise ValueError("inplace needs impl='native' or impl='triton': the reference can't write over its logits")
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace: the logits are a leaf of the graph, which would lose its values; give what a model made"
        )
    if logits.stride(-1) != 1:
        raise ValueError("inplace needs logits that are contiguous over the vocabulary")
    if len(logits) > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError("inplace needs logits whose rows don't overlap in memory")
