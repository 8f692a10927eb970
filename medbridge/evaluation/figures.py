"""Figures of a group of questions beyond accuracy and support: majority votes, confusion, grades, open answers.

They describe; none of them decides anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from medbridge.data import Item
from medbridge.data.answers import Outcome
from medbridge.data.open_answers import same_quantity, token_f1
from medbridge.data.readings import ReadingName
from medbridge.data.text import normalise
from medbridge.errors import MedbridgeError
from medbridge.evaluation.answered import Answered, Outcomes
from medbridge.evaluation.judged import OpenJudge
from medbridge.rollout import GREEDY
from medbridge.support import Tally, majority_at_k

_MOST_LABELS = 30
"""Answers up to which a confusion matrix is made."""

ABSTAINED = "(none read)"

ORDINAL = "ordinal-regression"
"""The tag `task_type` of questions whose options are grades in order, as MedMNIST calls it."""


def sampled(outcomes: Outcomes) -> list[Outcome]:
    """Those of the samples, without the greedy one."""
    return [outcome for sample, outcome in outcomes.items() if sample != GREEDY]


def mean_accuracy(outcomes: Sequence[Outcomes]) -> float:
    """Mean over questions of the share of samples that are right; NaN without any."""
    shares = [np.mean([o.status == "correct" for o in own]) for each in outcomes if (own := sampled(each))]
    return float(np.mean(shares)) if shares else float("nan")


def macro_accuracy(entries: Sequence[Answered], reading: ReadingName) -> float:
    """Mean over right answers of the mean accuracy on the questions that have it."""
    by_answer = defaultdict(list)
    for entry in entries:
        if sampled(entry.readings[reading]):
            by_answer[entry.item.answer.casefold()].append(entry.readings[reading])
    return float(np.mean([mean_accuracy(own) for own in by_answer.values()])) if by_answer else float("nan")


def majority(entries: Sequence[Answered], tallies: Sequence[Tally], most: int) -> list[float]:
    """Share of questions whose most frequent answer among k samples is right, at k = 1 to `most`; exact."""
    if most < 1:
        return []
    options = sorted({vote for tally in tallies for vote in tally.votes})
    if not options:
        return [0.0] * most
    votes = np.array([[tally.votes.get(option, 0) for option in options] for tally in tallies])
    place = {option: index for index, option in enumerate(options)}
    correct = [place.get(_vote_of(entry.item), -1) for entry in entries]
    found = majority_at_k(votes, np.array(correct), np.arange(1, most + 1), np.array([t.abstained for t in tallies]))
    return [float(value) for value in found.mean(axis=0)]


def _vote_of(item: Item) -> str:
    """How the right answer is written among a tally's votes."""
    return str(item.answer_index) if item.options is not None else normalise(item.answer)


def against_log(entries: Sequence[Answered], reading: ReadingName) -> tuple[int, int]:
    """Completions that the log's own score has otherwise, and how many it scored."""
    pairs = [
        (score, entry.readings[reading][sample].status == "correct")
        for entry in entries
        for sample, score in entry.scores.items()
    ]
    return sum(score != right for score, right in pairs), len(pairs)


def confusion(entries: Sequence[Answered], reading: ReadingName) -> dict[str, dict[str, int]] | None:
    """Right answer -> answer read -> completions, where all questions share their options."""
    shared = {entry.item.options and frozenset(entry.item.options) for entry in entries}
    options = next(iter(shared))
    if len(shared) != 1 or not options or len(options) > _MOST_LABELS:
        return None
    counts: dict[str, Counter[str]] = {option: Counter() for option in entries[0].item.options or ()}
    for entry in entries:
        names = entry.item.options
        assert names is not None
        for outcome in sampled(entry.readings[reading]):
            counts[entry.item.answer][ABSTAINED if outcome.option is None else names[outcome.option]] += 1
    return {right: dict(row) for right, row in counts.items()}


def open_answers(entries: Sequence[Answered], reading: ReadingName, judge: OpenJudge | None) -> dict[str, float] | None:
    """How far open answers are right beyond equal words; None without open questions.

    Keys: `token_f1`; with quantities asked for, how many completions that is (`quantities`) and the share that gives
    them, whatever the unit (`same_quantity`); with a judge, the share right by equal words or by it (`judged`), and how
    many it did not decide, which count as wrong (`undecided`).
    """
    shared, quantities = [], []
    judged: list[bool | None] = []
    for entry in entries:
        if entry.item.options is not None:
            continue
        for outcome in sampled(entry.readings[reading]):
            read, right = outcome.answer or "", entry.item.answer
            shared.append(1.0 if outcome.status == "correct" else token_f1(read, right))
            if judge is not None:
                meant = outcome.status == "correct" or (bool(read) and judge.same(entry.item.question, right, read))
                judged.append(meant)
            found = same_quantity(read, right)
            if found is not None:
                quantities.append(found)
    if not shared:
        return None
    given = {"quantities": float(len(quantities)), "same_quantity": float(np.mean(quantities))} if quantities else {}
    if judged:
        given["judged"] = float(np.mean([meant is True for meant in judged]))
        given["undecided"] = float(judged.count(None))
    return {"token_f1": float(np.mean(shared)), **given}


def ordinal(entries: Sequence[Answered], reading: ReadingName, ordered: Sequence[str]) -> dict[str, float] | None:
    """Of readable completions, the mean absolute difference in grades and Cohen's kappa with quadratic weights.

    None where the options are no grades: the data set is not among `ordered`, nor do the questions say so of themselves
    (`ORDINAL`).

    Raises:
        MedbridgeError: the questions of a data set in `ordered` have different options or none.
    """
    said = all(entry.item.dataset in ordered for entry in entries)
    if not said and any(entry.item.tags.get("task_type") != ORDINAL for entry in entries):
        return None
    if len({entry.item.options for entry in entries}) != 1 or entries[0].item.options is None:
        if not said:
            return None
        raise MedbridgeError(
            f"{entries[0].item.dataset}: its questions have different options or none, so that they are no grades."
        )
    pairs = [
        (entry.item.answer_index, outcome.option)
        for entry in entries
        for outcome in sampled(entry.readings[reading])
        if outcome.option is not None
    ]
    if not pairs:
        return None
    from sklearn.metrics import cohen_kappa_score

    truth, read = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    labels = list(range(len(entries[0].item.options)))
    kappa = cohen_kappa_score(truth, read, labels=labels, weights="quadratic") if len({*truth, *read}) > 1 else 1.0
    return {"mean_absolute_error": float(np.abs(truth - read).mean()), "quadratic_kappa": float(kappa)}
