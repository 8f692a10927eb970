"""The vocabulary sweep in Triton: one program per row of logits, one read of it forward, a read and a write backward.

The maths is that of `reference.logprobs_and_entropy` and of its gradient, with a running maximum. Lengths are no
arguments of the kernels, so no number of tokens compiles them anew.
"""

# Triton's kernels carry no types but tl.constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medbridge_kernels.triton.launch import LAUNCHES, on_device

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
ALIGNMENT = tl.constexpr(16)
"""Elements: 32 or 64 bytes, a multiple of the widest load."""


@triton.jit
def align_up(offset):
    """The next multiple of the alignment. The compiler sees that it is one, and so makes wide loads of narrow ones."""
    return (offset + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@triton.jit
def reciprocal_temperature(reciprocal, temperatures_ptr, row):
    """1 / temperature, of the row where each has its own."""
    if temperatures_ptr is not None:
        return tl.div_rn(1.0, tl.load(temperatures_ptr + row))
    else:
        return reciprocal


@triton.jit
def online_softmax(logits, largest, total, weighted, scale, ENTROPY: tl.constexpr):
    """Takes a tile [lanes, vector] into each lane's m = max x, s = sum 2^t and u = sum 2^t t, with t = scale (x - m).

    Differences are taken before they are scaled: exact where a logit is near the largest, which is where the weight is.
    """
    new_largest = tl.maximum(largest, tl.max(logits, axis=1))
    # A lane that has only seen -inf has no maximum to subtract.
    origin = tl.where(new_largest == -INFINITY, 0.0, new_largest)
    shift = tl.where(largest == -INFINITY, 0.0, (largest - origin) * scale)
    rescale = tl.exp2(shift)
    exponent = (logits - origin[:, None]) * scale
    power = tl.exp2(exponent)
    if ENTROPY:
        # 0 log 0 = 0
        products = tl.where(power == 0.0, 0.0, power * exponent)
        weighted = (weighted + total * shift) * rescale + tl.sum(products, axis=1)
    return new_largest, total * rescale + tl.sum(power, axis=1), weighted


@triton.jit
def join_lanes(largest, total, weighted, scale):
    """The row's m, s and u from those of its lanes."""
    row_largest = tl.max(largest, axis=0)
    shift = tl.where(largest == -INFINITY, 0.0, (largest - row_largest) * scale)
    rescale = tl.exp2(shift)
    return row_largest, tl.sum(total * rescale, axis=0), tl.sum((weighted + total * shift) * rescale, axis=0)


@triton.jit
def sweep_kernel(
    logits_ptr,
    row_stride,
    vocab,
    token_ids_ptr,
    keep_ptr,
    reciprocal,
    temperatures_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Log-probability, entropy and log-sum-exp of one row."""
    row = tl.program_id(0).to(tl.int64)
    length = vocab
    if keep_ptr is not None:
        length = tl.where(tl.load(keep_ptr + row), vocab, 0)
    inverse = reciprocal_temperature(reciprocal, temperatures_ptr, row)
    scale = inverse * LOG2_E

    # The row in three parts: up to the first aligned element, whole tiles from there, the rest.
    row_ptr = logits_ptr + row * row_stride
    start = align_up(row * row_stride)
    aligned_ptr = logits_ptr + start
    head = (start - row * row_stride).to(tl.int32)
    remaining = tl.maximum(length - head, 0)
    tile: tl.constexpr = LANES * VECTOR
    index = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    whole = remaining // tile * tile

    largest = tl.full((LANES,), -INFINITY, tl.float32)
    total = tl.full((LANES,), 0.0, tl.float32)
    weighted = tl.full((LANES,), 0.0, tl.float32)
    if head > 0:
        logits = tl.load(row_ptr + index, mask=index < tl.minimum(head, length), other=-INFINITY).to(tl.float32)
        largest, total, weighted = online_softmax(logits, largest, total, weighted, scale, ENTROPY)
    for column in range(0, whole, tile):
        logits = tl.load(aligned_ptr + column + index).to(tl.float32)
        largest, total, weighted = online_softmax(logits, largest, total, weighted, scale, ENTROPY)
    rest = whole + index
    logits = tl.load(aligned_ptr + rest, mask=rest < remaining, other=-INFINITY).to(tl.float32)
    largest, total, weighted = online_softmax(logits, largest, total, weighted, scale, ENTROPY)
    top, total_row, weighted_row = join_lanes(largest, total, weighted, scale)

    label = tl.load(token_ids_ptr + row)
    label_logit = tl.load(row_ptr + label, mask=(label >= 0) & (label < length), other=float("nan")).to(tl.float32)
    log_total = tl.log(total_row)
    read = length > 0
    tl.store(logprobs_ptr + row, tl.where(read, (label_logit - top) * inverse - log_total, 0.0))
    tl.store(lse_ptr + row, tl.where(read, top * inverse + log_total, 0.0))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(read, log_total - weighted_row / total_row / LOG2_E, 0.0))


@triton.jit
def logit_gradient(logits, is_label, inverse, lse, entropy, grad_logprob, grad_entropy, ENTROPY: tl.constexpr):
    """(g 1[j = y] - p_j (g + h (log p_j + H))) / temperature."""
    all_logprobs = logits * inverse - lse
    p = tl.exp2(all_logprobs * LOG2_E)
    slope = grad_logprob
    if ENTROPY:
        slope = tl.where(p == 0.0, 0.0, grad_logprob + grad_entropy * (all_logprobs + entropy))
    return (tl.where(is_label, grad_logprob, 0.0) - p * slope) * inverse


@triton.jit
def write_gradient(
    logits_ptrs,
    out_ptrs,
    mask,
    is_label,
    has_gradient,
    inverse,
    lse,
    entropy,
    grad_logprob,
    grad_entropy,
    ENTROPY: tl.constexpr,
):
    """The gradient of a tile; zeros, and nothing read, where the row has none."""
    gradient = tl.full(is_label.shape, 0.0, tl.float32)
    if has_gradient:
        logits = tl.load(logits_ptrs, mask=mask).to(tl.float32)
        gradient = logit_gradient(logits, is_label, inverse, lse, entropy, grad_logprob, grad_entropy, ENTROPY)
    tl.store(out_ptrs, gradient.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def sweep_backward_kernel(
    logits_ptr,
    row_stride,
    vocab,
    token_ids_ptr,
    keep_ptr,
    reciprocal,
    temperatures_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    out_ptr,
    out_row_stride,
    ENTROPY: tl.constexpr,
    ALIGNED_ALIKE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradient of one row of logits, which may be written over them."""
    row = tl.program_id(0).to(tl.int64)
    grad_logprob = tl.load(grad_logprobs_ptr + row)
    has_gradient = grad_logprob != 0.0
    grad_entropy = 0.0
    entropy = 0.0
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        has_gradient = has_gradient | (grad_entropy != 0.0)
    if keep_ptr is not None:
        has_gradient = has_gradient & tl.load(keep_ptr + row)
    inverse = reciprocal_temperature(reciprocal, temperatures_ptr, row)
    lse = tl.load(lse_ptr + row)
    label = tl.load(token_ids_ptr + row)
    label = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)

    # The row in three parts, as in the forward sweep. Rows that can't be aligned at once are taken as they are.
    start = row * row_stride
    out_start = row * out_row_stride
    head = 0
    index = tl.arange(0, TILE)
    if ALIGNED_ALIKE:
        start = align_up(start)
        out_start = align_up(out_start)
        head = (start - row * row_stride).to(tl.int32)
        if head > 0:
            column = tl.arange(0, ALIGNMENT)
            write_gradient(
                logits_ptr + row * row_stride + column, out_ptr + row * out_row_stride + column,
                column < tl.minimum(head, vocab), column == label,
                has_gradient, inverse, lse, entropy, grad_logprob, grad_entropy, ENTROPY,
            )  # fmt: skip
    logits_ptrs = logits_ptr + start + index
    out_ptrs = out_ptr + out_start + index
    remaining = tl.maximum(vocab - head, 0)
    whole = remaining // TILE * TILE
    for column in range(0, whole, TILE):
        write_gradient(
            logits_ptrs + column, out_ptrs + column, None, column + head + index == label,
            has_gradient, inverse, lse, entropy, grad_logprob, grad_entropy, ENTROPY,
        )  # fmt: skip
    write_gradient(
        logits_ptrs + whole, out_ptrs + whole, whole + index < remaining, whole + head + index == label,
        has_gradient, inverse, lse, entropy, grad_logprob, grad_entropy, ENTROPY,
    )  # fmt: skip


def sweep(
    logits: Tensor, token_ids: Tensor, keep: Tensor | None, temperature: float | Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and log-sum-exp of each row, float32 [tokens].

    Args:
        logits: float32, bfloat16 or float16 [tokens, vocab], contiguous over the vocabulary.
        token_ids: int64 [tokens]. One that is out of range has the log-probability NaN.
        keep: bool [tokens]; rows without it are not read and get 0. None: all.
        temperature: above 0, a number or float32 [tokens].
        entropy: whether it is computed; empty where not.
    """
    tokens, vocab = logits.shape
    logprobs = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logprobs)
    entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
    if tokens:
        launch = LAUNCHES["sweep", logits.itemsize]
        vector = 16 // logits.itemsize
        with on_device(logits):
            sweep_kernel[(tokens,)](
                logits, logits.stride(0), vocab, token_ids.contiguous(), _contiguous(keep), *_reciprocal(temperature),
                logprobs, entropies if entropy else None, lse,
                ENTROPY=entropy, LANES=launch.tile // vector, VECTOR=vector, num_warps=launch.warps(),
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
    """Writes the gradient of the logits to `out`, which may be the logits.

    Args:
        logits, token_ids, keep, temperature: as given to `sweep`.
        lse, entropy: as it returned them; the entropy is needed with `grad_entropy`.
        grad_logprobs, grad_entropy: float32 [tokens], the second None where the entropy has no gradient. A row whose
            gradients are 0 is not read.
        out: [tokens, vocab] in the dtype of the logits, contiguous over the vocabulary.
    """
    tokens, vocab = logits.shape
    if not tokens:
        return
    with_entropy = grad_entropy is not None
    launch = LAUNCHES["sweep_backward", logits.itemsize]
    with on_device(logits):
        sweep_backward_kernel[(tokens,)](
            logits, logits.stride(0), vocab, token_ids.contiguous(), _contiguous(keep), *_reciprocal(temperature),
            lse.contiguous(), _contiguous(entropy) if with_entropy else None, grad_logprobs.contiguous(),
            _contiguous(grad_entropy), out, out.stride(0),
            ENTROPY=with_entropy, ALIGNED_ALIKE=(logits.stride(0) - out.stride(0)) % ALIGNMENT.value == 0,
            TILE=launch.tile, num_warps=launch.warps(),
        )  # fmt: skip


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _reciprocal(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature.contiguous()
    return 1.0 / temperature, None
