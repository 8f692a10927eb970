"""Commands that come before a run: make a small model, document and check a configuration."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from medbridge.cli.app import app
from medbridge.cli.common import DataOption, JsonOption, SetOption, cache_folder, emit, read_settings, stdout
from medbridge.errors import MedbridgeError


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
    settings, base = read_settings(config, None, None, data or ([] if config else ["brain"]), overrides)
    items = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
    texts = sorted({text for item in items.split("train") for text in item_texts(item)})
    init_model(out, settings.model.from_nothing, texts, seed=settings.seed)
    policy = Policy.load(str(out), settings.model)
    parameters = sum(p.numel() for p in policy.model.parameters())
    found = {
        "path": str(out), "architecture": settings.model.from_nothing.architecture, "parameters": parameters,
        "vocabulary": policy.vocab_size,
    }  # fmt: skip
    emit(found, as_json)


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
    """Document every configuration key, or check one file and print it with its defaults.

    Keys below `study` are for `medbridge study`.
    """
    from medbridge.config import RunSettings, document, dump_config, load_config
    from medbridge.study import StudyConfig

    if path is not None:
        schema = StudyConfig if _names_a_study(path) else RunSettings
        settings = load_config(path, overrides or [], schema)
        sys.stdout.write(settings.model_dump_json(indent=2) + "\n" if as_json else dump_config(settings))
        return
    if as_json:
        sys.stdout.write(json.dumps(StudyConfig.model_json_schema(), indent=2) + "\n")
        return
    for key, kind, default, description in document(StudyConfig):
        value = {"": "", "required": ", required"}.get(default, f" = {default}")
        stdout.print(Text.assemble((key, "bold"), f"  {kind}{value}"), soft_wrap=True)
        stdout.print(Padding(Text(description), (0, 0, 0, 4), expand=False))


def _names_a_study(path: Path) -> bool:
    """Whether a file has the section that makes it a study's; what can't be read is told when it is loaded."""
    try:
        return re.search(r"^study:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError):
        return False
