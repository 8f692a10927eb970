"""Which of many items share a key, without an object for each: hashes of 64 bits in sorted arrays.

That two of a million different keys have one hash is expected once in 37 million such data sets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class KeyPositions:
    """Which items have a key: keys of 64 bits and positions as sorted arrays, 12 bytes an item."""

    def __init__(self, keys: np.ndarray, positions: np.ndarray) -> None:
        """`keys` [items] uint64 and ascending `positions` [items] int32."""
        order = np.argsort(keys, kind="stable")
        self._keys, self._positions = keys[order], positions[order]

    def positions(self, key: int) -> list[int]:
        """The items of a key, ascending."""
        return [int(position) for position in self._positions[_equal(self._keys, key)]]

    def several(self) -> Iterator[list[int]]:
        """The items of each key that more than one has, in the order of their first ones."""
        starts = _changes(self._keys)
        ends = np.append(starts[1:], len(self._keys))
        repeated = np.flatnonzero(ends - starts > 1)
        for group in repeated[np.argsort(self._positions[starts[repeated]])]:
            yield [int(position) for position in self._positions[starts[group] : ends[group]]]


class KeySides:
    """The sides that have a key, each pair of the two once: 12 bytes a pair."""

    def __init__(self, keys: np.ndarray, sides: np.ndarray) -> None:
        """`keys` [items] uint64 and the numbers of their `sides` [items] int32."""
        order = np.lexsort((sides, keys))
        self._keys, self._sides = keys[order], sides[order]
        first = _changes(self._keys, self._sides)
        self._keys, self._sides = self._keys[first], self._sides[first]

    def of(self, key: int) -> int:
        """The set of sides that have a key."""
        return sum(1 << int(number) for number in self._sides[_equal(self._keys, key)])


def _changes(*ordered: np.ndarray) -> np.ndarray:
    """Where one of the arrays differs from what is before it; the first place always does."""
    differs = np.logical_or.reduce([array[1:] != array[:-1] for array in ordered])
    return np.flatnonzero(np.append(True, differs)[: len(ordered[0])])


def _equal(ordered: np.ndarray, key: int) -> slice:
    low, high = (int(np.searchsorted(ordered, np.uint64(key), side)) for side in ("left", "right"))
    return slice(low, high)
