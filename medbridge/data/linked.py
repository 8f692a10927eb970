"""Questions that depend on each other, for they show images in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scipy.cluster.hierarchy import DisjointSet

from medbridge.data.items import Item


def linked(units: Sequence[Sequence[str]]) -> list[int]:
    """The number of each unit's cluster: units with a part in common, directly or through others, share one.

    Args:
        units: the parts of each, at least one.
    """
    found = DisjointSet({part for own in units for part in own})
    for own in units:
        for part in own[1:]:
            found.merge(own[0], part)
    place: dict[str, int] = {}
    return [place.setdefault(found[own[0]], len(place)) for own in units]


def with_links(items: list[Item]) -> list[Item]:
    """The items, those that show some images of others and not the same ones with `linked` set to a common name."""
    if all(len(item.images) < 2 for item in items):
        return items
    units = list({item.images for item in items if item.images})
    clusters = linked(units)
    shown: dict[int, set[tuple[str, ...]]] = {}
    for unit, cluster in zip(units, clusters, strict=True):
        shown.setdefault(cluster, set()).add(unit)
    names = {
        unit: min(image for other in shown[cluster] for image in other)
        for unit, cluster in zip(units, clusters, strict=True)
        if len(shown[cluster]) > 1
    }
    return [replace(item, linked=names[item.images]) if item.images in names else item for item in items]
