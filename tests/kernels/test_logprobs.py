"""Log-probabilities and entropies against float64, with torch's own error in the same dtype as the budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge_kernels import ops, reference, token_logprobs
from tests.kernels.conftest import FAST_DTYPES, IMPLS, log_softmax

pytestmark = pytest.mark.usefixtures("poisoned")


def exact(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    distribution = log_softmax(logits, temperature)
    entropy = -(distribution.exp() * distribution.clamp(min=-1e300)).sum(-1)
    return distribution.gather(-1, ids[..., None])[..., 0], entropy


def exact_gradient(logits: Tensor, ids: Tensor, temperature: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """(g 1[j = token] - p_j (g + h (log p_j + H))) / temperature, in float64."""
    log_p = log_softmax(logits, temperature)
    p = log_p.exp()
    log_p = log_p.clamp(min=-1e300)
    g, h, entropy = g.double()[:, None], h.double()[:, None], -(p * log_p).sum(-1, keepdim=True)
    is_label = torch.zeros_like(p).scatter_(1, ids[:, None], 1.0)
    return (g * is_label - p * (g + h * (log_p + entropy))) / temperature.double()[:, None]


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = (spread * torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 123, 128, 129, 50_257])
def test_within_twice_the_error_of_torch(vocab: int, dtype: torch.dtype, impl: str) -> None:
    logits, ids = draw(17, vocab, dtype)
    temperature = torch.linspace(0.5, 2, 17)
    found, entropy = token_logprobs(logits, ids, temperature, entropy=True, impl=impl)
    torch.testing.assert_close(token_logprobs(logits, ids, temperature, impl=impl), found)
    logprob, true_entropy = exact(logits, ids, temperature)
    wide = logits.float()
    torch_all = torch.log_softmax(wide / temperature[:, None], dim=-1)
    torch_logprob = torch_all.gather(-1, ids[:, None])[:, 0]
    torch_entropy = -(torch_all.exp() * torch_all).sum(-1)
    # Few rows may flatter torch: no budget is below the rounding of the logits themselves.
    rounding = torch.finfo(wide.dtype).eps * (wide / temperature[:, None]).abs().max().double()
    assert found.dtype == entropy.dtype == torch.float32
    for ours, theirs, true in ((found, torch_logprob, logprob), (entropy, torch_entropy, true_entropy)):
        budget = max(2 * (theirs.double() - true).abs().max(), rounding)
        assert (ours.double() - true).abs().max() <= budget


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 150, 50_257])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_gradient_within_twice_the_error_of_torch(spread: float, vocab: int, dtype: torch.dtype, impl: str) -> None:
    logits, ids = draw(9, vocab, dtype, spread)
    temperature = torch.linspace(0.5, 2, 9)
    g, h = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    true = exact_gradient(logits, ids, temperature, g, h)
    leaf = logits.clone().requires_grad_()
    results = token_logprobs(leaf, ids, temperature, entropy=True, impl=impl)
    torch.autograd.backward(results, (g, h))
    other = logits.clone().requires_grad_()
    log_p = torch.log_softmax(other.float() / temperature[:, None], dim=-1)
    torch.autograd.backward((log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)), (g, h))
    assert leaf.grad is not None and other.grad is not None
    assert leaf.grad.dtype == dtype
    budget = max(2 * (other.grad.double() - true).abs().max(), torch.finfo(torch.float32).eps * vocab**-0.5)
    assert (leaf.grad.double() - true).abs().max() <= budget


@pytest.mark.parametrize("impl", IMPLS)
def test_peaked_constant_and_ruled_out_logits(impl: str) -> None:
    inf = float("inf")
    logits = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [1.0, 1, -inf, -inf]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([3, 0, 1]), entropy=True, impl=impl)
    expected = torch.tensor([4.0, 1.0, 2.0]).log()
    torch.testing.assert_close(logprobs, -expected)
    torch.testing.assert_close(entropy, expected)
    (logprobs + 100 * entropy).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad, torch.tensor([[-0.25, -0.25, -0.25, 0.75], [0.0] * 4, [-0.5, 0.5, 0, 0]]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_a_token_that_is_ruled_out_has_log_probability_minus_infinity(dtype: torch.dtype, impl: str) -> None:
    logits = torch.zeros(2, 40, dtype=dtype)
    logits[0, 7] = -math.inf
    logprobs, entropy = token_logprobs(logits, torch.tensor([7, 7]), entropy=True, impl=impl)
    assert float(logprobs[0]) == -math.inf
    torch.testing.assert_close(entropy, torch.tensor([39.0, 40.0]).log())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("place", [0, 16, 149])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_undefined_rows_are_nan_and_only_they(bad: float, place: int, entropy: bool, impl: str) -> None:
    logits, ids = draw(5, 150)
    logits[1, place] = bad
    logits[3] = -math.inf
    results = token_logprobs(logits, ids, entropy=entropy, impl=impl)
    for result in results if entropy else (results,):
        assert result.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_native_is_right_at_the_ends_of_the_number_range(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, -top, 0.0], [-top, -top, -top], [top, top, -top]], dtype=dtype)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1, 0]), entropy=True, impl="native")
    torch.testing.assert_close(logprobs, -torch.tensor([1.0, 3.0, 2.0]).log())
    torch.testing.assert_close(entropy, torch.tensor([1.0, 3.0, 2.0]).log())


def test_a_token_id_outside_the_vocabulary_is_nan_or_refused() -> None:
    logits, _ = draw(4, 9)
    found = token_logprobs(logits, torch.tensor([0, -1, 9, 1 << 40]), impl="native")
    assert found.isnan().tolist() == [False, True, True, True]
    with pytest.raises((RuntimeError, IndexError)):
        token_logprobs(logits, torch.tensor([0, -1, 9, 1 << 40]), impl="reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
def test_gradient_of_what_is_used(used: str, impl: str) -> None:
    logits, ids = draw(9, 150)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(leaf, ids, 0.7, entropy=True, impl=impl)
    g, h = torch.full((9,), 1.5 * (used != "entropy")), torch.full((9,), -2.5 * (used != "logprobs"))
    loss = 0.0
    if used != "entropy":
        loss = loss + 1.5 * logprobs.sum()
    if used != "logprobs":
        loss = loss - 2.5 * entropy.sum()
    loss.backward()
    true = exact_gradient(logits, ids, torch.full((9,), 0.7), g, h)
    torch.testing.assert_close(leaf.grad, true.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_gradient_are_not_read(impl: str) -> None:
    logits, ids = draw(4, 150)
    leaf = logits.clone().requires_grad_()
    logprobs = token_logprobs(leaf, ids, impl=impl)
    (logprobs * torch.tensor([1.0, 0.0, 0.0, 2.0])).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.any(-1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entropy", [False, True])
def test_with_and_without_gradients_are_the_same(entropy: bool, impl: str) -> None:
    logits, ids = draw(9, 31)
    plain = token_logprobs(logits, ids, 0.7, entropy=entropy, impl=impl)
    graph = token_logprobs(logits.requires_grad_(), ids, 0.7, entropy=entropy, impl=impl)
    torch.testing.assert_close(graph, plain, rtol=0, atol=0)


def test_blocks_of_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = draw(23, 11)
    per_row = torch.linspace(0.5, 2, 23)
    whole = token_logprobs(logits, ids, per_row, entropy=True, impl="reference")
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 5 * 11 * 4)
    in_blocks = token_logprobs(logits, ids, per_row, entropy=True, impl="reference")
    torch.testing.assert_close(in_blocks, whole, rtol=0, atol=0)
    alone = token_logprobs(logits[4], ids[4], float(per_row[4]), impl="reference")
    torch.testing.assert_close(whole[0][4], alone)


def test_gradcheck() -> None:
    logits, ids = draw(4, 6, torch.float64)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, ids, temperature, entropy=True), (logits.requires_grad_(),)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_any_leading_shape(impl: str) -> None:
    logits, ids = draw(6, 5)
    temperature = torch.linspace(0.5, 2, 6)
    flat = token_logprobs(logits, ids, temperature, entropy=True, impl=impl)
    folded = token_logprobs(logits.view(2, 3, 5), ids.view(2, 3), temperature.view(2, 3), entropy=True, impl=impl)
    torch.testing.assert_close(folded, tuple(one.view(2, 3) for one in flat))
    torch.testing.assert_close(token_logprobs(logits[0], ids[0], 0.5, impl=impl), flat[0][0])
    for shape in ((0,), (0, 3), (2, 0)):
        none = token_logprobs(logits.new_empty(*shape, 5), ids.new_empty(shape), entropy=True, impl=impl)
        assert [one.shape for one in none] == [shape, shape]


@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout(impl: str) -> None:
    logits, ids = draw(12, 150)
    expected = token_logprobs(logits, ids, torch.full((12,), 0.7), impl=impl)
    columns = torch.stack([ids, ids - 1], dim=1)[:, 0]
    wide = torch.cat([logits, logits], dim=1)[:, :150]
    for given in (wide, logits.t().contiguous().t(), logits.flip(0).flip(0)):
        found = token_logprobs(given, columns, torch.tensor(0.7).expand(12), impl=impl)
        torch.testing.assert_close(found, expected)
    shifted = torch.cat([logits.view(3, 4, 150), logits.view(3, 4, 150)[:, -1:]], dim=1)[:, :-1]
    found = token_logprobs(shifted, ids.view(3, 4), 0.7, impl=impl)  # what trainers do: all rows but the last
    torch.testing.assert_close(found.view(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_entropy_in_or_out_of_the_graph(entropy_grad: bool) -> None:
    logits, ids = draw(5, 150)
    leaf = logits.requires_grad_()
    logprobs, entropy, _ = ops.vocabulary_sweep(leaf, ids, None, 1.0, None, True, entropy_grad, False, "native")
    (logprobs.sum() + entropy.sum()).backward()
    ones = torch.ones(5)
    true = exact_gradient(logits.detach(), ids, ones, ones, ones * entropy_grad)
    torch.testing.assert_close(leaf.grad, true.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": torch.ones(2, dtype=torch.int32)}, TypeError, "token_ids must be int64"),
        (
            {"token_ids": torch.ones(3, dtype=torch.int64)},
            ValueError,
            r"\(2, 3\) and token_ids of shape \(3,\)",
        ),
        ({"token_ids": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"must be \[\.\.\., vocab\]"),
        ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature = nan"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \(3,\)"),
        ({"impl": "fast"}, ValueError, "impl = 'fast', must be one of auto, triton, native, reference"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str, impl: str) -> None:
    given = {"logits": torch.ones(2, 3), "token_ids": torch.zeros(2, dtype=torch.int64), "impl": impl}
    with pytest.raises(error, match=message):
        token_logprobs(**{**given, **change})


def test_integer_logits_are_refused() -> None:
    logits, ids = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for impl in ("auto", "reference"):
        with pytest.raises(TypeError, match="logits must be floating point"):
            token_logprobs(logits, ids, impl=impl)
