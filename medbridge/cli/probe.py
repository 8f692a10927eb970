"""The command that probes encoders: what can be read off their features."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from medbridge.cli.app import app
from medbridge.cli.common import (
    ConfigArgument,
    DataOption,
    JsonOption,
    SetOption,
    bar,
    cache_folder,
    escaped,
    read_settings,
    stderr,
    stdout,
)


@app.command()
def probe(
    config: ConfigArgument = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder", "-e", metavar="NAME", show_default=False,
            help="`efficientnet-lite0`, `torchvision:NAME`, `timm:NAME`, or a vision-language model's folder or id; "
            "repeatable. Default: the configuration's model.",
        ),
    ] = None,
    data: DataOption = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", metavar="TAG", show_default=False,
            help="What is to be read off an image: a tag, or `answer` where each image has one; repeatable. Default: "
            "answer.",
        ),
    ] = None,
    layer: Annotated[str, typer.Option(help="Features of a vision tower: `before` or `after` the merger.")] = "after",
    cluster: Annotated[
        list[str] | None,
        typer.Option(
            "--cluster", metavar="TAG", show_default=False,
            help="Images that share this tag (a patient) are resampled together; repeatable. Default: questions that "
            "share an image.",
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="`mean` or `max` over an image's tokens.")] = "mean",
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write the results here too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Fit linear and nearest-neighbour probes on an encoder's features: can it see what the questions ask?

    Probes are fitted on the training split, chosen on the validation split and judged on the test split. Features are
    kept, so that a second target of the same encoder takes moments.
    """
    from pydantic import ValidationError

    from medbridge.data import open_items
    from medbridge.errors import MedbridgeError
    from medbridge.files import replace_text
    from medbridge.probe import EncoderSettings, FeatureStore, ProbeResult, ProbeSettings, open_encoder
    from medbridge.probe import probe as fit
    from medbridge.probe.metrics import words

    try:
        chosen = EncoderSettings.model_validate({"layer": layer, "pool": pool})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise MedbridgeError(
            f"--{wrong['loc'][0]} is {wrong['input']!r}; valid are: {wrong['ctx']['expected']}."
        ) from None
    settings, base = read_settings(config, None, None, data, overrides)
    names = encoder or ([settings.model.path] if settings.model.path else [])
    if not names:
        raise MedbridgeError("no encoder: give --encoder NAME, for example --encoder efficientnet-lite0.")
    found = open_items(settings.data, base_dir=base, cache_dir=cache_folder())
    store = FeatureStore(cache_folder() / "features", say=lambda text: stderr.print(text, markup=False))
    results: list[ProbeResult] = []
    for name in names:
        opened = open_encoder(name, chosen, settings.model)
        with bar(f"features of {name}", "images") as progress:
            for one in target or ["answer"]:
                results.append(
                    fit(
                        partial(store.features, opened, progress=progress),
                        found.items, one, ProbeSettings(seed=settings.seed, cluster=tuple(cluster or ())), encoder=name,
                    )
                )  # fmt: skip
    told = [result.to_dict() for result in results]
    if out is not None:
        replace_text(out, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("Encoder", "Target", "Test", "Commonest", "Probe", "Accuracy", "Balanced", "AUC"):
        table.add_column(column)
    for result in results:
        for kind, scores, setting in (
            ("linear", result.linear, f"C = {result.strength:g}"),
            ("kNN", result.knn, f"k = {result.neighbours}"),
        ):
            figures = (scores.accuracy, scores.balanced_accuracy, scores.auc)
            table.add_row(
                escaped(result.encoder), escaped(result.target), str(result.test), f"{result.commonest[1]:.3f}",
                f"{kind}, {setting}", *(escaped(words(figure)) for figure in figures),
            )  # fmt: skip
    stdout.print(table)
    for result in results:
        if result.left_out or result.unseen:
            stdout.print(
                f"{result.target}: {result.left_out} images left out (no label, or several); {result.unseen} test "
                "images with a label that no training image has",
                soft_wrap=True, markup=False,
            )  # fmt: skip
    stdout.print(f"Intervals are two-sided at {100 * results[0].confidence:.0f} %.", style="dim")
