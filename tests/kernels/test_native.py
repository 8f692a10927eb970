"""The C++ back end against float64: errors, special values, memory, determinism, and each set of instructions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medbridge_kernels import native, reference

if native.why_missing() is not None:
    pytest.skip(native.why_missing(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A last place of the type, relative: below it an error can't be told from the rounding of the result.
RESOLUTION = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NAN, INF = float("nan"), float("inf")


class Outcome:
    """Everything that both directions return for some rows."""

    def __init__(self, logprobs: Tensor, entropy: Tensor, gradient: Tensor) -> None:
        self.logprobs, self.entropy, self.gradient = logprobs, entropy, gradient

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logprobs, self.entropy, self.gradient


def by_torch(
    logits: Tensor, ids: Tensor, temperature: float | Tensor, g: Tensor, h: Tensor, dtype: torch.dtype
) -> Outcome:
    """torch's own code, computed in `dtype`, the gradient in the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    z = leaf.to(dtype)
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    logprobs, entropy = reference.logprobs_and_entropy(z, ids)
    ((logprobs * g.to(dtype)).sum() + (entropy * h.to(dtype)).sum()).backward()
    return Outcome(logprobs.detach(), entropy.detach(), leaf.grad)


def exact(logits: Tensor, ids: Tensor, temperature: float | Tensor, g: Tensor, h: Tensor) -> Outcome:
    return by_torch(logits.double(), ids, temperature, g, h, torch.float64)


def by_native(
    logits: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    g: Tensor,
    h: Tensor | None,
    keep: Tensor | None = None,
    out: Tensor | None = None,
) -> Outcome:
    logprobs, entropy, lse = native.sweep(logits, ids, keep, temperature, True)
    out = torch.full_like(logits, NAN) if out is None else out
    native.sweep_backward(logits, ids, keep, temperature, lse, entropy, g, h, out)
    return Outcome(logprobs, entropy, out)


def rows(tokens: int, vocab: int, dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, token ids, and the gradients by log-probability and entropy."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(tokens, vocab, generator=generator) * 3 + 5
    if kind == "constant":
        logits = torch.full((tokens, vocab), 1.25)
    if kind == "peaked":
        logits[torch.arange(tokens), torch.arange(tokens) % vocab] += 40
    if kind == "ruled out":
        logits[torch.rand(tokens, vocab, generator=generator) < 0.4] = -INF
        logits[:, 0] = 3.0
    if kind == "ascending":
        logits = logits.sort(dim=-1).values
    ids = torch.randint(0, vocab, (tokens,), generator=generator)
    ids[: tokens // 2] = logits[: tokens // 2].argmax(dim=-1)  # sampled tokens are mostly likely ones
    g, h = (torch.rand(tokens, generator=generator) * 1.8 - 0.9 for _ in range(2))
    return logits.to(dtype), ids, g, h


def assert_within_budget(found: Outcome, own: Outcome, true: Outcome, dtype: torch.dtype) -> None:
    """At most twice the error of torch's own code, and never less than the type can show (of nats, at one nat)."""
    types = (torch.float32, torch.float32, dtype)
    for name, a, b, c, kind in zip(
        ("logprobs", "entropy", "gradient"), found.parts(), own.parts(), true.parts(), types, strict=True
    ):
        finite = c.isfinite()
        assert torch.equal(a.double()[~finite], c[~finite]) and bool(a[finite].isfinite().all()), name
        largest = float(c[finite].abs().max()) if bool(finite.any()) else 0.0
        largest = largest if name == "gradient" else max(largest, 1.0)
        error, budget = (float((x.double() - c)[finite].abs().max()) if bool(finite.any()) else 0.0 for x in (a, b))
        assert error <= max(2 * budget, RESOLUTION[kind] * largest), f"{name}: {error:.2e}, torch's own {budget:.2e}"


@pytest.mark.parametrize("kind", ["normal", "constant", "peaked", "ruled out", "ascending"])
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 123, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_twice_that_of_torch(dtype: torch.dtype, vocab: int, kind: str) -> None:
    tokens = 24 if vocab < 1000 else 4
    logits, ids, g, h = rows(tokens, vocab, dtype, kind)
    for temperature in (1.0, 0.7, torch.linspace(0.4, 1.9, tokens)):
        own = by_torch(logits, ids, temperature, g, h, torch.float32)
        true = exact(logits, ids, temperature, g, h)
        assert_within_budget(by_native(logits, ids, temperature, g, h), own, true, dtype)


@pytest.mark.parametrize("vocab", [151_936, 151_937])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype: torch.dtype, vocab: int) -> None:
    logits, ids, g, h = rows(3, vocab, dtype)
    own = by_torch(logits, ids, 0.8, g, h, torch.float32)
    assert_within_budget(by_native(logits, ids, 0.8, g, h), own, exact(logits, ids, 0.8, g, h), dtype)


def test_a_common_offset_of_the_logits_costs_no_digits() -> None:
    logits, ids, g, h = rows(8, 1000, torch.float32)
    logits = (logits.double() + 5000).float()
    true = exact(logits, ids, 1.0, g, h)
    own = torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]  # more exact than z - logsumexp(z)
    found = by_native(logits, ids, 1.0, g, h)
    assert float((found.logprobs - true.logprobs).abs().max()) <= max(
        2 * float((own - true.logprobs).abs().max()), RESOLUTION[torch.float32] * float(true.logprobs.abs().max())
    )
    assert float((found.gradient - true.gradient).abs().max()) < 3e-7


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_bits_of_out_of_place(dtype: torch.dtype, with_entropy: bool) -> None:
    for tokens, vocab in ((5, 333), (70, 40_001)):  # the second is written past the caches where it has its own memory
        logits, ids, g, h = rows(tokens, vocab, dtype)
        apart = by_native(logits, ids, 0.9, g, h if with_entropy else None)
        assert not bool(apart.gradient.isnan().any())
        over = logits.clone()
        by_native(over, ids, 0.9, g, h if with_entropy else None, out=over)
        assert torch.equal(apart.gradient, over)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    logits, ids, g, h = rows(70, 30_001, dtype)
    plain = by_native(logits, ids, 1.0, g, h)
    wide = torch.full((70, 30_050), NAN, dtype=dtype)
    wide[:, 7:30_008] = logits
    out = torch.full((70, 30_050), 3.0, dtype=dtype)
    strided = by_native(wide[:, 7:30_008], ids, 1.0, g, h, out=out[:, 5:30_006])
    assert all(torch.equal(a, b) for a, b in zip(plain.parts(), strided.parts(), strict=True))
    assert bool((out[:, :5] == 3).all()) and bool((out[:, 30_006:] == 3).all())
    every_other = by_native(logits[::2], ids[::2].contiguous(), 1.0, g[::2].contiguous(), h[::2].contiguous())
    assert torch.equal(every_other.gradient, plain.gradient[::2])
    repeated, ids, g = logits[:1].expand(70, -1), ids[:1].expand(70).contiguous(), g[:1].expand(70).contiguous()
    assert torch.equal(
        by_native(repeated, ids, 1.0, g, None, out=torch.empty_like(logits)).logprobs[-1], plain.logprobs[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_outside_keep_are_not_read(dtype: torch.dtype) -> None:
    logits, ids, g, h = rows(9, 77, dtype)
    keep = torch.arange(9) % 3 != 1
    plain = by_native(logits, ids, 1.0, g, h)
    logits[~keep], ids[~keep], g[~keep], h[~keep] = NAN, -100, NAN, NAN
    found = by_native(logits, ids, 1.0, g, h, keep)
    for a, b in zip(found.parts(), plain.parts(), strict=True):
        assert torch.equal(a[keep], b[keep]) and bool((a[~keep] == 0).all())
    assert bool((native.sweep(logits, ids, keep, 1.0, False)[2][~keep] == 0).all())


def test_rows_without_gradient_are_not_read_for_it() -> None:
    logits, ids, g, h = rows(6, 50, torch.float32)
    _, entropy, lse = native.sweep(logits, ids, None, 1.0, True)
    g[:4], h[2:] = 0.0, 0.0
    logits[2:4] = NAN
    out = torch.full_like(logits, NAN)
    native.sweep_backward(logits, ids, None, 1.0, lse, entropy, g, h, out)
    assert bool((out[2:4] == 0).all()) and bool((out[[0, 1, 4, 5]] != 0).all())
    native.sweep_backward(logits, ids, None, 1.0, lse, None, g, None, out)
    assert bool((out[:4] == 0).all()) and bool((out[4:] != 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 200])
def test_undefined_rows_are_nan_and_leave_the_others_alone(dtype: torch.dtype, vocab: int) -> None:
    logits, ids, g, h = rows(6, vocab, dtype)
    plain = by_native(logits, ids, 1.0, g, h)
    ids[:4] = 0
    logits[0, vocab // 2], logits[1], logits[2], logits[3, -1] = NAN, NAN, -INF, INF
    found = by_native(logits, ids, 1.0, g, h)
    for a, b in zip(found.parts(), plain.parts(), strict=True):
        assert bool(a[:4].isnan().all()) and torch.equal(a[4:], b[4:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_finite_logits_are_numbers(dtype: torch.dtype) -> None:
    logits = torch.full((2, 40), torch.finfo(dtype).min, dtype=dtype)
    logits[1, 3] = torch.finfo(dtype).max
    logprobs, entropy, _ = native.sweep(logits, torch.tensor([7, 3]), None, 1.0, True)
    torch.testing.assert_close(logprobs, torch.tensor([-np.log(40.0), 0.0], dtype=torch.float32))
    torch.testing.assert_close(entropy, torch.tensor([np.log(40.0), 0.0], dtype=torch.float32))


def test_ruled_out_tokens_get_exactly_no_gradient() -> None:
    logits, ids, g, h = rows(5, 600, torch.float32, "ruled out")
    ids[:] = 0
    found = by_native(logits, ids, 0.6, g, h)
    assert bool((found.gradient[logits == -INF] == 0).all())
    token = int((logits[0] == -INF).nonzero()[0])
    logprobs, _, _ = native.sweep(logits[:1], torch.tensor([token]), None, 1.0, False)
    assert float(logprobs[0]) == -INF


@pytest.mark.parametrize("token", [-1, -100, 11, 2**62, -(2**63)])
def test_token_ids_outside_the_vocabulary_give_nan(token: int) -> None:
    logits, ids, g, h = rows(3, 11, torch.float32)
    plain = by_native(logits, ids, 1.0, g, h)
    ids[1] = token
    found = by_native(logits, ids, 1.0, g, h)
    assert bool(found.logprobs[1].isnan()) and torch.equal(found.entropy, plain.entropy)
    assert torch.equal(found.gradient[[0, 2]], plain.gradient[[0, 2]])


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_temperatures_per_token_that_are_none_give_nan(temperature: float) -> None:
    logits, ids, g, h = rows(3, 11, torch.float32)
    found = by_native(logits, ids, torch.tensor([1.0, temperature, 1.0]), g, h)
    plain = by_native(logits, ids, 1.0, g, h)
    for a, b in zip(found.parts(), plain.parts(), strict=True):
        assert bool(a[1].isnan().all()) and torch.equal(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_nothing_to_read(shape: tuple[int, int]) -> None:
    logits, ids = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64)
    found = by_native(logits, ids, 1.0, torch.ones(shape[0]), None)
    assert found.gradient.shape == shape and bool(found.logprobs.isnan().all())


def test_entropy_only_where_it_is_asked_for() -> None:
    logits, ids, _, _ = rows(4, 90, torch.float32)
    with_entropy, without = (native.sweep(logits, ids, None, 1.0, asked) for asked in (True, False))
    assert torch.equal(with_entropy[0], without[0]) and torch.equal(with_entropy[2], without[2])
    assert with_entropy[1].shape == (4,) and without[1].shape == (0,)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    logits, ids, _, _ = rows(9, 35, torch.float32)
    for tensor in native.sweep(logits, ids, torch.arange(9) % 2 == 0, 1.0, True):
        assert not bool(tensor.isnan().any())
    advantages = native.group_advantages(torch.randn(9), torch.tensor([0, 2, 2, 9]), "mean", "std", True, 1e-4)
    assert not bool(advantages.isnan().any())


def test_same_bits_for_any_number_of_threads_and_on_every_run() -> None:
    threads = torch.get_num_threads()
    logits, ids, g, h = rows(64, 3001, torch.float32)
    found = []
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            found.append(by_native(logits, ids, 0.7, g, h))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].parts(), other.parts(), strict=True))


def _instruction_sets() -> list[str]:
    from medbridge_kernels import _native

    sets = ["portable", "avx2", "avx512"]
    return sets[: sets.index(_native.instruction_set())]


@pytest.mark.parametrize("name", _instruction_sets())
def test_lesser_instruction_sets(name: str) -> None:
    """The set is chosen once per process: a child runs the checks above that concern values."""
    checks = "error_at_most_twice or undefined_rows or in_place or strided_rows or lowest or ruled_out or common_offset"
    environment = {**os.environ, "MEDBRIDGE_PORTABLE": {"portable": "1", "avx2": "avx2"}[name], "OMP_NUM_THREADS": "1"}
    program = (
        "import sys, pytest\nfrom medbridge_kernels import _native\n"
        f"assert _native.instruction_set() == {name!r}, _native.instruction_set()\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {checks!r}, {__file__!r}]))"
    )
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-1000:]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(3, 8, dtype=torch.float64)}, ValueError, "dtype = 'float64'"),
        ({"logits": torch.ones(8, 3).t()}, ValueError, "contiguous over the vocabulary"),
        ({"logits": torch.ones(3)}, ValueError, r"logits must be \[tokens, vocab\], got shape \(3,\)"),
        ({"token_ids": torch.zeros(3, dtype=torch.int32)}, TypeError, "token_ids must have dtype int64, got int32"),
        ({"token_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"token_ids must have shape \(3,\), got \(4,\)"),
        ({"token_ids": torch.zeros(6, dtype=torch.int64)[::2]}, ValueError, "token_ids must be contiguous"),
        ({"keep": torch.ones(3)}, TypeError, "keep must have dtype bool"),
        ({"keep": torch.ones(2, dtype=torch.bool)}, ValueError, r"keep must have shape \(3,\)"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperatures must have shape \(3,\)"),
        ({"temperature": torch.ones(3, dtype=torch.float64)}, TypeError, "temperatures must have dtype float32"),
        ({"lse": torch.ones(2)}, ValueError, r"lse must have shape \(3,\)"),
        ({"entropy": None}, ValueError, "needs the entropy"),
        ({"grad_logprobs": torch.ones(3, 1)}, ValueError, r"by_logprob must have shape \(3,\)"),
        ({"grad_entropy": torch.ones(4)}, ValueError, r"by_entropy must have shape \(3,\)"),
        ({"out": torch.ones(3, 7)}, ValueError, r"out must have the shape of the logits, \(3, 8\), got \(3, 7\)"),
        ({"out": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "out must have dtype float32"),
        ({"out": torch.ones(1, 8).expand(3, 8)}, ValueError, "out: rows 0 bytes apart"),
    ],
)  # fmt: skip
def test_refusals(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "logits": torch.ones(3, 8), "token_ids": torch.zeros(3, dtype=torch.int64), "keep": None, "temperature": 1.0,
        "lse": torch.ones(3), "entropy": torch.ones(3), "grad_logprobs": torch.ones(3), "grad_entropy": torch.ones(3),
        "out": torch.ones(3, 8),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        native.sweep_backward(**{**arguments, **change})


def test_out_may_be_the_logits_or_lie_elsewhere_but_not_overlap_them() -> None:
    memory = torch.randn(5, 8)
    lse, g, ids = torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="overlaps"):
        native.sweep_backward(memory[:3], ids, None, 1.0, lse, None, g, None, memory[1:4])
    read_only = memory.numpy()[:3]
    read_only.flags.writeable = False
    from medbridge_kernels import _native

    with pytest.raises(ValueError, match="writeable"):
        _native.sweep_backward(
            read_only, "float32", ids.numpy(), None, 1.0, None, lse.double().numpy(), None, g.numpy(), None, read_only
        )


# --- group advantage ---

REWARDS = st.lists(
    st.one_of(st.floats(-5, 5, width=32), st.sampled_from([0.0, 1.0, 0.1, 0.1, 1.0000001, NAN])), max_size=40
)


@given(rewards=REWARDS, cuts=st.lists(st.integers(0, 40), max_size=8), options=st.sampled_from(list(product(
    ("mean", "loo", "none"), ("std", "batch_std", "none"), (True, False), (torch.float64, torch.float32, torch.float16)
))))  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_group_advantages_are_those_of_the_reference(rewards: list[float], cuts: list[int], options: tuple) -> None:
    baseline, scale, unbiased, dtype = options
    reward = torch.tensor(rewards, dtype=dtype)
    offsets = torch.tensor([0, *sorted(min(cut, len(rewards)) for cut in cuts), len(rewards)])
    found = native.group_advantages(reward, offsets, baseline, scale, unbiased, 1e-4)
    expected = reference.group_advantages(reward, offsets, baseline, scale, unbiased, 1e-4)
    assert found.dtype == dtype
    # The difference of nearly equal rewards, in float64, over an eps of 1e-4.
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-10)
    assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize(("baseline", "scale"), [("mean", "std"), ("loo", "batch_std"), ("none", "std")])
def test_equal_rewards_give_exactly_zero(baseline: str, scale: str) -> None:
    rewards = torch.tensor([0.1] * 7 + [0.7] + [NAN, 0.3, 0.3] + [NAN] + [1 / 3] * 5000)
    offsets = torch.tensor([0, 7, 8, 11, 12, 12, 5012])
    assert bool((native.group_advantages(rewards, offsets, baseline, scale, True, 1e-4) == 0).all())


def test_infinite_rewards_spoil_their_own_group_only() -> None:
    rewards, offsets = torch.tensor([1.0, 2.0, INF, 0.0, 1.0, 4.0]), torch.tensor([0, 3, 6])
    found = native.group_advantages(rewards, offsets, "mean", "std", True, 1e-4)
    expected = reference.group_advantages(rewards, offsets, "mean", "std", True, 1e-4)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert bool(found[:3].isnan().all()) and not bool(found[3:].isnan().any())


@pytest.mark.parametrize(
    ("offsets", "first_bad"),
    [([1, 5], 0), ([-1, 5], 0), ([0, 4], 1), ([0, 3, 2, 5], 2), ([0, 9, 5], 2), ([0, 2, 6], 2), ([0], 0), ([], None),
     ([0, -(2**63), 5], 1)],
)  # fmt: skip
def test_offsets_are_checked(offsets: list[int], first_bad: int | None) -> None:
    tensor = torch.tensor(offsets, dtype=torch.int64)
    bad = "no offsets" if first_bad is None else rf"group_offsets\[{first_bad}\] = {offsets[first_bad]}"
    with pytest.raises(ValueError, match=f"group_offsets must rise from 0 to the 5 rewards, got {bad}"):
        native.group_advantages(torch.ones(5), tensor, "mean", "std", True, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_groups_however_far_from_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.arange(0, 20).repeat(6)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    rewards = torch.rand(int(offsets[-1]), generator=generator, dtype=torch.float64)
    group = torch.repeat_interleave(sizes)
    step = 2.0**-20 if dtype == torch.float32 else 2.0**-44  # of equal sums, so that the rewards are exact
    far = (rewards / step).round() * step + torch.tensor([0.0, 1.0, -1e3, 1e6])[group % 4]
    rewards = torch.where(group % 5 == 0, rewards.round(), far).to(dtype)
    rewards[torch.rand(len(rewards), generator=generator) < 0.1] = math.nan
    rewards[offsets[7]] = 1e18  # one that outweighs its group
    for baseline, scale, unbiased in product(("mean", "loo"), ("std", "batch_std", "none"), (True, False)):
        found = native.group_advantages(rewards, offsets, baseline, scale, unbiased, 1e-4)
        exact = reference.group_advantages(rewards.double(), offsets, baseline, scale, unbiased, 1e-4)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-9 if dtype == torch.float64 else 1e-7)
