"""What one question is: images, options, answer, strata tags and guessing floor. Files are read elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from medbridge.errors import MedbridgeError

SPLITS = ("train", "validation", "test")

MAX_OPTIONS = 26
"""One capital letter names one option, so there can be no more of them than letters."""

_RESERVED = re.compile(r"</?(?:think|answer)>|<\|\w{1,40}\|>", re.IGNORECASE)
"""Answer tags and chat control tokens: inside a text of the data they would be taken for the real ones."""

Permutation = tuple[int, ...]
"""Displayed position -> canonical option index; empty for an open question."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    `images` are absolute file paths in reading order, opened only when needed. `floor` is the probability
    that one guess is right: 1/m with m options, 0 for an open answer unless the importer knows better.
    `linked` is a name in common with items of the same data that show some of these images, and others beside them;
    None where there are none. `open_items` sets it.

    Raises MedbridgeError where the parts contradict each other.
    """

    id: str
    dataset: str
    split: str
    question: str
    answer: str
    options: tuple[str, ...] | None
    images: tuple[str, ...]
    # A mapping has no hash; the id is enough to tell items apart in a set.
    tags: Mapping[str, str] = field(hash=False)
    floor: float
    trace: str | None = None
    linked: str | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise MedbridgeError(f"item {self.id!r}: {problem}")

    def _problem(self) -> str | None:
        if not self.id or not self.dataset:
            return "the id and the data set name must not be empty."
        if self.split not in SPLITS:
            return f"split {self.split!r} is none of {', '.join(SPLITS)}."
        if not self.question.strip():
            return "the question is empty."
        if not self.answer.strip():
            return "the answer is empty, so nothing could be graded."
        for name, text in self._texts():
            if found := _RESERVED.search(text):
                return f"the {name} holds {found.group()!r}, which is reserved for prompts and completions."
        if self.options is not None and (problem := self._options_problem(self.options)):
            return problem
        if not 0.0 <= self.floor < 1.0:
            return f"the guessing floor {self.floor} must be at least 0 and below 1."
        return None

    def _options_problem(self, options: tuple[str, ...]) -> str | None:
        if not 2 <= len(options) <= MAX_OPTIONS:
            return f"{len(options)} option(s); a choice needs 2 to {MAX_OPTIONS}."
        if not all(option.strip() for option in options):
            return "an option is empty."
        bare = [option.strip() for option in options]
        for option in bare:
            if bare.count(option) > 1:
                return f"the option {option!r} stands there twice."
        if self.answer not in options:
            return f"the answer {self.answer!r} is not among the options {list(options)}."
        return None

    def _texts(self) -> Iterator[tuple[str, str]]:
        yield "question", self.question
        yield "answer", self.answer
        yield "trace", self.trace or ""
        for option in self.options or ():
            yield "option", option

    @property
    def answer_index(self) -> int | None:
        """Canonical index of the right option; None for an open question."""
        return None if self.options is None else self.options.index(self.answer)

    def stratum(self, keys: Sequence[str]) -> str:
        """The values of the tags `keys`, joined by " / "; the data set's name where no keys are given."""
        if not keys:
            return self.dataset
        for key in keys:
            if key not in self.tags:
                known = ", ".join(sorted(self.tags)) or "none"
                raise MedbridgeError(
                    f"item {self.id!r} has no tag {key!r} to build its stratum from (its tags: {known}). "
                    "Name tags that every item of the data has under `data.strata`."
                )
        return " / ".join(self.tags[key] for key in keys)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types; `from_dict` gives back an equal item."""
        record: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        record["tags"] = dict(self.tags)
        record["images"] = list(self.images)
        record["options"] = None if self.options is None else list(self.options)
        if self.linked is None:
            del record["linked"]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Item:
        """The inverse of `to_dict`. Raises MedbridgeError for missing or unknown keys."""
        try:
            values = dict(record)
            values["images"] = tuple(values["images"])
            values["options"] = None if values["options"] is None else tuple(values["options"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise MedbridgeError(f"not a stored item ({error}): {str(record)[:200]}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Item:
        try:
            record = json.loads(text)
        except ValueError as error:
            raise MedbridgeError(f"not a stored item ({error}): {text[:200]!r}") from error
        if not isinstance(record, dict):
            raise MedbridgeError(f"not a stored item (a JSON object is needed): {text[:200]!r}")
        return cls.from_dict(record)


@dataclass(frozen=True, slots=True)
class Skip:
    """A row left out: `source` is the file, `line` its line or row (from 1), `item` its id where known.

    `known` marks a defect of the published data that the importer expects: listed, but never an error.
    """

    source: str
    line: int | None
    item: str | None
    reason: str
    known: bool = False

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        if self.item is None or repr(self.item) in self.reason:
            return f"{place}: {self.reason}"
        return f"{place}: item {self.item!r}: {self.reason}"


@dataclass(slots=True)
class Place:
    """Where an importer reads at the moment: a file and its line or row (from 1), while its questions come."""

    source: str | None = None
    line: int | None = None

    def reach(self, source: str, line: int) -> None:
        self.source, self.line = source, line


@dataclass(frozen=True, slots=True)
class ItemSet:
    """The items of a run in a fixed order, with everything that was skipped on the way."""

    items: list[Item]
    skipped: list[Skip]

    def split(self, name: str) -> list[Item]:
        """The items of one split, in order. Raises MedbridgeError for an unknown split name."""
        if name not in SPLITS:
            raise MedbridgeError(f"no split {name!r}; the splits are {', '.join(SPLITS)}.")
        return [item for item in self.items if item.split == name]
