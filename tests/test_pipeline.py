"""Whole tiny runs: they end, they repeat without adding anything, they refuse what would mix results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from tiny_runs import pretend

from medbridge.config import load_config
from medbridge.data import Item, grade, permutation
from medbridge.errors import MedbridgeError
from medbridge.ledger import Ledger
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.report import write_report
from medbridge.rollout import GREEDY, Graded, Rollout
from medbridge.run_folder import environment
from medbridge.support.routing import route

TABLES = ("items", "stages", "rollouts", "outcomes", "tallies", "verdicts", "batches", "metrics")


def counts(ledger: Ledger) -> dict[str, int]:
    return {table: ledger.count(table) for table in TABLES}


def kinds(run: Run) -> list[str]:
    return [stage.kind for stage in run.ledger.stages()]


# -- from end to end -----------------------------------------------------------------------------------------------


def test_a_run_goes_to_its_end_and_a_second_time_adds_nothing(open_run: Callable[..., Run], tmp_path: Path) -> None:
    run = open_run()
    verdicts = run.execute()
    # a model that was shown the form in four steps knows nothing: both strata are bridged until the budget is spent
    assert kinds(run) == ["format", "diagnose", "bridge", "diagnose", "bridge", "diagnose", "evaluate", "evaluate"]
    assert {name: row.kind for name, row in verdicts.items()} == {"shade": "bridge", "side": "bridge"}
    stages = run.ledger.stages()
    assert all(stage.status == "done" and stage.finished is not None for stage in stages)
    assert [stage.round for stage in stages] == [0, 0, 0, 1, 1, 2, 2, 2]
    chain = [(stage.model, stage.result_model) for stage in stages if stage.result_model]
    assert chain == [
        ("models/from-nothing", "models/01-format"),
        ("models/01-format", "models/03-bridge"),
        ("models/03-bridge", "models/05-bridge"),
    ]
    assert [stage.model for stage in stages if stage.kind == "evaluate"] == ["models/01-format", "models/05-bridge"]
    assert run.ledger.meta("base_model") == "models/01-format"
    assert run.ledger.meta("finished") == {"reason": "the budget of 2 training stages is used up"}
    assert run.ledger.meta("outcome")["shade"]["kind"] == "bridge"
    for stage in stages:
        if stage.kind in ("bridge", "format"):
            assert stage.summary["steps"] == 4 and stage.summary["first_loss"] > stage.summary["last_loss"]
            assert set(run.ledger.metrics(stage.stage_id)) >= {"loss", "learning_rate", "gradient_norm"}
            assert len(run.ledger.trained_items(stage.stage_id)) == 4
        else:
            assert stage.summary["items"] == 12 and stage.summary["rollouts"] == 12 * 5
            assert set(run.ledger.verdicts(stage.stage_id)) == {"shade", "side"}
        if stage.kind == "evaluate":
            assert stage.summary["baseline"]["shade"]["accuracy"] == pytest.approx(1 / 3)
            assert stage.summary["baseline"]["side"]["accuracy"] == pytest.approx(1 / 2)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert sorted(path.name for path in (tmp_path / "run" / "models").iterdir()) == [
        "01-format", "03-bridge", "05-bridge", "from-nothing",
    ]  # fmt: skip
    assert load_config(tmp_path / "run" / "config.yaml") == run.settings

    before, written = counts(run.ledger), (tmp_path / "run" / "models" / "05-bridge" / "model.safetensors").stat()
    again = open_run()
    assert again.execute() == verdicts
    assert counts(again.ledger) == before
    assert (tmp_path / "run" / "models" / "05-bridge" / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns


def test_two_runs_of_the_same_settings_are_equal(open_run: Callable[..., Run], tmp_path: Path) -> None:
    found = []
    for folder in ("first", "second"):
        run = open_run(folder, budget={"stages": 1})
        verdicts = run.execute()
        rollouts = [
            (row.rollout.item_id, row.rollout.sample, row.rollout.text, row.rollout.logprobs.tobytes())
            for stage in run.ledger.stages()
            for row in run.ledger.rollouts(stage.stage_id)
        ]
        weights = (tmp_path / folder / "models" / "03-bridge" / "model.safetensors").read_bytes()
        found.append((verdicts, rollouts, weights, counts(run.ledger)))
    assert found[0] == found[1]
    other = open_run("third", budget={"stages": 0}, seed=1)
    other.execute()
    assert {row.rollout.text for row in other.ledger.rollouts(2)} != {text for _, _, text, _ in found[0][1]}


def test_training_never_sees_the_other_splits_and_test_is_only_evaluated(open_run: Callable[..., Run]) -> None:
    run = open_run()
    run.execute()
    for stage in run.ledger.stages():
        names = {row.rollout.item_id for row in run.ledger.rollouts(stage.stage_id)}
        trained = {name for step in run.ledger.trained_items(stage.stage_id) for name in step}
        splits = {name.split("/")[1] for name in names | trained}
        assert splits == {{"diagnose": "validation", "evaluate": "test"}.get(stage.kind, "train")}


def test_a_given_model_needs_no_format_stage(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, budget={"stages": 0}, diagnosis={"test_split": None})
    run.execute()
    assert kinds(run) == ["diagnose"]
    assert run.ledger.meta("base_model") == str(formed)
    assert not (run.folder / "models").exists()
    assert all(row.outcome.status != "abstain" for row in run.ledger.rollouts(1) if row.rollout.sample == GREEDY)


def test_no_format_steps_begin_with_the_bare_model(open_run: Callable[..., Run]) -> None:
    run = open_run(model={"from_nothing": {"format_steps": 0}}, budget={"stages": 0}, diagnosis={"test_split": None})
    run.execute()
    assert kinds(run) == ["diagnose"]
    assert run.ledger.stages()[0].model == "models/from-nothing"


def test_the_format_stage_teaches_the_form_and_no_answer(open_run: Callable[..., Run], train_items: list[Any]) -> None:
    run = open_run(model={"from_nothing": {"format_steps": 60}}, sft={"learning_rate": 5e-3, "batch_size": 8})
    run.base_model()
    [stage] = run.ledger.stages()
    assert stage.kind == "format" and stage.summary["source"] == "random answers"
    assert stage.strata == ("shade", "side")
    assert len(run.ledger.metrics(stage.stage_id)["loss"]) == 60
    run.diagnose(0, run.base_model())
    outcomes = [row.outcome for row in run.ledger.rollouts(2)]
    assert sum(outcome.well_formed for outcome in outcomes) > 0.8 * len(outcomes)


def test_the_environment_names_versions_and_machine() -> None:
    found = environment()
    assert found.keys() >= {"medbridge", "python", "torch", "transformers", "numpy", "machine", "device", "threads"}
    json.dumps(found)


# -- what may not be mixed -----------------------------------------------------------------------------------------


def test_changed_settings_are_refused_by_name(open_run: Callable[..., Run]) -> None:
    open_run(budget={"stages": 0}).execute()
    for sections, name in (
        ({"sft": {"learning_rate": 1e-4}}, "sft.learning_rate"),
        ({"seed": 7}, "seed"),
        ({"data": {"prompt": {"answer_style": "letter"}}}, "data.prompt.answer_style"),
        ({"model": {"lora": {"rank": 2}}}, "model.lora"),
    ):
        with pytest.raises(MedbridgeError, match=rf"begun with other settings \({name}\)"):
            open_run(**sections)


def test_a_run_begun_before_a_setting_came_goes_on_with_its_default(open_run: Callable[..., Run]) -> None:
    run = open_run(budget={"stages": 0})
    run.execute()
    stored = run.ledger.meta("config")
    del stored["data"]["prompt"]["number_tolerance"], stored["data"]["sources"][0]["tags"]
    run.ledger.set_meta("config", stored)
    assert len(open_run(budget={"stages": 0}).execute()) == 2
    run = open_run(budget={"stages": 0})
    stored["sft"] = "as it was"  # no settings of this version
    run.ledger.set_meta("config", stored)
    with pytest.raises(MedbridgeError, match="begun with other settings"):
        open_run(budget={"stages": 0})


def test_a_larger_budget_goes_on_with_the_run(open_run: Callable[..., Run]) -> None:
    first = open_run(budget={"stages": 1})
    first.execute()
    before = kinds(first)
    assert before == ["format", "diagnose", "bridge", "diagnose", "evaluate", "evaluate"]
    more = open_run(budget={"stages": 2}, name="another name")
    more.execute()
    assert kinds(more) == [*before, "bridge", "diagnose", "evaluate"]
    assert more.ledger.meta("name") == "another name"
    assert [stage.model for stage in more.ledger.stages() if stage.kind == "evaluate"] == [
        "models/01-format", "models/03-bridge", "models/07-bridge",
    ]  # fmt: skip


def test_one_folder_serves_one_process_at_a_time(
    open_run: Callable[..., Run], tiny_config: Callable[..., dict[str, Any]], processes: Any, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_config(sft={"steps": 300})))
    child = processes.start(["medbridge.cli", "run", config, "--run", tmp_path / "run"], tmp_path / "child.log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(MedbridgeError, match="another medbridge process is working in this run folder"):
        open_run(sft={"steps": 300})
    assert processes.kill(child) == -9
    open_run(sft={"steps": 300})  # a killed process holds nothing


def test_what_a_killed_process_was_writing_is_swept_away(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)})
    result = run.train_once("bridge", ["side"])
    half = run.folder / "models" / ".02-bridge-x7a" / "model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    again = open_run(model={"path": str(formed)})
    assert [path.name for path in (again.folder / "models").iterdir()] == [Path(result).name]


# -- when to stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "stages", "reason"),
    [
        ({"stages": 0}, 0, "the budget of 0 training stages is used up"),
        ({"stages": 5, "bridges_per_stratum": 1}, 1, "stages per stratum are used up for shade, side"),
        ({"stages": 5, "minutes": 1e-6}, 0, "the budget of 1e-06 minutes is used up"),
    ],
)
def test_the_budget_ends_a_run(budget: dict[str, Any], stages: int, reason: str, open_run: Callable[..., Run]) -> None:
    run = open_run(budget=budget)
    run.execute()
    assert kinds(run).count("bridge") == stages
    assert run.ledger.meta("finished") == {"reason": reason}
    assert kinds(run).count("evaluate") == 1 + (stages > 0)


def test_minutes_are_those_of_work_and_count_over_restarts(open_run: Callable[..., Run]) -> None:
    run = open_run(budget={"stages": 0})
    run.execute()
    run = open_run(budget={"stages": 0})
    worked = run.ledger.meta("worked_seconds")
    assert 0 < worked < 60
    run.ledger.set_meta("worked_seconds", 3600.0)
    run = open_run(budget={"stages": 5, "minutes": 59.0})
    # closing the run before had written its own count; what counts is what the ledger said when this one opened
    run._worked = 3600.0
    run.execute()
    assert run.ledger.meta("finished") == {"reason": "the budget of 59 minutes is used up"}


def test_undecided_strata_end_a_run_without_training(open_run: Callable[..., Run]) -> None:
    run = open_run(gate={"min_items": 7})  # each stratum has 6
    verdicts = run.execute()
    assert {row.kind for row in verdicts.values()} == {"undecided"}
    assert run.ledger.meta("finished") == {"reason": "undecided: shade, side"}
    assert "bridge" not in kinds(run)


# -- single stages -------------------------------------------------------------------------------------------------


def test_train_once_takes_named_strata_or_those_of_the_last_verdict(open_run: Callable[..., Run]) -> None:
    run = open_run()
    with pytest.raises(MedbridgeError, match="this model has not been diagnosed here"):
        run.train_once("bridge", None)
    assert run.train_once("bridge", ["side"]) == "models/02-bridge"
    assert run.ledger.stages()[-1].strata == ("side",)
    assert run.next_round() == 1 and run.current_model() == "models/02-bridge"
    run.diagnose(run.next_round(), run.current_model())
    run.train_once("bridge", None)
    assert run.ledger.stages()[-1].strata == ("shade", "side")
    run.diagnose(run.next_round(), run.current_model())
    with pytest.raises(MedbridgeError, match=r"no stratum's last verdict is sharpen \(shade: bridge, side: bridge\)"):
        run.train_once("sharpen", None)


def test_only_the_named_strata_are_trained_and_the_others_replayed(open_run: Callable[..., Run]) -> None:
    run = open_run(sft={"replay_share": 0.25})
    run.train_once("bridge", ["side"])
    tasks = {item.id: item.tags["task"] for item in run.items.items}
    for ids in run.ledger.trained_items(run.ledger.stages()[-1].stage_id):
        assert sorted(tasks[name] for name in ids) == ["shade", "side", "side", "side"]


def test_an_unknown_stratum_is_named_with_those_there_are(open_run: Callable[..., Run]) -> None:
    with pytest.raises(MedbridgeError, match="no training items of stratum 'colour'; training strata are: shade, side"):
        open_run().train_once("bridge", ["colour"])


def test_sharpening_stores_its_rollouts_with_rewards(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)})
    result = run.train_once("sharpen", ["side"])
    stage = run.ledger.stages()[-1]
    assert (stage.kind, stage.result_model, stage.strata) == ("sharpen", result, ("side",))
    stored = run.ledger.rollouts(stage.stage_id)
    assert len(stored) == 2 * 2 * 4  # steps, prompts, completions
    weight = run.settings.rl.format_weight
    for row in stored:
        expected = float(row.outcome.status == "correct") + weight * row.outcome.well_formed
        assert row.reward == pytest.approx(expected)
        assert row.rollout.item_id.startswith("squares/train/")
    for step in (1, 2):
        batch = run.ledger.rollouts(stage.stage_id, step=step)
        assert len({(row.rollout.item_id, row.rollout.permutation) for row in batch}) == 2
    assert set(run.ledger.metrics(stage.stage_id)) >= {
        "reward", "accuracy", "format", "completion_length", "signal", "seconds_sampling", "seconds_training",
    }  # fmt: skip
    assert stage.summary["items"] == 6
    Policy.load(str(run.folder / result), run.settings.model)


def test_an_item_that_comes_up_again_is_sampled_anew(open_run: Callable[..., Run], formed: Path) -> None:
    rl = {"steps": 4, "prompts_per_step": 6, "learning_rate": 1e-12}  # all items in each step, of the same weights
    run = open_run(model={"path": str(formed)}, rl=rl)
    run.train_once("sharpen", ["side"])
    drawn: dict[tuple[Any, ...], list[str]] = {}
    for step in range(1, 5):
        for row in run.ledger.rollouts(1, step=step):
            rollout = row.rollout
            drawn.setdefault((rollout.item_id, rollout.permutation, rollout.sample), []).append(rollout.text)
    again = [texts for texts in drawn.values() if len(texts) > 1]
    assert len(again) >= 20
    assert sum(len(set(texts)) > 1 for texts in again) >= 5


def test_tensorboard_files_are_written_or_the_missing_package_is_named(
    open_run: Callable[..., Run], formed: Path
) -> None:
    run = open_run(model={"path": str(formed)}, tensorboard=True)
    if find_spec("tensorboard") is None:
        with pytest.raises(MedbridgeError, match=r"pip install 'medbridge\[train\]'"):
            run.train_once("bridge", ["side"])
        run = open_run(model={"path": str(formed)}, tensorboard=False)  # may be changed
        run.train_once("bridge", None)
    else:
        run.train_once("bridge", ["side"])
        assert list((run.folder / "tensorboard" / "01-bridge").glob("events.*"))


def test_a_stage_of_another_kind_that_was_cut_off_comes_first(
    open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run()
    run.base_model()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.ledger, "log_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.train_once("bridge", ["side"])
    with pytest.raises(MedbridgeError, match="a bridge stage was cut off here"):
        run.train_once("sharpen", ["side"])
    run.train_once("bridge", None)  # goes on with it
    assert run.ledger.stages()[-1].status == "done" and run.ledger.stages()[-1].strata == ("side",)


# -- what bridging imitates ----------------------------------------------------------------------------------------


def test_rejection_sampling_imitates_own_right_answers_only(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, sft={"source": "rejection", "rejection_samples": 6, "steps": 3})
    run.train_once("bridge", ["side"])
    [stage] = run.ledger.stages()
    stored = run.ledger.rollouts(stage.stage_id, step=0)
    assert len(stored) == 6 * 6 and all(row.rollout.sample != GREEDY for row in stored)
    right = {
        (row.rollout.item_id, row.rollout.permutation, row.rollout.text)
        for row in stored
        if row.outcome.status == "correct" and row.outcome.well_formed
    }
    assert stage.summary["items"] == len(right) > 0
    trained = {name for ids in run.ledger.trained_items(stage.stage_id) for name in ids}
    assert trained <= {item_id for item_id, _, _ in right}


def test_of_stored_samples_only_right_ones_in_the_right_form_are_imitated_each_once(
    open_run: Callable[..., Run], formed: Path
) -> None:
    run = open_run(model={"path": str(formed)}, sft={"source": "rejection", "rejection_samples": 4, "steps": 2})
    stage = run._begin(0, "bridge", run.base_model(), ["side"])
    for item in run.items.split("train"):
        if item.tags["task"] == "side":
            wrong = "left" if item.answer == "right" else "right"
            right = f"<answer>{item.answer}</answer>"
            rows = []
            for number, text in enumerate([right, right, f"It is so. {right}", f"<answer>{wrong}</answer>"]):
                ids, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
                rollout = Rollout(item.id, number, (0, 1), text, ids, logprobs, "stop", 1)
                rows.append(Graded(rollout, grade(item, (0, 1), text, run.settings.data.prompt)))
            assert [row.outcome.status for row in rows] == ["correct", "correct", "correct", "wrong"]
            run.ledger.save_rollouts(stage.stage_id, 0, rows)
    run.train_once("bridge", None)
    assert run.ledger.stages()[-1].summary["items"] == 6
    assert run.ledger.count("rollouts") == 6 * 4


def test_rejection_sampling_without_a_right_answer_says_so(open_run: Callable[..., Run]) -> None:
    run = open_run(model={"from_nothing": {"format_steps": 0}}, sft={"source": "rejection", "rejection_samples": 2})
    with pytest.raises(MedbridgeError, match="no correct, well-formed answer to any training item of side"):
        run.train_once("bridge", ["side"])


@pytest.fixture
def traced_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data with reasoning on half of the training items."""
    folder = tmp_path / "traced"
    shutil.copytree(tiny_data, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["trace"] = "I look at the square."
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_traces_are_imitated_where_they_are_wanted(open_run: Callable[..., Run], traced_data: Path) -> None:
    data = {"sources": [{"kind": "jsonl", "path": str(traced_data)}], "strata": []}
    model = {"from_nothing": {"format_steps": 0}}
    used = {}
    for source in ("auto", "traces", "answers"):
        run = open_run(source, data=data, model=model, sft={"source": source, "steps": 3})
        run.train_once("bridge", ["squares"])
        [stage] = run.ledger.stages()
        used[source] = (stage.summary["items"], stage.summary["first_loss"])
        assert stage.summary["source"] == source
    assert {source: items for source, (items, _) in used.items()} == {"auto": 12, "traces": 6, "answers": 12}
    assert len({loss for _, loss in used.values()}) == 3


def test_traces_are_asked_for_and_there_are_none(open_run: Callable[..., Run]) -> None:
    with pytest.raises(MedbridgeError, match=r"sft\.source is traces, and no training item has one"):
        open_run(sft={"source": "traces"}).train_once("bridge", ["side"])


# -- checks, changes and routes ------------------------------------------------------------------------------------


def test_sharpening_that_costs_support_is_taken_back(open_run: Callable[..., Run], formed: Path) -> None:
    # six items can only show support above 0
    settings: dict[str, Any] = {
        "model": {"path": str(formed)},
        "budget": {"stages": 4},
        "gate": {"support_threshold": 0, "alpha": 0.1},
    }
    run = open_run(**settings)
    base = run.base_model()
    pretend(run, 0, base, lambda item, number: number != GREEDY)
    assert {row.kind for row in run.diagnose(0, base).values()} == {"sharpen"}
    sharpened = run.train_once("sharpen", ["side"])
    assert run.current_model() == sharpened
    pretend(run, 1, sharpened, lambda item, number: item.tags["task"] == "side")
    run.diagnose(1, sharpened)
    after = run.ledger.stages()[-1]
    # not the stratum that was trained: every stage moves the whole model
    assert list(after.summary["lost"]) == ["shade"]
    change = after.summary["changes"]["shade"]
    assert change["support"]["value"] == pytest.approx(-1.5) and change["support"]["high"] < 0
    assert change["items"] == 6
    assert len(change["lost"]) == 6 and after.summary["changes"]["side"]["acc_at_1"]["value"] == 1.0
    assert after.summary["forecasts"]["side"]["acc_at_1"]["value"] == 1.0
    model, verdicts = run.assess(1, sharpened)
    assert model == run.current_model() == base
    assert {row.kind for row in verdicts.values()} == {"sharpen"}
    plan = run._plan(1, verdicts)
    assert (plan.kind, plan.strata) == ("sharpen", ("shade",))  # what it cost so much is not tried again
    with run.reporter.console.capture() as said:
        again = open_run(**settings)
        assert again.current_model() == base
    assert said.get() == ""


def test_bridging_is_compared_too_but_never_taken_back(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, diagnosis={"tolerated_loss": 0.25})
    base = run.base_model()
    pretend(run, 0, base, lambda item, number: True)
    run.diagnose(0, base)
    bridged = run.train_once("bridge", ["side"])
    pretend(run, 1, bridged, lambda item, number: False)
    run.diagnose(1, bridged)
    after = run.ledger.stages()[-1]
    assert set(after.summary["changes"]) == {"shade", "side"} and "lost" not in after.summary
    assert {change["tolerated"] for change in after.summary["changes"].values()} == {0.25}
    assert run.current_model() == bridged


def test_after_sharpening_the_same_questions_are_asked_again(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, diagnosis={"items_per_look": 2}, gate={"error_control": "none"})
    base = run.base_model()
    pretend(run, 0, base, lambda item, number: number == 0 and item.id.endswith("1"))
    run.diagnose(0, base)
    asked = {tally.item_id for tally in run.ledger.tallies(1)}
    sharpened = run.train_once("sharpen", ["side"])
    pretend(run, 1, sharpened, lambda item, number: False)
    run.diagnose(1, sharpened)
    assert {tally.item_id for tally in run.ledger.tallies(run.ledger.stages()[-1].stage_id)} >= asked


def test_controls_ask_the_same_questions_of_other_images(
    open_run: Callable[..., Run], formed: Path, tiny_items: list[Item]
) -> None:
    run = open_run(
        model={"path": str(formed)}, diagnosis={"controls": ["blank", "shuffled"], "control_items": 4},
        budget={"stages": 0},
    )  # fmt: skip
    verdicts = run.execute()
    assert kinds(run) == ["diagnose", "control", "control", "evaluate"]
    assert [stage.strata for stage in run.ledger.stages()[1:3]] == [("blank",), ("shuffled",)]
    for stage in run.ledger.stages()[1:3]:
        assert stage.status == "done" and stage.summary["items"] == 8
        rows = run.ledger.rollouts(stage.stage_id)
        assert {row.rollout.images for row in rows} == {1}
        # the option orders are those of the real images, so that the two can be compared sample by sample
        orders = {(row.rollout.item_id, row.rollout.sample): row.rollout.permutation for row in rows}
        real = {(r.rollout.item_id, r.rollout.sample): r.rollout.permutation for r in run.ledger.rollouts(1)}
        assert orders.items() <= real.items()
        # and the model does see other images: its log-probabilities differ
        logprobs = {(r.rollout.item_id, r.rollout.sample): r.rollout.logprobs for r in run.ledger.rollouts(1)}
        same = [np.array_equal(row.rollout.logprobs, logprobs[row.rollout.item_id, row.rollout.sample]) for row in rows]
        assert not any(same)
    for row in verdicts.values():
        checks = row.verdict["checks"]
        assert list(checks) == ["strict", "lenient", "blank", "shuffled"]
        assert checks["strict"]["items"] == 6 and checks["blank"]["items"] == checks["blank"]["visual"]["items"] == 4
    page = write_report(run.folder).read_text()
    assert "Outlook" in page and "rey images" in page and "Strict and lenient reading" in page
    grey = list((run.folder / "controls").glob("*.png"))
    assert [path.name for path in grey] == ["blank-28x28.png"]
    before = counts(run.ledger)
    again = open_run(
        model={"path": str(formed)}, diagnosis={"controls": ["blank", "shuffled"], "control_items": 4},
        budget={"stages": 0},
    )  # fmt: skip
    assert again.execute() == verdicts and counts(again.ledger) == before


def test_training_items_are_routed_by_what_the_model_makes_of_them(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, routing={"samples": 6})
    run.train_once("bridge", ["shade", "side"])
    routed, bridged = run.ledger.stages()
    assert (routed.kind, routed.strata, bridged.kind) == ("route", ("bridge", "shade", "side"), "bridge")
    tallies = run.ledger.tallies(routed.stage_id)
    assert {tally.n for tally in tallies} == {6} and all(
        tally.item_id.startswith("squares/train/") for tally in tallies
    )
    routes = route(tallies, run.settings.routing, seed=run.settings.seed)
    assert routed.summary["routes"] == {
        "bridge": len(routes.bridge), "sharpen": len(routes.sharpen), "anchor": len(routes.anchor),
        "left_out": len(routes.left_out),
    }  # fmt: skip
    assert 0 < len(routes.bridge) < 12
    assert bridged.summary["items"] == len(routes.bridge) + len(routes.anchor)
    trained = {name for step in run.ledger.trained_items(bridged.stage_id) for name in step}
    assert trained <= {*routes.bridge, *routes.anchor}


def test_a_routing_left_behind_serves_its_own_strata_only(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, routing={"samples": 6})
    items = [item for item in run.items.split("train") if item.tags["task"] == "shade"]
    run.routed(0, "bridge", run.base_model(), ("shade",), items)  # and then the process was killed
    run.train_once("bridge", ["side"])
    assert [(stage.kind, stage.strata) for stage in run.ledger.stages()] == [
        ("route", ("bridge", "shade")), ("route", ("bridge", "side")), ("bridge", ("side",)),
    ]  # fmt: skip
    assert run.ledger.stages()[-1].summary["items"] > 0


def test_a_run_whose_data_moved_goes_on(
    open_run: Callable[..., Run], formed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The images' absolute paths neither order the items nor keep two measurements from being compared."""
    source: dict[str, Any] = {"kind": "jsonl", "path": "squares"}
    orders = []
    for base in ("here", "there"):
        shutil.copytree(tiny_data, tmp_path / base / "squares")
        settings = open_run(base, model={"path": str(formed)}).settings
        data = settings.data.model_copy(update={"sources": [type(settings.data.sources[0])(**source)]})
        run = Run(
            tmp_path / "moved" / base, settings.model_copy(update={"data": data}), base_dir=tmp_path / base,
            reporter=Reporter(Console(file=(tmp_path / "log").open("a"))),
        )  # fmt: skip
        strata = run._split("validation")
        orders.append({name: [item.id for item in items] for name, items in strata.items()})
        run.close()
    assert orders[0] == orders[1]


def test_a_route_with_nothing_to_teach_uses_all_items_and_says_so(
    open_run: Callable[..., Run], formed: Path, tmp_path: Path
) -> None:
    run = open_run(model={"path": str(formed)}, routing={"samples": 2})
    items = [item for item in run.items.split("train") if item.tags["task"] == "side"]
    stage = run._begin(0, "route", run.base_model(), ("sharpen", "side"))
    for item in items:  # never right: nothing to sharpen
        rows = []
        for number in range(2):
            order = permutation(item, run.settings.seed, number)
            rollout = Rollout(item.id, number, order, "?", np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 1, 1)
            rows.append(Graded(rollout, grade(item, order, "?", run.settings.data.prompt)))
        run.ledger.save_rollouts(stage.stage_id, 0, rows)
    run.train_once("sharpen", ["side"])
    assert run.ledger.stages()[-1].summary["items"] == 6
    run.reporter.console.file.flush()
    assert "routing: none of 6 training items is one to sharpen" in (tmp_path / "log").read_text()


# -- data that doesn't fit -----------------------------------------------------------------------------------------


def test_a_missing_strata_tag_names_the_item_and_its_tags(open_run: Callable[..., Run]) -> None:
    with pytest.raises(MedbridgeError, match=r"item 'squares/train/0' has no tag 'organ' .* \(its tags: task\)"):
        open_run(data={"strata": ["organ"]}).execute()


def test_an_empty_split_is_named(open_run: Callable[..., Run], tiny_data: Path) -> None:
    data = {"sources": [{"kind": "jsonl", "splits": {"train": str(tiny_data / "train.jsonl")}, "path": None}]}
    with pytest.raises(MedbridgeError, match=r"no items of split 'validation' \(it has \{'train': 12\}\)"):
        open_run(data=data).execute()


def test_no_training_split_can_still_be_diagnosed_and_a_format_stage_says_what_it_lacks(
    open_run: Callable[..., Run], tiny_data: Path
) -> None:
    data = {"sources": [{"kind": "jsonl", "splits": {"validation": str(tiny_data / "validation.jsonl")}, "path": None}]}
    run = open_run("bare", data=data, model={"from_nothing": {"format_steps": 0}})
    assert set(run.diagnose(0, run.base_model())) == {"shade", "side"}
    with pytest.raises(MedbridgeError, match=r"format_steps .* the data has none"):
        open_run("formed", data=data).base_model()


def test_a_folder_that_is_a_file_is_a_clear_error(open_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(MedbridgeError, match="taken"):
        open_run("taken")


def test_a_run_that_could_not_be_opened_binds_nobody(open_run: Callable[..., Run], tiny_data: Path) -> None:
    with pytest.raises(MedbridgeError) as kept:  # keeps the failed attempt's frames, and so its objects, alive
        open_run(data={"sources": [{"kind": "jsonl", "path": str(tiny_data / "nowhere")}]})
    assert "nowhere" in str(kept.value)
    open_run()  # with the path corrected: neither is the folder held nor are the settings


def test_mistakes_that_show_before_the_first_stage_can_be_mended_in_the_same_folder(
    open_run: Callable[..., Run], formed: Path
) -> None:
    for mistake in (
        {"model": {"path": "no/such-model"}},
        {"model": {"path": str(formed)}, "data": {"strata": ["organ"]}},
        {"model": {"path": str(formed)}, "diagnosis": {"split": "test", "test_split": None}, "data": {"strata": ["x"]}},
    ):
        with pytest.raises(MedbridgeError):
            open_run(**mistake).execute()
    wider = open_run(model={"from_nothing": {"hidden_size": 96, "format_steps": 0}}, budget={"stages": 0})
    wider.base_model()
    run = open_run(model={"from_nothing": {"hidden_size": 32, "format_steps": 0}}, budget={"stages": 0})
    run.execute()
    policy = Policy.load(str(run.folder / "models" / "from-nothing"), run.settings.model)
    assert policy.model.config.get_text_config().hidden_size == 32
    with pytest.raises(MedbridgeError, match="begun with other settings"):
        open_run(model={"from_nothing": {"hidden_size": 96}})


def test_skipped_rows_are_said(open_run: Callable[..., Run], tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_data, folder)
    with (folder / "train.jsonl").open("a") as rows:
        rows.write('{"dataset_name": "squares"}\n')
    source = {"sources": [{"kind": "jsonl", "path": str(folder)}]}
    with pytest.raises(MedbridgeError, match=r"train\.jsonl:13"):
        open_run("strict", data=source)
    run = open_run("lenient", data={**source, "on_bad": "skip"})
    assert len(run.items.skipped) == 1
    run.reporter.console.file.flush()
    assert "1 rows skipped; the first: " in (tmp_path / "log").read_text()
