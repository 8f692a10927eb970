"""Evaluation of what a run measured, and of a model that is measured for it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from typer.testing import CliRunner

from medbridge.cli import app
from medbridge.errors import MedbridgeError
from medbridge.evaluation import answered_in_stage
from medbridge.evaluation.figures import ABSTAINED
from medbridge.evaluation.runs import evaluate_run, stored_evaluation
from medbridge.ledger import Ledger
from medbridge.measurement import NO_VERDICT
from medbridge.pipeline import Run
from medbridge.report import write_report
from medbridge.rollout import GREEDY

RUN = CliRunner()


@pytest.fixture
def measured(open_run: Callable[..., Run]) -> Path:
    """A run whose diagnosis is known: of each shade, the first half of the samples is right; of the sides, none."""
    run = open_run()
    samples = run.settings.diagnosis.samples
    tiny_runs.pretend(run, 0, run.base_model(), lambda item, n: item.tags["task"] == "shade" and n < samples // 2)
    run.diagnose(0, run.base_model())
    return run.folder


def test_figures_of_a_known_diagnosis(measured: Path) -> None:
    found = evaluate_run(measured)
    shade, side = found.strata
    assert (shade.stratum, side.stratum, shade.items, side.items) == ("shade", "side", 6, 6)
    assert shade.accuracy["value"] == pytest.approx(0.5) and shade.pass_at_k[-1] == 1
    assert side.accuracy["value"] == 0 and side.pass_at_k[-1] == 0 and side.majority[-1] == 0
    # half are right, and the others all say one other option: a tie at the most, broken evenly
    assert shade.majority[-1] == pytest.approx(0.5)
    assert shade.abstain_rate == shade.truncated_rate == 0
    assert shade.readings == {"strict": 0.5, "standard": 0.5, "lenient": 0.5}
    assert shade.confusion is not None
    for right, row in shade.confusion.items():
        assert row[right] == sum(row.values()) / 2 and ABSTAINED not in row
    [whole] = found.datasets
    assert whole.items == 12 and whole.accuracy["value"] == pytest.approx(0.25)
    assert "validation split" in found.source and found.confidence == pytest.approx(0.9)


def test_a_run_keeps_the_verdicts_that_it_gave(measured: Path) -> None:
    """Also those that the guard refused, in whatever way the questions are divided afterwards."""
    ledger = Ledger(measured / "run.sqlite")
    [stage] = [stage for stage in ledger.stages() if stage.kind == "diagnose"]
    given = {name: (row.kind, row.reason) for name, row in ledger.verdicts(stage.stage_id).items()}
    ledger.close()
    assert {row.stratum: (row.verdict, row.reason) for row in evaluate_run(measured).strata} == given
    reason = f"{NO_VERDICT} For a test."
    with sqlite3.connect(measured / "run.sqlite") as database:
        database.execute("UPDATE verdicts SET kind = 'undecided', reason = ? WHERE stratum = 'side'", (reason,))
    found = evaluate_run(measured)
    assert [row.verdict for row in found.strata] == [given["shade"][0], "undecided"]
    assert found.strata[1].reason == reason == found.datasets[0].reason
    [whole] = evaluate_run(measured, by=[]).strata
    assert (whole.verdict, whole.reason) == ("undecided", reason)


def test_other_strata_and_readings(measured: Path) -> None:
    [whole] = evaluate_run(measured, by=[], reading="strict").strata
    assert whole.items == 12
    with pytest.raises(MedbridgeError, match="no tag 'organ'"):
        evaluate_run(measured, by=["organ"])


def test_outcomes_are_those_of_the_ledger(measured: Path) -> None:
    ledger = Ledger(measured / "run.sqlite", read_only=True)
    [stage] = [stage for stage in ledger.stages() if stage.kind == "diagnose"]
    entries = answered_in_stage(ledger, stage)
    stored = {(key, sample): outcome for key, sample, outcome in ledger.outcomes(stage.stage_id)}
    told = {(e.item.id, sample): outcome for e in entries for sample, outcome in e.readings["standard"].items()}
    assert told == stored and GREEDY in entries[0].readings["lenient"]
    assert {e.item.id: e.cluster for e in entries} == {t.item_id: t.cluster for t in ledger.tallies(stage.stage_id)}
    ledger.close()


def test_completions_that_were_cut_off_and_not_read_are_counted(measured: Path) -> None:
    ledger = Ledger(measured / "run.sqlite")
    with ledger.transaction():
        ledger._db.execute(
            "UPDATE rollouts SET finish_reason = 'length', text = 'the shade is' WHERE sample = 1 AND item_id LIKE ?",
            ("%0",),
        )
    [stage] = [stage for stage in ledger.stages() if stage.kind == "diagnose"]
    entries = answered_in_stage(ledger, stage, ("standard",))
    assert sum(entry.cut or 0 for entry in entries) == sum(entry.item.id.endswith("0") for entry in entries) > 0
    ledger.close()


def test_a_stage_that_is_no_measurement(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"--stage 7 is no finished measurement; there are: 2 \(diagnose of"):
        evaluate_run(measured, 7)
    with pytest.raises(MedbridgeError, match="no such run database"):
        evaluate_run(tmp_path / "none")


def test_a_run_of_unreadable_settings_has_no_stored_evaluation(measured: Path) -> None:
    ledger = Ledger(measured / "run.sqlite")
    [stage] = [stage for stage in ledger.stages() if stage.kind == "diagnose"]
    assert stored_evaluation(ledger, stage) is not None
    ledger.set_meta("config", {"gate": "wide open"})
    assert stored_evaluation(ledger, stage) is None
    ledger.close()
    assert "h-evaluation" not in write_report(measured).read_text()


def test_the_report_has_the_figures(measured: Path) -> None:
    text = write_report(measured).read_text()
    assert 'id="h-evaluation"' in text and "Majority@n" in text and "Confusion: right answer" in text


def test_the_command_on_a_run(measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "page" / "evaluation.html"
    shown = RUN.invoke(app, ["evaluate", "--run", str(measured), "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "shade" in shown.output and "Acc@1" in shown.output and page.is_file()
    told = json.loads(RUN.invoke(app, ["evaluate", "--run", str(measured), "--json"]).stdout)
    assert [row["stratum"] for row in told["strata"]] == ["shade", "side"]


def test_the_command_measures_a_model(
    tiny_settings: Callable[..., Any], tiny_data: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """On the whole test split, once: called again, the same run folder answers at once."""
    run, answers = tmp_path / "run", []
    command = [
        "evaluate", "--model", str(model_folder("qwen2_5_vl")), "--data", f"jsonl:{tiny_data}", "--run", str(run),
        "--set", "data.strata=[task]", "--set", "diagnosis.samples=4", "--set", "rollout.max_new_tokens=6",
        "--set", "rollout.engine=transformers", "--set", "data.prompt.system=''", "--json",
    ]  # fmt: skip
    for _ in range(2):
        told = RUN.invoke(app, command)
        assert told.exit_code == 0, told.output
        answers.append(json.loads(told.stdout))
    assert answers[0] == answers[1]
    assert [(row["stratum"], row["items"], row["samples"]) for row in answers[0]["strata"]] == [
        ("shade", 6, [4, 4]), ("side", 6, [4, 4]),
    ]  # fmt: skip
    assert all(row["truncated_rate"] is not None for row in answers[0]["strata"])
    assert "test split" in answers[0]["source"] and (run / "report.html").is_file()
    ledger = Ledger(run / "run.sqlite", read_only=True)
    assert [stage.kind for stage in ledger.stages()] == ["evaluate"]
    ledger.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["a.jsonl", "--run", "r"], "logs are evaluated by themselves"),
        (["a.yaml", "b.yaml"], "one configuration at a time, not 2"),
        (["a.yaml", "--stage", "1"], "--stage picks one of a run's measurements"),
        (["--run", "r", "--split", "test"], "--set and --split say how a model is measured"),
        (["--run", "r", "--judge-url", "http://x"], "a judge needs both"),
    ],
)
def test_commands_that_make_no_sense(arguments: list[str], message: str) -> None:
    refused = RUN.invoke(app, ["evaluate", *arguments])
    assert isinstance(refused.exception, MedbridgeError) and message in str(refused.exception)


def test_a_split_that_is_not_there(tiny_data: Path, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["evaluate", "--model", str(model_folder("qwen2_5_vl")), "--run", str(tmp_path / "run")]
    only = shutil.copytree(tiny_data, tmp_path / "only")
    (only / "validation.jsonl").unlink()
    refused = RUN.invoke(app, [*command, "--data", f"jsonl:{only}", "--split", "validation"])
    assert isinstance(refused.exception, MedbridgeError)
    assert "no items of split 'validation' to evaluate on" in str(refused.exception)
