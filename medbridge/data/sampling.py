"""Deterministic subsets: the same questions at every call, spread over the whole."""

from __future__ import annotations

from collections.abc import Sequence

from medbridge.data.items import SPLITS, Item


def even_positions(count: int, limit: int) -> list[int]:
    """`min(count, limit)` different positions below `count`, ascending, at even distances."""
    wanted = min(count, limit)
    return [position * count // wanted for position in range(wanted)]


def evenly_spaced(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items of each split, at even distances, in their order."""
    kept: set[str] = set()
    for split in SPLITS:
        ids = [item.id for item in items if item.split == split]
        kept.update(ids[position] for position in even_positions(len(ids), limit))
    return [item for item in items if item.id in kept]
