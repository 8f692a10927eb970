"""Exports are ordinary Hugging Face folders: transformers and PEFT load them; they say what the run's model says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from medbridge.config import RunSettings
from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.errors import MedbridgeError
from medbridge.export import export_model
from medbridge.model import ModelSettings, Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter

PROMPT = PromptSettings(answer_style="text", system="")


@pytest.fixture(scope="module")
def make_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Callable[..., RunSettings], tiny_data: Path
) -> Iterator[Callable[..., Run]]:
    """A run that bridged one stratum for three steps; keywords are laid over the tiny settings."""
    opened: list[Run] = []

    def make(**sections: Any) -> Run:
        folder = tmp_path_factory.mktemp("run") / "run"
        settings = tiny_settings(**{**sections, "sft": {"steps": 3, "warmup_steps": 1, "learning_rate": 5e-3}})
        run = Run(folder, settings, base_dir=tiny_data, reporter=Reporter(Console(quiet=True)))
        run.train_once("bridge", ["side"])
        opened.append(run)
        return run

    yield make
    for run in opened:
        run.close()


@pytest.fixture(scope="module")
def whole(make_run: Callable[..., Run], formed: Path) -> Run:
    """A run that trained all weights of a given model."""
    return make_run(model={"path": str(formed)})


@pytest.fixture(scope="module")
def adapted(make_run: Callable[..., Run], formed: Path) -> Run:
    """A run that trained adapters on a given model."""
    return make_run(model={"path": str(formed), "lora": {"rank": 4, "rank_stabilised": True}})


@pytest.fixture(scope="module")
def tied(make_run: Callable[..., Run], formed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that trained a model whose output layer is its embedding."""
    policy = Policy.load(str(formed), ModelSettings())
    model: Any = policy.model
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return make_run(model={"path": str(policy.save(tmp_path_factory.mktemp("tied") / "model"))})


@torch.no_grad()
def logits(model: Any, item: Item, images: ImageCache, processor: Any) -> torch.Tensor:
    """What transformers alone makes of an item's question."""
    content = [{"type": "image"} for _ in item.images] + [{"type": "text", "text": item.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(text=[text], images=[images.get(path) for path in item.images], return_tensors="pt")
    found: torch.Tensor = model(**given).logits.float()
    return found


def loaded(folder: Path | str, **options: Any) -> tuple[Any, Any]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["whole", "adapted", "tied"])
def test_an_export_says_what_the_runs_model_says(
    kind: str, request: pytest.FixtureRequest, train_items: list[Item], images: ImageCache, tmp_path: Path
) -> None:
    run: Run = request.getfixturevalue(kind)
    found = export_model(run.folder, tmp_path / "out")
    assert (found.model, found.dtype) == ("models/01-bridge", "float32")
    model, processor = loaded(found.out)
    own, _ = loaded(run.folder / found.model)
    base, _ = loaded(run.settings.model.path or "")
    item = train_items[0]
    said = logits(model, item, images, processor)
    assert torch.equal(said, logits(own, item, images, processor))
    assert not torch.equal(said, logits(base, item, images, processor))  # it was trained
    assert processor.chat_template and (found.out / "generation_config.json").is_file()
    is_tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert is_tied == (kind == "tied")
    policy = Policy.load(str(found.out), ModelSettings())  # and medbridge itself can go on from it
    assert policy.encode(item, [permutation(item, 0, 0)], PROMPT, images)


@pytest.mark.parametrize("kind", ["whole", "tied"])
def test_an_export_in_another_type(
    kind: str, request: pytest.FixtureRequest, train_items: list[Item], images: ImageCache, tmp_path: Path
) -> None:
    run: Run = request.getfixturevalue(kind)
    found = export_model(run.folder, tmp_path / "half", dtype="bfloat16")
    assert found.dtype == "bfloat16"
    stored: dict[str, tuple[Any, int]] = {}
    for file in found.out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: (t.dtype, t.numel()) for name in tensors.keys() for t in [tensors.get_tensor(name)]}  # noqa: SIM118
    assert {dtype for dtype, _ in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) == (kind != "tied")
    assert json.loads((found.out / "config.json").read_text())["dtype"] == "bfloat16"
    half, processor = loaded(found.out, dtype="auto")
    own, _ = loaded(run.folder / "models" / "01-bridge")
    for name, weight in own.named_parameters():
        assert torch.equal(half.get_parameter(name), weight.to(torch.bfloat16)), name
    assert torch.isfinite(logits(half, train_items[0], images, processor)).all()


def test_adapters_alone_are_what_peft_loads(
    adapted: Run, train_items: list[Item], images: ImageCache, tmp_path: Path
) -> None:
    found = export_model(adapted.folder, tmp_path / "adapter", adapter=True)
    config = json.loads((found.out / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["base_model_name_or_path"] == adapted.settings.model.path
    base, processor = loaded(config["base_model_name_or_path"])
    merged, _ = loaded(adapted.folder / "models" / "01-bridge")
    item = train_items[0]
    before = logits(base, item, images, processor)
    after = logits(PeftModel.from_pretrained(base, found.out).eval(), item, images, processor)
    expected = logits(merged, item, images, processor)
    assert (before - expected).abs().max() > 1e-2
    assert (after - expected).abs().max() < 1e-4


def test_base_best_and_stages_are_found_by_name(whole: Run, tmp_path: Path) -> None:
    folder = whole.folder
    assert export_model(folder, tmp_path / "base", model="base").model == whole.settings.model.path
    for name in ("1", "01-bridge", "models/01-bridge", "last"):
        assert export_model(folder, tmp_path / name.replace("/", "-"), model=name).model == "models/01-bridge"
    with pytest.raises(MedbridgeError, match="no model has been diagnosed"):
        export_model(folder, tmp_path / "best", model="best")
    with pytest.raises(MedbridgeError, match=r"no stage '7' has made a model.*one of: 01-bridge"):
        export_model(folder, tmp_path / "seven", model="7")
    with pytest.raises(MedbridgeError, match=r"has no adapters beside it"):
        export_model(folder, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "seven").exists() and not (tmp_path / "adapter").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_best_is_the_one_with_the_highest_accuracy(whole: Run, tmp_path: Path) -> None:
    whole.diagnose(1, "models/01-bridge")
    assert export_model(whole.folder, tmp_path / "best", model="best").model == "models/01-bridge"


def test_nothing_is_written_over(whole: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(MedbridgeError, match="not an empty folder"):
            export_model(whole.folder, tmp_path / name)
    assert (tmp_path / "folder" / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export_model(whole.folder, tmp_path / "empty").out.joinpath("config.json").is_file()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"no such run database"):
        export_model(tmp_path, tmp_path / "out")
