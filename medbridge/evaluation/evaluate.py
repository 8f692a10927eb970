"""What answered questions show, per stratum and per data set: accuracy, support, and the gate's verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medbridge.data import PromptSettings, Skip
from medbridge.data.linked import linked
from medbridge.data.readings import ReadingName
from medbridge.errors import MedbridgeError
from medbridge.evaluation import figures
from medbridge.evaluation.answered import Answered, answered_in_log
from medbridge.evaluation.judged import OpenJudge, by_judge, to_compare
from medbridge.evaluation.logged import Logged
from medbridge.measurement import no_verdict
from medbridge.measurement.counting import count
from medbridge.support import Evidence, GateSettings, Measured, SupportEstimate, Tally, judge, measure
from medbridge.support.guard import Facts, GuardSettings, Repeats, check

_JUDGED = "Open answers that the judge takes for the right one are right in all figures and for the verdicts."


@dataclass(frozen=True, slots=True)
class StratumResult:
    """One stratum, or one data set. Intervals are two-sided; what can't be told is None.

    Attributes:
        samples: fewest and most completions of a question.
        accuracy: mean accuracy of the sampled completions; `readings` has it under each reading of the answers.
        acc_at_1: greedy accuracy, where greedy completions are told apart.
        macro_accuracy: mean over right answers of the accuracy on the questions that have it.
        ks, pass_at_k, floors, majority: curves over k, with Pass@k of guessing. `majority` is empty for open questions
            whose answers a judge decides: words that mean the same would have to count together, wrong ones too.
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
        skipped: why rows of logs were left out.
        notes: what else a reader of the figures should know.
    """

    source: str
    reading: str
    strata: tuple[StratumResult, ...]
    datasets: tuple[StratumResult, ...]
    confidence: float
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
    open_judge: OpenJudge | None = None,
    judge_decides: bool = False,
    source: str = "",
    given: Mapping[str, tuple[str, str]] | None = None,
    doubted: Mapping[str, str] | None = None,
    guard: GuardSettings | None = None,
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
        judge_decides: what it takes for the right answer is right, in every figure and for the verdicts.
        source: what is evaluated, in words.
        given: verdicts, with their reasons, that strata of these names already have.
        doubted: items whose measurement can't be trusted, with the reason; what holds one gets no verdict.
        guard: from when on completions aren't trusted; None: the defaults.

    Raises:
        MedbridgeError: an item lacks a tag, is no grade where grades are said to be, or `ordered` names no data set.
    """
    settings = gate or GateSettings()
    if unknown := sorted(set(ordered) - {entry.item.dataset for entry in entries}):
        known = ", ".join(sorted({entry.item.dataset for entry in entries}))
        raise MedbridgeError(f"no data set is named {unknown[0]!r} to be in order; there are: {known}.")
    named = [entry.item.stratum(by) for entry in entries]  # raises before the judge is asked for hours
    how = _How(reading, ordered, open_judge, judge_decides, {entry.item.id: entry for entry in entries})
    if open_judge is not None:
        which = list(entries[0].readings) if judge_decides else [reading]
        open_judge.prepare(to_compare(entries, which, greedy=judge_decides))
        if judge_decides:
            entries = [by_judge(entry, open_judge) for entry in entries]

    def results(
        groups: Mapping[str, Sequence[Answered]], given: Mapping[str, tuple[str, str]]
    ) -> tuple[StratumResult, ...]:
        tallies = {name: _tallies(own, reading) for name, own in sorted(groups.items())}
        estimates = {name: measure(own, settings, seed=seed) for name, own in tallies.items()}
        doubts = {
            name: doubt
            for name, own in tallies.items()
            if (doubt := _doubt(groups[name], own, doubted or {}, guard or GuardSettings())) is not None
        }
        evidence: dict[str, Evidence] | None = {} if sequential else None
        trusted = {name: estimate for name, estimate in estimates.items() if name not in doubts}
        verdicts: dict[str, tuple[str, str]] = {
            **{name: (verdict.kind, verdict.reason) for name, verdict in judge(trusted, settings, evidence).items()},
            **{name: ("undecided", doubt) for name, doubt in doubts.items()},
            **given,
        }
        return tuple(
            _result(name, groups[name], own, estimates[name], verdicts[name], how) for name, own in tallies.items()
        )

    strata, datasets = defaultdict(list), defaultdict(list)
    for name, entry in zip(named, entries, strict=True):
        strata[name].append(entry)
        datasets[entry.item.dataset].append(entry)
    divided = {frozenset(e.item.id for e in own) for own in strata.values()}
    same_division = divided == {frozenset(e.item.id for e in own) for own in datasets.values()}
    return Evaluation(
        source, reading, results(strata, given or {}), () if same_division else results(datasets, {}),
        1 - 2 * settings.alpha, notes=(_JUDGED,) if judge_decides else (),
    )  # fmt: skip


def evaluate_logs(entries: Sequence[Logged | Skip], *, prompt: PromptSettings | None = None, **how: Any) -> Evaluation:
    """Grade and judge the completions that `read_logs` found, as `evaluate` does (with its other arguments).

    Questions with less than half of the usual number of completions, as logs that broke off have them, are left out:
    all curves would end with theirs.

    Args:
        entries: of `read_logs`.
        prompt: which open answers count as right; None: the defaults.

    Raises:
        MedbridgeError: nothing could be read, or an item lacks a tag.
    """
    logged = [entry for entry in entries if isinstance(entry, Logged)]
    skipped = [str(entry) for entry in entries if isinstance(entry, Skip)]
    if not logged:
        raise MedbridgeError(
            f"no question with completions in these logs ({skipped[0] if skipped else 'they are empty'})."
        )
    usual = float(np.median([len(entry.completions) for entry in logged]))
    whole = [entry for entry in logged if 2 * len(entry.completions) >= usual]
    skipped += [
        f"{entry.item.id}: {len(entry.completions)} completions, where {usual:g} are usual."
        for entry in logged
        if 2 * len(entry.completions) < usual
    ]
    clusters = linked([entry.shows for entry in whole])
    answered = [
        answered_in_log(entry, prompt, cluster=str(number)) for entry, number in zip(whole, clusters, strict=True)
    ]
    several = sum(entry.files > 1 for entry in whole)
    notes = (f"{several} questions stand in several logs, and their completions add up: all must be of one model.",)
    found = evaluate(answered, **how)
    return replace(found, skipped=tuple(skipped), notes=(*found.notes, *(notes if several else ())))


def _doubt(
    entries: Sequence[Answered], tallies: Sequence[Tally], doubted: Mapping[str, str], settings: GuardSettings
) -> str | None:
    """Why completions give no verdict, or None."""
    for entry in entries:
        if entry.item.id in doubted:
            return doubted[entry.item.id]
    samples = sum(tally.n for tally in tallies)
    if samples and min(tally.n for tally in tallies if tally.n) < 2:
        return "No verdict: one completion a question tells accuracy alone, and nothing of support. Sample several."
    counted = [(entry.distinct, tally.n) for entry, tally in zip(entries, tallies, strict=True) if entry.distinct]
    cut = [entry.cut for entry in entries if entry.cut is not None]
    problems = check(
        Facts(
            items=len(tallies), samples=max((tally.n for tally in tallies), default=0), miscounted=0, images_asked=0,
            images_fed=None, longest=0, max_new_tokens=0,
            truncated=sum(cut) / max(1, samples) if len(cut) == len(entries) else 0.0,
            abstained=sum(tally.abstained for tally in tallies) / max(1, samples),
            correct=sum(tally.c for tally in tallies) / max(1, samples), misordered=0, one_order=0,
            one_order_expected=0.0,
            repeats=Repeats(
                items=len(counted), identical=sum(different == 1 for different, _ in counted),
                samples=sum(n for _, n in counted), distinct=sum(different for different, _ in counted),
            ),
        ),
        settings,
    )  # fmt: skip
    return no_verdict(problems) if problems else None


def _tallies(entries: Sequence[Answered], reading: ReadingName) -> list[Tally]:
    outcomes = {entry.item.id: entry.readings[reading] for entry in entries}
    counted = count(outcomes, [entry.item for entry in entries], [])
    return [replace(tally, cluster=entry.cluster) for tally, entry in zip(counted, entries, strict=True)]


@dataclass(frozen=True, slots=True)
class _How:
    """What all strata have in common. `by_words`: the questions by id, as they are graded without a judge."""

    reading: ReadingName
    ordered: Sequence[str]
    judge: OpenJudge | None
    judge_decides: bool
    by_words: Mapping[str, Answered]


def _result(
    name: str,
    entries: Sequence[Answered],
    tallies: Sequence[Tally],
    estimate: SupportEstimate,
    verdict: tuple[str, str],
    how: _How,
) -> StratumResult:
    reading = how.reading
    merged = how.judge_decides and any(entry.item.options is None for entry in entries)
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
        majority=() if merged else _numbers(figures.majority(entries, tallies, estimate.n_min)),
        k=estimate.k,
        support=_plain(estimate.support),
        verdict=verdict[0],
        reason=verdict[1],
        abstain_rate=sum(t.abstained for t in tallies) / max(1, samples),
        truncated_rate=sum(cut) / max(1, samples) if len(cut) == len(entries) else None,
        disagreements=disagreements,
        scored=scored,
        confusion=figures.confusion(entries, reading),
        ordinal=figures.ordinal(entries, reading, how.ordered),
        open_answers=figures.open_answers([how.by_words[entry.item.id] for entry in entries], reading, how.judge),
    )


def _plain(measured: Measured | None) -> dict[str, float | None] | None:
    return None if measured is None else measured.to_dict()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _numbers(values: Sequence[float] | NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(_number(float(value)) for value in values)
