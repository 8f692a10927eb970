"""A full look at the questions of a run: every image decoded, everything counted, every problem named."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from medbridge.data.fingerprints import read_fingerprints
from medbridge.data.items import SPLITS, Item, ItemSet
from medbridge.data.leaks import Leaks, SharedQuestion, find_leaks
from medbridge.errors import MedbridgeError

MAX_ANSWERS = 50
"""Most frequent answers of a split that a report lists: open questions can have thousands."""

_NAMED = 4
"""Files or ids that a line names; the report's own lists have all."""


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
class Finding:
    """Everything of one kind that was found, a line for each. A remark (`problem` false) may well be meant so."""

    title: str
    problem: bool
    lines: list[str]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found, `images` being files; `findings` says in words what the other lists hold, `notes` what is
    known of the published data.
    """

    splits: dict[str, SplitCount]
    images: int
    broken_images: list[str] = field(default_factory=list)
    duplicate_ids: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    leaks: Leaks = field(default_factory=Leaks)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What must not be so: one line for each."""
        return [line for finding in self.findings if finding.problem for line in finding.lines]

    @property
    def remarks(self) -> list[str]:
        """What a person should look at: near duplicates and repeated questions."""
        return [line for finding in self.findings if not finding.problem for line in finding.lines]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON types, with every list whole."""
        record = asdict(self)
        leaks = record.pop("leaks")
        del record["findings"]
        return {"ok": self.ok, **record, **leaks, "problems": self.problems, "remarks": self.remarks}


def check_items(
    found: ItemSet,
    *,
    strata: Sequence[str] = (),
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every image once, count items, and list all problems and leaks of a set of questions.

    `strata` are the tags that make up a stratum. `threads` decode (default: one for each core).
    `progress(done, total)` is called after each image file. Memory grows by some hundred bytes for each image and
    each question; no pixels are kept. Nothing is raised for what is wrong with the data: it is in the report.
    """
    files = list(dict.fromkeys(image for item in found.items for image in item.images))
    prints = read_fingerprints(files, threads=threads, progress=progress)
    leaks = find_leaks(found.items, prints)
    ids = _repeated_ids(found.items)
    counts, untagged = _counts(found.items, strata)
    findings = [
        Finding("rows left out", True, [str(skip) for skip in found.skipped if not skip.known]),
        Finding("broken images", True, _broken(found.items, prints.broken)),
        Finding(
            "ids given twice",
            True,
            [f"the id {item_id!r} stands for {count} questions" for item_id, count in ids.items()],
        ),
        Finding("questions without a stratum", True, untagged),
        *_leak_findings(leaks),
    ]
    return CheckReport(
        splits=counts,
        images=len(files),
        broken_images=list(prints.broken.values()),
        duplicate_ids=list(ids),
        skipped=[str(skip) for skip in found.skipped],
        leaks=leaks,
        findings=[finding for finding in findings if finding.lines],
        notes=[str(skip) for skip in found.skipped if skip.known and skip.line is None],
    )


def _broken(items: Sequence[Item], reasons: Mapping[str, str]) -> list[str]:
    """A line for each broken file, with its questions: a file that came from within a table has no name of its own."""
    shown: dict[str, list[str]] = {file: [] for file in reasons}
    for item in items:
        for image in item.images:
            if image in shown:
                shown[image].append(item.id)
    return [f"broken image: {reason} (questions {_some(shown[file])})" for file, reason in reasons.items()]


def _repeated_ids(items: Sequence[Item]) -> dict[str, int]:
    """The ids that several questions have, and how many."""
    hashes = np.fromiter((hash(item.id) for item in items), np.int64, len(items))
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    ids = Counter(item.id for item in items if hash(item.id) in suspects) if suspects else Counter[str]()
    return {item_id: count for item_id, count in ids.items() if count > 1}


def _leak_findings(leaks: Leaks) -> list[Finding]:
    shared = [
        f"the same image is in {' and '.join(entry.splits)}: {_some(entry.files)} "
        f"(questions {'; '.join(_some(ids) for ids in entry.items.values())})"
        for entry in leaks.shared_images
    ]
    near = [
        f"an image of {entry.splits[1]} is nearly one of {entry.splits[0]}: {entry.file}, {entry.seen} "
        f"({entry.distance} bits apart, correlation {entry.correlation})"
        for entry in leaks.near_images
    ]
    repeated = [
        f"asked {len(entry.items)} times about the same image in {entry.split}"
        f"{'' if entry.agree else ', with different answers'}: {entry.question!r} ({_some(entry.items)})"
        for entry in leaks.duplicates
    ]
    return [
        Finding("images shared between splits", True, shared),
        Finding(
            "questions shared between splits", True, [_asked(entry, "the same") for entry in leaks.shared_questions]
        ),
        Finding("near duplicates between splits", False, near),
        Finding(
            "questions shared on near duplicates",
            False,
            [_asked(entry, "nearly the same") for entry in leaks.near_questions],
        ),
        Finding("questions asked twice within a split", False, repeated),
    ]


def _asked(entry: SharedQuestion, which: str) -> str:
    ids = "; ".join(_some(ids) for ids in entry.items.values())
    return f"asked about {which} image in {' and '.join(entry.items)}: {entry.question!r} ({ids})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


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
