"""The command that evaluates completions sampled elsewhere."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from medbridge.cli.app import app
from medbridge.cli.common import JsonOption, escaped, stdout


@app.command()
def evaluate(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG...", help="Sample logs, of one model.")],
    kind: Annotated[
        str,
        typer.Option("--format", "-f", help="`lm-eval`, `lmms-eval`, `inspect`, `rows` or `auto`."),
    ] = "auto",
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by", metavar="TAG", show_default=False,
            help="Make strata by this field of the questions; repeatable. Default: the task or data set.",
        ),
    ] = None,
    ordered: Annotated[
        list[str] | None,
        typer.Option(
            "--ordered", metavar="NAME", show_default=False,
            help="A data set or task whose options are grades in order; repeatable. Adds the mean error in grades.",
        ),
    ] = None,
    reading: Annotated[
        str, typer.Option(help="How answers are read: `strict`, `standard` or `lenient`; all three are shown.")
    ] = "standard",
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url", metavar="URL", show_default=False,
            help="OpenAI-compatible endpoint (http://host:8000/v1) that compares open answers whose words differ, with "
            "--judge-model. The key comes from MEDBRIDGE_JUDGE_KEY. Questions and answers are sent there.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="NAME", show_default=False, help="The judge, as its endpoint names it."),
    ] = None,
    judge_store: Annotated[
        Path, typer.Option("--judge-store", metavar="FILE", help="Where its verdicts are kept, with their prompts.")
    ] = Path("judge.sqlite"),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write the result here too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Diagnose support from completions that were sampled elsewhere: logs of lm-evaluation-harness, lmms-eval, Inspect
    or MedVLThinker. Grades every completion anew, and gives Acc@1, Pass@k, majority, support and a verdict per stratum.
    """
    from medbridge.data.readings import READINGS
    from medbridge.errors import MedbridgeError
    from medbridge.evaluation import evaluate_logs, read_logs
    from medbridge.evaluation.judge import Judge
    from medbridge.files import replace_text

    if reading not in READINGS:
        raise MedbridgeError(f"--reading is {reading!r}; valid are: {', '.join(READINGS)}.")
    if (judge_url is None) != (judge_model is None):
        raise MedbridgeError("a judge needs both --judge-url and --judge-model.")
    with ExitStack() as stack:
        ask = None
        if judge_url is not None and judge_model is not None:
            key = os.environ.get("MEDBRIDGE_JUDGE_KEY")
            ask = stack.enter_context(Judge(judge_url, judge_model, judge_store, key=key)).same
        entries = list(read_logs(logs, kind))
        found = evaluate_logs(entries, by=by or (), reading=reading, ordered=ordered or (), judge_open=ask)
    content = json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n"
    if out is not None:
        replace_text(out, content)
    if as_json:
        sys.stdout.write(content)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("Stratum", "Verdict", "Items", "n", "Mean Acc", "Acc@1", "Pass@n", "Guess", "Support @k", "None read")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in found.strata:
        n = f"{row.samples[0]}" if row.samples[0] == row.samples[1] else f"{row.samples[0]}-{row.samples[1]}"
        table.add_row(
            escaped(row.stratum), row.verdict, str(row.items), n, _bracketed(row.accuracy), _bracketed(row.acc_at_1),
            _two(row.pass_at_k[-1] if row.pass_at_k else None), _two(row.floors[-1] if row.floors else None),
            f"{_bracketed(row.support)} @{row.k}", f"{row.abstain_rate:.2f}",
        )  # fmt: skip
    stdout.print(table)
    for row in found.strata:
        read = ", ".join(f"{name} {value:.2f}" for name, value in row.readings.items())
        scored = f"; {row.disagreements} of {row.scored} completions the log scored otherwise" if row.scored else ""
        stdout.print(
            f"{row.stratum}: {row.reason} Mean accuracy by reading: {read}{scored}.", soft_wrap=True, markup=False
        )
        if row.open_answers is not None:
            told = f"  open answers: token F1 {row.open_answers['token_f1']:.2f}"
            if "same_quantity" in row.open_answers:
                told += f"; the right quantity in {row.open_answers['same_quantity']:.2f} of those asked for one"
            if "judged" in row.open_answers:
                told += f"; right by the judge {row.open_answers['judged']:.2f}"
            stdout.print(told, markup=False)
        if row.ordinal is not None:
            error, kappa = row.ordinal["mean_absolute_error"], row.ordinal["quadratic_kappa"]
            stdout.print(f"  {error:.2f} grades off on average, quadratic kappa {kappa:.2f}", markup=False)
    if found.skipped:
        stdout.print(f"{len(found.skipped)} rows left out; the first: {found.skipped[0]}", soft_wrap=True, markup=False)


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bracketed(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    ends = "" if value["low"] is None or value["high"] is None else f" [{value['low']:.2f},{value['high']:.2f}]"
    return escaped(f"{value['value']:.2f}{ends}")
