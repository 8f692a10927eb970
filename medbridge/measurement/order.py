"""In which order items are measured, and which of them are not independent."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from medbridge.data import Item


def cluster_of(item: Item, tags: Sequence[str]) -> str:
    """What makes items dependent: the values of `tags`, or without any the images that an item shares with others."""
    if tags:
        return " | ".join(f"{tag}={item.tags.get(tag, item.id)}" for tag in tags)
    return item.linked or " | ".join(item.images) or item.id


def by_stratum(
    items: Iterable[Item], keys: Sequence[str], seed: int, cluster: Sequence[str] = ()
) -> dict[str, list[Item]]:
    """Items of each stratum in a seeded order of whole clusters; strata sorted by name.

    A prefix that ends between two clusters is a random sample of clusters. The order goes by item ids, so that it stays
    where the data lies elsewhere.
    """
    strata: dict[str, list[Item]] = defaultdict(list)
    first: dict[str, str] = {}  # of a cluster, its smallest item id
    for item in items:
        strata[item.stratum(keys)].append(item)
        name = cluster_of(item, cluster)
        first[name] = min(first.get(name, item.id), item.id)

    def rank(item: Item) -> tuple[bytes, bytes]:
        return _hash(seed, first[cluster_of(item, cluster)]), _hash(seed, item.id)

    return {name: sorted(strata[name], key=rank) for name in sorted(strata)}


def whole_clusters(items: Sequence[Item], cluster: Sequence[str]) -> Iterator[list[Item]]:
    """The clusters of items in the order of `by_stratum`, one after another."""
    for _, members in groupby(items, key=lambda item: cluster_of(item, cluster)):
        yield list(members)


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}|{text}".encode("utf-8", "replace"), digest_size=8).digest()
