"""From a run's ledger to a plain view of it: the report's content in numbers and words. No HTML, no drawing.

A run may be read at any moment of its life, so everything here copes with what is not there yet.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from medbridge.ledger import Ledger, Stage, VerdictRow
from medbridge.rollout.engine import GREEDY, Graded
from medbridge.support.gate import GateSettings
from medbridge.support.intervals import bootstrap_ratio
from medbridge.support.tallies import Tally

MEASURING = ("diagnose", "evaluate")

_NAMES = {
    "format": "Format",
    "diagnose": "Diagnosis",
    "bridge": "Bridge",
    "sharpen": "Sharpen",
    "evaluate": "Test",
}

_QUIET_SECONDS = 900
"""A stage that has begun counts as stopped once nothing was written for this long."""

_LONGEST_NAME = 160
"""Characters of a stratum's name, a model's or a data set's that are shown."""

_SAMPLES_IN_ALL = 48
"""Sample items over all strata: they fill most of the file."""

_SAMPLES_PER_STRATUM = 4

_COMPLETIONS_PER_ITEM = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the two ends of its interval; an end is None where it isn't known."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over k; None where undefined."""

    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One stratum, measured by one stage. `label` says when, for a reader who sees this stratum only."""

    stage_id: int
    label: str
    kind: str
    reason: str
    items: int
    n_min: int
    n_max: int
    ks: list[int]
    pass_at_k: Curve
    floor: list[float | None]
    k: int | None
    k_note: str
    support: Estimate | None
    acc_at_1: Estimate | None
    greedy_items: int
    abstain_rate: float | None
    confidence: float
    threshold: float | None
    accuracy_target: float | None

    @property
    def raw_pass(self) -> float | None:
        """Raw Pass@K at the largest K, K = n_min."""
        return self.pass_at_k.value[-1] if self.pass_at_k.value else None

    @property
    def raw_floor(self) -> float | None:
        """Pass@K of guessing at the same K."""
        return self.floor[-1] if self.floor else None

    @property
    def chance(self) -> float | None:
        """Acc@1 of guessing."""
        return self.floor[0] if self.floor else None


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion: "text", "mark" (the span that was read) or "gap" (what was left out)."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as shown. `shown_order` are the options in the order in which the model saw them."""

    label: str
    status: str
    read: str | None
    chosen: str | None
    text: str
    span: tuple[int, int] | None
    well_formed: bool
    truncated: bool
    shown_order: list[str]
    tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One item with its images' paths, how its samples came out, and a few of its completions."""

    item_id: str
    question: str
    answer: str
    options: list[str] | None
    images: list[str]
    n: int
    correct: int
    abstained: int
    completions: list[Completion]

    @property
    def wrong(self) -> int:
        return max(0, self.n - self.correct - self.abstained)


@dataclass(frozen=True, slots=True)
class Contrast:
    """Whether one estimate is "above", "below" or "equal to" another, and whether the intervals are apart."""

    side: str
    apart: bool

    def words(self, other: str = "") -> str:
        """In words: "above the base model, intervals apart"."""
        return f"{self.side} {other}".strip() + (", intervals apart" if self.apart else ", intervals overlap")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Held-out accuracy of one stratum: the baseline, the base model and the final one.

    The contrasts are the final model's; where nothing was trained, `against_baseline` is the base model's.
    """

    stratum: str
    items: int
    baseline: Estimate | None
    base: Estimate | None
    final: Estimate | None
    chance: float | None
    against_baseline: Contrast | None
    against_base: Contrast | None


@dataclass(slots=True)
class StratumView:
    """All that is known of one stratum."""

    name: str
    measured: list[Measurement] = field(default_factory=list)
    held_out: list[Measurement] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    outcome: str | None = None
    story: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    option_counts: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def verdict(self) -> str | None:
        """Where the stratum stands: its final state, or else its latest verdict."""
        return self.outcome or (self.latest.kind if self.latest else None)

    @property
    def sentence(self) -> str:
        """The story with the verdict, in words."""
        kind = self.verdict
        if kind is None:
            return self.story
        return f"{self.story}; {'now' if self.path and kind in ('done', 'undecided') else 'verdict'} {kind}"

    @property
    def base(self) -> Measurement | None:
        return self.measured[0] if self.measured else None

    @property
    def latest(self) -> Measurement | None:
        return self.measured[-1] if self.measured else None


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage. What isn't known is None, and a stage of one kind has no numbers of another."""

    stage_id: int
    kind: str
    title: str
    done: bool
    model: str
    result_model: str | None
    strata: list[str]
    started: float
    seconds: float | None
    steps: int
    planned_steps: int | None
    items: int
    items_by_stratum: list[tuple[str, int]]
    replayed: int
    source: str | None
    loss: tuple[float, float] | None
    reward: tuple[float, float] | None
    rollouts: int
    tokens: int | None
    truncated_rate: float | None
    verdicts: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    plan: dict[str, Any]

    @property
    def trains(self) -> bool:
        return self.kind not in MEASURING


@dataclass(slots=True)
class RunView:
    """A whole run as the report shows it."""

    name: str
    folder: str
    state: str  # "empty", "running", "stopped" or "finished"
    state_note: str
    base_model: str
    final_model: str | None
    taught_format: bool
    datasets: list[str]
    embedded: bool
    split_counts: dict[str, int]
    begun: float | None
    ended: float | None
    generated: float
    seconds: float
    rollouts: int
    stages: list[StageView]
    strata: list[StratumView]
    comparisons: list[Comparison]
    test_split: str
    diagnosis_split: str
    confidence: float
    threshold: float | None
    accuracy_target: float | None
    letters: bool
    samples_from: str | None
    config: Any
    environment: dict[str, str]


def collect(run_dir: Path, *, samples: bool = True, now: float | None = None) -> RunView:
    """Read a run folder's ledger.

    Args:
        run_dir: folder that holds `run.sqlite`.
        samples: also choose sample items and read their completions.
        now: time of the report, seconds since the epoch; None takes the clock.

    Raises:
        MedbridgeError: there is no run database, or it can't be read.
    """
    written = _last_written(run_dir)  # before the file is opened: opening may touch the write-ahead log
    ledger = Ledger(run_dir / "run.sqlite", read_only=True)
    try:
        return _collect(ledger, run_dir, samples, time.time() if now is None else now, written)
    finally:
        ledger.close()


def _collect(ledger: Ledger, run_dir: Path, samples: bool, now: float, written: float) -> RunView:
    config = ledger.meta("config")
    settings = config if isinstance(config, dict) else {}
    stages = ledger.stages()
    items = ledger.items()
    verdicts = {stage.stage_id: ledger.verdicts(stage.stage_id) for stage in stages}
    measured = {
        stage.stage_id: ledger.tallies(stage.stage_id)
        for stage in stages
        if stage.kind in MEASURING and stage.status == "done"
    }
    views = _stage_views(ledger, stages, items, verdicts, settings)
    strata = _strata(ledger, stages, views, items, verdicts)
    tests = [view for view in views if view.kind == "evaluate" and view.done]
    comparisons = _comparisons(stages, tests, strata, measured)
    for stratum in strata:
        stratum.story = _story(stratum, comparisons)
    latest = [m for s in strata if (m := s.latest)]
    samples_from = None
    if samples:
        samples_from = _choose_samples(ledger, stages, views, measured, items, strata)
    trained = [view for view in views if view.trains and view.done and view.result_model]
    base_model = ledger.meta("base_model") or (stages[0].model if stages else "")
    datasets = sorted({record["dataset"] for record in items.values()})
    sources = _dig(settings, "data", "sources")
    kinds = [str(source.get("kind")) for source in sources or [] if isinstance(source, dict)]
    state, note = _state(ledger, views, now - written)
    return RunView(
        name=short(str(ledger.meta("name") or run_dir.name)),
        folder=run_dir.name,
        state=state,
        state_note=note,
        base_model=short(str(base_model)),
        final_model=short(str(trained[-1].result_model)) if trained else None,
        taught_format=any(stage.kind == "format" for stage in stages),
        datasets=[short(name) for name in datasets] or [short(kind) for kind in kinds],
        embedded="brain" in datasets or "brain" in kinds,
        split_counts=dict(Counter(record["split"] for record in items.values())),
        begun=stages[0].started if stages else None,
        ended=max((s.finished for s in stages if s.finished is not None), default=None),
        generated=now,
        seconds=sum(view.seconds or 0.0 for view in views),
        rollouts=ledger.count("rollouts"),
        stages=views,
        strata=strata,
        comparisons=comparisons,
        test_split=str(_dig(settings, "diagnosis", "test_split") or "test"),
        diagnosis_split=str(_dig(settings, "diagnosis", "split") or "validation"),
        confidence=latest[-1].confidence if latest else 1 - 2 * GateSettings().alpha,
        threshold=next((m.threshold for m in latest if m.threshold is not None), None),
        accuracy_target=next((m.accuracy_target for m in latest if m.accuracy_target is not None), None),
        letters=(_dig(settings, "data", "prompt", "answer_style") or "letter") == "letter",
        samples_from=samples_from,
        config=config,
        environment=dict(_flat(ledger.meta("environment"))),
    )


# -- state ---------------------------------------------------------------------------------------------------


def _last_written(run_dir: Path) -> float:
    """When the ledger was last written to, seconds since the epoch; 0 where there is none."""
    found = 0.0
    for path in (run_dir / "run.sqlite", run_dir / "run.sqlite-wal"):
        # A reader leaves an empty log behind, which says nothing.
        if path.is_file() and (status := path.stat()).st_size > 0:
            found = max(found, status.st_mtime)
    return found


def _state(ledger: Ledger, views: Sequence[StageView], quiet: float) -> tuple[str, str]:
    """The run's state with a sentence about it. `quiet`: seconds since the last entry."""
    finished = ledger.meta("finished")
    if finished is not None:
        reason = finished.get("reason") if isinstance(finished, dict) else finished
        return "finished", str(reason or "")
    if not views:
        return "empty", "Nothing is measured yet."
    last = views[-1]
    note = f"{last.title} {'is done, and the next stage has not begun' if last.done else 'has begun'}"
    if not last.done and last.trains:
        total = f" of {last.planned_steps:,}" if last.planned_steps else ""
        note += f": {last.steps:,}{total} steps"
    elif not last.done:
        note += f": {last.rollouts:,} completions"
    note += f"; the last entry is {duration(max(0.0, quiet))} old."
    if quiet < _QUIET_SECONDS:
        return "running", note
    return "stopped", f"{note} The same command resumes the run."


# -- stages --------------------------------------------------------------------------------------------------


def _stage_views(
    ledger: Ledger,
    stages: Sequence[Stage],
    items: Mapping[str, Mapping[str, Any]],
    verdicts: Mapping[int, Mapping[str, VerdictRow]],
    settings: Mapping[str, Any],
) -> list[StageView]:
    totals = Counter(stage.kind for stage in stages)
    numbers: Counter[str] = Counter()
    views = []
    for stage in stages:
        numbers[stage.kind] += 1
        title = _NAMES.get(stage.kind, stage.kind.capitalize())
        if totals[stage.kind] > 1:
            title += f" {numbers[stage.kind]}"
        summary = stage.summary
        trains = stage.kind not in MEASURING
        metrics = ledger.metrics(stage.stage_id) if trains else {}
        loss = _ends(metrics.get("loss", []))
        first, last = _number(summary.get("first_loss")), _number(summary.get("last_loss"))
        seen = {item_id for step in ledger.trained_items(stage.stage_id) for item_id in step}
        by_stratum = Counter(items[i]["stratum"] if i in items else "" for i in seen)
        own = {name: count for name, count in by_stratum.items() if name in stage.strata}
        # A format stage shows every training item, and the ledger keeps only those that are used later.
        replayed = 0 if stage.kind == "format" else len(seen) - sum(own.values())
        sampled = 0 if trains else sum(ledger.sampled(stage.stage_id).values())
        views.append(
            StageView(
                stage_id=stage.stage_id,
                kind=stage.kind,
                title=title,
                done=stage.status == "done",
                model=short(stage.model),
                result_model=None if stage.result_model is None else short(stage.result_model),
                strata=list(stage.strata),
                started=stage.started,
                seconds=_seconds(stage),
                steps=max((len(points) for points in metrics.values()), default=0),
                planned_steps=_planned_steps(stage, settings),
                items=len(seen) - replayed if trains else int(_number(summary.get("items")) or 0),
                items_by_stratum=sorted(own.items()),
                replayed=replayed,
                source=None if summary.get("source") is None else str(summary["source"]),
                loss=loss if loss is not None or first is None or last is None else (first, last),
                reward=_ends(metrics.get("reward", [])),
                rollouts=int(_number(summary.get("rollouts")) or sampled),
                tokens=None if (tokens := _number(summary.get("tokens"))) is None else int(tokens),
                truncated_rate=_number(summary.get("truncated_rate")),
                verdicts={name: row.kind for name, row in verdicts[stage.stage_id].items()},
                metrics=metrics,
                plan=stage.plan,
            )
        )
    return views


def _seconds(stage: Stage) -> float | None:
    stated = _number(stage.summary.get("seconds"))
    if stated is None and stage.finished is not None:
        return max(0.0, stage.finished - stage.started)
    return stated


def _planned_steps(stage: Stage, settings: Mapping[str, Any]) -> int | None:
    if stage.kind == "format":
        steps = _number(_dig(settings, "model", "from_nothing", "format_steps"))
    else:
        section = {"bridge": "sft", "sharpen": "rl"}.get(stage.kind, "")
        steps = _number(_dig(stage.plan, section, "steps")) or _number(stage.plan.get("steps"))
    return None if steps is None else int(steps)


def _ends(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Means of the first and the last tenth of a series (at most ten points each): one step is noise."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return None
    width = min(10, max(1, len(values) // 10))
    return math.fsum(values[:width]) / width, math.fsum(values[-width:]) / width


# -- strata --------------------------------------------------------------------------------------------------


def _strata(
    ledger: Ledger,
    stages: Sequence[Stage],
    views: Sequence[StageView],
    items: Mapping[str, Mapping[str, Any]],
    verdicts: Mapping[int, Mapping[str, VerdictRow]],
) -> list[StratumView]:
    names = {record["stratum"] for record in items.values()}
    names |= {name for rows in verdicts.values() for name in rows}
    names |= {name for stage in stages for name in stage.strata if stage.kind != "format"}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    option_counts: dict[str, set[int]] = defaultdict(set)
    for record in items.values():
        counts[record["stratum"]][record["split"]] += 1
        option_counts[record["stratum"]].add(len(record["options"] or ()))
    outcome = ledger.meta("outcome")
    outcome = outcome if isinstance(outcome, dict) else {}
    trained = [view for view in views if view.kind in ("bridge", "sharpen") and view.done]
    found = []
    for name in sorted(names):
        final = outcome.get(name)
        stratum = StratumView(
            name=name,
            path=[view.kind for view in trained if name in view.strata],
            outcome=str(final["kind"]) if isinstance(final, dict) and final.get("kind") else None,
            counts=dict(counts[name]),
            option_counts=sorted(option_counts[name]),
        )
        since: list[StageView] = []
        for view in views:
            row = verdicts[view.stage_id].get(name)
            if view.kind in ("bridge", "sharpen"):
                since.append(view)
            elif view.kind == "diagnose" and row is not None:
                label = _label(since, name, bool(stratum.measured))
                stratum.measured.append(_measurement(view.stage_id, label, row))
                since = []
            elif view.kind == "evaluate" and row is not None:
                label = "Final" if stratum.held_out else "Base"
                stratum.held_out.append(_measurement(view.stage_id, label, row))
        found.append(stratum)
    return found


def _label(since: Sequence[StageView], stratum: str, measured_before: bool) -> str:
    """When a diagnosis was made, seen from a stratum: "Base", "After bridge", "After bridge of others" ..."""
    if not since:
        return "Measured again" if measured_before else "Base"
    titles = " and ".join(view.title[0].lower() + view.title[1:] for view in since)
    took_part = any(stratum in view.strata for view in since)
    return f"After {titles}" + ("" if took_part else " of others")


def _measurement(stage_id: int, label: str, row: VerdictRow) -> Measurement:
    support, evidence = row.support, row.verdict.get("evidence")
    evidence = evidence if isinstance(evidence, dict) else {}
    ks = [int(k) for k in support.get("ks") or []]
    k = _number(support.get("k"))
    return Measurement(
        stage_id=stage_id,
        label=label,
        kind=row.kind,
        reason=row.reason,
        items=int(_number(support.get("items")) or 0),
        n_min=int(_number(support.get("n_min")) or 0),
        n_max=int(_number(support.get("n_max")) or 0),
        ks=ks,
        pass_at_k=_curve(support.get("pass_at_k"), len(ks)),
        floor=_numbers(support.get("floor"), len(ks)),
        k=None if k is None else int(k),
        k_note=str(support.get("k_note") or ""),
        support=_estimate(support.get("support")),
        acc_at_1=_estimate(support.get("acc_at_1")),
        greedy_items=int(_number(support.get("greedy_items")) or 0),
        abstain_rate=_number(support.get("abstain_rate")),
        confidence=_number(support.get("confidence")) or 1 - 2 * GateSettings().alpha,
        threshold=_number(evidence.get("threshold")),
        accuracy_target=_number(evidence.get("accuracy_target")),
    )


def _story(stratum: StratumView, comparisons: Sequence[Comparison]) -> str:
    """What happened to a stratum, in words: the header's one line."""
    base, latest = stratum.base, stratum.latest
    did = ", then ".join(_times(kind, len(list(run))) for kind, run in groupby(stratum.path)) or "not trained"
    if latest is None or base is None:
        return f"{did}; not measured"
    held_out = next((row for row in comparisons if row.stratum == stratum.name), None)
    before, after, where = base.acc_at_1, latest.acc_at_1, ""
    if held_out is not None and held_out.base is not None and held_out.final is not None:
        before, after, where = held_out.base, held_out.final, " on test items"
    if before is None or after is None:
        return f"{did}; Acc@1 not measured"
    if len(stratum.measured) > 1 or where:
        return f"{did}; Acc@1 {before.value:.2f} → {after.value:.2f}{where}"
    return f"{did}; Acc@1 {before.value:.2f}"


def _times(kind: str, count: int) -> str:
    done = {"bridge": "bridged", "sharpen": "sharpened"}[kind]
    return done if count == 1 else f"{done} twice" if count == 2 else f"{done} {count} times"


# -- held-out comparison -------------------------------------------------------------------------------------


def _comparisons(
    stages: Sequence[Stage],
    tests: Sequence[StageView],
    strata: Sequence[StratumView],
    tallies: Mapping[int, Sequence[Tally]],
) -> list[Comparison]:
    """Base against final model on the test split, per stratum, and over all where there are several."""
    if not tests:
        return []
    summaries = {stage.stage_id: stage.summary for stage in stages}
    baselines = next(
        (b for test in reversed(tests) if isinstance(b := summaries[test.stage_id].get("baseline"), dict)), {}
    )
    first, last = tests[0], tests[-1] if len(tests) > 1 else None
    rows = []
    for stratum in strata:
        at = {measurement.stage_id: measurement for measurement in stratum.held_out}
        base, final = at.get(first.stage_id), at.get(last.stage_id) if last else None
        some = final or base
        if some is None:
            continue
        rows.append(
            _comparison(
                stratum.name,
                some.greedy_items or some.items,
                _estimate(baselines.get(stratum.name)),
                base.acc_at_1 if base else None,
                final.acc_at_1 if final else None,
                some.chance,
            )
        )
    if len(rows) > 1:
        confidence = next((s.held_out[-1].confidence for s in strata if s.held_out), 0.9)
        overall = [_overall(tallies.get(test.stage_id, ()), confidence) for test in (first, last) if test]
        weights = [(row.items, row.baseline.value) for row in rows if row.baseline is not None]
        total = sum(count for count, _ in weights)
        complete = len(weights) == len(rows) and total > 0
        baseline = Estimate(math.fsum(n * v for n, v in weights) / total, None, None) if complete else None
        rows.append(
            _comparison(
                "All strata",
                sum(row.items for row in rows),
                baseline,
                overall[0],
                overall[1] if len(overall) > 1 else None,
                None,
            )
        )
    return rows


def _comparison(
    name: str,
    items: int,
    baseline: Estimate | None,
    base: Estimate | None,
    final: Estimate | None,
    chance: float | None,
) -> Comparison:
    return Comparison(
        stratum=name,
        items=items,
        baseline=baseline,
        base=base,
        final=final,
        chance=chance,
        against_baseline=_contrast(final or base, baseline),
        against_base=_contrast(final, base),
    )


def _contrast(ours: Estimate | None, theirs: Estimate | None) -> Contrast | None:
    """None where an interval isn't known."""
    if ours is None or theirs is None or ours.low is None or ours.high is None:
        return None
    if theirs.low is None or theirs.high is None:
        return None
    side = "above" if ours.value > theirs.value else "below" if ours.value < theirs.value else "equal to"
    return Contrast(side, ours.low > theirs.high or ours.high < theirs.low)


def _overall(tallies: Sequence[Tally], confidence: float) -> Estimate | None:
    """Acc@1 over all items of a stage, with the gate's interval."""
    greedy = [tally for tally in tallies if tally.greedy_correct is not None]
    if not greedy:
        return None
    result = bootstrap_ratio(
        [[float(bool(tally.greedy_correct))] for tally in greedy],
        1.0,
        bounds=(0.0, 1.0),
        clusters=[tally.cluster for tally in greedy],
        alpha=(1 - confidence) / 2,
        replicates=GateSettings().replicates,
        seed=0,
    )
    return Estimate(float(result.value[0]), float(result.low[0]), float(result.high[0]))


# -- samples -------------------------------------------------------------------------------------------------


def _choose_samples(
    ledger: Ledger,
    stages: Sequence[Stage],
    views: Sequence[StageView],
    tallies: Mapping[int, Sequence[Tally]],
    items: Mapping[str, Mapping[str, Any]],
    strata: Sequence[StratumView],
) -> str | None:
    """Give each stratum a few items of the latest finished measurement; returns that stage's title."""
    measuring = [stage for stage in stages if tallies.get(stage.stage_id)]
    if not measuring:
        return None
    stage = measuring[-1]
    by_stratum: dict[str, list[Tally]] = defaultdict(list)
    for tally in tallies[stage.stage_id]:
        if tally.item_id in items:
            by_stratum[items[tally.item_id]["stratum"]].append(tally)
    each = max(1, min(_SAMPLES_PER_STRATUM, _SAMPLES_IN_ALL // max(1, len(by_stratum))))
    for stratum in strata:
        chosen = _varied(by_stratum.get(stratum.name, []), each)
        if not chosen:
            continue
        stored: dict[str, list[Graded]] = defaultdict(list)
        for entry in ledger.rollouts(stage.stage_id, item_ids=[tally.item_id for tally in chosen]):
            stored[entry.rollout.item_id].append(entry)
        stratum.samples = [_sample(tally, items[tally.item_id], stored[tally.item_id]) for tally in chosen]
    return next(view.title for view in views if view.stage_id == stage.stage_id)


def _varied(tallies: Iterable[Tally], count: int) -> list[Tally]:
    """Up to `count` items: in turn one answered right, one wrong, one without a readable answer.

    Among these, a hash of the id decides: it spreads the choice over the data, and repeats.
    """

    def rank(tally: Tally) -> bytes:
        return hashlib.blake2b(tally.item_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    def fate(tally: Tally) -> int:
        if tally.abstained * 2 > tally.n or (tally.abstained and tally.c + tally.abstained == tally.n):
            return 2
        right = tally.greedy_correct if tally.greedy_correct is not None else 2 * tally.c > tally.n
        return 0 if right else 1

    queues: list[list[Tally]] = [[], [], []]
    for tally in sorted(tallies, key=rank):
        queues[fate(tally)].append(tally)
    chosen: list[Tally] = []
    while len(chosen) < count and any(queues):
        chosen.extend(queue.pop(0) for queue in queues if queue)
    return chosen[:count]


def _sample(tally: Tally, record: Mapping[str, Any], stored: Sequence[Graded]) -> Sample:
    options = record["options"]
    ordered = sorted(stored, key=lambda entry: entry.rollout.sample)
    chosen = [entry for entry in ordered if entry.rollout.sample == GREEDY][:1]
    sampled = [entry for entry in ordered if entry.rollout.sample != GREEDY]
    for status in ("correct", "wrong", "abstain"):
        chosen.extend([entry for entry in sampled if entry.outcome.status == status][:1])
    return Sample(
        item_id=record["item_id"],
        question=record["question"],
        answer=record["answer"],
        options=options,
        images=list(record["images"] or ()),
        n=tally.n,
        correct=tally.c,
        abstained=tally.abstained,
        completions=[_completion(entry, options) for entry in chosen[:_COMPLETIONS_PER_ITEM]],
    )


def _completion(entry: Graded, options: Sequence[str] | None) -> Completion:
    rollout, outcome = entry.rollout, entry.outcome
    known = options or ()
    chosen = None
    if outcome.option is not None and 0 <= outcome.option < len(known):
        chosen = known[outcome.option]
    return Completion(
        label="greedy" if rollout.sample == GREEDY else f"sample {rollout.sample + 1}",
        status=outcome.status,
        read=outcome.answer,
        chosen=chosen,
        text=rollout.text,
        span=outcome.span,
        well_formed=outcome.well_formed,
        truncated=rollout.finish_reason == "length",
        shown_order=[known[index] for index in rollout.permutation if 0 <= index < len(known)],
        tokens=len(rollout.token_ids),
    )


def excerpt(text: str, span: tuple[int, int] | None, limit: int) -> list[Piece]:
    """A text of at most about `limit` characters: its beginning, the span that was read, and its end.

    A span that doesn't lie in the text is ignored. What is left out is said in a piece of its own.
    """
    inside = span is not None and 0 <= span[0] < span[1] <= len(text)
    start, stop = span if span is not None and inside else (len(text), len(text))
    if len(text) <= limit:
        keep = [(0, len(text))]
    else:
        third = limit // 3
        # Of a span longer than what may be shown, its beginning is kept.
        around = (max(0, start - third // 2), min(len(text), stop + third // 2, start + limit))
        keep = [(0, third), around, (len(text) - third, len(text))]
    pieces: list[Piece] = []
    done = 0
    for begin, end in keep:
        if begin > done:
            pieces.append(Piece("gap", f"{begin - done:,} characters left out"))
        begin = max(begin, done)
        for kind, a, b in (
            ("text", begin, min(end, start)),
            ("mark", max(begin, start), min(end, stop)),
            ("text", max(begin, stop), end),
        ):
            if b > a:
                pieces.append(Piece(kind, text[a:b]))
        done = max(done, end)
    return pieces


# -- small things --------------------------------------------------------------------------------------------


def short(text: str, limit: int = _LONGEST_NAME) -> str:
    """The text, its middle replaced by an ellipsis where it is longer than `limit`."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}…{text[len(text) - limit // 2 + 1 :]}"


def duration(seconds: float) -> str:
    """A time span in words: "41 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(values: Any, size: int) -> list[float | None]:
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    return (numbers + [None] * size)[:size]


def _curve(record: Any, size: int) -> Curve:
    record = record if isinstance(record, dict) else {}
    return Curve(*(_numbers(record.get(name), size) for name in ("value", "low", "high")))


def _estimate(record: Any) -> Estimate | None:
    """From the gate's {"value", "low", "high"} or a baseline's {"accuracy", "low", "high"}."""
    if not isinstance(record, dict):
        return None
    value = _number(record.get("value", record.get("accuracy")))
    return None if value is None else Estimate(value, _number(record.get("low")), _number(record.get("high")))


def _dig(record: Any, *keys: str) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _flat(record: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(record, dict):
        for key, value in record.items():
            yield from _flat(value, f"{prefix}{key}." if isinstance(value, dict) else f"{prefix}{key}")
    elif record is not None:
        yield prefix.rstrip("."), str(record)
