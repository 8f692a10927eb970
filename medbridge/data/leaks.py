"""What one split gives away of another: equal images, near duplicates, equal questions; and duplicates within a split.

A split that is trained on or chosen by is seen before the next one is measured: train, then validation, then test.
So a leak has a side that holds it out and a side that has seen it, be they of one data set or of two. A side is
written DATASET/SPLIT.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from medbridge.data.fingerprints import Fingerprints
from medbridge.data.items import SPLITS, Item
from medbridge.data.keys import KeyPositions, KeySides
from medbridge.data.near import nearest

ANY = "any"
"""Stands for all sides that have seen something, where there are several."""

_EARLIER = [(seen, held) for place, held in enumerate(SPLITS) for seen in SPLITS[:place]]

_APART = re.compile(r"[^\w<>=±+%/]+")


@dataclass(frozen=True, slots=True)
class SharedImage:
    """Images with exactly the same pixels that occur in several splits. `items`: ids of the questions by side."""

    splits: tuple[str, ...]
    files: tuple[str, ...]
    items: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class NearImage:
    """A held-out image and the most similar image of a split seen before it, where the two are near duplicates.

    `splits`: that of `seen`, that of `file`. `distance` in bits of 64, `correlation` of thumbnails.
    """

    splits: tuple[str, str]
    file: str
    seen: str
    distance: int
    correlation: float


@dataclass(frozen=True, slots=True)
class SharedQuestion:
    """One question that several splits ask about the same image, or about near duplicates: its ids by side."""

    question: str
    items: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """One question asked several times about the same images within a split. `agree`: with the same answer."""

    split: str
    question: str
    items: tuple[str, ...]
    agree: bool


@dataclass(frozen=True, slots=True)
class Exposure:
    """How much of a held-out side another one has seen.

    `images` and `items` count equal pixels and the questions on them, `share` is that of the side's `of_items`;
    `questions` those that are asked there too; the `near_` ones the same for near duplicates. `same_text` counts
    items whose question, options and answer stand there about any image: no leak, but what a model without eyes knows.
    """

    held_out: str
    seen_in: str
    of_items: int
    images: int
    items: int
    share: float
    questions: int
    near_images: int
    near_items: int
    near_questions: int
    same_text: int


@dataclass(slots=True)
class Leaks:
    """All that `find_leaks` finds."""

    exposures: list[Exposure] = field(default_factory=list)
    shared_images: list[SharedImage] = field(default_factory=list)
    shared_questions: list[SharedQuestion] = field(default_factory=list)
    near_images: list[NearImage] = field(default_factory=list)
    near_questions: list[SharedQuestion] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)


def normalised(text: str) -> str:
    """A text without its case, spacing and punctuation; signs that change a meaning (< > = + % /) stay."""
    return " ".join(_APART.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split()) or text


def find_leaks(items: Sequence[Item], prints: Fingerprints) -> Leaks:
    """Leaks between the splits of all data sets together, and duplicates within each.

    Items with an image that can't be read take part with their other images; their questions are not compared.
    """
    return _Search(items, prints).leaks()


class _Search:
    """Sides are numbered and sets of them are the bits of a whole number; of a question two hashes are kept."""

    def __init__(self, items: Sequence[Item], prints: Fingerprints) -> None:
        self._items = items
        self._prints = prints
        names = {side(item) for item in items}
        self._names = sorted(names, key=lambda name: (SPLITS.index(name.rpartition("/")[2]), name))
        numbers = {name: number for number, name in enumerate(self._names)}
        self._sides = np.fromiter((numbers[side(item)] for item in items), np.int32, len(items))
        self._of_split = {
            split: sum(1 << number for name, number in numbers.items() if name.endswith(f"/{split}"))
            for split in SPLITS
        }
        self._before = {held: sum(self._of_split[seen] for seen, later in _EARLIER if later == held) for held in SPLITS}
        self._seen = [0] * len(prints.perceptual)  # sides of each image content
        for position in range(len(items)):
            for content in self._contents(position):
                self._seen[content] |= 1 << int(self._sides[position])
        self._near = {pair: self._near_images(*pair) for pair in _EARLIER}

        self._keys, self._texts, compared = self._read_keys()
        self._asked = KeyPositions(self._keys[compared], np.flatnonzero(compared).astype(np.int32))
        self._asked_by = KeySides(self._keys[compared], self._sides[compared])

    def leaks(self) -> Leaks:
        found = Leaks()
        found.shared_images = self._shared_images()
        found.near_images = self._named_near()
        for positions in self._asked.several():
            found.duplicates += self._duplicates(positions)
            if len({self._items[position].split for position in positions}) > 1:
                found.shared_questions.append(self._shared_question(positions))
        near_asked = self._near_questions()
        found.near_questions = [self._shared_question([held, *seen]) for held, seen in near_asked.items()]
        found.exposures = self._exposures(near_asked)
        return found

    def _contents(self, position: int) -> list[int]:
        """The image contents of an item that can be read."""
        number = self._prints.number
        return [number[image] for image in self._items[position].images if image in number]

    def _in(self, sides: int) -> Iterator[str]:
        """The names of a set of sides."""
        return (name for number, name in enumerate(self._names) if sides >> number & 1)

    # -- images ----------------------------------------------------------------------------------------------

    def _shared_images(self) -> list[SharedImage]:
        shared = {
            content: [split for split in SPLITS if self._of_split[split] & sides]
            for content, sides in enumerate(self._seen)
            if sum(bool(self._of_split[split] & sides) for split in SPLITS) > 1
        }
        files: dict[int, list[str]] = defaultdict(list)
        ids: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for file, content in self._prints.number.items():
            if content in shared:
                files[content].append(file)
        for position, item in enumerate(self._items):
            for content in shared.keys() & set(self._contents(position)):
                ids[content][side(item)].append(item.id)
        return [
            SharedImage(tuple(splits), tuple(files[content]), dict(ids[content])) for content, splits in shared.items()
        ]

    def _near_images(self, seen: str, held: str) -> dict[int, tuple[int, int, float]]:
        """Held-out content -> (content seen before, distance, correlation), where the one is not seen itself."""
        shown = np.array([bool(sides & self._of_split[seen]) for sides in self._seen], bool)
        asked = np.array([bool(sides & self._of_split[held]) for sides in self._seen], bool) & ~shown
        queries = np.flatnonzero(asked)
        match, distance, correlation = nearest(
            self._prints.perceptual, self._prints.thumbnails, queries, np.flatnonzero(shown)
        )
        hits = np.flatnonzero(match >= 0)
        return {int(queries[at]): (int(match[at]), int(distance[at]), float(correlation[at])) for at in hits}

    def _named_near(self) -> list[NearImage]:
        wanted = {
            content for found in self._near.values() for query, hit in found.items() for content in (query, hit[0])
        }
        file: dict[int, str] = {}
        for path, content in self._prints.number.items():
            if content in wanted:
                file.setdefault(content, path)
        return [
            NearImage(splits, file[content], file[match], distance, round(correlation, 4))
            for splits, found in self._near.items()
            for content, (match, distance, correlation) in found.items()
        ]

    # -- questions -------------------------------------------------------------------------------------------

    def _read_keys(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each item: question with images, question with answer whatever the images, and are its images all read."""
        count = len(self._items)
        asked, texts, compared = np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.bool_)
        for position, item in enumerate(self._items):
            contents = self._contents(position)
            if len(contents) == len(item.images):
                compared[position] = True
                asked[position] = _key(item, contents)
            texts[position] = _key(item, normalised(item.answer))
        return asked, texts, compared

    def _near_questions(self) -> dict[int, list[int]]:
        """Position of a held-out item -> positions of the same question on near duplicates, in splits seen before."""
        found: dict[int, list[int]] = {}
        for (seen, held), near in self._near.items():
            if not near:
                continue
            for position, item in enumerate(self._items):
                contents = self._contents(position)
                if item.split != held or len(contents) < len(item.images) or near.keys().isdisjoint(contents):
                    continue
                replaced = [near[content][0] if content in near else content for content in contents]
                others = [at for at in self._asked.positions(_key(item, replaced)) if self._items[at].split == seen]
                if others:
                    found.setdefault(position, []).extend(others)
        return found

    def _shared_question(self, positions: Sequence[int]) -> SharedQuestion:
        ids: dict[str, list[str]] = defaultdict(list)
        for position in sorted(positions, key=lambda at: SPLITS.index(self._items[at].split)):
            ids[side(self._items[position])].append(self._items[position].id)
        return SharedQuestion(self._items[positions[0]].question, dict(ids))

    def _duplicates(self, positions: Sequence[int]) -> Iterator[Duplicate]:
        for split in SPLITS:
            items = [self._items[position] for position in positions if self._items[position].split == split]
            if len(items) > 1:
                agree = len({normalised(item.answer) for item in items}) == 1
                yield Duplicate(split, items[0].question, tuple(item.id for item in items), agree)

    # -- counts ----------------------------------------------------------------------------------------------

    def _exposures(self, near_asked: dict[int, list[int]]) -> list[Exposure]:
        texts = KeySides(self._texts, self._sides)
        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

        def count(held: str, seen: int, what: str) -> None:
            for name in (*self._in(seen), ANY) if seen else ():
                counts[held, name][what] += 1

        for content, sides in enumerate(self._seen):
            for held in self._in(sides):
                split = held.rpartition("/")[2]
                count(held, sides & self._before[split], "images")
                count(held, self._near_sides(split, content), "near_images")
        for position, item in enumerate(self._items):
            before, contents, held = self._before[item.split], self._contents(position), side(item)
            exact = near = 0
            for content in contents:
                exact |= self._seen[content] & before
                near |= self._near_sides(item.split, content)
            count(held, exact, "items")
            count(held, near, "near_items")
            if exact or not item.images:
                same = self._asked_by.of(self._keys[position]) if len(contents) == len(item.images) else 0
                count(held, same & before, "questions")
            count(held, self._union(near_asked.get(position, ())), "near_questions")
            count(held, texts.of(self._texts[position]) & before, "same_text")
        totals = Counter(side(item) for item in self._items)
        several = Counter(held for held, seen in counts if seen != ANY)
        return [
            Exposure(
                held,
                seen,
                totals[held],
                share=found["items"] / totals[held],
                **{what: found[what] for what in _COUNTED},
            )
            for (held, seen), found in sorted(counts.items(), key=lambda entry: (entry[0][0], entry[0][1] == ANY))
            if seen != ANY or several[held] > 1
        ]

    def _near_sides(self, held: str, content: int) -> int:
        """The sides that have a near duplicate of a held-out content, the most similar one of each split."""
        sides = 0
        for (seen, later), near in self._near.items():
            if later == held and content in near:
                sides |= self._seen[near[content][0]] & self._of_split[seen]
        return sides

    def _union(self, positions: Sequence[int]) -> int:
        sides = 0
        for position in positions:
            sides |= 1 << int(self._sides[position])
        return sides


_COUNTED = ("images", "items", "questions", "near_images", "near_items", "near_questions", "same_text")


def side(item: Item) -> str:
    """The side that an item is on, as DATASET/SPLIT."""
    return f"{item.dataset}/{item.split}"


def _key(item: Item, rest: object) -> int:
    """A question's hash, 64 bits: its text and options, in whatever order, and `rest`."""
    options = None if item.options is None else sorted(map(normalised, item.options))
    text = json.dumps([normalised(item.question), options, rest], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
