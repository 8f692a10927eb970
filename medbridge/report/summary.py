"""The result of a run without the HTML: a dictionary for scripts, and the verdict table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medbridge.report.checks import findings
from medbridge.report.collect import collect
from medbridge.report.page import near_one, two
from medbridge.report.text import clean
from medbridge.report.view import (
    ChangeView,
    CheckView,
    Comparison,
    Estimate,
    Measurement,
    More,
    Outlook,
    RunView,
    StageView,
    StratumView,
    duration,
    short,
)

_NAMES_SHOWN = 3
"""Strata that a remark names; the others are counted."""

_STYLES = {"bridge": "yellow", "sharpen": "blue", "done": "green", "undecided": "magenta"}


def summarise(run_dir: Path) -> dict[str, Any]:
    """The run as JSON values: its state, each stratum's verdicts and accuracies, and its stages.

    Numbers that aren't known are None. Estimates are `{"value", "low", "high"}`, with two-sided intervals at
    `confidence`. `base` and `latest` are a stratum's first diagnosis and the last of a model that was not taken back,
    `test` is its held-out accuracy.

    Raises:
        MedbridgeError: there is no run database, or it can't be read.
    """
    view = collect(run_dir, samples=False)
    held_out = {row.stratum: row for row in view.comparisons}
    return {
        "name": view.name,
        "state": view.state,
        "reason": view.state_note,
        "base_model": view.base_model,
        "final_model": view.final_model,
        "datasets": view.datasets,
        "confidence": view.confidence,
        "seconds": view.seconds,
        "rollouts": view.rollouts,
        "strata": {
            stratum.name: {
                "summary": stratum.sentence,
                "verdict": stratum.verdict,
                "trained": stratum.path,
                "base": _measurement(stratum.base),
                "latest": _measurement(stratum.latest),
                "test": None if (row := held_out.get(stratum.name)) is None else _test(row),
            }
            for stratum in view.strata
        },
        "stages": [_stage(stage) for stage in view.stages],
    }


def print_verdicts(console: Console, run_dir: Path) -> None:
    """Print the first and the latest verdict of each stratum, with its Acc@1, and the held-out accuracies.

    Raises:
        MedbridgeError: there is no run database, or it can't be read.
    """
    view = collect(run_dir, samples=False)
    console.print(_headline(view))
    measured = [stratum for stratum in view.strata if stratum.measured]
    if measured:
        console.print(_verdict_table(measured))
        console.print(Text(f"Intervals are two-sided at {100 * view.confidence:.0f} %.", "dim"))
    for remark in _remarks(view):
        console.print(_text(remark))
    if view.comparisons:
        console.print(_test_table(view))


def _verdict_table(strata: Sequence[StratumView]) -> Table:
    draws = {measurement.n_min for stratum in strata for measurement in stratum.measured}
    common = draws.pop() if len(draws) == 1 else None
    raw = "Pass@K" if common is None else f"Pass@{common}"
    table = _table("Stratum", "Verdict", "Support above floor @k", raw, "Guess", "Acc@1")
    for stratum in strata:
        rows = [(stratum.base, _text(short(stratum.name, 60)))]
        if stratum.latest is not stratum.base:
            rows.append((stratum.latest, Text("  latest")))
        for measurement, name in rows:
            assert measurement is not None
            support = bracketed(measurement.support)
            table.add_row(
                name,
                Text(measurement.kind, _STYLES.get(measurement.kind, "")),
                Text(support if measurement.support is None else f"{support} @{measurement.k}"),
                Text(two(measurement.raw_pass) + ("" if common else f"@{measurement.n_min}")),
                Text(near_one(measurement.raw_floor)),
                Text(bracketed(measurement.acc_at_1)),
            )
    return table


def _remarks(view: RunView) -> list[str]:
    """What the checks and the rollbacks say, a line each; nothing where all is well."""
    found = findings(view.strata)
    remarks = []
    if found.reading:
        remarks.append(f"Another reading of the answers changes the verdict: {_names(found.reading)}.")
    if found.images:
        remarks.append(f"Other images change the verdict: {_names(found.images)}.")
    if found.unseen:
        remarks.append(f"No visual support shows: {_names(found.unseen)}.")
    for stage in view.stages:
        if stage.lost:
            lost = [change.stratum for change in stage.changes if change.alarm]
            remarks.append(f"{stage.title}: sharpening was taken back, support fell: {_names(lost)}.")
    return remarks


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(short(name, 30) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _test_table(view: RunView) -> Table:
    trained = any(row.final is not None for row in view.comparisons)
    accuracies = ["Acc@1 before", "after"] if trained else ["Acc@1"]
    table = _table(view.test_split.capitalize(), "Most frequent", *accuracies, "Intervals")
    for row in view.comparisons:
        estimates = [row.baseline, row.base, row.final] if trained else [row.baseline, row.base]
        contrast = row.against_baseline
        words = "" if contrast is None else "apart" if contrast.apart else "overlap"
        table.add_row(
            _text(short(row.stratum, 60)),
            *(Text(bracketed(estimate)) for estimate in estimates),
            Text(words, "bold" if contrast and contrast.apart else ""),
        )
    return table


def _table(first: str, *others: str) -> Table:
    """A table that fits 80 columns while the names in its first column are short; these wrap first.

    Cells are `Text`, since a string would be parsed for console markup in square brackets.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(_text(first), overflow="fold", min_width=8)
    for name in others:
        table.add_column(Text(name), no_wrap=True)
    return table


def _headline(view: RunView) -> Text:
    line = Text()
    line.append(clean(view.name), "bold")
    line.append(f": {view.state}")
    if view.state_note:
        line.append(f" ({clean(view.state_note).rstrip('.')})")
    if view.seconds:
        line.append(f", {duration(view.seconds)} of work")
    return line


def bracketed(value: Estimate | None) -> str:
    """As a table shows it, "0.42 [0.30,0.51]"; a dash where it isn't known."""
    if value is None:
        return two(None)
    known = value.low is not None and value.high is not None
    return two(value.value) + (f" [{two(value.low)},{two(value.high)}]" if known else "")


def _text(text: str) -> Text:
    """Text from the data as it is: no console markup, no terminal control characters."""
    return Text(clean(text).replace("\n", " "))


def _measurement(measurement: Measurement | None) -> dict[str, Any] | None:
    if measurement is None:
        return None
    return {
        "stage": measurement.stage_id,
        "when": measurement.label,
        "verdict": measurement.kind,
        "reason": measurement.reason,
        "more": None if measurement.more is None else _more(measurement.more),
        "pooled": measurement.pooled,
        "items": measurement.items,
        "samples_per_item": measurement.n_min,
        "pass_at_k": measurement.raw_pass,
        "guessing_floor": measurement.raw_floor,
        "statistic": measurement.statistic,
        "k": measurement.k,
        "support_above_floor": _estimate(measurement.support),
        "acc_at_1": _estimate(measurement.acc_at_1),
        "abstain_rate": measurement.abstain_rate,
        "checks": {check.name: _check(check) for check in measurement.checks},
        "visual_support": measurement.visual_support,
        "outlook": None if measurement.outlook is None else _outlook(measurement.outlook),
    }


def _more(more: More) -> dict[str, Any]:
    return {"items": more.items, "samples": more.samples, "capped": more.capped, "bottleneck": more.bottleneck}


def _check(check: CheckView) -> dict[str, Any]:
    found = {
        "verdict": check.kind,
        "changed": check.changed,
        "items": check.items,
        "support_above_floor": _estimate(check.support),
        "acc_at_1": _estimate(check.acc_at_1),
    }
    return found if check.reads else {**found, "visual_support": _estimate(check.visual)}


def _outlook(outlook: Outlook) -> dict[str, Any]:
    return {
        "cover": _estimate(outlook.cover),
        "efficiency": outlook.efficiency,
        "gap": _estimate(outlook.gap),
        "k90": outlook.k90,
        "reliable_k": outlook.reliable_k,
        "predicted": [{"k": k, "pass_at_k": share} for k, share in outlook.predicted],
        "forecast": _estimate(outlook.forecast),
    }


def _test(row: Comparison) -> dict[str, Any]:
    return {
        "items": row.items,
        "most_frequent_answer": _estimate(row.baseline),
        "base": _estimate(row.base),
        "final": _estimate(row.final),
        "against_most_frequent_answer": None if row.against_baseline is None else row.against_baseline.words(),
        "against_base": None if row.against_base is None else row.against_base.words(),
    }


def _estimate(value: Estimate | None) -> dict[str, float | None] | None:
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}


def _stage(stage: StageView) -> dict[str, Any]:
    return {
        "stage": stage.stage_id,
        "kind": stage.kind,
        "done": stage.done,
        "strata": stage.strata,
        "trained_by": {name: stage.way(name) for name in stage.strata} if stage.trains else None,
        "held_out_accuracy": stage.held_out,
        "kept_step": stage.kept_step,
        "model": stage.model,
        "result_model": stage.result_model,
        "seconds": stage.seconds,
        "steps": stage.steps if stage.trains else None,
        "items": stage.items,
        "rollouts": stage.rollouts,
        "verdicts": stage.verdicts,
        "taken_back": stage.undone or bool(stage.lost),
        "changes": {change.stratum: _change(change) for change in stage.changes},
    }


def _change(change: ChangeView) -> dict[str, Any]:
    return {
        "items": change.items,
        "support_above_floor": _estimate(change.support),
        "pass_at_k": _estimate(change.pass_at_k),
        "k": change.k,
        "acc_at_1": _estimate(change.acc_at_1),
        "gained": change.gained,
        "lost": change.lost,
        "support_lost": change.alarm,
        "forecast": _estimate(change.forecast),
        "came_out": _estimate(change.came_out),
    }
