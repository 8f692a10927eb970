"""From a run's ledger to a plain view of it: the report's content in numbers and words. No HTML, no drawing.

A run may be read at any moment of its life, so everything here copes with what is not there yet.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from medbridge.data.items import SPLITS
from medbridge.errors import MedbridgeError
from medbridge.evaluation.runs import stored_evaluation
from medbridge.ledger import TRAINING as LEDGER_TRAINING
from medbridge.ledger import Ledger, Stage, VerdictRow
from medbridge.report.checks import changes, checks, losses, more, outlook
from medbridge.report.records import curve, dig, estimate, mapping, number, numbers, text, whole
from medbridge.report.samples import choose_samples
from medbridge.report.view import (
    MEASURING,
    TRAINING,
    Comparison,
    Contrast,
    Estimate,
    Measurement,
    RunView,
    StageView,
    StratumView,
    duration,
    short,
)
from medbridge.support.gate import GateSettings
from medbridge.support.intervals import bootstrap_ratio
from medbridge.support.tallies import Tally

_NAMES = {
    "format": "Format",
    "diagnose": "Diagnosis",
    "bridge": "Bridge",
    "sharpen": "Sharpen",
    "mixed": "Bridge and sharpen",
    "evaluate": "Test",
    "control": "Control",
    "route": "Routing",
}

_PURPOSES = {"blank": "grey images", "shuffled": "exchanged images", "bridge": "bridge", "sharpen": "sharpen"}

_QUIET_SECONDS = 900
"""A stage that has begun counts as stopped once nothing was written for this long."""


def collect(run_dir: Path, *, samples: bool = True, now: float | None = None) -> RunView:
    """Read a run folder's ledger.

    Args:
        run_dir: folder that holds `run.sqlite`.
        samples: also choose sample items and read their completions, and evaluate the last measurement.
        now: time of the report, seconds since the epoch; None takes the clock.

    Raises:
        MedbridgeError: there is no run database, or it can't be read.
    """
    written = _last_written(run_dir)  # before the file is opened: opening may touch the write-ahead log
    ledger = Ledger(run_dir / "run.sqlite", read_only=True)
    try:
        return _collect(ledger, run_dir, samples, time.time() if now is None else now, written)
    except sqlite3.DatabaseError as error:
        raise MedbridgeError(
            f"{ledger.path}: the run database can't be read ({error}). Restore it from a backup; if a run is "
            "writing to it just now, try again."
        ) from error
    finally:
        ledger.close()


def _collect(ledger: Ledger, run_dir: Path, samples: bool, now: float, written: float) -> RunView:
    config = ledger.meta("config")
    settings = config if isinstance(config, dict) else {}
    stages = ledger.stages()
    items = ledger.items()
    verdicts = {stage.stage_id: ledger.verdicts(stage.stage_id) for stage in stages}
    # Samples are shown of the last model that stands.
    finished = [s for s in stages if s.kind in MEASURING and s.status == "done" and not losses(mapping(s.summary))]
    measured = {
        stage.stage_id: ledger.tallies(stage.stage_id)
        for stage in finished
        if stage.kind == "evaluate" or stage is finished[-1]
    }
    views = _stage_views(ledger, stages, items, verdicts, settings)
    strata = _strata(ledger, stages, views, items, verdicts)
    tests = [view for view in views if view.kind == "evaluate" and view.done]
    told = [stage for stage in finished if stage.kind == "evaluate"]
    comparisons = _comparisons(stages, tests, strata, measured)
    for stratum in strata:
        stratum.story = _story(stratum, comparisons)
    latest = [m for s in strata if (m := s.latest)]
    samples_from = None
    if samples:
        samples_from = choose_samples(ledger, views, measured, items, strata)
    trained = [view for view in views if view.trains and view.done and view.result_model and not view.undone]
    base_model = ledger.meta("base_model") or (stages[0].model if stages else "")
    datasets = sorted({record["dataset"] for record in items.values()})
    sources = dig(settings, "data", "sources")
    kinds = [str(source.get("kind")) for source in sources or [] if isinstance(source, dict)]
    state, note = _state(ledger, views, now - written)
    study = ledger.meta("study")
    if study is not None:
        state = "finished" if mapping(study).get("finished") else state
        note = (
            "A study: its models stand beside each other, and study.html tells of them. Here are its stages in the "
            "order in which they were run, whichever model they began with."
        )
    return RunView(
        name=short(str(ledger.meta("name") or run_dir.name)),
        folder=run_dir.name,
        state=state,
        state_note=note,
        base_model=short(str(base_model)),
        final_model=short(str(trained[-1].result_model)) if trained and study is None else None,
        taught_format=any(stage.kind == "format" for stage in stages),
        datasets=[short(name) for name in datasets] or [short(kind) for kind in kinds],
        embedded="brain" in datasets or "brain" in kinds,
        splits=sorted({record["split"] for record in items.values()}, key=_split_order),
        begun=stages[0].started if stages else None,
        ended=max((s.finished for s in stages if s.finished is not None), default=None),
        generated=now,
        seconds=sum(view.seconds or 0.0 for view in views if view.kind != "control"),  # within their diagnoses
        rollouts=ledger.count("rollouts"),
        stages=views,
        strata=strata,
        comparisons=comparisons,
        test_split=str(dig(settings, "diagnosis", "test_split") or "test"),
        diagnosis_split=str(dig(settings, "diagnosis", "split") or "validation"),
        confidence=latest[-1].confidence if latest else 1 - 2 * GateSettings().alpha,
        threshold=next((m.threshold for m in latest if m.threshold is not None), None),
        accuracy_target=next((m.accuracy_target for m in latest if m.accuracy_target is not None), None),
        letters=(dig(settings, "data", "prompt", "answer_style") or "letter") == "letter",
        samples_from=samples_from,
        evaluation=stored_evaluation(ledger, (told or finished)[-1]) if finished and samples else None,
        config=config,
        study=study is not None,
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
    # Controls begin and end within a diagnosis.
    last = next((v for v in reversed(views) if not v.done), None) or [v for v in views if v.kind != "control"][-1]
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
    titles = _titles(stages)
    undone = _undone(stages)
    views = []
    for stage in stages:
        summary = mapping(stage.summary)
        trains = stage.kind in TRAINING
        metrics = ledger.metrics(stage.stage_id) if trains else {}
        loss = _ends(metrics.get("loss", []))
        first, last = number(summary.get("first_loss")), number(summary.get("last_loss"))
        seen = {item_id for step in ledger.trained_items(stage.stage_id) for item_id in step}
        by_stratum = Counter(items[i]["stratum"] if i in items else "" for i in seen)
        own = {name: count for name, count in by_stratum.items() if name in stage.strata}
        # A format stage shows every training item, and the ledger keeps only those that are used later.
        replayed = 0 if stage.kind == "format" else len(seen) - sum(own.values())
        rollouts = number(summary.get("rollouts"))
        if rollouts is None:
            rollouts = 0 if trains else sum(ledger.sampled(stage.stage_id).values())
        views.append(
            StageView(
                stage_id=stage.stage_id,
                kind=stage.kind,
                title=titles[stage.stage_id],
                done=stage.status == "done",
                model=short(stage.model),
                result_model=None if stage.result_model is None else short(stage.result_model),
                strata=list(stage.strata),
                started=stage.started,
                seconds=_seconds(stage),
                steps=max((len(points) for points in metrics.values()), default=0),
                planned_steps=_planned_steps(stage, settings),
                items=len(seen) - replayed if trains else whole(summary.get("items")) or 0,
                items_by_stratum=sorted(own.items()),
                replayed=replayed,
                source=None if summary.get("source") is None else str(summary["source"]),
                loss=loss if loss is not None or first is None or last is None else (first, last),
                reward=_ends(metrics.get("reward", [])),
                rollouts=int(rollouts),
                tokens=whole(summary.get("tokens")),
                truncated_rate=number(summary.get("truncated_rate")),
                verdicts={name: row.kind for name, row in verdicts[stage.stage_id].items()},
                metrics=metrics,
                changes=changes(summary),
                since=titles.get(whole(summary.get("since")) or 0),
                lost=losses(summary),
                undone=stage.stage_id in undone,
                ways=_ways(stage),
                kept_step=whole(summary.get("kept_step")),
                held_out=number(summary.get("held_out_accuracy")),
            )
        )
    return views


def _titles(stages: Sequence[Stage]) -> dict[int, str]:
    """What each stage is called: its kind, counted where there are several, and what a control or routing is for."""
    kinds = {stage.stage_id: (stage.kind, _purpose(stage)) for stage in stages}
    totals, so_far = Counter(kinds.values()), Counter[tuple[str, str]]()
    titles = {}
    for stage_id, (kind, purpose) in kinds.items():
        so_far[kind, purpose] += 1
        count = f" {so_far[kind, purpose]}" if totals[kind, purpose] > 1 else ""
        titles[stage_id] = _NAMES.get(kind, kind.capitalize()) + count + (f" ({purpose})" if purpose else "")
    return titles


def _purpose(stage: Stage) -> str:
    if stage.kind not in ("control", "route"):
        return ""
    return ", ".join(_PURPOSES[name] for name in stage.strata if name in _PURPOSES)


def _undone(stages: Sequence[Stage]) -> set[int]:
    """The training stages that the diagnosis after them took back."""
    trained, found = None, set()
    for stage in stages:
        if stage.kind in LEDGER_TRAINING:
            trained = stage.stage_id
        elif stage.kind == "diagnose" and trained is not None and losses(mapping(stage.summary)):
            found.add(trained)
    return found


def _ways(stage: Stage) -> dict[str, str]:
    """What each stratum of a mixed stage was trained by."""
    chosen = mapping(dig(stage.plan, "strata")) if stage.kind == "mixed" else {}
    return {str(name): way for way, names in chosen.items() if isinstance(names, list) for name in names}


def _seconds(stage: Stage) -> float | None:
    stated = number(mapping(stage.summary).get("seconds"))
    if stated is None and stage.finished is not None:
        return max(0.0, stage.finished - stage.started)
    return stated


def _planned_steps(stage: Stage, settings: Mapping[str, Any]) -> int | None:
    if stage.kind == "format":
        steps = number(dig(settings, "model", "from_nothing", "format_steps"))
    else:
        section = {"bridge": "sft", "sharpen": "rl", "mixed": "rl"}.get(stage.kind, "")
        steps = number(dig(stage.plan, section, "steps")) or number(stage.plan.get("steps"))
    return whole(steps)


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
    names |= {name for stage in stages for name in stage.strata if stage.kind in LEDGER_TRAINING}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    option_counts: dict[str, set[int]] = defaultdict(set)
    for record in items.values():
        counts[record["stratum"]][record["split"]] += 1
        option_counts[record["stratum"]].add(len(record["options"] or ()))
    outcome = ledger.meta("outcome")
    outcome = outcome if isinstance(outcome, dict) else {}
    trained = [view for view in views if view.kind in LEDGER_TRAINING and view.done]
    found = []
    for name in sorted(names):
        final = outcome.get(name)
        stratum = StratumView(
            name=name,
            path=[view.way(name) for view in trained if name in view.strata and not view.undone],
            undone=[view.way(name) for view in trained if name in view.strata and view.undone],
            outcome=str(final["kind"]) if isinstance(final, dict) and final.get("kind") else None,
            counts=dict(counts[name]),
            option_counts=sorted(option_counts[name]),
        )
        since: list[StageView] = []
        for view in views:
            row = verdicts[view.stage_id].get(name)
            if view.kind in LEDGER_TRAINING:
                since.append(view)
            elif view.kind == "diagnose" and row is not None:
                back = bool(view.lost and stratum.measured)
                label = _label(since, name, bool(stratum.measured)) + (", taken back" if back else "")
                stratum.measured.append(_measurement(view.stage_id, label, row, taken_back=back))
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


def _measurement(stage_id: int, label: str, row: VerdictRow, *, taken_back: bool = False) -> Measurement:
    support, verdict = mapping(row.support), mapping(row.verdict)
    evidence = mapping(verdict.get("evidence"))
    ks = _ks(support.get("ks"))
    return Measurement(
        stage_id=stage_id,
        label=label,
        kind=row.kind,
        reason=row.reason,
        items=whole(support.get("items")) or 0,
        n_min=whole(support.get("n_min")) or 0,
        n_max=whole(support.get("n_max")) or 0,
        ks=ks,
        pass_at_k=curve(support.get("pass_at_k"), len(ks)),
        floor=numbers(support.get("floor"), len(ks)),
        k=whole(support.get("k")),
        k_note=str(support.get("k_note") or ""),
        support=estimate(support.get("support")),
        acc_at_1=estimate(support.get("acc_at_1")),
        greedy_items=whole(support.get("greedy_items")) or 0,
        abstain_rate=number(support.get("abstain_rate")),
        confidence=number(support.get("confidence")) or 1 - 2 * GateSettings().alpha,
        threshold=number(evidence.get("threshold")),
        accuracy_target=number(evidence.get("accuracy_target")),
        statistic=text(support.get("statistic")) or "pass",
        reached=curve(support.get("reached"), len(ks)),
        more=more(verdict),
        pooled=verdict.get("pooled") is True,
        checks=checks(verdict, row.kind, support),
        outlook=outlook(support),
        taken_back=taken_back,
    )


def _ks(values: Any) -> list[int]:
    """The k of a measurement's curves; none where they can't be that."""
    ks = [whole(value) for value in values] if isinstance(values, list) else []
    found = [k for k in ks if k is not None and k >= 1]
    return found if len(found) == len(ks) else []


def _story(stratum: StratumView, comparisons: Sequence[Comparison]) -> str:
    """What happened to a stratum, in words: the header's one line."""
    base, latest = stratum.base, stratum.latest
    kept = ", then ".join(_times(kind, len(list(run))) for kind, run in groupby(stratum.path))
    undone = ", ".join(f"{_times(kind, len(list(run)))} and taken back" for kind, run in groupby(stratum.undone))
    did = "; ".join(part for part in (kept, undone) if part) or "not trained"
    if latest is None or base is None:
        return f"{did}; not measured"
    held_out = next((row for row in comparisons if row.stratum == stratum.name), None)
    before, after, where = base.acc_at_1, latest.acc_at_1, ""
    if held_out is not None and held_out.base is not None and held_out.final is not None:
        before, after, where = held_out.base, held_out.final, " on test items"
    if before is None or after is None:
        return f"{did}; Acc@1 not measured"
    if latest is not base or where:
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
    summaries = {stage.stage_id: mapping(stage.summary) for stage in stages}
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
                estimate(baselines.get(stratum.name)),
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


# -- small things --------------------------------------------------------------------------------------------


def _split_order(name: str) -> tuple[int, str]:
    return (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)


def _flat(record: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(record, dict):
        for key, value in record.items():
            yield from _flat(value, f"{prefix}{key}." if isinstance(value, dict) else f"{prefix}{key}")
    elif record is not None:
        yield prefix.rstrip("."), str(record)
