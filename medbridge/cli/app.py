"""The command line's root, to which each group of commands adds its own, and the entry point."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medbridge import __version__
from medbridge.cli.common import escaped, stderr, stdout, together
from medbridge.errors import MedbridgeError

_ORDER = (
    "demo", "run", "diagnose", "bridge", "sharpen", "evaluate", "probe", "study", "report", "export", "data", "config",
)  # fmt: skip


class _InOrderOfUse(TyperGroup):
    """Lists commands as one meets them; those that are not named come last."""

    def list_commands(self, ctx: Any) -> list[str]:
        def place(name: str) -> int:
            return _ORDER.index(name) if name in _ORDER else len(_ORDER)

        return sorted(super().list_commands(ctx), key=place)


app = typer.Typer(
    name="medbridge",
    cls=_InOrderOfUse,
    help="Measure what a medical vision-language model can reach; bridge it (SFT) or sharpen it (RL); measure again.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
state = {"debug": False}


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
    state["debug"] = debug


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
        if state["debug"]:
            raise
        stderr.print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
        sys.exit(2)


def _with_others() -> None:
    """One of several processes that torchrun has started: rank 0 obeys the command line, the others train with it."""
    from medbridge.followers import follow
    from medbridge.train.parallel import joined

    with joined() as ranks:
        if not ranks.leads:
            follow(ranks)
            return
        together["ranks"] = ranks
        try:
            app()
        except SystemExit as ending:
            if ending.code:
                raise
            ranks.share(lambda: None)  # the others are not needed any more
