"""Commands on a run: measure, train, report, take a model out."""

from __future__ import annotations

from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medbridge.cli.app import app
from medbridge.cli.common import (
    ConfigArgument,
    DataOption,
    JsonOption,
    ModelOption,
    ProfileOption,
    RunOption,
    SetOption,
    StrataOption,
    conclude,
    emit,
    open_run,
    read_settings,
    write_run_report,
)

if TYPE_CHECKING:
    from medbridge.stage_folder import Method


class Dtype(StrEnum):
    """Type of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def demo(run: RunOption = None, as_json: JsonOption = False) -> None:
    """Run the main job on the embedded default: a tiny model made from nothing, questions on real brain slices.

    Takes a few minutes on two CPU cores. The slices are of one average brain: this shows the method and is no
    clinical benchmark.
    """
    source = files("medbridge").joinpath("configs/demo.yaml")
    from medbridge.config import RunSettings, parse_config

    settings: RunSettings = parse_config(source.read_text(encoding="utf-8"), source="demo.yaml")
    folder = run or Path("runs") / settings.name
    with open_run(folder, settings, Path.cwd()) as opened:
        opened.execute()
    conclude(folder, as_json)


@app.command("run")
def run_command(
    config: ConfigArgument = None,
    run: RunOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    profile: ProfileOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure, bridge or sharpen, and measure again, until every stratum is done, undecidable or the budget is spent.

    Killed at any moment, it goes on from there when it is called again with the same run folder.
    """
    settings, base = read_settings(config, run, model, data, overrides)
    folder = run or Path("runs") / settings.name
    with open_run(folder, settings, base) as opened:
        opened.profile = profile
        opened.execute()
    conclude(folder, as_json)


@app.command()
def diagnose(
    config: ConfigArgument = None,
    run: RunOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure support and Acc@1 of a model on data, and give a verdict per stratum. Nothing is trained."""
    settings, base = read_settings(config, run, model, data, overrides)
    folder = run or Path("runs") / settings.name
    with open_run(folder, settings, base) as opened:
        opened.diagnose(opened.next_round(), opened.current_model())
    conclude(folder, as_json)


@app.command()
def bridge(
    config: ConfigArgument = None,
    run: RunOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    strata: StrataOption = None,
    overrides: SetOption = None,
    profile: ProfileOption = 0,
    as_json: JsonOption = False,
) -> None:
    """One stage of supervised fine-tuning, on the strata whose last verdict is bridge or on those named."""
    _train("bridge", config, run, model, data, strata, overrides, profile, as_json)


@app.command()
def sharpen(
    config: ConfigArgument = None,
    run: RunOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    strata: StrataOption = None,
    overrides: SetOption = None,
    profile: ProfileOption = 0,
    as_json: JsonOption = False,
) -> None:
    """One stage of GRPO, on the strata whose last verdict is sharpen or on those named."""
    _train("sharpen", config, run, model, data, strata, overrides, profile, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file; default: report.html in the run folder.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's report: one HTML file that needs no network. Works at any moment of a run's life."""
    conclude(run, as_json, out)


@app.command()
def export(
    run: Annotated[Path, typer.Option("--run", "-r", metavar="DIR", help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="STAGE",
            help="`last` (what the run goes on from), `best` (by Acc@1 at the diagnoses), `base`, or a training stage "
            "by number or folder, such as `05-sharpen`.",
        ),
    ] = "last",
    adapter: Annotated[
        bool,
        typer.Option("--adapter/--merged", help="Only the LoRA adapters, for PEFT; or the model with them merged."),
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights; default: as they are.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model of a run as an ordinary Hugging Face folder: weights, processor, chat template."""
    from medbridge.export import export_model

    found = export_model(run, out, model=model, adapter=adapter, dtype=None if dtype is None else dtype.value)
    emit({"model": found.model, "path": str(found.out), "dtype": found.dtype}, as_json)


def _train(
    kind: Method,
    config: Path | None,
    run: Path | None,
    model: str | None,
    data: list[str] | None,
    strata: list[str] | None,
    overrides: list[str] | None,
    profile: int,
    as_json: bool,
) -> None:
    settings, base = read_settings(config, run, model, data, overrides)
    folder = run or Path("runs") / settings.name
    with open_run(folder, settings, base) as opened:
        opened.profile = profile
        result = opened.train_once(kind, strata)
    written = write_run_report(folder)
    emit({"stage": kind, "model": str(folder / result), "report": str(written)}, as_json)
