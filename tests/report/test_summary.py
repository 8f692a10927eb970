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
    assert [stage["kind"] for stage in found["stages"]][:3] == ["format", "diagnose", "bridge"]


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


@pytest.mark.parametrize("width", [30, 200])
def test_any_width_prints(finished_run: Path, width: int) -> None:
    assert "tissue" in printed(finished_run, width) or width == 30
