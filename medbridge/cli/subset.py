"""The command that draws a balanced subset, and where it gets the questions' difficulty from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medbridge.cli.common import JsonOption, SetOption, bar, cache_folder, emit, read_settings
from medbridge.cli.data import data_app
from medbridge.data.settings import SplitName
from medbridge.errors import MedbridgeError

_MEASURING = ("diagnose", "evaluate", "route")
"""Stages of a run that sample questions as they are; a control's have other images."""


@data_app.command("subset")
def data_subset(
    sources: Annotated[
        list[str], typer.Argument(metavar="KIND[:PATH]...", help="Sources, written as for `--data`.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist or be empty.")],
    size: Annotated[int, typer.Option("--size", min=1, help="Questions to draw.")],
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TAG", help="Tag to balance by; repeatable: all together make a stratum.", show_default=False
        ),
    ] = None,
    balance_answers: Annotated[
        bool, typer.Option("--balance-answers", help="Balance the right option's letter within each stratum.")
    ] = False,
    difficulty: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", show_default=False,
            help="Balance the difficulty too: the folder of a run that sampled these questions, or a JSON file of item "
            "ids and success rates.",
        ),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="The split to draw from.")] = "train",
    seed: Annotated[int, typer.Option(help="Another seed draws other questions.")] = 0,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Draw a balanced subset and write it as a data folder, with a card that says how it was drawn."""
    from medbridge.data import open_items
    from medbridge.data.subset import Drawing, write_subset

    settings, base = read_settings(None, None, None, sources, overrides)
    drawing = Drawing(
        size, split, tuple(by or ()), balance_answers, None if difficulty is None else success_rates(difficulty),
        "" if difficulty is None else difficulty.resolve().name, seed,
    )  # fmt: skip
    found = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
    with bar("writing", "items") as progress:
        summary = write_subset(found.items, settings.data.sources, out, drawing, base_dir=base, progress=progress)
    emit(summary, as_json)


def success_rates(path: Path) -> dict[str, float]:
    """Share of right samples by item id: of a run's folder, the latest measurement of each item, or of a JSON file."""
    if path.is_dir():
        return _measured(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedbridgeError(f"{path}: neither a run's folder nor a readable JSON file ({error}).") from error
    if not isinstance(found, dict):
        raise MedbridgeError(
            f"{path}: an object of item ids and success rates is needed, not a {type(found).__name__}."
        )
    for item_id, rate in found.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise MedbridgeError(f"{path}: the success rate of {item_id!r} must be a number from 0 to 1, not {rate!r}.")
    return found


def _measured(run: Path) -> dict[str, float]:
    from medbridge.ledger import Ledger

    ledger = Ledger(run / "run.sqlite", read_only=True)
    try:
        stages = [stage.stage_id for stage in ledger.stages() if stage.kind in _MEASURING]
        rates = {tally.item_id: tally.c / tally.n for stage in stages for tally in ledger.tallies(stage) if tally.n}
    finally:
        ledger.close()
    if not rates:
        raise MedbridgeError(f"{run}: this run has not measured a question yet. Name one with a finished diagnosis.")
    return rates
