"""What an image looks like in 280 bytes: equal pixels and near duplicates are told from it, without the pixels.

Files are decoded on several threads, since Pillow gives the interpreter's lock back while it decodes. Which images
are compared with which is `leaks`'s business.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from PIL import Image

from medbridge.data.images import load_image
from medbridge.errors import MedbridgeError

SIDE = 16
"""Pixels of a thumbnail's side: what two images have in common is told from 256 grey levels."""

_HASHED = 32
"""Side of the grey image that the perceptual hash is computed from."""

_WAITING = 4
"""Images in work per thread: enough to keep all busy, few enough that decoded ones fill no memory."""

_COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(_HASHED) + 1) / (2 * _HASHED)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`pixels`: hash of the size and the RGB values; `perceptual`: 64 bits; `thumbnail`: SIDE x SIDE grey levels."""

    pixels: bytes
    perceptual: int
    thumbnail: bytes


@dataclass(slots=True)
class Fingerprints:
    """The images of a data set, each pixel content once: files of equal pixels share a number.

    `number` maps a file to its content; `perceptual` [contents] uint64 and `thumbnails` [contents, SIDE * SIDE] uint8.
    `broken` says of each file that can't be read why.
    """

    number: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    perceptual: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    thumbnails: np.ndarray = field(default_factory=lambda: np.empty((0, SIDE * SIDE), np.uint8))


def fingerprint(path: str) -> Fingerprint:
    """Decode an image once and describe it. Raises MedbridgeError where it can't be read.

    The perceptual hash is the usual one: the 8 x 8 lowest frequencies of the cosine transform of a 32 x 32 grey
    image, each of them above the median or not. It stays within 6 bits when an image is scaled, compressed anew or
    made brighter.
    """
    image = load_image(path)
    size = f"{image.width}x{image.height}".encode()
    pixels = hashlib.blake2b(image.tobytes(), digest_size=16, salt=size).digest()
    grey = image.convert("L")
    small = np.asarray(grey.resize((_HASHED, _HASHED), Image.Resampling.BILINEAR), np.float32)
    waves = (_COSINES @ small @ _COSINES.T).ravel()
    bits = np.packbits(waves > np.median(waves[1:]))  # the first one is the mean grey level
    thumbnail = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes()
    return Fingerprint(pixels, int.from_bytes(bits.tobytes(), "big"), thumbnail)


def read_fingerprints(
    paths: Sequence[str], *, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Fingerprints:
    """The fingerprints of image files, in their order whatever the threads (default: one for each core).

    `progress(done, total)` is called after each file. Raises nothing for a broken file: it is listed.
    """
    found = Fingerprints()
    known: dict[bytes, int] = {}
    hashes: list[int] = []
    thumbnails = bytearray()
    for path, result in _described(paths, threads or _cores()):
        if isinstance(result, str):
            found.broken[path] = result
        else:
            number = known.setdefault(result.pixels, len(known))
            found.number[path] = number
            if number == len(hashes):
                hashes.append(result.perceptual)
                thumbnails += result.thumbnail
        if progress is not None:
            progress(len(found.number) + len(found.broken), len(paths))
    found.perceptual = np.array(hashes, np.uint64)
    found.thumbnails = np.frombuffer(bytes(thumbnails), np.uint8).reshape(-1, SIDE * SIDE)
    return found


def _described(paths: Sequence[str], threads: int) -> Iterator[tuple[str, Fingerprint | str]]:
    """Each path with its fingerprint or what is wrong with it, in order."""
    waiting: deque[tuple[str, Future[Fingerprint | str]]] = deque()
    left = iter(paths)
    # The images' own guard against this warning is not made for threads: what one of them restores, another had set.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            waiting.extend((path, pool.submit(_outcome, path)) for path in islice(left, _WAITING * threads))
            while waiting:
                path, future = waiting.popleft()
                yield path, future.result()
                waiting.extend((path, pool.submit(_outcome, path)) for path in islice(left, 1))
        finally:
            for _, future in waiting:
                future.cancel()


def _cores() -> int:
    """Cores that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(path: str) -> Fingerprint | str:
    try:
        return fingerprint(path)
    except MedbridgeError as error:
        return str(error)
