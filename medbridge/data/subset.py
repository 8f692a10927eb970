"""Balanced subsets of a data set: as equal as the data allows by stratum, answer letter and difficulty.

The same questions come out at every call, and the folder that is written says in its card how they were drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medbridge.data.convert import licence_of, require_empty, write_items
from medbridge.data.folder import write_folder
from medbridge.data.items import Item
from medbridge.data.prompts import LETTERS
from medbridge.data.settings import SourceSettings
from medbridge.errors import MedbridgeError

NOT_MEASURED = "not measured"

_DIFFICULTIES = ((1 / 3, "hard"), (2 / 3, "medium"), (float("inf"), "easy"))
"""Success rates below the number are of that difficulty."""

_SHORT_GROUPS = 50
"""Groups without enough questions that a card names."""

Criterion = tuple[str, Callable[[Item], str]]
"""What is balanced: its name and each question's value."""


@dataclass(frozen=True, slots=True)
class ShortGroup:
    """A group that had fewer questions than an equal share; others filled it up."""

    path: tuple[str, ...]
    items: int
    share: int


@dataclass(frozen=True, slots=True)
class Subset:
    """The drawn questions in the order of the data, and the groups that were too small."""

    items: list[Item]
    short: list[ShortGroup]


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a subset is drawn. `difficulty` maps item ids to success rates, `measured_in` says where they are from."""

    size: int
    split: str = "train"
    by: tuple[str, ...] = ()
    balance_answers: bool = False
    difficulty: Mapping[str, float] | None = None
    measured_in: str = ""
    seed: int = 0

    def criteria(self) -> list[Criterion]:
        """What is balanced, the coarsest first."""
        chosen: list[Criterion] = []
        if self.by:
            chosen.append((" / ".join(self.by), lambda item: item.stratum(self.by)))
        if self.balance_answers:
            chosen.append(("answer", answer_letter))
        if self.difficulty is not None:
            chosen.append(("difficulty", self._difficulty))
        return chosen

    def _difficulty(self, item: Item) -> str:
        rate = (self.difficulty or {}).get(item.id)
        if rate is None:
            return NOT_MEASURED
        return next(name for below, name in _DIFFICULTIES if rate < below)


def answer_letter(item: Item) -> str:
    """The right option's letter and the number of options, as "B of 4"; "open" without options."""
    position = item.answer_index
    return "open" if position is None or item.options is None else f"{LETTERS[position]} of {len(item.options)}"


def draw(items: Sequence[Item], drawing: Drawing) -> Subset:
    """Draw questions so that each value of the first criterion gets the same number, within it each of the second, ...

    A group with too few questions gives all it has, and the others share what is missing. Within a group a keyed hash
    of the id decides. What can't be divided goes where least was drawn so far. Raises MedbridgeError where there are
    fewer than `size` questions, where one lacks a tag of `by`, and where the difficulty of none is known.
    """
    if drawing.size > len(items):
        raise MedbridgeError(
            f"{drawing.size} questions are asked for, and the split {drawing.split!r} has {len(items)}. "
            "Ask for fewer, or name more sources."
        )
    if drawing.difficulty is not None and not any(item.id in drawing.difficulty for item in items):
        raise MedbridgeError(
            f"{drawing.measured_in} holds no success rate of a question in the split {drawing.split!r}. "
            "Name a run that sampled these questions, or leave the difficulty out."
        )
    return _Draw(items, drawing).subset()


class _Draw:
    def __init__(self, items: Sequence[Item], drawing: Drawing) -> None:
        self._items = items
        self._drawing = drawing
        self._criteria = drawing.criteria()
        self._taken: list[Counter[str]] = [Counter() for _ in self._criteria]  # by value, over all groups
        self._short: list[ShortGroup] = []

    def subset(self) -> Subset:
        kept = {item.id for item in self._from(self._items, self._drawing.size, ())}
        return Subset([item for item in self._items if item.id in kept], self._short)

    def _from(self, items: Sequence[Item], size: int, path: tuple[str, ...]) -> list[Item]:
        if len(path) == len(self._criteria):
            return sorted(items, key=lambda item: self._rank(item.id))[:size]
        groups: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            groups[self._criteria[len(path)][1](item)].append(item)
        taken = self._taken[len(path)]
        order = sorted(groups, key=lambda name: (taken[name], self._rank(*path, name)))
        quotas = equal_shares({name: len(groups[name]) for name in order}, size)
        chosen = []
        for name in sorted(groups):
            share = size // len(groups)
            if len(groups[name]) < share:
                self._short.append(ShortGroup((*path, name), len(groups[name]), share))
            taken[name] += quotas[name]
            chosen += self._from(groups[name], quotas[name], (*path, name))
        return chosen

    def _rank(self, *names: str) -> bytes:
        # A keyed hash instead of a random generator: the order can never change with a library's version.
        text = "\x00".join((str(self._drawing.seed), *names))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def equal_shares(room: Mapping[str, int], size: int) -> dict[str, int]:
    """How many each gets of `size`: the same number, or all that it has room for; the first ones get what is left.

    The sum is `size`, or all the room there is.
    """
    shares = dict.fromkeys(room, 0)
    left = min(size, sum(room.values()))
    while left:
        open_ones = [name for name in room if shares[name] < room[name]]
        each = left // len(open_ones)
        if not each:
            for name in open_ones[:left]:
                shares[name] += 1
            break
        for name in open_ones:
            given = min(each, room[name] - shares[name])
            shares[name] += given
            left -= given
    return shares


def write_subset(
    items: Sequence[Item],
    sources: Sequence[SourceSettings],
    out: Path,
    drawing: Drawing,
    *,
    base_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw from the items of the split and write the folder `out`, which `kind: jsonl` reads; what it holds.

    `sources` are where the items come from, with paths relative to `base_dir`: the card has their licences. The same
    questions, pictures and settings give the same bytes. Raises MedbridgeError as `draw` does, where an image can't be
    copied, and if `out` is there and not empty.
    """
    require_empty(out)
    licences = list(dict.fromkeys(licence_of(source, base_dir) for source in sources))
    candidates = [item for item in items if item.split == drawing.split]
    subset = draw(candidates, drawing)
    summary = {
        "folder": str(out),
        "split": drawing.split,
        "items": len(subset.items),
        "of_items": len(candidates),
        "images": _images(subset.items),
        "of_images": _images(candidates),
        "seed": drawing.seed,
        "questions_sha256": questions_hash(candidates),
        "counts": _counts(candidates, subset.items, drawing.criteria()),
        "short_groups": [" / ".join(group.path) for group in subset.short],
    }

    def build(folder: Path) -> None:
        write_items(folder, subset.items, progress)
        (folder / "README.md").write_text(_card(summary, subset, licences, drawing), encoding="utf-8")

    write_folder(out, build)
    return summary


def questions_hash(items: Sequence[Item]) -> str:
    """SHA-256 over all that questions say, without the pictures and where they lie."""
    total = hashlib.sha256()
    for item in items:
        record = {**item.to_dict(), "images": len(item.images)}
        record.pop("linked", None)
        total.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def _images(items: Sequence[Item]) -> int:
    return len({image for item in items for image in item.images})


def _counts(
    before: Sequence[Item], after: Sequence[Item], criteria: Sequence[Criterion]
) -> dict[str, dict[str, list[int]]]:
    """Criterion -> value -> [questions there were, questions drawn]."""
    counted = {}
    for name, value in criteria:
        had, has = Counter(map(value, before)), Counter(map(value, after))
        counted[name] = {key: [had[key], has[key]] for key in sorted(had)}
    return counted


def _card(summary: Mapping[str, Any], subset: Subset, licences: Sequence[str], drawing: Drawing) -> str:
    names = sorted({item.dataset for item in subset.items})
    lines = [
        f"# Subset of {', '.join(names)}",
        "",
        "Written by `medbridge data subset`. " + " ".join(licences),
        "",
        f"- Questions: {summary['items']} of the {summary['of_items']} in the split `{drawing.split}`, on "
        f"{summary['images']} of {summary['of_images']} images.",
        f"- Balanced by: {', then '.join(name for name, _ in drawing.criteria()) or 'nothing; drawn at random'}.",
        f"- Seed: {drawing.seed}. SHA-256 of the questions drawn from: `{summary['questions_sha256']}`.",
    ]
    if drawing.difficulty is not None:
        lines.append(
            f"- Difficulty: share of right samples in `{drawing.measured_in}`, hard below 1/3, easy from 2/3 on."
        )
    for name, values in summary["counts"].items():
        lines += ["", f"| {_cell(name)} | there were | drawn |", "|---|---:|---:|"]
        lines += [f"| {_cell(value)} | {had} | {has} |" for value, (had, has) in values.items()]
    if subset.short:
        lines += ["", f"Groups with less than an equal share ({len(subset.short)}), filled up from the others:", ""]
        lines += [
            f"- {' / '.join(map(_cell, group.path))}: {group.items} of {group.share}"
            for group in subset.short[:_SHORT_GROUPS]
        ]
        if len(subset.short) > _SHORT_GROUPS:
            lines.append(f"- and {len(subset.short) - _SHORT_GROUPS} more")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text of the data inside a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
