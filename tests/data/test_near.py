"""The search for near duplicates against comparing every image with every other."""

from __future__ import annotations

import numpy as np
import pytest

from medbridge.data import near
from medbridge.data.near import CORRELATION, DISTANCE, nearest


def clustered(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and thumbnails of images that come in families, some of them near, some of them not quite."""
    random = np.random.default_rng(seed)
    perceptual = random.integers(0, 2**63, count, np.uint64)
    thumbnails = random.integers(0, 256, (count, 256)).astype(np.float64)
    for index in range(count // 2, count):
        parent = random.integers(0, count // 2)
        flips = random.choice(64, random.integers(0, DISTANCE + 4), replace=False).astype(np.uint64)
        perceptual[index] = perceptual[parent] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
        thumbnails[index] = thumbnails[parent] + random.normal(0, random.choice([0.5, 3.0, 9.0]), 256)
    return perceptual, np.clip(np.round(thumbnails), 0, 255).astype(np.uint8)


def brute(perceptual: np.ndarray, thumbnails: np.ndarray, queries: np.ndarray, base: np.ndarray) -> dict[int, int]:
    best = {}
    rows = thumbnails.astype(np.float64)
    for query in queries:
        apart = np.array([int(perceptual[query] ^ perceptual[other]).bit_count() for other in base])
        alike = np.array([np.corrcoef(rows[query], rows[other])[0, 1] for other in base])
        fits = np.flatnonzero((apart <= DISTANCE) & (alike >= CORRELATION))
        if len(fits):
            best[int(query)] = int(base[fits[np.argmax(alike[fits])]])
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("portion", [7, 1 << 20])
def test_the_search_finds_what_comparing_all_finds(monkeypatch: pytest.MonkeyPatch, seed: int, portion: int) -> None:
    monkeypatch.setattr(near, "_PAIRS", portion)
    perceptual, thumbnails = clustered(120, seed)
    order = np.random.default_rng(seed).permutation(120)
    queries, base = np.sort(order[:50]), np.sort(order[50:])
    match, distance, correlation = nearest(perceptual, thumbnails, queries, base)
    found = {int(query): int(other) for query, other in zip(queries, match, strict=True) if other >= 0}
    assert found == brute(perceptual, thumbnails, queries, base)
    assert len(found) > 5
    for query, other, bits, alike in zip(queries, match, distance, correlation, strict=True):
        if other >= 0:
            assert int(perceptual[query] ^ perceptual[other]).bit_count() == bits <= DISTANCE
            exact = np.corrcoef(thumbnails[query].astype(float), thumbnails[other].astype(float))[0, 1]
            assert alike == pytest.approx(exact, abs=1e-5)


def test_every_distance_up_to_the_bound_is_found() -> None:
    thumbnail = np.arange(256).astype(np.uint8)
    for bits in range(64 - DISTANCE):
        for count in (DISTANCE, DISTANCE + 1):
            flipped = np.uint64(((1 << count) - 1) << min(bits, 64 - count))
            match, _, _ = nearest(
                np.array([0, flipped], np.uint64), np.stack([thumbnail] * 2), np.array([0]), np.array([1])
            )
            assert (match[0] == 1) == (count <= DISTANCE)


def test_images_that_show_nothing_are_near_nothing() -> None:
    flat = np.full((2, 256), 90, np.uint8)
    flat[1, 0] = 91
    match, _, _ = nearest(np.zeros(2, np.uint64), flat, np.array([0]), np.array([1]))
    assert match.tolist() == [-1]


@pytest.mark.parametrize("asked, shown", [([], []), ([0], []), ([], [0])])
def test_nothing_to_compare(asked: list[int], shown: list[int]) -> None:
    thumbnails = np.arange(512).reshape(2, 256).astype(np.uint8)
    queries, base = np.array(asked, np.int64), np.array(shown, np.int64)
    match, _, _ = nearest(np.zeros(2, np.uint64), thumbnails, queries, base)
    assert match.tolist() == [-1] * len(asked)
