"""Log-probabilities and entropies against float64, with torch's own error in the same dtype as the budget."""

from __future__ import annotations

import pytest
import torch

from medbridge_kernels import reference, token_logprobs


def exact(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = torch.log_softmax(logits.double() / temperature, dim=-1)
    entropy = -(distribution.exp() * distribution.clamp(min=-1e300)).sum(-1)
    return distribution.gather(-1, ids[..., None])[..., 0], entropy


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = (spread * torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 123, 50_257])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_within_twice_the_error_of_torch(vocab: int, dtype: torch.dtype, temperature: float) -> None:
    logits, ids = draw(17, vocab, dtype)
    found, entropy = token_logprobs(logits, ids, temperature, entropy=True)
    logprob, true_entropy = exact(logits, ids, temperature)
    wide = logits.float()
    torch_all = torch.log_softmax(wide / temperature, dim=-1)
    torch_logprob, torch_entropy = (
        torch_all.gather(-1, ids[:, None])[:, 0],
        -(torch_all.exp() * torch_all).sum(-1),
    )
    # Few rows may flatter torch: no budget is below the rounding of the logits themselves.
    rounding = torch.finfo(wide.dtype).eps * (wide / temperature).abs().max().double()
    assert found.dtype == entropy.dtype == torch.float32
    for ours, theirs, true in ((found, torch_logprob, logprob), (entropy, torch_entropy, true_entropy)):
        budget = max(2 * (theirs.double() - true).abs().max(), rounding)
        assert (ours.double() - true).abs().max() <= budget


def test_peaked_constant_and_ruled_out_logits() -> None:
    inf = float("inf")
    logits = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [1.0, 1, -inf, -inf]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([3, 0, 1]), entropy=True)
    expected = torch.tensor([4.0, 1.0, 2.0]).log()
    torch.testing.assert_close(logprobs, -expected)
    torch.testing.assert_close(entropy, expected)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("entropy", [False, True])
def test_with_and_without_gradients_are_the_same(entropy: bool) -> None:
    logits, ids = draw(9, 31)
    plain = token_logprobs(logits, ids, 0.7, entropy=entropy)
    graph = token_logprobs(logits.requires_grad_(), ids, 0.7, entropy=entropy)
    torch.testing.assert_close(graph, plain, rtol=0, atol=0)


def test_blocks_of_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = draw(23, 11)
    per_row = torch.linspace(0.5, 2, 23)
    whole = token_logprobs(logits, ids, per_row, entropy=True)
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 5 * 11 * 4)
    in_blocks = token_logprobs(logits, ids, per_row, entropy=True)
    torch.testing.assert_close(in_blocks, whole, rtol=0, atol=0)
    torch.testing.assert_close(whole[0][4], token_logprobs(logits[4], ids[4], float(per_row[4])))


def test_gradcheck() -> None:
    logits, ids = draw(4, 6, torch.float64)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, ids, temperature, entropy=True), (logits.requires_grad_(),)
    )


def test_any_leading_shape() -> None:
    logits, ids = draw(6, 5)
    torch.testing.assert_close(
        token_logprobs(logits.view(2, 3, 5), ids.view(2, 3)), token_logprobs(logits, ids).view(2, 3)
    )
    assert token_logprobs(logits[:0], ids[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "logits must be floating point"),
        ({"token_ids": torch.ones(2, dtype=torch.int32)}, TypeError, "token_ids must be int64"),
        (
            {"token_ids": torch.ones(3, dtype=torch.int64)},
            ValueError,
            r"\(2, 3\) and token_ids of shape \(3,\)",
        ),
        ({"token_ids": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"must be \[\.\.\., vocab\]"),
        ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \(3,\)"),
        ({"impl": "native"}, NotImplementedError, "impl='native' isn't available in this version"),
    ],
)
def test_refusals(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_logprobs(**{"logits": torch.ones(2, 3), "token_ids": torch.zeros(2, dtype=torch.int64), **change})
