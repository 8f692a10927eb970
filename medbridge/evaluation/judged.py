"""Open answers in other words than the right one's, and what a judge makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from medbridge.data import Item
from medbridge.data.answers import Outcome
from medbridge.data.readings import ReadingName
from medbridge.evaluation.answered import Answered, Outcomes
from medbridge.rollout import GREEDY


class OpenJudge(Protocol):
    """Compares open answers."""

    def prepare(self, compared: Iterable[tuple[str, str, str]]) -> None:
        """Is told beforehand what `same` is going to be asked."""
        ...

    def same(self, question: str, right: str, read: str) -> bool | None:
        """Whether the answer that was read means the right one; None: undecided."""
        ...


def to_compare(
    entries: Iterable[Answered], readings: Sequence[ReadingName], *, greedy: bool
) -> Iterator[tuple[str, str, str]]:
    """What a judge is going to be asked of the samples, and of greedy completions: question, right answer, answer read.

    These are the open answers whose words differ from the right ones'.
    """
    for entry in entries:
        for name in readings:
            for sample, outcome in entry.readings[name].items():
                if (greedy or sample != GREEDY) and _differs(entry.item, outcome):
                    yield entry.item.question, entry.item.answer, outcome.answer or ""


def by_judge(entry: Answered, judge: OpenJudge) -> Answered:
    """The question, with those open answers right, too, that the judge takes for the right one; under all readings."""
    if entry.item.options is not None:
        return entry
    readings: Mapping[ReadingName, Outcomes] = {
        name: {
            sample: replace(outcome, status="correct") if _means_the_right_one(entry.item, outcome, judge) else outcome
            for sample, outcome in outcomes.items()
        }
        for name, outcomes in entry.readings.items()
    }
    return replace(entry, readings=readings)


def _differs(item: Item, outcome: Outcome) -> bool:
    return item.options is None and outcome.status != "correct" and bool(outcome.answer)


def _means_the_right_one(item: Item, outcome: Outcome, judge: OpenJudge) -> bool:
    return _differs(item, outcome) and judge.same(item.question, item.answer, outcome.answer or "") is True
