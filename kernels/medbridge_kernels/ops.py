"""The operators that the fast back ends share, registered with torch.library so that torch.compile keeps its graph
whole and autograd knows their gradients. What they compute is defined in reference.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from medbridge_kernels import native, triton
from medbridge_kernels.config import config_of
from medbridge_kernels.reference import PolicyInputs


def backend(impl: str) -> ModuleType:
    """The module that holds `sweep`, `sweep_backward` and `group_advantages` of a fast back end."""
    return {"native": native, "triton": triton}[impl]


def lse_dtype(impl: str) -> torch.dtype:
    """Of the log-sum-exp that a back end's `sweep` gives for its `sweep_backward`."""
    return torch.float64 if impl == "native" else torch.float32


def each(temperature: float, temperatures: Tensor | None) -> float | Tensor:
    """The temperature as the back ends take it: operators can't have an argument that is one or the other."""
    return temperature if temperatures is None else temperatures


def split_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """The two arguments that `each` joins, a tensor in float32."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.detach().to(torch.float32).contiguous()
    return float(temperature), None


# --- group advantage ---


@torch.library.custom_op("medbridge_kernels::group_advantages", mutates_args=())
def group_advantages(
    rewards: Tensor, group_offsets: Tensor, baseline: str, scale: str, unbiased: bool, eps: float, impl: str
) -> Tensor:
    """Advantages [sequences] in the dtype of the rewards; without a gradient."""
    return backend(impl).group_advantages(rewards.detach(), group_offsets, baseline, scale, unbiased, eps)


@group_advantages.register_fake
def _(rewards: Tensor, *rest: Any) -> Tensor:
    return rewards.new_empty(rewards.shape)


# --- vocabulary sweep ---


@torch.library.custom_op("medbridge_kernels::vocabulary_sweep", mutates_args=())
def vocabulary_sweep(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    entropy_grad: bool,
    inplace: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy (empty unless asked for), both float32, and log-sum-exp of each row, [tokens].

    `entropy_grad=False` leaves the entropy out of the graph. `inplace` has the backward write the gradient over the
    logits.
    """
    return backend(impl).sweep(logits, token_ids, keep, each(temperature, temperatures), entropy)


@vocabulary_sweep.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(token_ids, entropy, rest[-1])


def empty_rows(token_ids: Tensor, entropy: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what a sweep gives: log-probabilities, entropies (empty unless asked for) and log-sum-exps."""
    tokens = token_ids.shape
    logprobs = token_ids.new_empty(tokens, dtype=torch.float32)
    return logprobs, logprobs.new_empty(tokens if entropy else (0,)), logprobs.new_empty(tokens, dtype=lse_dtype(impl))


@torch.library.custom_op("medbridge_kernels::vocabulary_sweep_backward", mutates_args=())
def vocabulary_sweep_backward(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    impl: str,
) -> Tensor:
    """Gradient of the logits, [tokens, vocab] in their dtype."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    taus = each(temperature, temperatures)
    backend(impl).sweep_backward(logits, token_ids, keep, taus, lse, entropy, grad_logprobs, grad_entropy, out)
    return out


@vocabulary_sweep_backward.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("medbridge_kernels::vocabulary_sweep_backward_", mutates_args=("logits",))
def vocabulary_sweep_backward_(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    impl: str,
) -> None:
    """The same, written over the logits. Their version rises, so autograd refuses to use the old values again."""
    taus = each(temperature, temperatures)
    backend(impl).sweep_backward(logits, token_ids, keep, taus, lse, entropy, grad_logprobs, grad_entropy, logits)


def _sweep_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, token_ids, keep, temperature, temperatures, entropy, entropy_grad, inplace, impl = inputs
    _, entropies, lse = output
    with_entropy = entropy and entropy_grad
    ctx.save_for_backward(logits, token_ids, keep, temperatures, lse, entropies if with_entropy else None)
    ctx.temperature, ctx.inplace, ctx.impl = temperature, inplace, impl
    ctx.set_materialize_grads(False)


def _sweep_gradient(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None) -> Any:
    logits, token_ids, keep, temperatures, lse, entropy = ctx.saved_tensors
    run = vocabulary_sweep_backward_ if ctx.inplace else vocabulary_sweep_backward
    rows = gradient_rows(lse, entropy, grad_logprobs, grad_entropy)
    grad = run(logits, token_ids, keep, ctx.temperature, temperatures, *rows, ctx.impl)
    return logits.detach() if ctx.inplace else grad, *[None] * 8


def gradient_rows(
    lse: Tensor, entropy: Tensor | None, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What a sweep's backward takes of each row, from what autograd has; `entropy` None: it isn't in the graph."""
    by_logprob = torch.zeros_like(lse, dtype=torch.float32) if grad_logprobs is None else grad_logprobs.contiguous()
    if entropy is None or grad_entropy is None:
        return lse, None, by_logprob, None
    return lse, entropy, by_logprob, grad_entropy.contiguous()


vocabulary_sweep.register_autograd(_sweep_gradient, setup_context=_sweep_context)


# --- policy terms ---


@torch.library.custom_op("medbridge_kernels::policy_terms", mutates_args=())
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
    normalizer: float,
    normalizers: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Phase 2 of the loss in kernels: everything of size [tokens].

    Returns the loss, its derivatives by log-probability and by entropy, [tokens] (the last empty where the loss has no
    entropy term), and the metrics in the order of `metric_names`. With `normalizer` 0 and no `normalizers` the counts
    of this call are taken.
    """
    divisor: float | Tensor | None = normalizer if normalizer != 0 else normalizers
    return triton.policy_terms(
        logprobs, entropy, sequence_ids, n_sequences, advantages, per_token, old_logprobs, ref_logprobs,
        rollout_logprobs, keep, divisor, config_of(config),
    )  # fmt: skip


@policy_terms.register_fake
def _(
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
    normalizer: float,
    normalizers: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = config_of(config)
    names = metric_names(settings, ref_logprobs is not None, rollout_logprobs is not None)
    by_entropy = torch.empty_like(logprobs) if settings.entropy_coef != 0 else logprobs.new_empty(0)
    return logprobs.new_empty(()), torch.empty_like(logprobs), by_entropy, logprobs.new_empty(len(names))


def metric_names(config: Any, with_ref: bool, with_rollout: bool) -> list[str]:
    """Names of the metrics, in the order in which `reference.loss_metrics` makes them."""
    names = ["clip_low", "clip_high", "ratio_mean", "ratio_max", "effective_sample_size"]
    names += ["kl"] * with_ref
    if with_rollout:
        names += ["rollout_ratio_mean", "rollout_ratio_max", "rollout_effective_sample_size", "rollout_kl"]
    names += ["corrected"] * (config.correction != "none")
    names += ["off_policy"] * (config.off_policy_threshold is not None)
    return names


def _terms_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.set_materialize_grads(False)


def _terms_gradient(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    by_logprob, by_entropy = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 13
    return by_logprob * grad_loss, by_entropy * grad_loss if by_entropy.numel() else None, *[None] * 11


policy_terms.register_autograd(_terms_gradient, setup_context=_terms_context)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    inputs: PolicyInputs,
    masked: bool,
    config: Any,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics by `policy_terms`, with the face of `reference.policy_terms`."""
    fixed = 0.0 if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer)
    loss, _, _, metrics = policy_terms(
        logprobs, entropy, inputs.sequence_ids, inputs.n_sequences, inputs.advantages, inputs.per_token,
        inputs.old_logprobs, inputs.ref_logprobs, inputs.rollout_logprobs, inputs.keep if masked else None,
        fixed, normalizer if isinstance(normalizer, Tensor) else None, config.key,
    )  # fmt: skip
    names = metric_names(config, inputs.ref_logprobs is not None, inputs.rollout_logprobs is not None)
    return loss, dict(zip(names, metrics.detach().unbind(), strict=True))
