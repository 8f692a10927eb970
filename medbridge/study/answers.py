"""What the models answered, for the study's page: which completions it holds, and how much of each.

Chosen by fixed rules within a budget of bytes; how they are drawn is the page's.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from medbridge.data.answers import Status
from medbridge.ledger import Completion, Ledger
from medbridge.report.samples import excerpt
from medbridge.report.text import clean
from medbridge.rollout.engine import GREEDY

ANSWER_BYTES = 4_000_000
"""Budget of all completions in a page."""

STATUSES: tuple[Status, ...] = ("correct", "wrong", "abstain")

_CHARACTERS = 600
"""Of one completion that are shown, about: its beginning, what was read, and its end."""

_READ = 200
"""Characters of an answer that was read."""

_FIRST = 4
"""Questions of each stratum whose completions come before all others', so that every cell has some."""

_BATCH = 200
"""Questions that are read from the ledger at once."""

Record = list[Any]
"""One completion: sample (-1 is the greedy one), index in `STATUSES`, what was read (the index of an option, a text, or
None), 1 where it was cut off, and its pieces: a text, [the span that was read], or {"gap": what was left out}."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The completions of one question: a list for each model. `whole`: none of those chosen was left out."""

    records: list[list[Record]]
    whole: bool


def json_text(value: Any) -> str:
    """JSON that no text in it can end: of all that HTML looks for in a script, each begins with "<"."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def choose_answers(
    ledger: Ledger, stages: Sequence[int], strata: Mapping[str, Sequence[str]], *, budget: int = ANSWER_BYTES
) -> dict[str, Answers]:
    """The answers that the page holds, by item id: the greedy completion and the first sampled one of each status.

    The first questions of each stratum come whole, then the greedy completions of all questions, then the sampled
    ones, until the budget is used up. Strata take turns; within one a hash of the id decides, which spreads the choice
    over the data, and repeats. Of one question every model's are shown, or none's.

    Args:
        ledger: of the run.
        stages: the measurement of each model.
        strata: item ids by stratum.
        budget: bytes of all completions as the page holds them.
    """
    order = _order(strata)
    first = _FIRST * len(strata)
    shown: dict[str, Answers] = {}
    for greedy, sampled, ids in (
        (True, True, order[:first]), (True, False, order[first:]), (False, True, order[first:]),
    ):  # fmt: skip
        for item_id, found in _read(ledger, stages, ids):
            records = [[_record(c) for c in own if (greedy if c.sample == GREEDY else sampled)] for own in found]
            budget -= len(json_text(records).encode())
            if budget < 0:
                return shown
            before = shown[item_id].records if item_id in shown else [[] for _ in stages]
            shown[item_id] = Answers([old + new for old, new in zip(before, records, strict=True)], sampled)
    return shown


def _order(strata: Mapping[str, Sequence[str]]) -> list[str]:
    def drawn(item_id: str) -> bytes:
        return hashlib.blake2b(item_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    turns = zip_longest(*(sorted(ids, key=drawn) for _, ids in sorted(strata.items())))
    return [item_id for turn in turns for item_id in turn if item_id is not None]


def _read(ledger: Ledger, stages: Sequence[int], ids: Sequence[str]) -> Iterator[tuple[str, list[list[Completion]]]]:
    """The completions of each item by each model, the greedy one first, then by status."""
    for start in range(0, len(ids), _BATCH):
        batch = ids[start : start + _BATCH]
        found: list[dict[str, list[Completion]]] = []
        for stage in stages:
            by_item = defaultdict(list)
            for entry in ledger.examples(stage, batch):
                by_item[entry.item_id].append(entry)
            found.append(by_item)
        for item_id in batch:
            yield item_id, [sorted(by_item[item_id], key=_place) for by_item in found]


def _place(completion: Completion) -> tuple[bool, int]:
    return completion.sample != GREEDY, STATUSES.index(completion.outcome.status)


def _record(completion: Completion) -> Record:
    outcome = completion.outcome
    read: str | int | None = outcome.option
    if read is None and outcome.answer is not None:
        read = clean(outcome.answer[:_READ])
    pieces: list[Any] = []
    for piece in excerpt(clean(completion.text), outcome.span, _CHARACTERS):
        pieces.append({"text": piece.text, "mark": [piece.text], "gap": {"gap": piece.text}}[piece.kind])
    return [completion.sample, STATUSES.index(outcome.status), read, int(completion.truncated), *pieces]
