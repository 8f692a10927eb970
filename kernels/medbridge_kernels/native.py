"""The C++ back end, for CPU tensors: the torch face of the extension `_native`, without copies. What it computes is
defined in reference; checks of what users give are the public functions' business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from medbridge_kernels import _native

    _IMPORT_ERROR: str | None = None
except ImportError as error:
    _IMPORT_ERROR = str(error)


def why_missing() -> str | None:
    """Why the extension can't be used, with the cure; None where it can."""
    if _IMPORT_ERROR is None:
        return None
    return (
        f"the extension medbridge_kernels._native can't be imported ({_IMPORT_ERROR}); install the package, or build "
        "the extension of a checkout with `pip install --editable .`, which needs GCC or Clang"
    )


def sweep(
    logits: Tensor, token_ids: Tensor, keep: Tensor | None, temperature: float | Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy (empty unless asked for), both float32, and log-sum-exp, float64, of each row, [tokens].

    The log-sum-exp is for `sweep_backward`: rounded to float32, its error would be one of all of the row's
    probabilities. A temperature outside 1e-30 to 1e30 gives NaN.

    Args:
        logits: float32, bfloat16 or float16 [tokens, vocab], contiguous over the vocabulary.
        token_ids: int64 [tokens]; one outside the vocabulary gives NaN.
        keep: bool [tokens] or None: rows without it aren't read, their results are 0.
        temperature: a number or float32 [tokens].
        entropy: whether to compute it.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides that don't fit.
    """
    logprobs = torch.empty(token_ids.shape, dtype=torch.float32)
    entropies = torch.empty(token_ids.shape if entropy else (0,), dtype=torch.float32)
    lse = torch.empty(token_ids.shape, dtype=torch.float64)
    _native.sweep(
        _matrix(logits), _name(logits), _array(token_ids), _array(keep), *_temperatures(temperature),
        _array(logprobs), _array(entropies) if entropy else None, _array(lse),
    )  # fmt: skip
    return logprobs, entropies, lse


def sweep_backward(
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float | Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits, in their dtype, to `out` [tokens, vocab], which may be `logits` itself.

    ``(g 1[j = token] - p_j (g + h (log p_j + H))) / temperature``; rows that aren't kept, and rows with g = h = 0, are
    not read: 0.

    Args:
        logits, token_ids, keep, temperature: as for `sweep`.
        lse, entropy: of `sweep`; the entropy is needed with `grad_entropy` only, the lse may have been rounded.
        grad_logprobs, grad_entropy: g and h, [tokens], read as float32; None: 0.
        out: rows may lie further apart than the vocabulary is long.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides that don't fit; `out` that overlaps `logits` in part.
    """
    _native.sweep_backward(
        _matrix(logits), _name(logits), _array(token_ids), _array(keep), *_temperatures(temperature),
        _array(lse.double()), _array(entropy), _array(grad_logprobs.float()),
        _array(None if grad_entropy is None else grad_entropy.float()), _matrix(out),
    )  # fmt: skip


def group_advantages(
    rewards: Tensor, group_offsets: Tensor, baseline: str, scale: str, unbiased: bool, eps: float
) -> Tensor:
    """Advantages [sequences] in the dtype of the rewards; see `medbridge_kernels.group_advantages`.

    Raises:
        TypeError, ValueError: dtypes or shapes that don't fit; offsets that don't rise from 0 to the number of rewards.
    """
    values = rewards if rewards.dtype == torch.float64 else rewards.float()
    advantages = torch.empty(values.shape, dtype=values.dtype)
    _native.group_advantages(
        _array(values.contiguous()),
        _array(group_offsets.contiguous()),
        baseline,
        scale,
        unbiased,
        eps,
        _array(advantages),
    )
    return advantages.to(rewards.dtype)


def _name(logits: Tensor) -> str:
    return str(logits.dtype).removeprefix("torch.")


def _matrix(logits: Tensor) -> Any:
    """The logits' own memory; numpy has no bfloat16, so 16-bit types go as int16 of the same bits."""
    return _array(logits if logits.dtype.itemsize == 4 else logits.view(torch.int16))


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()


def _temperatures(temperature: float | Tensor) -> tuple[float, Any]:
    if isinstance(temperature, Tensor):
        return 1.0, _array(temperature)
    return float(temperature), None
