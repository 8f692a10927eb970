"""Majority votes against enumeration in exact rational arithmetic, and their refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, product
from math import comb, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge.support.passk import pass_at_k
from medbridge.support.votes import majority_at_k

BUDGET = 1e-13
THREADED = """
import sys
import numpy as np
from medbridge import _native
generator = np.random.default_rng(5)
votes = np.array([generator.multinomial(64, chance) for chance in generator.dirichlet(np.ones(5), 600)])
table = _native.majority_at_k(votes, generator.integers(-1, 5, 600), np.arange(1, 71), generator.integers(0, 6, 600))
sys.stdout.buffer.write(table.tobytes())
"""


def share(counts: list[int], correct: int) -> Fraction:
    """What one draw counts for: counts are its votes per option."""
    most = max(counts, default=0)
    if correct < 0 or most == 0 or counts[correct] < most:
        return Fraction(0)
    return Fraction(1, counts.count(most))


def by_subsets(votes: list[int], correct: int, abstained: int, k: int) -> Fraction:
    samples = [option for option, count in enumerate(votes) for _ in range(count)] + [-1] * abstained
    subsets = list(combinations(samples, k))
    total = sum(share([s.count(option) for option in range(len(votes))], correct) for s in subsets)
    return Fraction(total) / len(subsets)


def by_counts(votes: list[int], correct: int, abstained: int, k: int) -> Fraction:
    """The same by the multivariate hypergeometric distribution of the votes drawn: for larger n."""
    total = Fraction(0)
    for drawn in product(*(range(v + 1) for v in votes)):
        silent = k - sum(drawn)
        if 0 <= silent <= abstained:
            ways = prod(comb(v, y) for v, y in zip(votes, drawn, strict=True)) * comb(abstained, silent)
            total += ways * share(list(drawn), correct)
    return total / comb(sum(votes) + abstained, k)


def relative_error(found: float, exact: Fraction) -> float:
    return float(abs(Fraction(found) - exact) / exact) if exact else abs(found)


@st.composite
def items(draw: st.DrawFn, most: int, options: int = 5) -> tuple[list[int], int, int]:
    votes = draw(st.lists(st.integers(0, most), min_size=1, max_size=options))
    return votes, draw(st.integers(-1, len(votes) - 1)), draw(st.integers(0, most))


@settings(max_examples=150, deadline=None)
@given(items(most=3, options=4))
def test_equals_the_enumeration_of_all_subsets(item: tuple[list[int], int, int]) -> None:
    votes, correct, abstained = item
    n = sum(votes) + abstained
    row = majority_at_k([votes], [correct], range(1, n + 3), [abstained])[0]
    for k, found in enumerate(row.tolist(), start=1):
        if k > n:
            assert np.isnan(found)
        else:
            assert relative_error(found, by_subsets(votes, correct, abstained, k)) <= BUDGET


@settings(max_examples=30, deadline=None)
@given(items(most=12, options=3), st.data())
def test_equals_the_enumeration_of_drawn_counts(item: tuple[list[int], int, int], data: st.DataObject) -> None:
    votes, correct, abstained = item
    n = sum(votes) + abstained
    k = data.draw(st.integers(1, max(1, n)))
    found = majority_at_k([votes], [correct], [k], [abstained])[0, 0]
    if k > n:
        assert np.isnan(found)
    else:
        assert relative_error(float(found), by_counts(votes, correct, abstained, k)) <= BUDGET


@pytest.mark.parametrize(
    ("votes", "abstained", "k"),
    [
        ([1, 1023], 0, 1),
        ([1, 1023], 0, 3),
        ([300, 500], 224, 512),
        ([120, 904], 0, 200),  # about 1e-47
        ([500, 120], 404, 1023),
        ([12, 30, 40], 942, 60),
        ([2, 2, 2, 1, 1, 1, 1], 1014, 1000),
    ],
)
def test_accuracy_up_to_1024_samples(votes: list[int], abstained: int, k: int) -> None:
    found = float(majority_at_k([votes], [0], [k], [abstained])[0, 0])
    assert relative_error(found, by_counts(votes, 0, abstained, k)) <= BUDGET


def test_1024_options_with_one_vote_each() -> None:
    row = majority_at_k(np.ones((1, 1024), dtype=int), [7], range(1, 1025))[0]
    np.testing.assert_allclose(row, 1 / 1024, rtol=BUDGET)  # drawn with chance k / 1024, then one of k that tie


@settings(max_examples=60, deadline=None)
@given(items(most=60))
def test_one_sample_and_all_samples(item: tuple[list[int], int, int]) -> None:
    votes, correct, abstained = item
    n = sum(votes) + abstained
    if n > 0:
        one, everything = majority_at_k([votes], [correct], [1, n], [abstained])[0]
        assert one == pytest.approx(votes[correct] / n if correct >= 0 else 0.0, rel=BUDGET)
        assert everything == pytest.approx(float(share(votes, correct)), rel=BUDGET)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_without_wrong_votes_it_is_pass_at_k(right: int, abstained: int) -> None:
    ks = np.arange(1, right + abstained + 1)
    row = majority_at_k([[0, right]], [1], ks, [abstained])
    np.testing.assert_allclose(row, pass_at_k([right + abstained], [right], ks), rtol=BUDGET)
    assert np.all(row <= 1)


@settings(max_examples=60, deadline=None)
@given(items(most=20), st.data())
def test_the_order_of_options_and_absent_options_change_no_bit(
    item: tuple[list[int], int, int], data: st.DataObject
) -> None:
    votes, correct, abstained = item
    order = data.draw(st.permutations(range(len(votes))))
    shuffled = [votes[option] for option in order] + [0, 0]
    place = order.index(correct) if correct >= 0 else -1
    ks = range(1, sum(votes) + abstained + 1)
    np.testing.assert_array_equal(
        majority_at_k([votes], [correct], ks, [abstained]), majority_at_k([shuffled], [place], ks, [abstained])
    )


def test_the_accuracies_of_all_options_and_of_no_vote_add_up_to_one() -> None:
    votes, abstained = [3, 9, 4, 9], 6
    ks = np.arange(1, sum(votes) + abstained + 1)
    total = majority_at_k([votes] * 4, range(4), ks, [abstained] * 4).sum(axis=0)
    silent = np.array([comb(abstained, k) / comb(31, k) for k in ks])
    np.testing.assert_allclose(total + silent, 1, rtol=BUDGET)


def test_many_items_equal_one_at_a_time() -> None:
    generator = np.random.default_rng(0)
    votes = generator.integers(0, 16, (400, 5))
    votes = votes[generator.integers(0, 400, 1200)]  # repeated, out of order
    correct, abstained = generator.integers(-1, 5, 1200), generator.integers(0, 3, 1200)
    ks = [5, 1, 64, 5, 16]
    together = majority_at_k(votes, correct, ks, abstained)
    for i in range(0, 1200, 17):
        one = slice(i, i + 1)
        np.testing.assert_array_equal(together[one], majority_at_k(votes[one], correct[one], ks, abstained[one]))


def test_the_number_of_threads_changes_no_bit() -> None:
    tables = [
        subprocess.run(
            [sys.executable, "-c", THREADED],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    ]
    assert len(tables[0]) == 600 * 70 * 8
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64", ">i4"])
def test_every_integer_dtype(dtype: str) -> None:
    votes, correct, ks, abstained = (np.array(v, dtype=dtype) for v in ([[3, 1, 9], [0, 4, 2]], [2, 1], [1, 4], [0, 5]))
    np.testing.assert_array_equal(
        majority_at_k(votes, correct, ks, abstained),
        majority_at_k([[3, 1, 9], [0, 4, 2]], [2, 1], [1, 4], [0, 5]),
    )


def test_strided_and_read_only_input() -> None:
    votes = np.arange(60).reshape(10, 6)[::2, ::3].T
    votes.flags.writeable = False
    np.testing.assert_array_equal(majority_at_k(votes, [0, 1], [2, 9]), majority_at_k(votes.copy(), [0, 1], [2, 9]))


def test_empty_input() -> None:
    assert majority_at_k(np.zeros((0, 3), dtype=int), [], [1, 2]).shape == (0, 2)
    assert majority_at_k([[1, 2]], [0], []).shape == (1, 0)
    nobody = majority_at_k(np.zeros((2, 0), dtype=int), [-1, -1], [1, 2], [0, 1])
    np.testing.assert_array_equal(nobody, [[np.nan, np.nan], [0.0, np.nan]])


@pytest.mark.parametrize(
    ("votes", "correct", "ks", "abstained", "message"),
    [
        ([[1, 2], [3, -4]], [0, 0], [1], None, r"votes\[1, 1\] = -4 is negative"),
        ([[1, 2], [3, 4]], [0, 2], [1], None, r"correct\[1\] = 2: expected a column of votes, 0 to 1, or -1"),
        ([[1, 2], [3, 4]], [-2, 0], [1], None, r"correct\[0\] = -2: expected a column"),
        ([[1, 2], [3, 4]], [0, 0], [1, 0], None, r"ks\[1\] = 0 is below 1"),
        ([[1, 2], [3, 4]], [0, 0], [1], [0, -1], r"abstained\[1\] = -1 is negative"),
        ([[1024], [1025]], [0, 0], [1], None, r"votes\[1\], with the abstentions, counts more than 1024 samples"),
        ([[1000, 20], [1000, 20]], [0, 0], [1], [4, 5], r"votes\[1\], with the abstentions, counts more than 1024"),
        ([[2**63 - 1, 2**63 - 1]], [0], [1], None, r"votes\[0\], with the abstentions, counts more than 1024"),
        ([[0, 1]], [0], [1], [2**63 - 1], r"votes\[0\], with the abstentions, counts more than 1024"),
        ([[1, 2]], [0, 0], [1], None, r"votes has shape \(1, 2\) and correct has shape \(2,\)"),
        ([[1, 2]], [0], [1], [0, 0], r"votes has shape \(1, 2\) and abstained has shape \(2,\)"),
        ([1, 2], [0], [1], None, r"votes must have two dimensions, got shape \(2,\)"),
        ([[1, 2]], 0, [1], None, r"correct must have one dimension"),
        ([[1, 2]], [0], 1, None, r"ks must have one dimension"),
        ([[1, 2]], [0], [1], 0, r"abstained must have one dimension"),
        ([[1.0, float("nan")]], [0], [1], None, r"votes must hold integers, got dtype float64"),
        ([[1, 2]], [0.0], [1], None, r"correct must hold integers"),
        ([[1, 2]], [0], [1.5], None, r"ks must hold integers, got dtype float64 with ks\[0\] = 1.5"),
        ([[1, 2]], [0], [1], [0.5], r"abstained must hold integers"),
        ([[True, False]], [0], [1], None, r"votes must hold integers, got dtype bool"),
        ([[1], [1, 2]], [0, 0], [1], None, r"votes can't be read as a numpy array"),
        ([[1, 2]], [0], [1], ["no"], r"abstained must hold integers"),
    ],
)
def test_refusals_name_the_first_bad_index(
    votes: object, correct: object, ks: object, abstained: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        majority_at_k(votes, correct, ks, abstained)  # type: ignore[arg-type]
