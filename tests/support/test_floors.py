"""The guessing floor and what is left above it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbridge.support import guessing_floor, largest_informative_k, support_above_floor

EXACT = json.loads((Path(__file__).parent / "exact_values.json").read_text())


@pytest.mark.parametrize(("options", "k", "value"), EXACT["guessing_floor"])
def test_stored_values(options: int, k: int, value: float) -> None:
    assert guessing_floor([1 / options], [k])[0, 0] == pytest.approx(value, rel=1e-15, abs=0)


def test_limits() -> None:
    np.testing.assert_array_equal(guessing_floor([0.0, 1.0], [1, 5]), [[0, 0], [1, 1]])
    assert guessing_floor([1e-12], [3])[0, 0] == pytest.approx(3e-12, rel=1e-11)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_floor_outside_its_range_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"f\[1\]"):
        guessing_floor([0.5, bad], [1])
    with pytest.raises(ValueError, match=r"ks\[0\] = 0"):
        guessing_floor([0.5], [0])


def test_support_above_floor() -> None:
    np.testing.assert_allclose(support_above_floor([0.9, 0.8, 1.0, 0.7], [0.8, 0.8, 0.8, 0.8]), [0.5, 0, 1, -0.5])
    assert np.isnan(support_above_floor(1.0, 1.0))
    assert np.isnan(support_above_floor(0.99, 0.96, 0.05))
    assert np.isnan(support_above_floor(float("nan"), 0.5))


@pytest.mark.parametrize(
    ("floors", "limit", "k"),
    [
        ([1 / 2], 0.05, 4),
        ([1 / 3], 0.05, 7),
        ([1 / 4], 0.05, 10),
        ([1 / 5], 0.05, 13),
        ([0.0], 0.05, 16),
        ([1 / 2], 0.25, 2),  # met exactly
        ([0.5, 0.0], 0.05, 16),
        ([0.96], 0.05, None),
        ([1.0], 0.05, None),
        ([], 0.05, None),
    ],
)
def test_largest_informative_k(floors: list[float], limit: float, k: int | None) -> None:
    assert largest_informative_k(floors, range(1, 17), limit) == k


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_largest_informative_k_is_where_support_is_not_refused(floors: list[float], limit: float) -> None:
    ks = range(1, 21)
    floor = guessing_floor(floors, ks).mean(axis=0)
    shown = np.flatnonzero(~np.isnan(support_above_floor(floor, floor, limit)))
    assert largest_informative_k(floors, ks, limit) == (None if shown.size == 0 else ks[shown[-1]])


def test_no_k_to_choose_from() -> None:
    assert largest_informative_k([0.5], []) is None
