"""Training on two ranks (gloo, FSDP2, real processes) against one: losses, weights, averages, resume, and failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medbridge.model import ModelSettings, Policy

WORKER = Path(__file__).with_name("parallel_worker.py")
LORA = {"lora": {"rank": 4}}
CHECKPOINTING = {"gradient_checkpointing": True}
KL = {"kl_coefficient": 0.05}
RL = {"prompts_per_step": 3, "completions": 4, "micro_batch_size": 5}
CARE = {"kl_coefficient": 0.05, "consistency_weight": 0.5, "ema_decay": 0.9, "updates_per_batch": 3}
MIXED = {"batch_size": 5, "micro_batch_size": 2, "replay_share": 0.4}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, model_folder: Callable[[str], Path], formed: Path
) -> Path:
    """A folder for results, with models: the output layer tied, not tied, and one that answers in the right form."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, tied in (("tied", True), ("untied", False)):
        shutil.copytree(model_folder("qwen2_5_vl"), folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
        (folder / name / "config.json").write_text(json.dumps(config))
    _drop_output_layer(folder / "tied")
    shutil.copytree(formed, folder / "formed")
    for name, tied in (("tied", True), ("untied", False)):
        model = Policy.load(str(folder / name), ModelSettings()).model
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    return folder


def _drop_output_layer(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def train(count: int, cases: list[dict[str, Any]], out: Path, data: Path, check: bool = True) -> Any:
    """Train cases on so many ranks; their results by name."""
    out.mkdir(exist_ok=True)
    plan = out / f"plan-{count}.json"
    plan.write_text(json.dumps({"cases": cases, "data": str(data), "out": str(out)}))
    root = WORKER.parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{WORKER.parent}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(WORKER)]
    done = subprocess.run([*command, str(plan)], env=environment, capture_output=True, text=True, timeout=240)
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-4000:]
    return {case["name"]: torch.load(out / f"{case['name']}-{count}.pt") for case in cases}


def cases(place: Path) -> list[dict[str, Any]]:
    """Batches of 5 in micro-batches of 2 give one rank more passes than the other; one of 1 leaves it without work."""
    sft = {"kind": "sft", "settings": {"batch_size": 5, "micro_batch_size": 2}}
    rl = {"kind": "rl", "path": str(place / "formed")}
    return [
        {**sft, "name": "tied", "path": str(place / "tied")},
        {**sft, "name": "untied", "path": str(place / "untied"), "images": "some", "model": CHECKPOINTING},
        {**sft, "name": "lora", "path": str(place / "tied"), "model": LORA},
        {"kind": "sft", "settings": {"batch_size": 1}, "name": "text", "path": str(place / "untied"), "images": "none"},
        {**rl, "name": "rl", "settings": {**RL, **CARE}, "rollouts": str(place / "rl")},
        {**rl, "name": "rl-lora", "settings": {**RL, **KL}, "rollouts": str(place / "rl-lora"), "model": LORA},
        {**rl, "name": "mixed", "settings": RL, "rollouts": str(place / "mixed"), "supervised": MIXED},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(place: Path, tiny_data: Path) -> dict[int, Any]:
    """The cases on one rank and on several; the others train on the rollouts of the first."""
    return {count: train(count, cases(place), place / f"on-{count}", tiny_data) for count in (1, 2, 4)}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["tied", "untied", "lora", "text", "rl", "rl-lora", "mixed"])
def test_several_ranks_train_as_one(runs: dict[int, Any], name: str, count: int) -> None:
    one, several = runs[1][name], runs[count][name]
    assert one["log"].keys() == several["log"].keys() == {1, 2, 3, 4, 5}
    for step, metrics in one["log"].items():
        # log-probabilities and advantages are float32; a loss is a sum in which they cancel
        assert several["log"][step] == pytest.approx(metrics, rel=1e-6, abs=1e-7), step
        assert metrics.get("signal", 1) > 0, "nothing was learned from the rewards"
    assert one["weights"].keys() == several["weights"].keys()
    for key, weight in one["weights"].items():
        assert torch.dist(several["weights"][key], weight) <= 1e-6 * weight.norm(), key


def test_a_checkpoint_is_the_same_for_any_number_of_ranks(
    runs: dict[int, Any], place: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Resumed at step 4 of 5 on the other number of ranks, and on the same one, where nothing differs by a bit."""
    from safetensors.torch import load_file

    left = {count: place / f"on-{count}" / "rl" / "checkpoints" for count in (1, 2)}
    for kind in ("weights", "optimizer", "average"):
        one, two = (load_file(left[count] / "step-000004" / f"{kind}.safetensors") for count in (1, 2))
        assert one.keys() == two.keys() and one
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-6, msg=f"{kind} {key}")
    for begun, goes_on in ((1, 2), (2, 1), (2, 2)):
        out = tmp_path / f"{begun}-{goes_on}"
        shutil.copytree(left[begun], out / "rl" / "checkpoints")
        case = next(case for case in cases(place) if case["name"] == "rl")
        found = train(goes_on, [case], out, tiny_data)["rl"]
        assert found["log"].keys() == {5}
        for key, weight in runs[begun]["rl"]["weights"].items():
            if begun == goes_on:
                assert torch.equal(found["weights"][key], weight), key
            else:
                assert torch.dist(found["weights"][key], weight) <= 1e-6 * weight.norm(), key


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_which_resumes_to_the_same_bits(
    runs: dict[int, Any], place: Path, tiny_data: Path, tmp_path: Path, killed: int
) -> None:
    case = cases(place)[0]
    out = tmp_path / "out"
    done = train(2, [{**case, "kills": killed, "at": 4}], out, tiny_data, check=False)
    assert done.returncode != 0
    found = train(2, [case], out, tiny_data)[case["name"]]
    assert found["log"].keys() == {3, 4, 5}
    for key, weight in runs[2][case["name"]]["weights"].items():
        assert torch.equal(found["weights"][key], weight), key


def test_an_error_on_rank_0_is_told_by_the_others(place: Path, tiny_data: Path, tmp_path: Path) -> None:
    case = {**cases(place)[0], "fails_at": 2}
    done = train(2, [case], tmp_path / "out", tiny_data, check=False)
    assert done.returncode != 0
    assert "rank 0 has ended: RuntimeError" in done.stderr


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="starving a thread is Linux's")
@pytest.mark.parametrize("status", [0, 3])
def test_ranks_end_whatever_their_threads_do(status: int) -> None:
    """Without `leave` more than half of these processes are aborted at their end."""
    command = [sys.executable, str(WORKER.with_name("leaving_worker.py")), "3", str(status)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == [status] * 6, done.stderr[-4000:]


def medbridge(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "-m", "--", "medbridge.cli", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_a_stage_of_a_run(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A model from nothing is taught the answer form, and sharpened."""
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(tiny_config(rl={"checkpoint_every": 1})))
    told = json.loads(medbridge("sharpen", config, "--run", run, "--stratum", "shade", "--json").stdout)
    assert told["stage"] == "sharpen"
    assert (Path(told["model"]) / "model.safetensors").is_file()


def test_a_whole_run(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Measured on rank 0, trained on both, measured again."""
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(tiny_config()))
    told = json.loads(medbridge("run", config, "--run", run, "--json").stdout)
    assert told["state"] == "finished"
    assert [len(stratum["trained"]) for stratum in told["strata"].values()] == [2] * len(told["strata"])
    assert (run / told["final_model"] / "model.safetensors").is_file()
    again = json.loads(medbridge("run", config, "--run", run, "--json").stdout)
    assert again["rollouts"] == told["rollouts"] and again["final_model"] == told["final_model"]
