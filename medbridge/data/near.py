"""Near duplicates among images: the same picture scaled, compressed anew or brightened. Equal pixels are not its work.

Two images are near when their perceptual hashes differ in at most `DISTANCE` bits and their thumbnails correlate by at
least `CORRELATION`. The first is what can be searched, the second what tells two patients of one modality apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

DISTANCE = 6
"""Bits of 64. Scaled and compressed copies of SLAKE's images differ in at most 2, brightened ones in at most 6."""

CORRELATION = 0.998
"""Of 16 x 16 thumbnails. Every scaled or compressed copy of SLAKE's images is above it; no two eyes of RetinaMNIST in
different splits are (docs/data-checks.md)."""

FLAT = 2.0
"""Standard deviation in grey levels below which an image shows too little to be told from another."""

_BANDS = DISTANCE + 1
_BAND_BITS = [np.arange(band, 64, _BANDS, dtype=np.uint64) for band in range(_BANDS)]
"""Bits of each band, far apart: neighbouring frequencies say nearly the same, and would fill few buckets."""

_BAND_MASKS = [np.bitwise_or.reduce(np.uint64(1) << bits) for bits in _BAND_BITS]

_PAIRS = 1 << 20
"""Pairs that are looked at together: some 30 MiB."""


def nearest(
    perceptual: np.ndarray, thumbnails: np.ndarray, queries: np.ndarray, base: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The most similar near duplicate in `base` of each of `queries`, both positions in the arrays of images.

    Args:
        perceptual: [images] uint64. thumbnails: [images, pixels] uint8.

    Returns:
        match: [queries] int64, a position in the arrays, -1 where there is none; distance: [queries] uint8, bits;
        correlation: [queries] float32.

    Hashes that differ in at most d of 64 bits are equal in at least one of d + 1 bands, so that only images that share
    a band are compared (multi-index hashing): n images cost about n^2 / 512 comparisons of 8 bytes for each band.
    """
    match = np.full(len(queries), -1, np.int64)
    distance = np.zeros(len(queries), np.uint8)
    correlation = np.zeros(len(queries), np.float32)
    telling = _contrasts(thumbnails) >= FLAT
    base = base[telling[base]]
    asked = np.flatnonzero(telling[queries])
    for band, bits in enumerate(_BAND_BITS):
        keys = _band(perceptual, bits)
        ordered = base[np.argsort(keys[base], kind="stable")]
        low = np.searchsorted(keys[ordered], keys[queries[asked]], "left")
        high = np.searchsorted(keys[ordered], keys[queries[asked]], "right")
        for rows, columns in _pairs(low, high):
            ours, theirs = asked[rows], ordered[columns]
            differing = perceptual[queries[ours]] ^ perceptual[theirs]
            apart = np.bitwise_count(differing)
            close = apart <= DISTANCE
            for earlier in _BAND_MASKS[:band]:
                close &= (differing & earlier) != 0  # else that band has had the pair already
            ours, theirs, apart = ours[close], theirs[close], apart[close]
            alike = _correlations(thumbnails, queries[ours], theirs)
            better = (alike >= CORRELATION) & (alike > correlation[ours])
            # Of several matches of one query the last stays, which is the most similar one.
            order = np.flatnonzero(better)[np.argsort(alike[better], kind="stable")]
            match[ours[order]] = theirs[order]
            distance[ours[order]] = apart[order]
            correlation[ours[order]] = alike[order]
    return match, distance, correlation


def _band(perceptual: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The given bits of each hash, put side by side: [images] uint64."""
    keys = np.zeros(len(perceptual), np.uint64)
    for place, bit in enumerate(bits):
        keys |= ((perceptual >> bit) & np.uint64(1)) << np.uint64(place)
    return keys


def _pairs(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, column) of all columns from low[row] to below high[row], in portions of about _PAIRS."""
    ends = np.cumsum(high - low)
    start = 0
    while start < len(low):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS, "right")))
        counts = (high - low)[start:stop]
        rows = np.repeat(np.arange(start, stop), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(rows):
            yield rows, low[rows] + within
        start = stop


def _contrasts(thumbnails: np.ndarray) -> np.ndarray:
    """Standard deviation of each thumbnail in grey levels: [images] float32."""
    result = np.empty(len(thumbnails), np.float32)
    for rows in _portions(len(thumbnails)):
        result[rows] = thumbnails[rows].std(axis=1, dtype=np.float32)
    return result


def _correlations(thumbnails: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the thumbnails at positions `one` with those at `other`: [pairs] float32."""
    result = np.empty(len(one), np.float32)
    for rows in _portions(len(one)):
        a, b = (thumbnails[side[rows]].astype(np.float32) for side in (one, other))
        a -= a.mean(axis=1, keepdims=True)
        b -= b.mean(axis=1, keepdims=True)
        norms = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
        result[rows] = np.einsum("ij,ij->i", a, b) / norms
    return result


def _portions(count: int) -> Iterator[slice]:
    """Rows of thumbnails that are widened to floats together: 16 MiB."""
    return (slice(start, start + (1 << 14)) for start in range(0, count, 1 << 14))
