"""The command line: every command, its options and what it prints. The work is done elsewhere."""

from __future__ import annotations

import os

# A waiting OpenMP thread gives its core back: on a shared machine, spinning ones slow everything down several-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from medbridge import __version__
from medbridge.errors import MedbridgeError

if TYPE_CHECKING:
    from medbridge.config import RunSettings
    from medbridge.pipeline import Run
    from medbridge.stage_folder import Method
    from medbridge.train.ranks import Ranks

app = typer.Typer(
    name="medbridge",
    help="Measure what a medical vision-language model can reach; bridge it (SFT) or sharpen it (RL); measure again.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Import, check and show data sets.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
_state = {"debug": False}
_together: dict[str, Ranks] = {}  # the processes that torchrun has started, under "ranks"

ConfigArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG.yaml",
        help="Configuration (`medbridge config` documents every key). Without one, the run folder's own, or the "
        "defaults with `--model` and `--data`.",
        show_default=False,
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", "-r", metavar="DIR", help="Run folder; default: runs/NAME. An existing one is continued.",
        show_default=False,
    ),
]  # fmt: skip
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the configuration, e.g. `--set rl.learning_rate=1e-6`.",
        show_default=False,
    ),
]  # fmt: skip
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model folder or Hugging Face id (`model.path`).", show_default=False),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data", "-d", metavar="KIND[:PATH]",
        help="Data source: `brain`, `slake:DIR`, `medmnist:FILE.npz` or `jsonl:PATH` (`data.sources`); repeatable.",
        show_default=False,
    ),
]  # fmt: skip
StrataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stratum",
        "-s",
        metavar="NAME",
        help="Stratum to train on; repeatable. Default: by the last verdicts.",
        show_default=False,
    ),
]
ProfileOption = Annotated[
    int,
    typer.Option(
        "--profile", metavar="N", min=0, show_default=False,
        help="Trace N steps of each training stage, from its second one on, into `profile/` of the run folder, with a "
        "table of where the time went.",
    ),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


class Dtype(StrEnum):
    """Type of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OnBad(StrEnum):
    """What a bad row does."""

    error = "error"
    skip = "skip"


def _version(value: bool) -> None:
    if value:
        stdout.print(f"medbridge {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where a command fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _state["debug"] = debug


@app.command()
def demo(run: RunOption = None, as_json: JsonOption = False) -> None:
    """Run the main job on the embedded default: a tiny model made from nothing, questions on real brain slices.

    Takes a few minutes on two CPU cores. The slices are of one average brain: this shows the method and is no
    clinical benchmark.
    """
    source = files("medbridge").joinpath("configs/demo.yaml")
    from medbridge.config import parse_config

    settings = parse_config(source.read_text(encoding="utf-8"), source="demo.yaml")
    folder = run or Path("runs") / settings.name
    with _open_run(folder, settings, Path.cwd()) as opened:
        opened.execute()
    _conclude(folder, as_json)


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
    settings, base = _settings(config, run, model, data, overrides)
    folder = run or Path("runs") / settings.name
    with _open_run(folder, settings, base) as opened:
        opened.profile = profile
        opened.execute()
    _conclude(folder, as_json)


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
    settings, base = _settings(config, run, model, data, overrides)
    folder = run or Path("runs") / settings.name
    with _open_run(folder, settings, base) as opened:
        opened.diagnose(opened.next_round(), opened.current_model())
    _conclude(folder, as_json)


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
    _conclude(run, as_json, out)


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
    _emit({"model": found.model, "path": str(found.out), "dtype": found.dtype}, as_json)


@app.command("init-model")
def init_model_command(
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    data: DataOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Configuration whose data and model.from_nothing to use.", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a small vision-language model of a real architecture from nothing, as a Hugging Face folder.

    Its tokenizer is trained on the data's texts. Shape and architecture are keys of `model.from_nothing`, for example
    `--set model.from_nothing.architecture=qwen3_vl`.
    """
    from medbridge.data import open_items
    from medbridge.model import Policy, init_model
    from medbridge.pipeline import item_texts

    if out.exists() and not force:
        raise MedbridgeError(f"{out} exists. Name another folder, or pass --force to replace it.")
    settings, base = _settings(config, None, None, data or ([] if config else ["brain"]), overrides)
    items = open_items(settings.data, base_dir=base, cache_dir=_cache())
    texts = sorted({text for item in items.split("train") for text in item_texts(item)})
    init_model(out, settings.model.from_nothing, texts, seed=settings.seed)
    policy = Policy.load(str(out), settings.model)
    parameters = sum(p.numel() for p in policy.model.parameters())
    found = {
        "path": str(out), "architecture": settings.model.from_nothing.architecture, "parameters": parameters,
        "vocabulary": policy.vocab_size,
    }  # fmt: skip
    _emit(found, as_json)


@app.command("config")
def config_command(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A configuration to check and print with all defaults.", metavar="CONFIG.yaml", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Document every configuration key, or check one file and print it with its defaults."""
    from medbridge.config import document, dump_config, load_config

    if path is not None:
        settings = load_config(path, overrides or [])
        sys.stdout.write(settings.model_dump_json(indent=2) + "\n" if as_json else dump_config(settings))
        return
    if as_json:
        from medbridge.config import RunSettings

        sys.stdout.write(json.dumps(RunSettings.model_json_schema(), indent=2) + "\n")
        return
    table = Table("key", "type", "default", "what it is", show_lines=False)
    for key, kind, default, description in document():
        table.add_row(key, kind, default, description)
    stdout.print(table)


# -- data --------------------------------------------------------------------------------------------------------


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

    settings, base = _settings(None, None, None, [source], None)
    chosen: SourceSettings = settings.data.sources[0]
    with _bar("importing", "items") as progress:
        summary = import_to_folder(
            chosen, out, base_dir=base, cache_dir=_cache(), on_bad=on_bad.value, progress=progress
        )
    _emit(summary.to_dict(), as_json)


@data_app.command("check")
def data_check(
    config: ConfigArgument = None,
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every image, count questions per split and stratum, list all problems. Exit code 1 if there are any."""
    from medbridge.data import check_items, open_items

    settings, base = _settings(config, None, None, data, [*(overrides or []), "data.on_bad=skip"])
    with _bar("checking", "images") as progress:
        found = open_items(settings.data, base_dir=base, cache_dir=_cache())
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
            stdout.print(f"- {_escape(problem)}", soft_wrap=True)
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

    settings, base = _settings(config, None, None, data, overrides)
    found = open_items(settings.data, base_dir=base, cache_dir=_cache())
    items = found.items if split is None else found.split(split)
    views = describe_items(items, count, settings.data.prompt, seed=settings.seed)
    if as_json:
        sys.stdout.write(json.dumps(views, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(format_items(views) + "\n")


# -- shared ------------------------------------------------------------------------------------------------------


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
    settings, base = _settings(config, run, model, data, overrides)
    folder = run or Path("runs") / settings.name
    with _open_run(folder, settings, base) as opened:
        opened.profile = profile
        result = opened.train_once(kind, strata)
    written = _write_report(folder)
    _emit({"stage": kind, "model": str(folder / result), "report": str(written)}, as_json)


def _settings(
    config: Path | None, run: Path | None, model: str | None, data: list[str] | None, overrides: list[str] | None
) -> tuple[RunSettings, Path]:
    """Settings from a file, from the run folder's own copy, or from the defaults; and the folder of relative paths."""
    from medbridge.config import load_config, parse_config

    extra = list(overrides or [])
    if model is not None:
        # on the command line, paths start at the working folder
        folder = str(Path(model).resolve()) if Path(model).is_dir() else model
        extra.append(f"model.path={json.dumps(folder)}")
    if data:
        extra.append(f"data.sources={json.dumps([_source(text) for text in data])}")
    stored = None if run is None else run / "config.yaml"
    if config is not None:
        return load_config(config, extra), config.resolve().parent
    if stored is not None and stored.is_file():
        from medbridge.ledger import Ledger

        ledger = Ledger(stored.with_name("run.sqlite"), read_only=True)
        base = ledger.meta("base_dir")
        ledger.close()
        return load_config(stored, extra), Path(base or Path.cwd())
    if not data:
        raise MedbridgeError(
            "nothing to work on: give a CONFIG.yaml, an existing run folder (--run), or --data KIND[:PATH] "
            "(for example --data brain)."
        )
    return parse_config("{}", source="command line", overrides=extra), Path.cwd()


def _source(text: str) -> dict[str, str]:
    kind, _, path = text.partition(":")
    return {"kind": kind, **({"path": str(Path(path).resolve())} if path else {})}


def _cache() -> Path:
    """Where data made or unpacked outside a run folder is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "medbridge"


@contextmanager
def _open_run(folder: Path, settings: RunSettings, base: Path) -> Iterator[Run]:
    from medbridge.pipeline import Run
    from medbridge.progress import Reporter

    opened = Run(folder, settings, base_dir=base, reporter=Reporter(stderr))
    if "ranks" in _together:
        opened.ranks = _together["ranks"]
    try:
        yield opened
    except KeyboardInterrupt:
        stderr.print(f"stopped; call again with --run {folder} to go on", soft_wrap=True, markup=False)
        raise  # typer ends with exit code 130
    finally:
        opened.close()


@contextmanager
def _bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work that reports (done, total)."""
    from medbridge.progress import Reporter

    with Reporter(stderr).task(description, None, unit) as meter:
        yield meter.reach


def _write_report(run: Path, out: Path | None = None) -> Path:
    from medbridge.report import write_report

    return write_report(run, out)


def _conclude(run: Path, as_json: bool, out: Path | None = None) -> None:
    """Write the report and print the verdicts."""
    from medbridge.report import print_verdicts, summarise

    written = _write_report(run, out)
    if as_json:
        sys.stdout.write(json.dumps({**summarise(run), "report": str(written)}, indent=2) + "\n")
        return
    print_verdicts(stdout, run)
    stdout.print(f"report: {written.resolve()}", soft_wrap=True, markup=False)


def _emit(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        for key, value in found.items():
            stdout.print(f"{key}: {value}", soft_wrap=True, markup=False)


def main() -> None:
    """Entry point: errors that a user can mend are one message, without a traceback unless `--debug`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _with_others()
        else:
            app()
    except MedbridgeError as error:
        if _state["debug"]:
            raise
        stderr.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)


def _with_others() -> None:
    """One of several processes that torchrun has started: rank 0 obeys the command line, the others train with it."""
    from medbridge.followers import follow
    from medbridge.train.parallel import joined

    with joined() as ranks:
        if not ranks.leads:
            follow(ranks)
            return
        _together["ranks"] = ranks
        try:
            app()
        except SystemExit as ending:
            if ending.code:
                raise
            ranks.share(lambda: None)  # the others are not needed any more


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
