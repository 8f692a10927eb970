"""A profile of real small stages: a trace that loads, and a table whose shares add up."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import interrupted

from medbridge.config import RunSettings
from medbridge.pipeline import Run
from medbridge.progress import Reporter


@pytest.fixture
def run(
    tmp_path: Path, tiny_settings: Callable[..., RunSettings], tiny_data: Path, formed: Path
) -> Iterator[Callable[..., Run]]:
    """A run with a given model; keywords are laid over the tiny settings."""
    opened: list[Run] = []

    def make(**sections: Any) -> Run:
        settings = tiny_settings(**{"model": {"path": str(formed)}, **sections})
        log = (tmp_path / "log").open("w")
        opened.append(Run(tmp_path / "run", settings, base_dir=tiny_data, reporter=Reporter(Console(file=log))))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize(("kind", "phases"), [("bridge", {"training"}), ("sharpen", {"sampling", "training", "loss"})])
def test_a_stage_is_traced_from_its_second_step_on(kind: str, phases: set[str], run: Callable[..., Run]) -> None:
    opened = run(rl={"steps": 4})
    opened.profile = 2
    opened.train_once(kind, ["side"])  # type: ignore[arg-type]
    folder = opened.folder / "profile" / f"01-{kind}"
    assert sorted(path.name for path in folder.iterdir()) == ["time.txt", "trace.json.gz"]
    with gzip.open(folder / "trace.json.gz") as file:
        trace = json.load(file)
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names and any("Optimizer.step" in str(name) for name in names)
    updates = [event for event in trace["traceEvents"] if "Optimizer.step" in str(event.get("name"))]
    assert len(updates) == 2
    text = (folder / "time.txt").read_text()
    assert text.startswith("profile of 2 steps") and "aten::" in text
    found = {name: float(share) for name, share in re.findall(r"^\s*(\w+) +[\d.]+ s +([\d.]+) %$", text, re.MULTILINE)}
    assert {name for name, share in found.items() if share > 0} >= phases
    assert sum(share for name, share in found.items() if name != "loss") == pytest.approx(100, abs=2)
    opened.reporter.console.file.flush()
    assert "trace.json.gz" in Path(opened.reporter.console.file.name).read_text()


def test_without_it_nothing_is_written(run: Callable[..., Run]) -> None:
    opened = run()
    opened.train_once("bridge", ["side"])
    assert not (opened.folder / "profile").exists()


def test_more_steps_than_there_are(run: Callable[..., Run]) -> None:
    opened = run()
    opened.profile = 1000
    opened.train_once("bridge", ["side"])
    assert (opened.folder / "profile" / "01-bridge" / "time.txt").read_text().startswith("profile of 3 steps")


def test_a_stage_of_one_step_has_nothing_to_profile(run: Callable[..., Run], tmp_path: Path) -> None:
    opened = run(sft={"steps": 1})
    opened.profile = 1
    opened.train_once("bridge", ["side"])
    assert not (opened.folder / "profile").exists()
    opened.reporter.console.file.flush()
    assert "only warms up" in (tmp_path / "log").read_text()


def test_a_stage_that_fails_leaves_no_profiler_behind(run: Callable[..., Run]) -> None:
    opened = run()
    opened.profile = 5
    interrupted(opened, 3, lambda: opened.train_once("bridge", ["side"]))
    opened.train_once("bridge", None)
    assert (opened.folder / "profile" / "01-bridge" / "trace.json.gz").is_file()
