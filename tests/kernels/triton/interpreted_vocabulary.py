"""The vocabulary sweep in Triton's interpreter, against float64 with torch's own error in the same dtype as budget."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from medbridge_kernels import reference
from medbridge_kernels.triton import sweep, sweep_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    ids = torch.randint(vocab, (rows,), generator=generator)
    g, h = torch.randn(2, rows, generator=generator)
    return logits, ids, g, h


def by_torch(
    logits: Tensor, ids: Tensor, temperature: float | Tensor, g: Tensor, h: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and the gradient in the dtype of the logits, computed in `dtype`."""
    leaf = logits.detach().clone().requires_grad_()
    logprobs, entropy = reference.logprobs_and_entropy(reference.scaled_logits(leaf.to(dtype), temperature), ids)
    (logprobs * g.to(dtype) + entropy * h.to(dtype)).sum().backward()
    assert leaf.grad is not None
    return logprobs.detach(), entropy.detach(), leaf.grad


def within(found: Tensor, torchs: Tensor, true: Tensor, rounding: float) -> None:
    budget = max(2 * (torchs.double() - true).abs().max().item(), rounding)
    assert (found.double() - true).abs().max().item() <= budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 123, 5_000, 50_257, 151_937])
@pytest.mark.parametrize("per_token", [False, True])
def test_within_twice_the_error_of_torch(vocab: int, dtype: torch.dtype, per_token: bool) -> None:
    rows = 8 if vocab < 50_000 else 2
    logits, ids, g, h = draw(rows, vocab, dtype)
    temperature = torch.linspace(0.6, 1.4, rows) if per_token else 0.7
    logprobs, entropy, lse = sweep(logits, ids, None, temperature, True)
    gradient = torch.empty_like(logits)
    sweep_backward(logits, ids, None, temperature, lse, entropy, g, h, gradient)
    assert logprobs.dtype == entropy.dtype == lse.dtype == torch.float32

    exact = by_torch(logits.double(), ids, temperature, g, h, torch.float64)
    torchs = by_torch(logits, ids, temperature, g, h, torch.float32)
    # Few rows may flatter torch: no budget is below the rounding of the numbers that go in and out.
    rounding = torch.finfo(torch.float32).eps * (logits.double() / 0.6).abs().max().item()
    within(logprobs, torchs[0], exact[0], rounding)
    within(entropy, torchs[1], exact[1], rounding)
    within(gradient, torchs[2], exact[2], rounding * max(g.abs().max().item(), h.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_lose_nothing(dtype: torch.dtype) -> None:
    logits = torch.tensor([[3e4, 3e4, -3e4], [0.0, 3e4, 0.0], [-3e4, -3e4, -3e4]], dtype=dtype)
    ids = torch.tensor([0, 1, 2])
    logprobs, entropy, _ = sweep(logits, ids, None, 0.7, True)
    torch.testing.assert_close(logprobs, -torch.tensor([2.0, 1.0, 3.0]).log())
    torch.testing.assert_close(entropy, torch.tensor([2.0, 1.0, 3.0]).log())


def test_constant_rows_and_single_tokens() -> None:
    logprobs, entropy, lse = sweep(torch.full((2, 5_000), 7.0), torch.tensor([0, 4_999]), None, 1.0, True)
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(5_000)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(5_000)))
    torch.testing.assert_close(lse, torch.full((2,), 7 + math.log(5_000)))
    logprobs, entropy, _ = sweep(torch.full((1, 1), 7.0), torch.tensor([0]), None, 0.3, True)
    assert logprobs.item() == entropy.item() == 0.0


def test_tokens_that_are_ruled_out() -> None:
    logits, ids, g, h = draw(3, 9_000)
    ruled_out = torch.zeros(3, 9_000, dtype=torch.bool)
    ruled_out[0, 10:] = ruled_out[1, :8_990] = ruled_out[2, 1::2] = True
    ids = torch.tensor([3, 8_995, 1])  # the last is ruled out itself
    logits = logits.masked_fill(ruled_out, -INF)
    logprobs, entropy, lse = sweep(logits, ids, None, 1.0, True)
    gradient = torch.empty_like(logits)
    sweep_backward(logits, ids, None, 1.0, lse, entropy, g, h, gradient)
    expected, expected_entropy, _ = by_torch(logits[:2], ids[:2], 1.0, g[:2], h[:2], torch.float64)
    torch.testing.assert_close(logprobs[:2].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy[:2].double(), expected_entropy, rtol=1e-6, atol=1e-6)
    assert logprobs[2] == -INF and entropy[2].isfinite()
    p = torch.softmax(logits.double(), -1)
    log_p = p.clamp(min=1e-300).log()
    true = torch.nn.functional.one_hot(ids, 9_000) * g[:, None] - p * (
        g[:, None] + h[:, None] * (log_p - (p * log_p).sum(-1, keepdim=True))
    )
    torch.testing.assert_close(gradient.double(), true, rtol=1e-5, atol=1e-6)
    assert gradient[:2][ruled_out[:2]].count_nonzero() == 0


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_or_infinity_makes_its_row_nan(value: float, dtype: torch.dtype) -> None:
    logits, ids, g, h = draw(3, 5_000, dtype)
    clean = sweep(logits, ids, None, 1.0, True)
    logits[1, 4_321] = value
    logprobs, entropy, lse = sweep(logits, ids, None, 1.0, True)
    gradient = torch.empty_like(logits)
    sweep_backward(logits, ids, None, 1.0, lse, entropy, g, h, gradient)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all() and gradient[::2].isfinite().all()
    for found, expected in zip((logprobs, entropy, lse), clean, strict=True):
        assert torch.equal(found[::2], expected[::2])


def test_a_row_with_nothing_allowed_is_nan() -> None:
    logprobs, entropy, _ = sweep(torch.full((1, 300), -INF), torch.tensor([0]), None, 1.0, True)
    assert logprobs.isnan().all() and entropy.isnan().all()


def test_ids_out_of_range_give_nan_and_are_not_read() -> None:
    logits = draw(4, 50)[0]
    logprobs, entropy, _ = sweep(logits, torch.tensor([50, -1, 2**40, 49]), None, 1.0, True)
    assert logprobs.isnan().tolist() == [True, True, True, False] and entropy.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_outside_the_mask_or_without_gradient_are_not_read(dtype: torch.dtype) -> None:
    logits, ids, g, h = draw(6, 777, dtype)
    keep = torch.tensor([True, False, True, True, False, True])
    g[2] = h[2] = h[3] = g[5] = 0.0
    expected = [value.where(keep, 0.0) for value in sweep(logits.masked_fill(~keep[:, None], 0), ids, None, 0.7, True)]
    whole = torch.empty_like(logits)
    sweep_backward(logits, ids, None, 0.7, *sweep(logits, ids, None, 0.7, True)[:0:-1], g, h, whole)

    logits[~keep] = NAN
    ids[~keep] = -100
    found = sweep(logits, ids, keep, 0.7, True)
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)
    logits[2] = NAN
    g[~keep] = NAN
    gradient = torch.empty_like(logits)
    sweep_backward(logits, ids, keep, 0.7, found[2], found[1], g, h, gradient)
    still = torch.tensor([1, 2, 4])
    assert gradient[still].count_nonzero() == 0 and torch.equal(gradient[[0, 3, 5]], whole[[0, 3, 5]])


@pytest.mark.parametrize("vocab", [123, 4_999])
@pytest.mark.parametrize("pad", [0, 5, 16])
def test_strided_rows_in_place_and_into_other_strides(vocab: int, pad: int) -> None:
    logits, ids, g, h = draw(4, vocab, torch.bfloat16)
    _, entropy, lse = sweep(logits, ids, None, 1.0, True)
    expected = torch.empty_like(logits)
    sweep_backward(logits, ids, None, 1.0, lse, entropy, g, h, expected)

    wide = torch.full((4, vocab + pad), 9.0, dtype=torch.bfloat16)
    rows = wide[:, :vocab].copy_(logits)
    for mine, true in zip(sweep(rows, ids, None, 1.0, True), sweep(logits, ids, None, 1.0, True), strict=True):
        torch.testing.assert_close(mine, true)  # rows that begin elsewhere add up in another order
    apart = torch.empty_like(logits)
    sweep_backward(rows, ids, None, 1.0, lse, entropy, g, h, apart)
    assert torch.equal(apart, expected)
    sweep_backward(rows, ids, None, 1.0, lse, entropy, g, h, rows)
    assert torch.equal(rows, expected) and (wide[:, vocab:] == 9).all()


def test_without_entropy() -> None:
    logits, ids, g, _ = draw(3, 5_000)
    with_entropy, without = sweep(logits, ids, None, 1.0, True), sweep(logits, ids, None, 1.0, False)
    assert torch.equal(with_entropy[0], without[0]) and torch.equal(with_entropy[2], without[2])
    assert without[1].shape == (0,)
    gradients = torch.empty_like(logits), torch.empty_like(logits)
    sweep_backward(logits, ids, None, 1.0, without[2], None, g, None, gradients[0])
    sweep_backward(logits, ids, None, 1.0, without[2], with_entropy[1], g, torch.zeros(3), gradients[1])
    torch.testing.assert_close(*gradients)


def test_no_tokens() -> None:
    logits, ids = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    logprobs, entropy, lse = sweep(logits, ids, None, 1.0, True)
    sweep_backward(logits, ids, None, 1.0, lse, entropy, logprobs, entropy, logits)
    assert logprobs.shape == entropy.shape == lse.shape == (0,)


def test_more_rows_than_a_grid_had_in_y(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70,000 rows the interpreter, which takes milliseconds for each, runs five."""
    rows, chosen = 70_000, [0, 1, 65_535, 65_536, 69_999]
    logits, ids, g, h = draw(rows, 5)

    def few(*limits: int) -> list[int] | range:
        return chosen if limits == (rows,) else builtins.range(*limits)

    monkeypatch.setattr(interpreter, "range", few, raising=False)
    found = sweep(logits, ids, None, 1.0, True)
    gradient = torch.empty_like(logits)
    sweep_backward(logits, ids, None, 1.0, found[2], found[1], g, h, gradient)
    expected = by_torch(logits[chosen].double(), ids[chosen], 1.0, g[chosen], h[chosen], torch.float64)
    for mine, true in zip((found[0], found[1], gradient), expected, strict=True):
        torch.testing.assert_close(mine[chosen].double(), true, rtol=1e-5, atol=1e-6)
        assert mine.isfinite().flatten(1 - mine.ndim).sum() == mine[chosen].numel()


def test_offsets_beyond_32_bits() -> None:
    stride = 2**30 + 16
    storage = torch.UntypedStorage(2 * (2 * stride + 64))  # what is never touched takes no memory
    logits = torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, (3, 40), (stride, 1))
    values, ids, g, h = draw(3, 40, torch.bfloat16)
    logits.copy_(values)
    logprobs, entropy, lse = sweep(logits, ids, None, 1.0, True)
    sweep_backward(logits, ids, None, 1.0, lse, entropy, g, h, logits)
    expected = sweep(values, ids, None, 1.0, True)
    sweep_backward(values, ids, None, 1.0, lse, entropy, g, h, values)
    assert torch.equal(logprobs, expected[0]) and torch.equal(logits, values)
