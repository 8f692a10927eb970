"""The command that evaluates a model, a run's measurement, or completions sampled elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from medbridge.cli.app import app
from medbridge.cli.common import (
    DataOption,
    JsonOption,
    ModelOption,
    RunOption,
    SetOption,
    bar,
    escaped,
    open_run,
    read_settings,
    stdout,
    write_run_report,
)

if TYPE_CHECKING:
    from medbridge.data import PromptSettings
    from medbridge.evaluation import Evaluation, StratumResult


@app.command()
def evaluate(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CONFIG.yaml | LOG...]", show_default=False,
            help="A configuration, whose model is measured; or sample logs, of one model.",
        ),
    ] = None,
    run: RunOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", show_default=False, help="Split to measure; default: test."),
    ] = None,
    stage: Annotated[
        int | None,
        typer.Option(
            "--stage", metavar="N", show_default=False,
            help="With --run alone: which of its measurements, by its number; default: the last on the test split.",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--format", "-f", help="Of logs: `lm-eval`, `lmms-eval`, `inspect`, `medvlthinker`, `rows` or `auto`."
        ),
    ] = "auto",
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by", metavar="TAG", show_default=False,
            help="Make strata by this field of the questions; repeatable. Default: the run's strata; of logs, the task "
            "or data set.",
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
    judge_decides: Annotated[
        bool,
        typer.Option(
            "--judge-decides",
            help="Open answers that the judge takes for the right one are right in all figures and for the verdicts, "
            "not only beside them.",
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE.html", help="Write a page of the result.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write the result here too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Every figure of a model on a benchmark: Acc@1, mean of n, Pass@k, majority, support, verdict, confusion.

    With a CONFIG.yaml, or --model and --data, the model is sampled on the whole test split in a run folder, where that
    was not done. With --run alone, what a run measured is evaluated. With LOGs, completions that were sampled by
    lm-evaluation-harness, lmms-eval, Inspect or MedVLThinker are graded anew; nothing is sampled.
    """
    from medbridge.data.readings import READINGS
    from medbridge.errors import MedbridgeError
    from medbridge.files import replace_text

    if reading not in READINGS:
        raise MedbridgeError(f"--reading is {reading!r}; valid are: {', '.join(READINGS)}.")
    configs = [path for path in sources or () if path.suffix in (".yaml", ".yml")]
    logs = [path for path in sources or () if path not in configs]
    measure = bool(configs or model or data)
    if logs and (measure or run or split or stage is not None):
        raise MedbridgeError(
            "logs are evaluated by themselves: leave out --run, --model, --data, --split, --stage and configurations. "
            "How open answers are graded can be set: --set data.prompt.f1_from=0.8."
        )
    if len(configs) > 1:
        raise MedbridgeError(f"one configuration at a time, not {len(configs)}.")
    if measure and stage is not None:
        raise MedbridgeError("--stage picks one of a run's measurements: give it with --run alone.")
    if not (measure or logs) and (overrides or split):
        raise MedbridgeError("--set and --split say how a model is measured: give CONFIG.yaml, or --model and --data.")
    if judge_decides and judge_url is None:
        raise MedbridgeError("--judge-decides needs a judge: give --judge-url and --judge-model.")
    with _judge(judge_url, judge_model, judge_store) as open_judge:
        how: dict[str, Any] = {"reading": reading, "ordered": ordered or (), "open_judge": open_judge}
        how["judge_decides"] = judge_decides
        if logs:
            found = _of_logs(logs, kind, prompt=_prompt(overrides or ()), by=by or (), **how)
        elif measure:
            found = _of_model(configs[0] if configs else None, run, model, data, overrides, split, by=by, **how)
        elif run is not None:
            from medbridge.evaluation.runs import evaluate_run

            found = evaluate_run(run, stage, by=by, **how)
        else:
            raise MedbridgeError(
                "nothing to evaluate: give a CONFIG.yaml, --model and --data, a run folder (--run), or sample logs."
            )
    content = json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n"
    if out is not None:
        replace_text(out, content)
    if html is not None:
        from medbridge.report.evaluation import write_evaluation

        write_evaluation(found, html)
    if as_json:
        sys.stdout.write(content)
        return
    _print(found)
    if html is not None:
        stdout.print(f"page: {html.resolve()}", soft_wrap=True, markup=False)


@contextmanager
def _judge(url: str | None, model: str | None, store: Path) -> Iterator[Any]:
    """What compares open answers, or None where no judge is asked for."""
    from medbridge.errors import MedbridgeError
    from medbridge.evaluation.judge import Judge

    if url is None and model is None:
        yield None
    elif url is None or model is None:
        raise MedbridgeError("a judge needs both --judge-url and --judge-model.")
    else:
        key = os.environ.get("MEDBRIDGE_JUDGE_KEY")
        with Judge(url, model, store, key=key, bar=bar) as judge:
            yield judge


def _prompt(overrides: Sequence[str]) -> PromptSettings:
    """How answers in logs are graded."""
    from medbridge.config import parse_config
    from medbridge.data import PromptSettings
    from medbridge.errors import MedbridgeError

    below = "data.prompt."
    if other := [override for override in overrides if not override.startswith(below)]:
        raise MedbridgeError(
            f"--set {other[0]}: of logs only how answers are graded can be set, such as --set data.prompt.f1_from=0.8."
        )
    own = [override.removeprefix(below) for override in overrides]
    return parse_config("", source="--set", overrides=own, schema=PromptSettings)


def _of_logs(logs: list[Path], kind: str, **how: Any) -> Evaluation:
    from dataclasses import replace

    from medbridge.evaluation import evaluate_logs, read_logs

    found = evaluate_logs(list(read_logs(logs, kind)), **how)
    return replace(found, source=", ".join(path.name for path in logs))


def _of_model(
    config: Path | None,
    run: Path | None,
    model: str | None,
    data: list[str] | None,
    overrides: list[str] | None,
    split: str | None,
    **how: Any,
) -> Evaluation:
    """Measure a model on a whole split, where the run folder does not hold that yet."""
    from medbridge.errors import MedbridgeError
    from medbridge.evaluation.runs import evaluate_stage

    wanted = [*(overrides or ()), *([f"diagnosis.test_split={split}"] if split else ())]
    settings, base = read_settings(config, run, model, data, wanted)
    folder = run or Path("runs") / settings.name
    with open_run(folder, settings, base) as opened:
        measured = opened.evaluate(opened.current_model())
        if measured is None:
            name = settings.diagnosis.test_split
            raise MedbridgeError(f"the data has no items of split {name!r} to evaluate on. Name another with --split.")
        found = evaluate_stage(opened.ledger, measured, settings, **how)
    write_run_report(folder)
    return found


def _print(found: Evaluation) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Stratum", overflow="fold", min_width=13)
    greedy = any(row.acc_at_1 is not None for row in found.strata)
    for name in ("Verdict", "Items x n", "Acc@1" if greedy else "Mean Acc", "Maj@n", "Pass@n", "Support @k"):
        table.add_column(name, no_wrap=True)
    for row in found.strata:
        table.add_row(*_cells(row, greedy))
    if found.datasets:
        table.add_section()
        for row in found.datasets:
            table.add_row(*_cells(row, greedy))
    stdout.print(table)
    for row in found.strata:
        _print_details(row)
    for note in found.notes:
        stdout.print(f"note: {note}", soft_wrap=True, markup=False)
    if found.skipped:
        stdout.print(f"{len(found.skipped)} rows left out; the first: {found.skipped[0]}", soft_wrap=True, markup=False)


def _cells(row: StratumResult, greedy: bool) -> list[str]:
    """Intervals stand below their numbers, so that the table fits 80 columns."""
    n = f"{row.samples[0]}" if row.samples[0] == row.samples[1] else f"{row.samples[0]}-{row.samples[1]}"
    support = _stacked(row.support, "" if row.k is None else f" @{row.k}")
    return [
        escaped(row.stratum), row.verdict, f"{row.items} x {n}", _stacked(row.acc_at_1 if greedy else row.accuracy),
        _last(row.majority), _last(row.pass_at_k), support,
    ]  # fmt: skip


def _print_details(row: StratumResult) -> None:
    from medbridge.report.page import two

    read = ", ".join(f"{name} {two(value)}" for name, value in row.readings.items())
    scored = f"; {row.disagreements} of {row.scored} completions the log scored otherwise" if row.scored else ""
    by_guessing = f"; guessing {two(row.floors[0])}" if row.floors else ""
    by_answer = "" if row.macro_accuracy is None else f"; mean over right answers {two(row.macro_accuracy)}"
    told = [
        f"; {100 * rate:.1f} % {what}"
        for rate, what in ((row.abstain_rate, "without a readable answer"), (row.truncated_rate, "cut off"))
        if rate
    ]
    stdout.print(
        f"{row.stratum}: {row.reason} Mean accuracy by reading: {read}{by_answer}{by_guessing}{''.join(told)}{scored}.",
        soft_wrap=True,
        markup=False,
    )
    if row.open_answers is not None:
        words = f"  open answers: token F1 {row.open_answers['token_f1']:.2f}"
        if "same_quantity" in row.open_answers:
            words += f"; the right quantity in {row.open_answers['same_quantity']:.2f} of those asked for one"
        if "judged" in row.open_answers:
            words += f"; right by the judge {row.open_answers['judged']:.2f}"
            if row.open_answers["undecided"]:
                words += f" ({row.open_answers['undecided']:.0f} it did not decide)"
        stdout.print(words, markup=False)
    if row.ordinal is not None:
        error, kappa = row.ordinal["mean_absolute_error"], row.ordinal["quadratic_kappa"]
        stdout.print(f"  {error:.2f} grades off on average, quadratic kappa {kappa:.2f}", markup=False)


def _last(values: tuple[float | None, ...]) -> str:
    from medbridge.report.page import two

    return two(values[-1] if values else None)


def _stacked(value: dict[str, float | None] | None, beside: str = "") -> str:
    """A number with what stands beside it, and its interval below."""
    from medbridge.report.page import two

    if value is None or value["value"] is None:
        return two(None)
    low, high = value["low"], value["high"]
    ends = "" if low is None or high is None else f"\n[{two(low)},{two(high)}]"
    return escaped(f"{two(value['value'])}{beside}{ends}")
