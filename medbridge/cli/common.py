"""What the commands share: their options, how they find their settings, and how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from medbridge.errors import MedbridgeError

if TYPE_CHECKING:
    from medbridge.config import RunSettings
    from medbridge.pipeline import Run
    from medbridge.train.ranks import Ranks

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
together: dict[str, Ranks] = {}  # the processes that torchrun has started, under "ranks"

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


def read_settings(
    config: Path | None, run: Path | None, model: str | None, data: list[str] | None, overrides: list[str] | None
) -> tuple[RunSettings, Path]:
    """Settings from a file, from the run folder's own copy, or from the defaults; and the folder of relative paths."""
    from medbridge.config import load_config, parse_config

    extra: list[str] = []
    if model is not None:
        # on the command line, paths start at the working folder
        folder = str(Path(model).resolve()) if Path(model).is_dir() else model
        extra.append(f"model.path={json.dumps(folder)}")
    if data:
        extra.append(f"data.sources={json.dumps([_source(text) for text in data])}")
    extra += overrides or []  # last, so that they can change what the options name
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
    from medbridge.data.importers.mapping import ready_made

    kind, _, path = text.partition(":")
    if kind == "table" and path in ready_made() and not Path(path).exists():
        return {"kind": kind, "mapping": path}
    return {"kind": kind, **({"path": str(Path(path).resolve())} if path else {})}


def cache_folder() -> Path:
    """Where data made or unpacked outside a run folder is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "medbridge"


@contextmanager
def open_run(folder: Path, settings: RunSettings, base: Path) -> Iterator[Run]:
    """A run's folder, locked and open, until the block ends; what stops it says how to go on."""
    from medbridge.pipeline import Run
    from medbridge.progress import Reporter

    opened = Run(folder, settings, base_dir=base, reporter=Reporter(stderr))
    if "ranks" in together:
        opened.ranks = together["ranks"]
    try:
        yield opened
    except KeyboardInterrupt:
        stderr.print(f"stopped; call again with --run {folder} to go on", soft_wrap=True, markup=False)
        raise  # typer ends with exit code 130
    finally:
        opened.close()


@contextmanager
def bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work that reports (done, total)."""
    from medbridge.progress import Reporter

    with Reporter(stderr).task(description, None, unit) as meter:
        yield meter.reach


def write_run_report(run: Path, out: Path | None = None) -> Path:
    """Write the run's HTML report; its path."""
    from medbridge.report import write_report

    return write_report(run, out)


def conclude(run: Path, as_json: bool, out: Path | None = None) -> None:
    """Write the report and print the verdicts."""
    from medbridge.report import print_verdicts, summarise

    written = write_run_report(run, out)
    if as_json:
        sys.stdout.write(json.dumps({**summarise(run), "report": str(written)}, indent=2) + "\n")
        return
    print_verdicts(stdout, run)
    stdout.print(f"report: {written.resolve()}", soft_wrap=True, markup=False)


def emit(found: dict[str, Any], as_json: bool) -> None:
    """Print a result, a line for each key or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        for key, value in found.items():
            stdout.print(f"{key}: {value}", soft_wrap=True, markup=False)


def escaped(text: str) -> str:
    """Text of the data, with rich's markup taken for what it is."""
    from rich.markup import escape

    return escape(text)
