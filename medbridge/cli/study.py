"""The command that runs a study: several models, probes, and where the bottleneck is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from medbridge.cli.app import app
from medbridge.cli.common import JsonOption, RunOption, SetOption, cache_folder, escaped, stderr, stdout
from medbridge.progress import Reporter

if TYPE_CHECKING:
    from medbridge.study.result import StudyResult


@app.command()
def study(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.yaml", help="A run's configuration with a section `study` (docs/study.md)."),
    ],
    run: RunOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare models by stratum: does the vision tower see, does the model reach, does it say it first?

    Trains the models itself (SFT, then RL, on all strata), or takes those that `study.models` names. Cut off at any
    moment, it goes on from there; what is measured is not measured again. Writes study.html and study.json.
    """
    from medbridge.config import load_config
    from medbridge.study import StudyConfig, run_study
    from medbridge.study.study import PAGE

    settings = load_config(config, overrides or [], StudyConfig)
    folder = run or Path("runs") / settings.name
    found = run_study(
        settings, folder, base_dir=config.resolve().parent, cache_dir=cache_folder(), reporter=Reporter(stderr)
    )
    if as_json:
        sys.stdout.write(json.dumps({**found.to_dict(), "page": str(folder / PAGE)}, indent=2) + "\n")
        return
    stdout.print(table_of(found))
    for cell in found.cells:
        stdout.print(f"{escaped(cell.model)} on {escaped(cell.stratum)}: {escaped(cell.finding.words)}", soft_wrap=True)
    stdout.print(f"page: {(folder / PAGE).resolve()}", soft_wrap=True, markup=False)


def table_of(found: StudyResult) -> Table:
    """Names wrap, findings are two lines and intervals stand below their numbers: the table fits 80 columns."""
    from medbridge.report.summary import bracketed

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("Stratum", "Model"):
        table.add_column(name, overflow="fold", min_width=10)
    for name in ("Finding", "Sees", "Reaches", "Says"):
        table.add_column(name, no_wrap=True)
    for stratum in found.strata:
        for row in found.models:
            cell = found.cell(row.name, stratum)
            if cell is not None:
                gain = None if cell.sight is None else cell.sight.gain
                numbers = (
                    escaped(bracketed(value).replace(" ", "\n")) for value in (gain, cell.support, cell.acc_at_1)
                )
                table.add_row(escaped(stratum), escaped(row.name), cell.finding.kind.replace("-", "-\n"), *numbers)
    return table
