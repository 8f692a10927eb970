"""Control images: the same questions over blank images, or over another question's. What a model still answers then, it
does not see. Real images are read by `images`; what controls say about support is decided elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from medbridge.data.images import load_image
from medbridge.data.items import Item, ItemSet, Skip
from medbridge.files import replace_file

GREY = 128
"""Value of all three channels of a blank image: the middle, so that no model sees a black or white frame."""

_MOST_SHIFTS = 32
"""Turns of the ring that are tried; only image sets that overlap need more than one."""


def blank(items: Iterable[Item], folder: Path) -> ItemSet:
    """The same items, with each image replaced by a uniform grey one of its size.

    Each size (upright, as `load_image` gives it) is written once, as `folder`/blank-WIDTHxHEIGHT.png, and found again
    by a later call; a file appears there whole or not at all. The same size means the same number of image tokens, so
    prompts keep their length. Ids stay, and with them option orders and the random numbers of sampling. Items without
    images are skipped.

    Raises:
        MedbridgeError: an image that can't be read, or a folder that can't be written.
    """
    found, skipped = [], []
    blank_of: dict[str, str] = {}
    for item in items:
        if not item.images:
            skipped.append(_skip(item, "has no images to blank"))
            continue
        for path in item.images:
            if path not in blank_of:
                blank_of[path] = _blank_image(load_image(path).size, folder)
        found.append(replace(item, images=tuple(blank_of[path] for path in item.images)))
    return ItemSet(found, skipped)


def shuffled(items: Iterable[Item], seed: int) -> ItemSet:
    """The same items, each with the images of another.

    Items that share their images go on sharing: the distinct image sets of each number of images are put on a ring in
    an order drawn from `seed`, and each gives its images to the one before. So no item keeps an image of its own, and
    every image set is used once. Depends on `seed`, the ids and who shares images, not on the order of the items or
    where the files lie. Ids stay. Items without images, and those for which there are no other images, are skipped.
    """
    chosen = list(items)
    # The first item of each image set, by the number of images. The same images in another order are no other images.
    sets: dict[int, dict[frozenset[str], Item]] = defaultdict(dict)
    for item in sorted(chosen, key=lambda item: item.id):
        sets[len(item.images)].setdefault(frozenset(item.images), item)
    given = {count: _ring(own, seed) for count, own in sets.items()}
    found, skipped = [], []
    for item in chosen:
        if not item.images:
            skipped.append(_skip(item, "has no images to exchange"))
        elif (other := given[len(item.images)].get(frozenset(item.images))) is None:
            skipped.append(_skip(item, f"there are no other {len(item.images)} images to show instead of its own"))
        else:
            found.append(replace(item, images=other.images))
    return ItemSet(found, skipped)


def _ring(sets: Mapping[frozenset[str], Item], seed: int) -> dict[frozenset[str], Item]:
    """To each image set the item of another that shares none with it; sets for which none is found are left out."""

    def rank(own: frozenset[str]) -> bytes:
        # A keyed hash instead of a random generator: the order can never change with a library's version.
        return hashlib.blake2b(f"{seed}\x00{sets[own].id}".encode(), digest_size=16).digest()

    order = sorted(sets, key=rank)

    def shifted(by: int) -> dict[frozenset[str], Item]:
        pairs = zip(order, order[by:] + order[:by], strict=True)
        return {own: sets[other] for own, other in pairs if own.isdisjoint(other)}

    best: dict[frozenset[str], Item] = {}
    for by in range(1, min(len(order), _MOST_SHIFTS + 1)):
        best = max(best, shifted(by), key=len)
        if len(best) == len(order):
            break
    return best


def _blank_image(size: tuple[int, int], folder: Path) -> str:
    path = folder.absolute() / f"blank-{size[0]}x{size[1]}.png"
    if path.is_file():
        return str(path)
    replace_file(path, lambda stream: Image.new("L", size, GREY).save(stream, format="PNG"))
    return str(path)


def _skip(item: Item, reason: str) -> Skip:
    return Skip("control images", None, item.id, reason)
