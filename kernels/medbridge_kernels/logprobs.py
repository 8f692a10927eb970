"""Log-probabilities, and entropies, of given tokens, from logits: checks the input and picks the back end."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from medbridge_kernels import ops, reference
from medbridge_kernels.impl import Impl, choose


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    entropy: Literal[False] = False,
    *,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    entropy: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    *,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token, ``log softmax(logits / temperature)[token]``, and the entropy of each
    distribution.

    The softmax is computed in float32 for half-precision and float32 logits, in float64 for float64. The fast back
    ends need no memory beyond the outputs and the gradient; the reference, without gradients, below about 200 MB.

    Args:
        logits: floating point [..., vocab]; row t is the distribution of token t (already shifted).
        token_ids: int64 [...], each from 0 to vocab - 1.
        temperature: above 0; a number, or a tensor [...] with one per token.
        entropy: also return the entropy in nats.
        impl: back end: "auto", "reference", "native" (CPU) or "triton" (GPU).

    Returns:
        Log-probabilities [...], float32 or float64; with `entropy`, a pair of them and the entropies [...].
        Both are differentiable.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that don't fit, or a temperature that isn't above 0.
        NotImplementedError: a back end that isn't available.
    """
    chosen = choose(impl, logits)
    check_logits(logits, token_ids, temperature)
    if chosen == "reference":
        logprobs, entropies = reference.token_logprobs(logits, token_ids, temperature, entropy)
        return logprobs if entropies is None else (logprobs, entropies)
    rows = logits.reshape(-1, logits.shape[-1])
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    flat, entropies, _ = ops.vocabulary_sweep(
        rows if rows.stride(-1) == 1 else rows.contiguous(), token_ids.reshape(-1).contiguous(), None,
        *ops.split_temperature(temperature), entropy, True, False, chosen,
    )  # fmt: skip
    logprobs = flat.reshape(token_ids.shape)
    return (logprobs, entropies.reshape(token_ids.shape)) if entropy else logprobs


def check_logits(logits: Tensor, token_ids: Tensor, temperature: float | Tensor) -> None:
    """Refuse dtypes and shapes that don't fit, without waiting for the device."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids must be int64, got {token_ids.dtype}")
    if logits.ndim != token_ids.ndim + 1 or logits.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and token_ids of shape {tuple(token_ids.shape)}: "
            "logits must be [..., vocab] and token_ids [...]"
        )
    check_temperature(token_ids, temperature)


def check_temperature(token_ids: Tensor, temperature: float | Tensor) -> None:
    """Refuse a temperature that is not above 0 or doesn't fit the tokens (the values of a tensor aren't read)."""
    if isinstance(temperature, Tensor):
        if temperature.shape != token_ids.shape:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}, must be a number or have the shape of "
                f"token_ids, {tuple(token_ids.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature = {temperature}, must be above 0")
