"""Commands on data sets: import, check, show."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from medbridge.cli.app import app
from medbridge.cli.common import (
    ConfigArgument,
    DataOption,
    JsonOption,
    SetOption,
    bar,
    cache_folder,
    emit,
    escaped,
    read_settings,
    stdout,
)

data_app = typer.Typer(help="Import, check and show data sets.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")


class OnBad(StrEnum):
    """What a bad row does."""

    error = "error"
    skip = "skip"


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(metavar="KIND[:PATH]", help="Source, written as for `--data`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist or be empty.")],
    on_bad: Annotated[
        OnBad, typer.Option(help="What a bad row or image does: end the import, or be skipped and listed.")
    ] = OnBad.error,
    as_json: JsonOption = False,
) -> None:
    """Convert a data set into a folder of JSONL files and images, which `--data jsonl:OUT` reads."""
    from medbridge.data import SourceSettings, import_to_folder

    settings, base = read_settings(None, None, None, [source], None)
    chosen: SourceSettings = settings.data.sources[0]
    with bar("importing", "items") as progress:
        summary = import_to_folder(
            chosen, out, base_dir=base, cache_dir=cache_folder(), on_bad=on_bad.value, progress=progress
        )
    emit(summary.to_dict(), as_json)


@data_app.command("check")
def data_check(
    config: ConfigArgument = None,
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every image, count questions per split and stratum, list all problems. Exit code 1 if there are any."""
    from medbridge.data import check_items, open_items

    settings, base = read_settings(config, None, None, data, [*(overrides or []), "data.on_bad=skip"])
    with bar("checking", "images") as progress:
        found = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
        checked = check_items(found, strata=settings.data.strata, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(checked.to_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        table = Table("split", "stratum", "items", "most frequent answer", "share")
        for split, counted in checked.splits.items():
            for name, stratum in counted.strata.items():
                share = f"{stratum.commonest_share:.2f}"
                table.add_row(split, name, str(stratum.items), stratum.commonest_answer, share)
        stdout.print(table)
        stdout.print(f"{checked.images} distinct image files decoded")
        for problem in checked.problems:
            stdout.print(f"- {escaped(problem)}", soft_wrap=True)
        stdout.print("no problems" if checked.ok else f"{len(checked.problems)} problems")
    if not checked.ok:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    config: ConfigArgument = None,
    data: DataOption = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Questions to show.")] = 5,
    split: Annotated[
        str | None, typer.Option(help="Only this split: train, validation or test.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show questions as a model will see them, with the completion that training would imitate."""
    from medbridge.data import describe_items, format_items, open_items

    settings, base = read_settings(config, None, None, data, overrides)
    found = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
    items = found.items if split is None else found.split(split)
    views = describe_items(items, count, settings.data.prompt, seed=settings.seed)
    if as_json:
        sys.stdout.write(json.dumps(views, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(format_items(views) + "\n")
