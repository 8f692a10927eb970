"""Maxima of rewards, PKPO's weights and Pass@k-training advantages against enumeration in exact rational arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, pairwise, product
from math import comb, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medbridge.support.passk import pass_at_k
from medbridge.support.rewards import max_at_k, pass_at_k_advantages, pass_at_k_weights

BUDGET = 1e-13
SUBNORMAL = 1e-300  # here doubles begin to lose digits: a larger error allows for it
BASELINES = ("none", "loo", "loo_minus_one")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max_at_k": lambda rewards, k, offsets=None: max_at_k(rewards, [k], offsets),
    "pass_at_k_weights": lambda rewards, k, offsets=None: pass_at_k_weights(rewards, k, "none", offsets),
    "pass_at_k_advantages": pass_at_k_advantages,
}
THREADED = """
import sys
import numpy as np
from medbridge import _native
generator = np.random.default_rng(5)
offsets = np.concatenate([[0], np.cumsum(generator.integers(0, 40, 2000))])
rewards = generator.normal(size=offsets[-1]).round(1)
out = sys.stdout.buffer
out.write(_native.max_at_k(rewards, np.arange(1, 20), offsets).tobytes())
for baseline in ("none", "loo", "loo_minus_one"):
    out.write(_native.pass_at_k_weights(rewards, 4, baseline, offsets).tobytes())
out.write(_native.pass_at_k_advantages(rewards, 4, offsets).tobytes())
"""

# Few distinct values, so that ties are common, or any values of very different size.
rewards_of_an_item = st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=8) | st.lists(
    st.floats(-1e6, 1e6), min_size=1, max_size=8
)


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def maxima(rewards: list[Fraction], k: int) -> list[Fraction]:
    """The maximum of every k-subset; of the empty one 0."""
    return [max(subset, default=Fraction(0)) for subset in combinations(rewards, k)]


def with_and_without(rewards: list[Fraction], i: int, k: int) -> tuple[Fraction, list[Fraction]]:
    """E[max({g_i} u J)], and the rewards of the other samples."""
    others = rewards[:i] + rewards[i + 1 :]
    return mean([max((rewards[i], *J)) for J in combinations(others, k - 1)]), others


def exact_weight(rewards: list[Fraction], i: int, k: int, baseline: str) -> Fraction:
    found, others = with_and_without(rewards, i, k)
    if baseline != "none":
        found -= mean(maxima(others, k if baseline == "loo" else k - 1))
    return Fraction(k, len(rewards)) * found


def undefined(n: int, k: int, baseline: str) -> bool:
    return k > n or (baseline == "loo" and k == n)


@settings(max_examples=100, deadline=None)
@given(rewards_of_an_item)
def test_max_at_k_equals_the_enumeration_of_all_subsets(rewards: list[float]) -> None:
    exact = [Fraction(r) for r in rewards]
    ks = [*range(1, len(rewards) + 2)]
    row = max_at_k([rewards], ks)[0]
    assert np.isnan(row[-1])
    for k, found in zip(ks[:-1], row.tolist(), strict=False):
        assert abs(Fraction(found) - mean(maxima(exact, k))) <= BUDGET * max(map(abs, rewards)) + SUBNORMAL


@pytest.mark.parametrize("baseline", BASELINES)
@settings(max_examples=60, deadline=None)
@given(rewards=rewards_of_an_item)
def test_weights_equal_the_enumeration_of_all_subsets(baseline: str, rewards: list[float]) -> None:
    exact = [Fraction(r) for r in rewards]
    n = len(rewards)
    size = max(map(abs, rewards)) if baseline == "none" else max(rewards) - min(rewards)
    for k in range(2 if baseline == "loo_minus_one" else 1, n + 2):
        found = pass_at_k_weights([rewards], k, baseline)[0].tolist()  # type: ignore[arg-type]
        if undefined(n, k, baseline):
            assert np.isnan(found).all()
        else:
            for i in range(n):
                assert abs(Fraction(found[i]) - exact_weight(exact, i, k, baseline)) <= BUDGET * size + SUBNORMAL


@settings(max_examples=60, deadline=None)
@example([0.0, 1.0, 1.0 + 2**-52])  # at k = 2 only the small gap counts
@example([-1e300, 1e-300, 3e-300, 2e-300])
@given(rewards_of_an_item)
def test_advantages_equal_the_enumeration_of_all_subsets(rewards: list[float]) -> None:
    exact = [Fraction(r) for r in rewards]
    n = len(rewards)
    for k in range(1, n + 1):
        best = maxima(exact, k)
        variance = mean([x * x for x in best]) - mean(best) ** 2
        found = pass_at_k_advantages([rewards], k)[0]
        if variance == 0:
            assert not found.any()
        else:
            deviations = [with_and_without(exact, i, k)[0] - mean(best) for i in range(n)]
            # squared and rational: a tiny variance has no double
            expected = [float(np.sign(d)) * sqrt(d * d / variance) for d in deviations]
            np.testing.assert_allclose(found, expected, rtol=BUDGET, atol=BUDGET)
        assert np.all(np.abs(found) <= sqrt((n - k) / k) * (1 + BUDGET))
        assert abs(found.sum()) <= 1e-12
    assert np.isnan(pass_at_k_advantages([rewards], n + 1)).all()


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("k", [2, 10, 90])
def test_accuracy_for_many_samples(n: int, k: int) -> None:
    rewards = np.random.default_rng(n + k).normal(size=n)
    order = np.argsort(rewards)
    g = [Fraction(r) for r in rewards[order].tolist()]
    most = sum((comb(i, k - 1) * g[i] for i in range(n)), Fraction(0)) / comb(n, k)
    assert abs(Fraction(float(max_at_k([rewards], [k])[0, 0])) - most) <= BUDGET
    weights = pass_at_k_weights([rewards], k, "loo_minus_one")[0][order]
    for i in (0, n // 2, n - 1):
        gains = (comb(j, k - 2) * (g[i] - g[j]) for j in range(i))  # J's maximum is g[j], below g[i]
        exact = sum(gains, Fraction(0)) / comb(n - 1, k - 1) * k / n
        assert abs(Fraction(float(weights[i])) - exact) <= BUDGET * exact
    # The mean over the samples of E[max I_i] is the mean over all subsets.
    np.testing.assert_allclose(pass_at_k_weights([rewards], k).sum() / k, float(most), rtol=BUDGET)


def test_stored_values() -> None:
    rewards = [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert max_at_k(rewards, [4])[0, 0] == pytest.approx(0.7857142857142857, rel=1e-15)
    right, wrong = pass_at_k_weights(rewards, 4, "loo_minus_one")[0, [0, 7]]
    assert right == pytest.approx(0.2857142857142857, rel=1e-15)
    assert wrong == 0
    assert pass_at_k_advantages(rewards, 4)[0, [0, 7]].round(6).tolist() == [0.522233, -0.174078]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.data())
def test_binary_rewards_give_pass_at_k_and_the_papers_advantage(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    rewards = np.arange(n) < c
    support = Fraction(1) - Fraction(comb(n - c, k), comb(n, k))
    found = max_at_k([rewards.astype(int)], range(1, n + 1))
    np.testing.assert_allclose(found, pass_at_k([n], [c], range(1, n + 1)), rtol=BUDGET)
    advantages = pass_at_k_advantages([rewards.astype(np.int8)], k)[0]
    if support in (0, 1):
        assert not advantages.any()
        return
    sd = sqrt(support * (1 - support))
    if c > 0:
        assert advantages[0] == pytest.approx(float(1 - support) / sd, rel=BUDGET)
    if c < n:
        wrong = 1 - support - Fraction(comb(n - c - 1, k - 1), comb(n - 1, k - 1))
        assert advantages[-1] == pytest.approx(float(wrong) / sd, rel=BUDGET)


def test_one_sample_advantage_is_the_standardised_reward() -> None:
    rewards = np.random.default_rng(1).normal(3, 2, (1, 32))
    expected = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(pass_at_k_advantages(rewards, 1), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_are_unbiased_for_the_gradient_of_the_maximum(k: int, baseline: str) -> None:
    if k == 1 and baseline == "loo_minus_one":
        return  # undefined
    chance, value = np.array([0.5, 0.3, 0.2]), np.array([0.25, -1.0, 2.0])
    score = np.eye(3) - chance  # gradient of log p(action) with respect to the logits
    actions = np.array(list(product(range(3), repeat=k)))
    gradient = np.einsum("o,o,oik->k", chance[actions].prod(axis=1), value[actions].max(axis=1), score[actions])
    samples = np.array(list(product(range(3), repeat=4)))  # every outcome of n = 4 samples
    weights = pass_at_k_weights(value[samples], k, baseline)  # type: ignore[arg-type]
    expected = np.einsum("o,oi,oik->k", chance[samples].prod(axis=1), weights, score[samples])
    np.testing.assert_allclose(expected, gradient, rtol=1e-13)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.3, -0.0, 0.0, 0.1, 0.7]), min_size=2, max_size=40), st.data())
def test_ties_get_the_same_bits(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(2, len(rewards)))
    results = [pass_at_k_weights([rewards], k, baseline)[0] for baseline in BASELINES]  # type: ignore[arg-type]
    for found in [*results, pass_at_k_advantages([rewards], k)[0]]:
        for value in set(rewards):
            assert len({x.hex() for x, r in zip(found.tolist(), rewards, strict=True) if r == value}) == 1


@pytest.mark.parametrize("value", [0.1, -3.7, 0.0, 1e300, -5e-324])
def test_equal_rewards_give_exactly_0(value: float) -> None:
    rewards = np.full((1, 13), value)
    assert not pass_at_k_weights(rewards, 5, "loo").any()
    assert not pass_at_k_weights(rewards, 5, "loo_minus_one").any()
    assert not pass_at_k_advantages(rewards, 5).any()
    np.testing.assert_array_equal(max_at_k(rewards, [1, 5, 13]), [[value] * 3])


def test_rewards_of_extreme_size() -> None:
    for size in (1e300, 1e-300, 5e-324):
        rewards = np.array([[-size, 0.0, size, size]])
        np.testing.assert_allclose(
            pass_at_k_advantages(rewards, 2), pass_at_k_advantages([[-1, 0, 1, 1]], 2), rtol=BUDGET
        )
        assert np.all(np.abs(max_at_k(rewards, [1, 2, 3, 4])) <= size)
        assert np.isfinite(pass_at_k_weights(rewards, 2, "loo")).all()
    # so many samples that the chance of missing the best underflows
    rewards = np.arange(5000.0)[None]
    assert np.isfinite(pass_at_k_advantages(rewards, 2500)).all()
    assert max_at_k(rewards, [2500])[0, 0] == pytest.approx(5000 * 2500 / 2501 + 2500 / 2501 - 1, rel=1e-13)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ragged_items_equal_one_at_a_time(name: str) -> None:
    function = FUNCTIONS[name]
    generator = np.random.default_rng(2)
    offsets = np.concatenate([[0], np.cumsum(generator.integers(0, 9, 300)), [0]])
    offsets[-1] = offsets[-2]  # the last item is empty
    rewards = generator.normal(size=offsets[-1])
    together = function(rewards, 3, offsets)
    assert together.shape == ((301, 1) if name == "max_at_k" else rewards.shape)
    for i, (start, end) in enumerate(pairwise(offsets)):
        alone = function(rewards[start:end], 3, [0, end - start])
        np.testing.assert_array_equal(together[i : i + 1] if name == "max_at_k" else together[start:end], alone)
        np.testing.assert_array_equal(alone, function(rewards[None, start:end], 3).reshape(alone.shape))
        assert np.isnan(alone).all() == (end - start < 3) or alone.size == 0


def test_the_number_of_threads_changes_no_bit() -> None:
    results = [
        subprocess.run(
            [sys.executable, "-c", THREADED],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    ]
    assert len(results[0]) > 1_000_000
    assert results[0] == results[1] == results[2]


def test_strided_input_and_every_real_dtype() -> None:
    values = [[3, 1, 2, 2], [0, 0, 1, 5]]
    expected = max_at_k(values, [2])
    for dtype in ("int8", "uint16", "int64", "uint64", "float16", "float32", ">f8", "longdouble"):
        np.testing.assert_array_equal(max_at_k(np.array(values, dtype=dtype), [2]), expected)
    np.testing.assert_array_equal(max_at_k(np.asfortranarray(values), [2]), expected)
    np.testing.assert_array_equal(max_at_k(np.array(values).repeat(2, axis=1)[:, ::2], np.array([2])), expected)


def test_empty_input_and_a_k_beyond_everything() -> None:
    assert max_at_k(np.zeros((0, 4)), [1]).shape == (0, 1)
    assert max_at_k([[1.0]], []).shape == (1, 0)
    assert max_at_k([], [1, 2], [0]).shape == (0, 2)
    assert pass_at_k_weights([], 2, "loo", [0, 0]).shape == (0,)
    assert pass_at_k_advantages(np.zeros((3, 0)), 1).shape == (3, 0)
    assert np.isnan(max_at_k(np.zeros((2, 0)), [1])).all()
    assert np.isnan(pass_at_k_weights([[1.0, 2.0]], 2**63 - 1, "loo")).all()
    assert np.isnan(max_at_k([[1.0, 2.0]], [2**63 - 1])).all()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("rewards", "offsets", "message"),
    [
        ([[0.0, 1.0], [2.0, float("nan")]], None, r"rewards\[1, 1\] = nan: rewards must be finite"),
        ([[0.0, float("-inf")]], None, r"rewards\[0, 1\] = -inf: rewards must be finite"),
        ([0.0, 1.0, float("inf")], [0, 3], r"rewards\[2\] = inf: rewards must be finite"),
        ([[0.0, 2e300]], None, r"rewards\[0, 1\] = 2e\+300: the largest accepted magnitude is 1e300"),
        ([[True, False]], None, r"rewards must hold real numbers, got dtype bool"),
        ([["1", "0"]], None, r"rewards must hold real numbers"),
        ([[1j]], None, r"rewards must hold real numbers, got dtype complex128"),
        ([0.0, 1.0], None, r"rewards must have two dimensions, got shape \(2,\)"),
        ([[0.0, 1.0]], [0, 2], r"rewards must have one dimension, got shape \(1, 2\)"),
        ([[0.0], [0.0, 1.0]], None, r"rewards can't be read as a numpy array"),
        ([0.0, 1.0], [], r"offsets is empty"),
        ([0.0, 1.0], [1, 2], r"offsets\[0\] = 1: the first group must start at 0"),
        ([0.0, 1.0], [0, 2, 1], r"offsets\[2\] = 1 is below offsets\[1\] = 2"),
        ([0.0, 1.0], [0, 1], r"offsets\[1\] = 1: the last group must end with the last of the 2 rewards"),
        ([0.0, 1.0], [0, 3], r"offsets\[1\] = 3: the last group must end"),
        ([0.0, 1.0], [0.0, 2.0], r"offsets must hold integers"),
        ([0.0, 1.0], 2, r"offsets must have one dimension"),
    ],
)
def test_bad_rewards_and_offsets(name: str, rewards: object, offsets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](rewards, 1, offsets)


@pytest.mark.parametrize("function", [pass_at_k_weights, pass_at_k_advantages])
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, r"k = 0 is below 1"),
        (-3, r"k = -3 is below 1"),
        (2.0, r"k must be an integer, got 2.0"),
        (True, r"k must be an integer, got True"),
        ("2", r"k must be an integer, got '2'"),
        (None, r"k must be an integer, got None"),
        (2**63, r"k = 9223372036854775808 doesn't fit in int64"),
    ],
)
def test_bad_k(function: Callable[..., Any], k: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function([[0.0, 1.0]], k)


def test_bad_ks_and_baseline() -> None:
    with pytest.raises(ValueError, match=r"ks\[1\] = 0 is below 1"):
        max_at_k([[0.0, 1.0]], [1, 0])
    with pytest.raises(ValueError, match=r"ks must hold integers"):
        max_at_k([[0.0, 1.0]], [1.0])
    with pytest.raises(ValueError, match=r"baseline = 'mean': expected 'none', 'loo' or 'loo_minus_one'"):
        pass_at_k_weights([[0.0, 1.0]], 1, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k = 1: the loo_minus_one baseline"):
        pass_at_k_weights([[0.0, 1.0]], 1, "loo_minus_one")
    assert pass_at_k_weights([[0.0, 1.0]], np.int32(1)).tolist() == [[0.0, 0.5]]
