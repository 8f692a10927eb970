"""The summary for scripts and the table for the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medbridge.report import print_verdicts, summarise


def printed(folder: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_verdicts(console, folder)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_summary_is_json_with_every_stratum(finished_run: Path) -> None:
    found = summarise(finished_run)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["state"] == "finished" and found["name"] == "brain demo"
    assert list(found["strata"]) == ["level", "plane", "rotation", "tissue"]
    plane = found["strata"]["plane"]
    assert plane["trained"] == ["bridge", "sharpen"]
    assert plane["summary"].startswith("bridged, then sharpened; Acc@1 ")
    assert plane["base"]["verdict"] == "bridge" and plane["base"]["when"] == "Base"
    assert plane["base"]["pass_at_k"] > 0.9  # the trap: raw Pass@16 looks strong ...
    assert plane["base"]["support_above_floor"]["high"] < 0.5  # ... and there is nothing above guessing
    assert plane["latest"]["when"] == "After sharpen"
    assert plane["test"]["final"]["low"] > plane["test"]["base"]["high"]
    assert plane["test"]["against_base"] == "above, intervals apart"
    assert found["strata"]["level"]["latest"]["when"] == "After sharpen of others"
    assert [stage["kind"] for stage in found["stages"]][:6] == [
        "format", "diagnose", "control", "control", "route", "bridge",
    ]  # fmt: skip


def test_the_summary_tells_checks_outlook_and_changes(finished_run: Path) -> None:
    found = summarise(finished_run)
    latest = {name: stratum["latest"] for name, stratum in found["strata"].items()}
    assert all(m["statistic"] == "reached" and m["pooled"] in (False, True) for m in latest.values())
    strict = latest["level"]["checks"]["strict"]
    assert strict["verdict"] == "done" and strict["changed"] and strict["support_above_floor"]["value"] == 0.9
    assert "visual_support" not in strict
    assert latest["tissue"]["checks"]["blank"]["visual_support"] == {"value": 0.01, "low": -0.2, "high": 0.2}
    assert [m["visual_support"] for m in latest.values()] == [True, True, True, False]
    undecided = [m for s in found["strata"].values() for m in (s["base"], s["latest"]) if m["verdict"] == "undecided"]
    assert undecided and all(m["more"]["bottleneck"] in ("items", "samples") for m in undecided)
    decided = latest["plane"]
    assert decided["more"] is None
    assert decided["outlook"] == {
        "cover": {"value": 0.61, "low": 0.44, "high": 0.79},
        "efficiency": pytest.approx(decided["acc_at_1"]["value"] / decided["pass_at_k"]),
        "gap": decided["outlook"]["gap"],
        "k90": 1,
        "reliable_k": 64,
        "predicted": [{"k": 32, "pass_at_k": 0.95}, {"k": 64, "pass_at_k": 0.97}],
        "forecast": {"value": 0.66, "low": 0.47, "high": 0.88},
    }
    assert decided["outlook"]["gap"]["value"] == pytest.approx(decided["pass_at_k"] - decided["acc_at_1"]["value"])
    stages = [stage for stage in found["stages"] if stage["kind"] == "diagnose"]
    assert [stage["taken_back"] for stage in stages] == [False] * 3 and stages[0]["changes"] == {}
    change = stages[2]["changes"]["plane"]
    assert change["items"] == 24 and change["k"] == 16 and not change["support_lost"]
    assert change["forecast"]["value"] == 0.7 and change["came_out"] == decided["acc_at_1"]
    assert stages[2]["changes"]["level"]["forecast"] is None


def test_sharpening_that_was_taken_back(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe()
    for split in ("train", "validation"):
        run.draw("plane", split, 12, ("axial", "coronal"), "Which plane?", pictures=1)
    run.measure("diagnose", {"plane": (0.8, 9, 0.0)})
    model = run.train("sharpen", ["plane"], steps=3)
    run.measure("diagnose", {"plane": (0.5, 9, 0.0)}, round=1, model=model, lost={"plane": "plane lost support"})
    found = summarise(run.folder)
    assert [stage["taken_back"] for stage in found["stages"]] == [False, True, True]
    assert found["stages"][2]["changes"]["plane"]["support_lost"]
    plane = found["strata"]["plane"]
    assert plane["latest"] == plane["base"] and plane["trained"] == [] and found["final_model"] is None
    assert plane["verdict"] == plane["base"]["verdict"]
    text = printed(run.folder)
    assert "\nDiagnosis 2: sharpening was taken back, support fell: plane.\n" in text and "  latest" not in text


def test_an_empty_run_has_a_summary(fabricate: Callable[..., Any]) -> None:
    run = fabricate()
    assert summarise(run.folder)["state"] == "empty"
    assert "empty" in printed(run.folder)


def test_the_table_fits_a_terminal(finished_run: Path) -> None:
    text = printed(finished_run)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(" plane") and "bridge" in line for line in lines)
    verdicts = lines[: lines.index("Intervals are two-sided at 90 %.")]
    assert sum(line.endswith("]") for line in verdicts) == 8  # no interval is cut off
    remarks = lines[len(verdicts) + 1 :]
    assert remarks[:3] == [
        "Another reading of the answers changes the verdict: level.",
        "Other images change the verdict: plane.",
        "No visual support shows: tissue.",
    ]
    assert "Support above floor @k" in text and "…" not in text and "most frequent" in text.lower()


def test_hostile_names_neither_style_nor_control_the_terminal(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe("[bold]x[/bold]\x1b[2J\u202e")
    name = "[red]a[/red]\x1b]0;title\x07"
    run.draw(name, "validation", 8, ("a", "b"), "Which?")
    run.measure("diagnose", {name: (0.5, 4.0, 0.0)})
    text = printed(run.folder, 160)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "[bold]x[/bold]" in text and "[red]a[/red]" in text


def test_remarks_name_few_strata_and_nothing_where_all_is_well(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=2)
    run.describe()
    names = [f"s{index}" for index in range(5)]
    for name in names:
        run.draw(name, "validation", 9, ("a", "b"), "Which?", pictures=1)
    changed = {"strict": {"kind": "done", "items": 8}}
    run.measure("diagnose", dict.fromkeys(names, (0.5, 9, 0.0)), checks=dict.fromkeys(names, changed))
    last = printed(run.folder).strip().splitlines()[-1]
    assert last == "Another reading of the answers changes the verdict: s0, s1, s2 and 2 more."
    run.sql("UPDATE verdicts SET verdict = json_remove(verdict, '$.checks')")
    assert printed(run.folder).strip().splitlines()[-1] == "Intervals are two-sided at 90 %."


@pytest.mark.parametrize("width", [30, 200])
def test_any_width_prints(finished_run: Path, width: int) -> None:
    assert "tissue" in printed(finished_run, width) or width == 30
