"""Log-probabilities, and entropies, of given tokens: checks the input and picks the back end."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from medbridge_kernels import reference
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

    The softmax is computed in float32 for half-precision and float32 logits, in float64 for float64. Without
    gradients the memory beyond the input stays below about 200 MB whatever its size.

    Args:
        logits: floating point [..., vocab]; row t is the distribution of token t (already shifted).
        token_ids: int64 [...], each from 0 to vocab - 1.
        temperature: above 0; a number, or a tensor [...] with one per token.
        entropy: also return the entropy in nats.
        impl: back end; "auto" and "reference" are available.

    Returns:
        Log-probabilities [...], float32 or float64; with `entropy`, a pair of them and the entropies [...].
        Both are differentiable.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that don't fit, or a temperature that isn't above 0.
        NotImplementedError: a back end that isn't available.
    """
    choose(impl)
    check_logits(logits, token_ids, temperature)
    logprobs, entropies = reference.token_logprobs(logits, token_ids, temperature, entropy)
    return logprobs if entropies is None else (logprobs, entropies)


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
    if isinstance(temperature, Tensor):
        if temperature.shape != token_ids.shape:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}, must be a number or have the shape of "
                f"token_ids, {tuple(token_ids.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature = {temperature}, must be above 0")
