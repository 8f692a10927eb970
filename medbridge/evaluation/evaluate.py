"""What answered questions show, per stratum and per data set: accuracy, support, and the gate's verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medbridge.data import Skip
from medbridge.data.readings import ReadingName
from medbridge.errors import MedbridgeError
from medbridge.evaluation import figures
from medbridge.evaluation.answered import Answered, answered_in_log
from medbridge.evaluation.logged import Logged
from medbridge.measurement.counting import count
from medbridge.support import Evidence, GateSettings, Measured, SupportEstimate, Tally, Verdict, judge, measure


@dataclass(frozen=True, slots=True)
class StratumResult:
    """One stratum, or one data set. Intervals are two-sided; what can't be told is None.

    Attributes:
        samples: fewest and most completions of a question.
        accuracy: mean accuracy of the sampled completions; `readings` has it under each reading of the answers.
        acc_at_1: greedy accuracy, where greedy completions are told apart.
        macro_accuracy: mean over right answers of the accuracy on the questions that have it.
        ks, pass_at_k, floors, majority: curves over k, with Pass@k of guessing.
        support: above the guessing floor, at `k`.
        abstain_rate: share of completions without a readable answer.
        truncated_rate: share of completions that ended at their token limit; None where that isn't known.
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
    readings: dict[str, float | None]
    acc_at_1: dict[str, float | None] | None
    macro_accuracy: float | None
    ks: tuple[int, ...]
    pass_at_k: tuple[float | None, ...]
    floors: tuple[float | None, ...]
    majority: tuple[float | None, ...]
    k: int | None
    support: dict[str, float | None] | None
    verdict: str
    reason: str
    abstain_rate: float
    truncated_rate: float | None
    disagreements: int
    scored: int
    confusion: dict[str, dict[str, int]] | None
    ordinal: dict[str, float] | None
    open_answers: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found, and the rows that were left out.

    Attributes:
        source: what was evaluated, in words: a model and a split, or log files.
        strata: results by stratum; `datasets` by data set, where that is another division.
        confidence: of every interval, two-sided.
    """

    source: str
    reading: str
    strata: tuple[StratumResult, ...]
    datasets: tuple[StratumResult, ...]
    confidence: float
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def evaluate(
    entries: Sequence[Answered],
    *,
    by: Sequence[str] = (),
    reading: ReadingName = "standard",
    ordered: Sequence[str] = (),
    gate: GateSettings | None = None,
    sequential: bool = False,
    seed: int = 0,
    open_judge: figures.OpenJudge | None = None,
    source: str = "",
) -> Evaluation:
    """Count and judge answered questions.

    Args:
        entries: not empty, all with the same readings, `reading` among them.
        by: tags that make up a stratum; none: the data set.
        reading: of the answers; the accuracy under the others stands beside it.
        ordered: data sets whose options are grades in order, from least to most; those that say so need not be named.
        gate: settings of the verdict; None: the defaults.
        sequential: the questions came in looks, so that verdicts are of the last look's level.
        seed: of the bootstrap.
        open_judge: compares open answers whose words differ from the right one's. What it says is told beside the
            readings and changes no verdict. None: there is none.

    Raises:
        MedbridgeError: an item lacks a tag, or is no grade where grades are said to be.
    """
    settings = gate or GateSettings()
    if open_judge is not None:
        open_judge.prepare(figures.to_compare(entries, reading))

    def results(groups: Mapping[str, Sequence[Answered]]) -> tuple[StratumResult, ...]:
        tallies = {name: _tallies(own, reading) for name, own in sorted(groups.items())}
        estimates = {name: measure(own, settings, seed=seed) for name, own in tallies.items()}
        evidence: dict[str, Evidence] | None = {} if sequential else None
        verdicts = judge(estimates, settings, evidence)
        return tuple(
            _result(name, groups[name], own, estimates[name], verdicts[name], reading, ordered, open_judge)
            for name, own in tallies.items()
        )

    strata, datasets = defaultdict(list), defaultdict(list)
    for entry in entries:
        strata[entry.item.stratum(by)].append(entry)
        datasets[entry.item.dataset].append(entry)
    divided = {frozenset(e.item.id for e in own) for own in strata.values()}
    same_division = divided == {frozenset(e.item.id for e in own) for own in datasets.values()}
    return Evaluation(
        source, reading, results(strata), () if same_division else results(datasets), 1 - 2 * settings.alpha
    )


def evaluate_logs(entries: Sequence[Logged | Skip], **how: Any) -> Evaluation:
    """Grade and judge the completions that `read_logs` found, as `evaluate` does (with its other arguments).

    Raises:
        MedbridgeError: nothing could be read, or an item lacks a tag.
    """
    logged = [entry for entry in entries if isinstance(entry, Logged)]
    skipped = tuple(str(entry) for entry in entries if isinstance(entry, Skip))
    if not logged:
        raise MedbridgeError(
            f"no question with completions in these logs ({skipped[0] if skipped else 'they are empty'})."
        )
    return replace(evaluate([answered_in_log(entry) for entry in logged], **how), skipped=skipped)


def _tallies(entries: Sequence[Answered], reading: ReadingName) -> list[Tally]:
    outcomes = {entry.item.id: entry.readings[reading] for entry in entries}
    counted = count(outcomes, [entry.item for entry in entries], [])
    return [replace(tally, cluster=entry.cluster) for tally, entry in zip(counted, entries, strict=True)]


def _result(
    name: str,
    entries: Sequence[Answered],
    tallies: Sequence[Tally],
    estimate: SupportEstimate,
    verdict: Verdict,
    reading: ReadingName,
    ordered: Sequence[str],
    open_judge: figures.OpenJudge | None,
) -> StratumResult:
    samples = sum(tally.n for tally in tallies)
    cut = [entry.cut for entry in entries if entry.cut is not None]
    disagreements, scored = figures.against_log(entries, reading)
    readings = {which: figures.mean_accuracy([e.readings[which] for e in entries]) for which in entries[0].readings}
    return StratumResult(
        stratum=name,
        items=len(tallies),
        clusters=estimate.clusters,
        samples=(estimate.n_min, estimate.n_max),
        accuracy=_plain(estimate.accuracy) or {},
        readings={which: _number(value) for which, value in readings.items()},
        acc_at_1=_plain(estimate.acc_at_1),
        macro_accuracy=_number(figures.macro_accuracy(entries, reading)),
        ks=tuple(int(k) for k in estimate.ks),
        pass_at_k=_numbers(estimate.pass_at_k.value),
        floors=_numbers(estimate.floor),
        majority=_numbers(figures.majority(entries, tallies, estimate.n_min)),
        k=estimate.k,
        support=_plain(estimate.support),
        verdict=verdict.kind,
        reason=verdict.reason,
        abstain_rate=sum(t.abstained for t in tallies) / max(1, samples),
        truncated_rate=sum(cut) / max(1, samples) if len(cut) == len(entries) else None,
        disagreements=disagreements,
        scored=scored,
        confusion=figures.confusion(entries, reading),
        ordinal=figures.ordinal(entries, reading, ordered),
        open_answers=figures.open_answers(entries, reading, open_judge),
    )


def _plain(measured: Measured | None) -> dict[str, float | None] | None:
    return None if measured is None else measured.to_dict()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _numbers(values: Sequence[float] | NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(_number(float(value)) for value in values)
