"""Training stages in real tiny runs: two kinds of training in one stage, held-out items, which weights are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import interrupted, pretend

from medbridge.data import Item
from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.report import summarise, write_report
from medbridge.rollout import GREEDY
from medbridge.scoring import HeldOut


def weak_and_strong(item: Item, number: int) -> bool:
    """Shade is never right, side is right but for the greedy answer."""
    return item.tags["task"] == "side" and number != GREEDY


# -- mixed ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(formed: Path) -> dict[str, Any]:
    """Settings of a run that bridges and sharpens at once."""
    return {
        "model": {"path": str(formed)}, "budget": {"stages": 4, "mixed": True},
        "gate": {"support_threshold": 0.1, "alpha": 0.2, "error_control": "none"},
        "rl": {"steps": 4, "checkpoint_every": 2},
    }  # fmt: skip


def verdicts_for(run: Run) -> Any:
    base = run.base_model()
    pretend(run, 0, base, weak_and_strong)
    return run.assess(0, base)


def test_strata_that_want_different_things_are_trained_in_one_stage(
    open_run: Callable[..., Run], mixed: dict[str, Any]
) -> None:
    run = open_run(**mixed, sft={"batch_size": 3})
    base, verdicts = verdicts_for(run)
    assert {name: row.kind for name, row in verdicts.items()} == {"shade": "bridge", "side": "sharpen"}
    plan = run._plan(0, verdicts)
    assert (plan.kind, plan.strata) == ("mixed", ("shade", "side"))
    assert plan.wanted == {"bridge": ("shade",), "sharpen": ("side",)}
    result = run._train(0, base, plan)
    stage = run.ledger.stages()[-1]
    assert (stage.kind, stage.status, stage.result_model) == ("mixed", "done", "models/02-mixed")
    assert stage.plan["strata"] == {"bridge": ["shade"], "sharpen": ["side"]} and {"sft", "rl"} <= stage.plan.keys()
    tasks = {item.id: item.tags["task"] for item in run.items.items}
    for ids in run.ledger.trained_items(stage.stage_id):  # two groups and three examples a step
        assert sorted(tasks[name] for name in ids) == ["shade"] * 3 + ["side"] * 2
    assert {tasks[row.rollout.item_id] for row in run.ledger.rollouts(stage.stage_id)} == {"side"}
    metrics = run.ledger.metrics(stage.stage_id)
    assert set(metrics) >= {"reward", "sft_loss", "memory_gb", "mfu"} and len(metrics["sft_loss"]) == 4
    assert run.next_round() == 1 and run.current_model() == result
    # both kinds are counted, each for its own strata
    run.ledger.set_meta("x", None)
    pretend(run, 1, result, weak_and_strong)
    run.diagnose(1, result)
    limited = open_run(
        **{**mixed, "budget": {"stages": 4, "mixed": True, "bridges_per_stratum": 1}}, sft={"batch_size": 3}
    )
    verdicts = limited.ledger.verdicts(limited.ledger.stages()[-1].stage_id)
    assert limited._plan(1, verdicts).kind == "sharpen"
    view = summarise(run.folder)
    assert view["strata"]["shade"]["trained"] == ["bridge"] and view["strata"]["side"]["trained"] == ["sharpen"]
    page = write_report(run.folder).read_text()
    assert "Bridge and sharpen" in page and "bridged" in page and "sharpened" in page
    assert open_run(**mixed, sft={"batch_size": 3}).bridge  # the folder opens again


def test_a_mixed_stage_that_was_cut_off_goes_on_bit_by_bit(
    open_run: Callable[..., Run], mixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for folder, killed in (("straight", False), ("cut", True)):
        run = open_run(folder, **mixed)
        base, verdicts = verdicts_for(run)
        if killed:
            interrupted(run, 4, partial(run._train, 0, base, run._plan(0, verdicts)))
            run = open_run(folder, **mixed)
            with pytest.raises(MedbridgeError, match=r"a mixed stage was cut off here. Finish it with `medbridge run`"):
                run.train_once("bridge", ["shade"])
            plan = run._plan(0, run.assess(0, base)[1])
            assert plan.reason.startswith("going on with mixed")
        else:
            plan = run._plan(0, verdicts)
        result = run._train(0, base, plan)
        results.append((run.folder / result / "model.safetensors").read_bytes())
        assert [step for step, _ in run.ledger.metrics(2)["sft_loss"]] == [1, 2, 3, 4]
    assert results[0] == results[1]


def test_a_mixed_stage_that_costs_support_is_taken_back_and_only_bridging_is_tried_again(
    open_run: Callable[..., Run], mixed: dict[str, Any]
) -> None:
    run = open_run(**mixed)
    base, verdicts = verdicts_for(run)
    result = run._train(0, base, run._plan(0, verdicts))
    pretend(run, 1, result, lambda item, number: False)
    model, verdicts = run.assess(1, result)
    assert model == base and list(run.ledger.stages()[-1].summary["lost"]) == ["side"]
    plan = run._plan(1, verdicts)
    assert (plan.kind, plan.strata) == ("bridge", ("shade",))
    assert summarise(run.folder)["stages"][1]["taken_back"] is True


def test_without_the_setting_bridging_comes_first(open_run: Callable[..., Run], mixed: dict[str, Any]) -> None:
    run = open_run(**{**mixed, "budget": {"stages": 4}})
    _, verdicts = verdicts_for(run)
    assert (run._plan(0, verdicts).kind, run._plan(0, verdicts).strata) == ("bridge", ("shade",))


def test_the_diagnosed_k_is_the_gates(open_run: Callable[..., Run], mixed: dict[str, Any]) -> None:
    run = open_run(**mixed)
    _, verdicts = verdicts_for(run)
    stage = run._begin(0, "sharpen", run.base_model(), ["side"])
    assert run._diagnosed_k(stage) == verdicts["side"].verdict["evidence"]["k"]
    assert run._diagnosed_k(run._begin(3, "sharpen", run.base_model(), ["side"])) is None


# -- held-out items ------------------------------------------------------------------------------------------------


def test_held_out_items_are_whole_clusters_and_never_trained_on(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed)}, held_out={"share": 0.5}, sft={"steps": 6, "checkpoint_every": 2})
    out = run._held_out_ids
    assert 0 < len(out) < 12 and len(out) % 2 == 0  # two questions an image
    pictures = {item.id: item.images for item in run.items.split("train")}
    assert {pictures[name] for name in out}.isdisjoint(images for name, images in pictures.items() if name not in out)
    run.train_once("bridge", ["shade", "side"])
    run.train_once("sharpen", ["shade"])
    for stage in run.ledger.stages():
        trained = {name for step in run.ledger.trained_items(stage.stage_id) for name in step}
        assert trained and trained.isdisjoint(out)
    bridged, sharpened = run.ledger.stages()
    assert [step for step, _ in run.ledger.metrics(bridged.stage_id)["held_out_accuracy"]] == [2, 4, 6]
    assert bridged.summary["kept_step"] == 6
    # what is noted is what the saved model says
    stored = run.ledger.metrics(bridged.stage_id)["held_out_accuracy"][-1][1]
    policy = Policy.load(str(run.folder / str(bridged.result_model)), run.settings.model)
    asked = run.held_out_items(["shade", "side"])
    assert {item.id for item in asked} == out
    assert HeldOut(policy, asked, run.settings, run.images)(0) == stored
    assert {item.tags["task"] for item in run.held_out_items(["shade"])} == {"shade"}
    assert sharpened.summary["held_out_accuracy"] == run.ledger.metrics(2)["held_out_accuracy"][-1][1]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints at steps 2 and 4 of 6, of which the first is said to be the best."""
    said = {2: 0.75, 4: 0.5, 6: 0.25}
    monkeypatch.setattr(HeldOut, "__call__", lambda self, step: said[step])


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_the_best_checkpoint_is_kept_where_it_is_asked_for(
    open_run: Callable[..., Run], formed: Path, lora: Any, scored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "model": {"path": str(formed), "lora": lora},
        "sft": {"steps": 6, "checkpoint_every": 2, "schedule": "constant", "warmup_steps": 0, "keep_checkpoints": 1},
    }
    weights, adapters = {}, {}
    for name, held_out in (("last", {"share": 0.5}), ("best", {"share": 0.5, "keep": "best"})):
        run = open_run(name, **settings, held_out=held_out)
        run.train_once("bridge", ["side"])
        [stage] = run.ledger.stages()
        assert stage.summary["kept_step"] == (6 if name == "last" else 2)
        assert stage.summary["held_out_accuracy"] == (0.25 if name == "last" else 0.75)
        weights[name] = load_file(run.folder / str(stage.result_model) / "model.safetensors")
        if lora:
            adapters[name] = load_file(run.folder / "models" / "01-bridge-adapter" / "adapter_model.safetensors")
        assert not list((run.folder / "checkpoints").glob("*"))
    # a run that ends after step 2: the same items, order and rates, so the very same weights
    short = open_run("short", **{**settings, "sft": {**settings["sft"], "steps": 2}}, held_out={"share": 0.5})
    short.train_once("bridge", ["side"])
    expected = load_file(short.folder / "models" / "01-bridge" / "model.safetensors")
    assert all(torch.equal(weights["best"][name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(weights["last"][name], tensor) for name, tensor in expected.items())
    if lora:
        own = load_file(short.folder / "models" / "01-bridge-adapter" / "adapter_model.safetensors")
        assert own.keys() == adapters["best"].keys()
        assert all(torch.equal(adapters["best"][name], tensor) for name, tensor in own.items())


def test_a_run_that_is_cut_off_keeps_the_same_checkpoint(
    open_run: Callable[..., Run], formed: Path, scored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "model": {"path": str(formed)}, "sft": {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 1},
        "held_out": {"share": 0.5, "keep": "best"},
    }  # fmt: skip
    found = []
    for folder, last in (("straight", None), ("cut", 5)):
        run = open_run(folder, **settings)
        if last is not None:
            interrupted(run, last, partial(run.train_once, "bridge", ["side"]))
            run = open_run(folder, **settings)
        run.train_once("bridge", None if last else ["side"])
        [stage] = run.ledger.stages()
        scores = run.ledger.metrics(1)["held_out_accuracy"]
        found.append(
            (stage.summary["kept_step"], scores, (run.folder / "models/01-bridge/model.safetensors").read_bytes())
        )
    assert found[0] == found[1] and found[0][0] == 2


def test_strata_without_held_out_items_are_trained_and_it_is_said(
    open_run: Callable[..., Run], formed: Path, tmp_path: Path
) -> None:
    run = open_run(model={"path": str(formed)}, held_out={"share": 1e-9, "keep": "best"})
    run.train_once("bridge", ["side"])
    assert "held_out_accuracy" not in run.ledger.metrics(1) and "kept_step" not in run.ledger.stages()[0].summary
    run.reporter.console.file.flush()
    assert "none of the held-out training items is of side" in (tmp_path / "log").read_text()


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bridge", "sharpen"])
def test_a_stage_that_can_not_fit_in_memory_is_refused_and_one_that_may_not_is_tried(
    kind: Any, open_run: Callable[..., Run], formed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries alone take 64 MiB of a CPU's memory; 128 MiB hold the model, and not the largest micro-batch."""

    def said(run: Run) -> str:
        run.reporter.console.file.flush()
        return (tmp_path / "log").read_text()

    settings = {"path": str(formed), "device": "cpu"}
    run = open_run(model=settings)
    with monkeypatch.context() as patch:
        patch.setattr("medbridge.stages.device_memory", lambda device: 32 << 20)
        patch.setattr(Policy, "load", None)  # not even that is begun
        with pytest.raises(MedbridgeError, match=r"(?s)training does not fit in memory.* available +0\.03"):
            run.train_once(kind, ["side"])
    assert not run.ledger.metrics(1) and "may not fit" not in said(run)
    monkeypatch.setattr("medbridge.stages.device_memory", lambda device: 128 << 20)
    assert run.train_once(kind, None) == f"models/01-{kind}"  # the same stage goes on
    assert re.search(rf"(?s){kind}: training may not fit in memory.* available +0\.12", said(run))
    monkeypatch.setattr("medbridge.stages.device_memory", lambda device: 1 << 40)
    run = open_run("other", model=settings)
    run.train_once(kind, ["side"])
    assert said(run).count("may not fit") == 1


# -- adapters ------------------------------------------------------------------------------------------------------


def test_adapters_are_kept_beside_the_merged_model(open_run: Callable[..., Run], formed: Path) -> None:
    run = open_run(model={"path": str(formed), "lora": {"rank": 2}})
    result = run.train_once("sharpen", ["side"])
    folder = run.folder / f"{result}-adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    before = load_file(formed / "model.safetensors")
    after = load_file(run.folder / result / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    adapted = {
        name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight"
        for name in load_file(folder / "adapter_model.safetensors")
    }
    assert changed and {name.split("layers.")[-1] for name in changed} <= {
        name.split("layers.")[-1] for name in adapted
    }
