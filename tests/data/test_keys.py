"""Keys of many items: the groups that a dictionary of lists would have."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from medbridge.data.keys import KeyPositions, KeySides

LARGEST = 2**64 - 1


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_groups_are_those_of_a_dictionary(count: int) -> None:
    random = np.random.default_rng(count)
    known = np.array([0, 7, 8, 2**63, LARGEST], np.uint64)
    keys = known[random.integers(0, len(known), count)]
    sides = random.integers(0, 70, count).astype(np.int32)
    positions = np.sort(random.choice(1000, count, replace=False)).astype(np.int32)
    groups: dict[int, list[int]] = defaultdict(list)
    held: dict[int, int] = defaultdict(int)
    for key, position, side in zip(keys.tolist(), positions.tolist(), sides.tolist(), strict=True):
        groups[key].append(position)
        held[key] |= 1 << side
    by_position, by_side = KeyPositions(keys, positions), KeySides(keys, sides)
    for key in (*known.tolist(), 5):
        assert by_position.positions(key) == groups.get(key, [])
        assert by_side.of(key) == held.get(key, 0)
    # In the order of their first positions, as they were put in.
    assert list(by_position.several()) == [group for group in groups.values() if len(group) > 1]
