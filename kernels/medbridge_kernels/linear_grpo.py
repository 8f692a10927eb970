"""The GRPO loss and log-probabilities from hidden states and the output layer's weight: checks the input and picks
the back end. Logits are made a chunk of tokens at a time and never stored whole.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from medbridge_kernels import linear, ops, reference
from medbridge_kernels.config import Level, LossConfig
from medbridge_kernels.grpo import LossOutputs, policy_inputs, policy_loss
from medbridge_kernels.impl import Impl, choose
from medbridge_kernels.logprobs import check_temperature


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
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
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    banned_ids: Tensor | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, LossOutputs]:
    """`grpo_loss` of the logits ``softcap(logit_scale (hidden weight^T + bias))``, without ever holding them whole.

    The gradients of hidden states, weight and bias are made chunk by chunk in the forward pass, right after a chunk's
    logits: three matrix products in all, as many as plain autograd takes. Where the gradient of a token depends on
    tokens of other chunks (``ratio_level="sequence"``, an off-policy threshold, a correction at the sequence level
    without `old_logprobs`), for products in float16, and under torch.compile, the logits are made again in the backward
    pass: four. A weight, bias or hidden state that needs no gradient costs none. The weight's gradient is summed over
    chunks in float32.

    Args:
        hidden: floating point [tokens, width]: the states that predict `token_ids`.
        weight: [vocab, width], the output layer (`lm_head.weight`).
        bias: [vocab] or None.
        logit_scale: factor of the logits, not 0.
        softcap: ``softcap tanh(logits / softcap)`` bounds the logits, above 0 (Gemma 2); None: no bound.
        banned_ids: int64 [any], tokens that can't be sampled: probability 0, whatever the model says.
        memory_budget: bytes for the logits that are held at a time; None: 160 MiB on a CPU, 1 GiB on a GPU. At least
            one row is held.
        token_ids, sequence_ids, advantages, rewards, group_offsets, advantage_level, old_logprobs, ref_logprobs,
            rollout_logprobs, mask, temperature, config, normalizer, impl: as in `grpo_loss`. "reference" holds the
            logits whole.

    Returns:
        The loss, a differentiable scalar in float32 (float64 for float64 hidden states), and the outputs. Under
        autocast the products are in its dtype, and gradients in those of hidden states, weight and bias.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `grpo_loss`, and for shapes of hidden, weight and bias that
            don't fit.
    """
    chosen = choose(impl, hidden)
    layer = _layer(hidden, weight, token_ids, temperature, bias, logit_scale, softcap, banned_ids, memory_budget)
    inputs = policy_inputs(
        token_ids, sequence_ids, advantages, rewards, group_offsets, advantage_level, old_logprobs, ref_logprobs,
        rollout_logprobs, mask, config, normalizer, impl,
    )  # fmt: skip
    masked = mask is not None
    if chosen == "reference":
        logits = reference.project(hidden, weight, bias, logit_scale, softcap, banned_ids)
        loss, logprobs, entropy, metrics = reference.grpo_loss(
            logits, token_ids, inputs, masked, temperature, config, normalizer
        )
        return loss, LossOutputs(logprobs, entropy, metrics)
    token_ids, keep = token_ids.contiguous(), inputs.keep if masked else None
    # float16 gradients are too small without the scale of the loss, which is known in the backward pass only.
    late = linear.is_coupled(inputs, config) or layer[-1] == torch.float16
    if late or torch.compiler.is_compiling():
        logprobs, entropy, _ = linear.linear_sweep(
            hidden, weight, bias, token_ids, keep, *ops.split_temperature(temperature), True,
            config.entropy_coef != 0, *layer, chosen,
        )  # fmt: skip
        loss, metrics = policy_loss(logprobs, entropy, inputs, masked, config, normalizer, chosen)
        return loss, LossOutputs(logprobs.detach(), entropy.detach(), metrics)
    loss, logprobs, entropy = linear.linear_loss(
        hidden, weight, bias, token_ids, keep, temperature, inputs, config, normalizer, layer, chosen
    )
    metrics = reference.loss_metrics(logprobs, inputs, config)
    return loss, LossOutputs(logprobs, entropy, metrics)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    entropy: Literal[False] = False,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    banned_ids: Tensor | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    entropy: Literal[True],
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    banned_ids: Tensor | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    banned_ids: Tensor | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits ``softcap(logit_scale (hidden weight^T + bias))``, without holding them whole.

    Its backward pass makes each chunk's logits again.

    Args:
        hidden: floating point [..., width].
        token_ids: int64 [...]; temperature: a number or [...].
        weight, bias, logit_scale, softcap, banned_ids, memory_budget: as in `linear_grpo_loss`.
        entropy: also return the entropy in nats.
        impl: back end: "auto", "reference", "native" (CPU) or "triton" (GPU).

    Returns:
        Log-probabilities [...], float32 or float64; with `entropy`, a pair of them and the entropies [...].

    Raises:
        TypeError, ValueError, NotImplementedError: as in `linear_grpo_loss`.
    """
    chosen = choose(impl, hidden)
    shape = token_ids.shape
    if hidden.shape[:-1] != shape:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, must be [..., width] with token_ids {tuple(shape)}")
    hidden, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1).contiguous()
    if isinstance(temperature, Tensor):
        check_temperature(token_ids, temperature)
        temperature = temperature.reshape(-1)
    layer = _layer(hidden, weight, ids, temperature, bias, logit_scale, softcap, banned_ids, memory_budget)
    entropies: Tensor | None
    if chosen == "reference":
        logits = reference.project(hidden, weight, bias, logit_scale, softcap, banned_ids)
        logprobs, entropies = reference.token_logprobs(logits, ids, temperature, entropy)
    else:
        logprobs, entropies, _ = linear.linear_sweep(
            hidden, weight, bias, ids, None, *ops.split_temperature(temperature), entropy, True, *layer, chosen
        )
    if not entropy or entropies is None:
        return logprobs.reshape(shape)
    return logprobs.reshape(shape), entropies.reshape(shape)


def _layer(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    banned_ids: Tensor | None,
    memory_budget: int | None,
) -> tuple[float, float, Tensor | None, int, torch.dtype]:
    """Scale, soft cap (0: none), banned tokens, budget and type of the products, checked, as operators take them."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids must be int64, got {token_ids.dtype}")
    if hidden.ndim != 2 or hidden.shape[:1] != token_ids.shape:
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} and token_ids of shape {tuple(token_ids.shape)}: "
            "hidden must be packed rows [tokens, width] and token_ids [tokens]"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [vocab, width] with width {hidden.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [vocab] = ({weight.shape[0]},)")
    if not torch.is_autocast_enabled(hidden.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TypeError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}: they must be the same")
    check_temperature(token_ids, temperature)
    if logit_scale == 0:
        raise ValueError("logit_scale = 0 leaves nothing of the logits")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}, must be above 0")
    if banned_ids is not None and banned_ids.dtype != torch.int64:
        raise TypeError(f"banned_ids must be int64, got {banned_ids.dtype}")
    if memory_budget is None:
        memory_budget = linear.DEFAULT_BUDGET["cpu" if hidden.device.type == "cpu" else "cuda"]
    if memory_budget <= 0:
        raise ValueError(f"memory_budget = {memory_budget} bytes, must be above 0")
    cap = 0.0 if softcap is None else float(softcap)
    return float(logit_scale), cap, banned_ids, int(memory_budget), linear.compute_dtype(weight)
