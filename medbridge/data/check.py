"""A full look at the questions of a run: every image decoded, everything counted, every problem named."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medbridge.data.images import load_image
from medbridge.data.items import SPLITS, Item, ItemSet
from medbridge.errors import MedbridgeError

MAX_ANSWERS = 50
"""Most frequent answers of a split that a report lists: open questions can have thousands."""


@dataclass(frozen=True, slots=True)
class StratumCount:
    """One stratum of a split: how many items, and the answer that is right most often."""

    items: int
    commonest_answer: str
    commonest_share: float


@dataclass(frozen=True, slots=True)
class SplitCount:
    """One split. `options` counts items by number of options (0: open questions), `answers` by answer."""

    items: int
    images: int
    strata: dict[str, StratumCount]
    options: dict[int, int]
    answers: dict[str, int]


@dataclass(frozen=True, slots=True)
class SharedImage:
    """Images with exactly the same pixels that occur in several splits."""

    splits: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. `problems` has one line for each; `shared_images` are leaks between splits."""

    splits: dict[str, SplitCount]
    images: int
    broken_images: list[str] = field(default_factory=list)
    duplicate_ids: list[str] = field(default_factory=list)
    shared_images: list[SharedImage] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def check_items(
    found: ItemSet,
    *,
    strata: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every image once, count items, and list all problems of a set of questions.

    `strata` are the tags that make up a stratum. `progress(done, total)` is called after each image file.
    Memory grows by some hundred bytes for each image; no pixels are kept. Nothing is raised for what is wrong
    with the data: it is in the report.
    """
    splits_of: dict[str, set[str]] = defaultdict(set)
    for item in found.items:
        for image in item.images:
            splits_of[image].add(item.split)
    broken: list[str] = []
    by_pixels: dict[bytes, list[str]] = defaultdict(list)
    for done, path in enumerate(splits_of, start=1):
        try:
            by_pixels[_pixel_hash(path)].append(path)
        except MedbridgeError as error:
            broken.append(str(error))
        if progress is not None:
            progress(done, len(splits_of))
    shared = []
    for files in by_pixels.values():
        splits = {split for file in files for split in splits_of[file]}
        if len(splits) > 1:
            shared.append(SharedImage(tuple(split for split in SPLITS if split in splits), tuple(files)))
    ids = Counter(item.id for item in found.items)
    duplicates = [item_id for item_id, count in ids.items() if count > 1]
    problems = [str(skip) for skip in found.skipped if not skip.known]
    problems += [f"broken image: {reason}" for reason in broken]
    problems += [f"the id {item_id!r} stands for {ids[item_id]} questions" for item_id in duplicates]
    problems += [f"the same image is in {' and '.join(entry.splits)}: {', '.join(entry.files[:4])}" for entry in shared]
    counts, untagged = _counts(found.items, strata)
    return CheckReport(
        splits=counts,
        images=len(splits_of),
        broken_images=broken,
        duplicate_ids=duplicates,
        shared_images=shared,
        skipped=[str(skip) for skip in found.skipped],
        problems=problems + untagged,
    )


def _pixel_hash(path: str) -> bytes:
    image = load_image(path)
    return hashlib.blake2b(image.tobytes(), digest_size=16, salt=f"{image.width}x{image.height}".encode()).digest()


def _counts(items: Sequence[Item], strata: Sequence[str]) -> tuple[dict[str, SplitCount], list[str]]:
    """The counts of each split, and a line for each item that lacks a tag of its stratum."""
    counts: dict[str, SplitCount] = {}
    untagged = []
    for split in SPLITS:
        chosen = [item for item in items if item.split == split]
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for item in chosen:
            try:
                answers[item.stratum(strata)][item.answer] += 1
            except MedbridgeError as error:
                untagged.append(str(error))
        if not chosen:
            continue
        overall: Counter[str] = Counter(item.answer for item in chosen)
        sizes = Counter(len(item.options or ()) for item in chosen)
        counts[split] = SplitCount(
            items=len(chosen),
            images=len({image for item in chosen for image in item.images}),
            strata={name: _stratum(answers[name]) for name in sorted(answers)},
            options={size: sizes[size] for size in sorted(sizes)},
            answers=dict(overall.most_common(MAX_ANSWERS)),
        )
    return counts, untagged


def _stratum(answers: Counter[str]) -> StratumCount:
    answer, count = answers.most_common(1)[0]
    return StratumCount(answers.total(), answer, count / answers.total())
