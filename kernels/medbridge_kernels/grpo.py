"""The GRPO loss from logits of packed rows: checks the input and picks the back end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medbridge_kernels import reference
from medbridge_kernels.config import LossConfig
from medbridge_kernels.impl import Impl, choose
from medbridge_kernels.logprobs import check_logits


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """What the loss computed on its way, detached from the graph and on the device of the logits.

    Attributes:
        logprobs: log-probability of each token, [tokens], 0 outside the mask.
        entropy: entropy in nats of each token's distribution, [tokens], 0 outside the mask.
        metrics: scalars over the tokens in the mask: "clip_low" and "clip_high" (share of tokens whose ratio
            is cut, by the sign of the advantage), "ratio_max", "effective_sample_size" (of the ratios, as a
            share of the tokens, 0 to 1) and, with reference log-probabilities, "kl" (mean of the configured
            estimator).
    """

    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    *,
    sequence_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: LossConfig,
    normalizer: float | Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, LossOutputs]:
    """Clipped policy loss over packed completion tokens, ``sum_t w_t loss_t / normalizer``.

    With ratio r = exp(logprob - old logprob) and A the advantage of the token's sequence::

        loss_t = -min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)
                 + kl_coef KL_t - entropy_coef H_t

    w_t is the mask, divided by the number of the sequence's tokens in the mask for ``normalize="sequences"``.
    A step that is split into micro-batches of whole sequences gives each the same `normalizer`, the count of
    the whole step, and adds the losses up.

    Args:
        logits: floating point [tokens, vocab]; row t is the distribution of token t (already shifted). No
            padding.
        token_ids: int64 [tokens]; outside the mask any value.
        sequence_ids: int64 [tokens], the row of `advantages` that each token belongs to.
        advantages: floating point [sequences].
        old_logprobs: [tokens], of the policy that sampled; None: the current one, so that the ratio is 1.
        ref_logprobs: [tokens], of the reference policy; needed where kl_coef is above 0, otherwise only for
            the metric.
        mask: bool, or integer 0 and 1, [tokens]; None: every token counts.
        temperature: of the policy, a number or [tokens].
        config: which loss.
        normalizer: number of tokens ("tokens") or sequences ("sequences") of the whole step, or the constant
            ("constant"). None: the counts of this call, where "sequences" counts the rows of `advantages`.
        impl: back end; "auto" and "reference" are available.

    Returns:
        The loss, a differentiable scalar in float32 (float64 for float64 logits), and the outputs.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that don't fit; a KL term without `ref_logprobs`; "constant" without `normalizer`.
        NotImplementedError: a back end that isn't available.
    """
    choose(impl)
    check_logits(logits, token_ids, temperature)
    if logits.ndim != 2:
        raise ValueError(f"logits must be packed rows [tokens, vocab], got shape {tuple(logits.shape)}")
    if sequence_ids.dtype != torch.int64:
        raise TypeError(f"sequence_ids must be int64, got {sequence_ids.dtype}")
    per_token = {
        "sequence_ids": sequence_ids,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "mask": mask,
    }
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != token_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be [tokens] = {tuple(token_ids.shape)}")
    for name, tensor in (
        ("advantages", advantages),
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
    ):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        raise TypeError(f"mask must be bool or an integer 0 and 1, got {mask.dtype}: tokens can't be weighted by it")
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be [sequences], got shape {tuple(advantages.shape)}")
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef = {config.kl_coef} needs ref_logprobs")
    if config.normalize == "constant" and normalizer is None:
        raise ValueError("normalize = 'constant' needs normalizer (Dr. GRPO: sequences times the longest completion)")
    loss, logprobs, entropy, metrics = reference.grpo_loss(
        logits,
        token_ids,
        sequence_ids,
        advantages.detach(),
        None if old_logprobs is None else old_logprobs.detach(),
        None if ref_logprobs is None else ref_logprobs.detach(),
        mask,
        temperature,
        config,
        normalizer,
    )
    return loss, LossOutputs(logprobs, entropy, metrics)
