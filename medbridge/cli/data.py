"""Commands on data sets: import, check, show."""

from __future__ import annotations

import json
import sys
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from medbridge.errors import MedbridgeError

if TYPE_CHECKING:
    from medbridge.data import CheckReport

_LINES = 10
"""Lines of one kind that `data check` prints; a large set can have thousands."""

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
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a data set into a folder of JSONL files and images, which `--data jsonl:OUT` reads.

    What else a source can be told is set by `--set data.sources.0.KEY=VALUE`, such as `dicom.window=[40,400]`.
    """
    from medbridge.data import SourceSettings, import_to_folder

    settings, base = read_settings(None, None, None, [source], overrides)
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
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 for near duplicates and repeated questions too.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every image, count questions, list all problems and leaks between splits and data sets.

    Exit code 1 if there are problems: broken or missing files, bad rows, ids given twice, and images or questions that
    several splits have. Near duplicates and questions that are asked twice within a split are remarks.
    """
    from medbridge.data import check_items, open_items

    # Every image is decoded anyway: a broken one is then one line, not one for each of its questions.
    settings, base = read_settings(
        config, None, None, data, ["data.check_images=exists", *(overrides or []), "data.on_bad=skip"]
    )
    with bar("checking", "images") as progress:
        found = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
        checked = check_items(found, strata=settings.data.strata, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(checked.to_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        _print_check(checked)
    if not checked.ok or (strict and checked.remarks):
        raise typer.Exit(1)


def _print_check(checked: CheckReport) -> None:
    counts = Table("split", "stratum", "items", "most frequent answer", "share")
    for split, counted in checked.splits.items():
        for name, stratum in counted.strata.items():
            share = f"{stratum.commonest_share:.2f}"
            answer = escaped(stratum.commonest_answer)
            counts.add_row(split, escaped(name), str(stratum.items), answer, share)
    stdout.print(counts)
    stdout.print(f"{checked.images} distinct image files decoded")
    if checked.leaks.exposures:
        seen = Table("held out < seen in", "images", "items on them", "same question", "near images", "items on them",
                     "same question", "text alone")  # fmt: skip
        for found in checked.leaks.exposures:
            exact = (found.images, f"{found.items} ({100 * found.share:.1f} %)", found.questions)
            near = (found.near_images, found.near_items, found.near_questions)
            sides = escaped(f"{found.held_out}\n< {found.seen_in}")
            seen.add_row(sides, *map(str, (*exact, *near, found.same_text)))
        seen.columns[0].overflow, seen.columns[0].min_width = "fold", 18
        stdout.print(seen)
    for finding in checked.findings:
        stdout.print(f"{finding.title} ({len(finding.lines)}{'' if finding.problem else ', remarks'}):")
        for line in finding.lines[:_LINES]:
            stdout.print(f"- {escaped(line)}", soft_wrap=True)
        if len(finding.lines) > _LINES:
            stdout.print(f"  and {len(finding.lines) - _LINES} more: --json lists all")
    for note in checked.notes:
        stdout.print(f"note: {escaped(note)}", soft_wrap=True)
    stdout.print("no problems" if checked.ok else f"{len(checked.problems)} problems")


@data_app.command("show")
def data_show(
    config: ConfigArgument = None,
    data: DataOption = None,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", min=1, help="Questions to show. Default: 5, on a page 48.", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split: train, validation or test.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a page with pictures and filters instead.", show_default=False
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show questions as a model will see them, with the completion that training would imitate."""
    from medbridge.data import describe_items, format_items, open_items
    from medbridge.data.sampling import even_positions

    if open_page and html is None:
        raise MedbridgeError("--open has no page to open: name its file with --html FILE.")
    settings, base = read_settings(config, None, None, data, overrides)
    found = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
    items = found.items if split is None else found.split(split)
    if html is not None:
        from medbridge.report.questions import write_questions

        chosen = [items[position] for position in even_positions(len(items), count or 48)]
        page = write_questions(
            chosen,
            html,
            total=len(items),
            strata=settings.data.strata,
            settings=settings.data.prompt,
            seed=settings.seed,
        )
        emit({"page": str(page.resolve()), "questions": len(chosen)}, as_json)
        if open_page:
            webbrowser.open(page.resolve().as_uri())
        return
    views = describe_items(items, count or 5, settings.data.prompt, seed=settings.seed)
    if as_json:
        sys.stdout.write(json.dumps(views, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(format_items(views) + "\n")
