"""What a run refuses, and that a refusal leaves it as it was: the same folder goes on once the cause is mended."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from medbridge.config import RunSettings, parse_config
from medbridge.data import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.ledger import VerdictRow
from medbridge.model import ModelSettings, Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.train import Example, SftSettings, train_sft


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data that a test may change."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def open_run(tmp_path: Path, data: Path, tiny_settings: Callable[..., RunSettings]) -> Callable[..., Any]:
    """Open the run folder with changed settings, as a context."""

    def make(base_dir: Path | None = None, **sections: Any) -> Any:
        sources = {"sources": [{"kind": "jsonl", "path": str(data)}]}
        settings = tiny_settings(**{**sections, "data": {**sources, **sections.get("data", {})}})
        reporter = Reporter(Console(file=io.StringIO()))
        return closing(Run(tmp_path / "run", settings, base_dir=base_dir or data, reporter=reporter))

    return make


def drop(path: Path, task: str) -> None:
    """Take the rows of one stratum out of a JSONL file."""
    rows = [line for line in path.read_text().splitlines() if json.loads(line)["tags"]["task"] != task]
    path.write_text("".join(f"{row}\n" for row in rows))


def test_a_mistyped_stratum_begins_no_stage(open_run: Callable[..., Any]) -> None:
    with open_run() as run:
        with pytest.raises(MedbridgeError, match="no training items of stratum 'shady'"):
            run.train_once("bridge", ["shady"])
        assert all(stage.kind == "format" for stage in run.ledger.stages())
        assert run.train_once("bridge", ["shade"])


def test_a_stage_that_was_cut_off_does_not_change_its_strata(open_run: Callable[..., Any]) -> None:
    with open_run() as run:
        run._begin(0, "bridge", run.base_model(), ["shade"])
        with pytest.raises(MedbridgeError, match="a bridge stage on shade was cut off here"):
            run.train_once("bridge", ["side"])
        assert run.train_once("bridge", None)


def test_a_stratum_without_training_items_is_left_out_and_named(open_run: Callable[..., Any], data: Path) -> None:
    drop(data / "train.jsonl", "shade")
    rows = {name: VerdictRow(name, "bridge", "", {}, {}) for name in ("shade", "side")}
    with open_run() as run:
        plan = run._plan(0, rows)
        assert (plan.kind, plan.strata) == ("bridge", ("side",))
        alone = run._plan(0, {"shade": rows["shade"]})
        assert (alone.kind, alone.reason) == ("stop", "there are no training items for shade")


def test_tags_that_no_item_has_are_refused(open_run: Callable[..., Any]) -> None:
    for key in ("cluster", "kind_of_question"):
        with pytest.raises(MedbridgeError, match=f"diagnosis.{key} names the tag 'slcie', which no item has.*task"):
            open_run(diagnosis={key: ["slcie"]})


def test_changed_questions_do_not_mix_into_a_run(open_run: Callable[..., Any], data: Path) -> None:
    with open_run() as run:
        run.diagnose(0, run.base_model())
    path = data / "validation.jsonl"
    before = path.read_text()
    row = json.loads(before.splitlines()[0])
    other = next(letter for letter in row["options"] if letter != row["answer_label"])
    row |= {"answer_label": other, "answer": row["options"][other]}
    path.write_text("\n".join([json.dumps(row), *before.splitlines()[1:]]) + "\n")
    with pytest.raises(MedbridgeError, match="questions are not those that this run was begun with"):
        open_run()
    path.write_text(before)
    with open_run() as run:
        assert run.diagnose(0, run.base_model())


def test_an_infinite_setting_is_still_the_same_setting(open_run: Callable[..., Any]) -> None:
    for _ in range(2):
        with open_run(sft={"max_gradient_norm": float("inf")}) as run:
            run.diagnose(0, run.base_model())


def test_text_of_the_data_is_no_markup() -> None:
    out = io.StringIO()
    Reporter(Console(file=out, width=200)).say("bridge T2[/w] and [ct]")
    assert out.getvalue().strip() == "bridge T2[/w] and [ct]"


def test_a_stray_file_among_the_models_is_left_alone(open_run: Callable[..., Any], tmp_path: Path) -> None:
    stray = tmp_path / "run" / "models" / ".DS_Store"
    stray.parent.mkdir(parents=True)
    stray.write_text("x")
    with open_run():
        assert stray.exists()


def test_a_relative_model_path_starts_at_the_configuration(
    open_run: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(model_folder("qwen2_5_vl"), home / "my_model")
    with open_run(base_dir=home, model={"path": "my_model"}) as run:
        assert run.base_model() == str(home / "my_model")
        assert run.diagnose(0, run.base_model())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_model_is_stored_in_the_type_that_it_came_in(
    changed_model: Callable[..., Path], key: str, tmp_path: Path
) -> None:
    folder = changed_model("qwen2_5_vl", {"config.json": {}})
    Policy.load(str(folder), ModelSettings(dtype="bfloat16")).model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config[key] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    for _ in range(2):  # what was saved is the input of the next stage
        policy = Policy.load(str(folder), ModelSettings(dtype="float32"), trainable=True)
        assert policy.model.dtype == torch.float32
        folder = policy.save(tmp_path / "saved")
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        with safe_open(folder / "model.safetensors", framework="pt") as stored:
            assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_replay_leaves_room_for_what_is_bridged(
    load_policy: Callable[..., Policy], train_items: list[Any], images: Any, tmp_path: Path
) -> None:
    class Own:
        def __init__(self, items: list[Any]) -> None:
            self.items = items

        def __len__(self) -> int:
            return len(self.items)

        def example(self, index: int, visit: int) -> Example:
            return Example(self.items[index], (0, 1, 2)[: len(self.items[index].options)], "<answer>x</answer>")

    seen: list[str] = []
    own, others = train_items[:1], train_items[1:]
    train_sft(
        load_policy(trainable=True), Own(own), Own(others), SftSettings(steps=2, batch_size=2, replay_share=0.9),
        model=ModelSettings(), prompts=PromptSettings(answer_style="text", system=""), images=images, seed=0,
        checkpoints=tmp_path, on_start=lambda step: None, on_step=lambda step, metrics, ids: seen.extend(ids),
    )  # fmt: skip
    assert seen.count(own[0].id) == 2


def test_yaml_that_python_cannot_hold_is_an_error_like_any_other() -> None:
    minimal = "data: {sources: [{kind: brain}]}\n"
    with pytest.raises(MedbridgeError, match="month must be in"):
        parse_config(minimal + "name: 2024-13-45\n", source="x.yaml")
    with pytest.raises(MedbridgeError, match="not an index"):
        parse_config(minimal, source="x.yaml", overrides=["data.sources.²=3"])
    with pytest.raises(MedbridgeError, match=r"diagnosis\.test_split is 'tset'"):
        parse_config(minimal + "diagnosis: {test_split: tset}\n", source="x.yaml")
