"""Grades logged completions, and says per stratum what they show: accuracy, support, and the gate's verdict."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medbridge.data import Item, PromptSettings, Skip, grade
from medbridge.data.answers import Outcome
from medbridge.data.open_answers import same_quantity, token_f1
from medbridge.data.readings import READINGS, ReadingName, regrade
from medbridge.data.text import normalise
from medbridge.errors import MedbridgeError
from medbridge.evaluation.logs import Logged
from medbridge.measurement.counting import count
from medbridge.rollout import GREEDY
from medbridge.support import GateSettings, Measured, Tally, judge, majority_at_k, measure

_BOXED = re.compile(r"\\boxed\{([^{}]{0,400})\}")

_MOST_LABELS = 30
"""Answers up to which a confusion matrix is made."""

ABSTAINED = "(none read)"


@dataclass(frozen=True, slots=True)
class StratumResult:
    """One stratum of the logs. Intervals are two-sided; what can't be told is None.

    Attributes:
        samples: fewest and most completions of a question.
        accuracy: mean accuracy of the sampled completions; `readings` has it under each reading of the answers.
        acc_at_1: greedy accuracy, where the log tells greedy completions apart.
        macro_accuracy: mean over right answers of the accuracy on the questions that have it.
        ks, pass_at_k, floors, majority: curves over k, with Pass@k of guessing.
        support: above the guessing floor, at `k`.
        abstain_rate: share of completions without a readable answer.
        disagreements: completions that the log's own score has otherwise, of `scored` that it scored.
        confusion: right answer -> answer read -> completions, where all questions share their options.
        open_answers: of open questions, the mean token F1 of the completions, and how many of those asked for a
            quantity give it, whatever its unit; with a judge, how many are right by equal words or by it.
        ordinal: of readable completions, where the options are grades in order: mean absolute difference in grades, and
            Cohen's kappa with quadratic weights.
    """

    stratum: str
    items: int
    clusters: int
    samples: tuple[int, int]
    accuracy: dict[str, float | None]
    readings: dict[str, float]
    acc_at_1: dict[str, float | None] | None
    macro_accuracy: float
    ks: tuple[int, ...]
    pass_at_k: tuple[float | None, ...]
    floors: tuple[float | None, ...]
    majority: tuple[float | None, ...]
    k: int | None
    support: dict[str, float | None] | None
    verdict: str
    reason: str
    abstain_rate: float
    disagreements: int
    scored: int
    confusion: dict[str, dict[str, int]] | None
    ordinal: dict[str, float] | None
    open_answers: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All strata, and the rows that were left out."""

    reading: str
    strata: tuple[StratumResult, ...]
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def evaluate_logs(
    entries: Sequence[Logged | Skip],
    *,
    by: Sequence[str] = (),
    reading: ReadingName = "standard",
    ordered: Sequence[str] = (),
    gate: GateSettings | None = None,
    seed: int = 0,
    judge_open: Callable[[str, str, str], bool] | None = None,
) -> Evaluation:
    """Grade and judge logged completions.

    Args:
        entries: of `read_logs`.
        by: tags that make up a stratum; none: the data set or task.
        reading: of the answers; the accuracy under the others stands beside it.
        ordered: data sets (or tasks) whose options are grades in order, from least to most.
        gate: settings of the verdict; None: the defaults.
        seed: of the bootstrap.
        judge_open: whether an open answer means the right one, of (question, right answer, answer read); asked where
            the words differ. What it says is told beside the readings and changes no verdict. None: it isn't asked.

    Raises:
        MedbridgeError: nothing could be read, or an item lacks a tag.
    """
    logged = [entry for entry in entries if isinstance(entry, Logged)]
    skipped = tuple(str(entry) for entry in entries if isinstance(entry, Skip))
    if not logged:
        raise MedbridgeError(
            f"no question with completions in these logs ({skipped[0] if skipped else 'they are empty'})."
        )
    settings = gate or GateSettings()
    strata: dict[str, list[Logged]] = defaultdict(list)
    for entry in logged:
        strata[entry.item.stratum(by)].append(entry)
    graded = {name: [_graded(entry) for entry in own] for name, own in sorted(strata.items())}
    tallies = {name: _tallies(strata[name], own, reading) for name, own in graded.items()}
    estimates = {name: measure(own, settings, seed=seed) for name, own in tallies.items()}
    verdicts = judge(estimates, settings)
    found = []
    for name, own in tallies.items():
        estimate, verdict = estimates[name], verdicts[name]
        outcomes = [each[reading] for each in graded[name]]
        told = _against_log(strata[name], outcomes)
        found.append(
            StratumResult(
                stratum=name,
                items=len(own),
                clusters=estimate.clusters,
                samples=(estimate.n_min, estimate.n_max),
                accuracy=_plain(estimate.accuracy) or {},
                readings={which: _right([each[which] for each in graded[name]]) for which in READINGS},
                acc_at_1=_plain(estimate.acc_at_1),
                macro_accuracy=_macro(strata[name], outcomes),
                ks=tuple(int(k) for k in estimate.ks),
                pass_at_k=_numbers(estimate.pass_at_k.value),
                floors=_numbers(estimate.floor),
                majority=_majority(strata[name], own, estimate.n_min),
                k=estimate.k,
                support=_plain(estimate.support),
                verdict=verdict.kind,
                reason=verdict.reason,
                abstain_rate=sum(t.abstained for t in own) / max(1, sum(t.n for t in own)),
                disagreements=told[0],
                scored=told[1],
                confusion=_confusion(strata[name], outcomes),
                ordinal=_ordinal(strata[name], outcomes, ordered),
                open_answers=_open_answers(strata[name], outcomes, judge_open),
            )
        )
    return Evaluation(reading, tuple(found), skipped)


_Outcomes = dict[int, Outcome]
"""Sample -> outcome; the greedy completion under `GREEDY`."""


def _graded(entry: Logged) -> dict[ReadingName, _Outcomes]:
    """The outcomes of one question's completions under each reading."""
    item, settings = entry.item, PromptSettings(answer_style="letter")
    order = tuple(range(len(item.options or ())))
    texts = dict(enumerate(entry.completions)) | ({} if entry.greedy is None else {GREEDY: entry.greedy})
    found: dict[ReadingName, _Outcomes] = {name: {} for name in READINGS}
    for sample, text in texts.items():
        written = _tagged(text)
        outcome = grade(item, order, written, settings)
        for name in READINGS:
            found[name][sample] = regrade(item, order, written, outcome, settings, name)
    return found


def _tagged(text: str) -> str:
    """A boxed answer, as some models write it, in the tags that are read."""
    boxes = list(_BOXED.finditer(text))
    if not boxes or "<answer>" in text.lower():
        return text
    last = boxes[-1]
    return f"{text[: last.start()]}<answer>{last[1]}</answer>"


def _tallies(
    entries: Sequence[Logged], graded: Sequence[Mapping[ReadingName, _Outcomes]], reading: ReadingName
) -> list[Tally]:
    outcomes = {entry.item.id: each[reading] for entry, each in zip(entries, graded, strict=True)}
    return count(outcomes, [entry.item for entry in entries], ["cluster"])


def _sampled(outcomes: _Outcomes) -> list[Outcome]:
    return [outcome for sample, outcome in outcomes.items() if sample != GREEDY]


def _right(graded: Sequence[_Outcomes]) -> float:
    shares = [np.mean([o.status == "correct" for o in own]) for each in graded if (own := _sampled(each))]
    return float(np.mean(shares)) if shares else float("nan")


def _macro(entries: Sequence[Logged], graded: Sequence[_Outcomes]) -> float:
    by_answer = defaultdict(list)
    for entry, each in zip(entries, graded, strict=True):
        by_answer[entry.item.answer.casefold()].append(each)
    return float(np.nanmean([_right(own) for own in by_answer.values()]))


def _majority(entries: Sequence[Logged], tallies: Sequence[Tally], most: int) -> tuple[float | None, ...]:
    if most < 1:
        return ()
    options = sorted({vote for tally in tallies for vote in tally.votes})
    if not options:
        return (0.0,) * most
    votes = np.array([[tally.votes.get(option, 0) for option in options] for tally in tallies])
    place = {option: index for index, option in enumerate(options)}
    correct = [place.get(_vote_of(entry.item), -1) for entry in entries]
    found = majority_at_k(votes, np.array(correct), np.arange(1, most + 1), np.array([t.abstained for t in tallies]))
    return _numbers(found.mean(axis=0))


def _vote_of(item: Item) -> str:
    """How the right answer is written among a tally's votes."""
    return str(item.answer_index) if item.options is not None else normalise(item.answer)


def _against_log(entries: Sequence[Logged], graded: Sequence[_Outcomes]) -> tuple[int, int]:
    """Completions that the log's own score has otherwise, and how many it scored."""
    pairs = [
        (score, each[sample].status == "correct")
        for entry, each in zip(entries, graded, strict=True)
        for sample, score in enumerate(entry.scores)
        if score is not None
    ]
    return sum(score != right for score, right in pairs), len(pairs)


def _confusion(entries: Sequence[Logged], graded: Sequence[_Outcomes]) -> dict[str, dict[str, int]] | None:
    shared = {entry.item.options and frozenset(entry.item.options) for entry in entries}
    options = next(iter(shared))
    if len(shared) != 1 or not options or len(options) > _MOST_LABELS:
        return None
    counts: dict[str, Counter[str]] = {option: Counter() for option in sorted(options)}
    for entry, each in zip(entries, graded, strict=True):
        assert entry.item.options is not None
        for outcome in _sampled(each):
            counts[entry.item.answer][ABSTAINED if outcome.option is None else entry.item.options[outcome.option]] += 1
    return {right: dict(row) for right, row in counts.items()}


def _open_answers(
    entries: Sequence[Logged], graded: Sequence[_Outcomes], judge_open: Callable[[str, str, str], bool] | None
) -> dict[str, float] | None:
    shared, quantities, judged = [], [], []
    for entry, each in zip(entries, graded, strict=True):
        if entry.item.options is not None:
            continue
        for outcome in _sampled(each):
            read, right = outcome.answer or "", entry.item.answer
            shared.append(1.0 if outcome.status == "correct" else token_f1(read, right))
            if judge_open is not None:
                judged.append(
                    outcome.status == "correct" or (bool(read) and judge_open(entry.item.question, right, read))
                )
            same = same_quantity(read, right)
            if same is not None:
                quantities.append(same)
    if not shared:
        return None
    given = {"quantities": float(len(quantities)), "same_quantity": float(np.mean(quantities))} if quantities else {}
    if judged:
        given["judged"] = float(np.mean(judged))
    return {"token_f1": float(np.mean(shared)), **given}


def _ordinal(entries: Sequence[Logged], graded: Sequence[_Outcomes], ordered: Sequence[str]) -> dict[str, float] | None:
    if not ordered or any(entry.item.dataset not in ordered for entry in entries):
        return None
    if len({entry.item.options for entry in entries}) != 1 or entries[0].item.options is None:
        raise MedbridgeError(
            f"{entries[0].item.dataset}: its questions have different options or none, so that they are no grades."
        )
    pairs = [
        (entry.item.answer_index, outcome.option)
        for entry, each in zip(entries, graded, strict=True)
        for outcome in _sampled(each)
        if outcome.option is not None
    ]
    if not pairs:
        return None
    from sklearn.metrics import cohen_kappa_score

    truth, read = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    labels = list(range(len(entries[0].item.options)))
    kappa = cohen_kappa_score(truth, read, labels=labels, weights="quadratic") if len({*truth, *read}) > 1 else 1.0
    return {"mean_absolute_error": float(np.abs(truth - read).mean()), "quadratic_kappa": float(kappa)}


def _plain(measured: Measured | None) -> dict[str, float | None] | None:
    return None if measured is None else measured.to_dict()


def _numbers(values: Any) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)
