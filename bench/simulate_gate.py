"""Operating characteristics of the gate by simulation: which statistic it should read, how often it errs, what it
costs, and how often every interval of the project misses. It times nothing and asserts nothing.

    python bench/simulate_gate.py [--study NAME ...] [--quick] [--runs N] [--jobs N] [--write]

Without --study every study runs. Results go to bench/results/gate.json, study by study; --write puts the tables into
docs/operating-characteristics.md, between their markers. --quick takes a corner of each grid and saves nothing. The
figures depend on the seed, the runs and the grid only, not on the number of jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate_studies.candidates import render_candidates, run_candidates
from gate_studies.coverage import render_coverage, run_coverage
from gate_studies.power import render_power, run_power
from gate_studies.running import Plan
from gate_studies.sequential import render_sequential, render_strata, run_sequential, run_strata
from gate_studies.threshold import render_threshold, run_threshold
from records import record

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gate.json"
PAGE = HERE.parent / "docs" / "operating-characteristics.md"


@dataclass(frozen=True)
class Study:
    """A question that the simulation answers: `run` gives the figures, `render` the tables by their names."""

    run: Callable[[Plan], dict[str, Any]]
    render: Callable[[dict[str, Any]], dict[str, str]]


STUDIES = {
    "candidates": Study(run_candidates, render_candidates),
    "threshold": Study(run_threshold, render_threshold),
    "power": Study(run_power, render_power),
    "sequential": Study(run_sequential, render_sequential),
    "strata": Study(run_strata, render_strata),
    "coverage": Study(run_coverage, render_coverage),
}


def save(path: Path, name: str, command: str, seconds: float, figures: dict[str, Any]) -> None:
    """Put one study's figures into the results, beside those of the others."""
    studies = json.loads(path.read_text())["figures"] if path.is_file() else {}
    studies[name] = {
        **record(command),
        "seconds": round(seconds),
        **figures,
    }
    ordered = {study: studies[study] for study in STUDIES if study in studies}
    path.write_text(json.dumps({"figures": ordered}, indent=1) + "\n")


def write_page(page: Path, figures: dict[str, dict[str, Any]]) -> None:
    """Put the tables between their markers, with the command and the runs.

    Raises:
        ValueError: the page lacks the markers of a table.
    """
    text = page.read_text()
    for name, found in figures.items():
        for key, body in STUDIES[name].render(found).items():
            pattern = re.compile(rf"(<!-- table: {re.escape(key)} -->\n).*?(<!-- end: {re.escape(key)} -->)", re.DOTALL)
            if not pattern.search(text):
                raise ValueError(f"{page}: no markers `<!-- table: {key} -->` and `<!-- end: {key} -->`")
            runs = found.get("runs_of", {}).get(key, found["runs"])
            note = f"`{found['command']}`, measured {found['measured']}, {runs:,} data sets per truth."
            block = f"{body}\n\n{note}\n"
            text = pattern.sub(lambda match, block=block: match[1] + block + match[2], text)
    page.write_text(text)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS, page: Path = PAGE) -> None:
    """Run the studies, print their tables, and save what isn't a quick look."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--study", action="append", choices=list(STUDIES), help="this study only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a corner of each grid; saves nothing")
    parser.add_argument("--runs", type=int, help="simulated data sets per truth, in place of each study's own number")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--write", action="store_true", help="put the tables of the saved results into the page")
    chosen_by = parser.parse_args(arguments)
    if chosen_by.quick and chosen_by.write:
        parser.error("--quick saves nothing, so there is nothing to --write")
    if chosen_by.runs is not None and chosen_by.runs < 10:
        parser.error(f"--runs {chosen_by.runs}: a rate needs at least 10 data sets")
    plan = Plan(chosen_by.quick, chosen_by.runs, chosen_by.jobs)
    for name in chosen_by.study or STUDIES:
        command = f"python bench/simulate_gate.py --study {name}" + (f" --runs {plan.runs}" if plan.runs else "")
        begun = time.monotonic()
        figures = STUDIES[name].run(plan)
        for key, body in STUDIES[name].render(figures).items():
            print(f"\n{key}\n\n{body}", flush=True)
        if not plan.quick:
            save(results, name, command, time.monotonic() - begun, figures)
    if chosen_by.write:
        write_page(page, json.loads(results.read_text())["figures"])


if __name__ == "__main__":
    main()
