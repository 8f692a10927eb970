"""An exported model in real vLLM: it says there what it says in transformers, and not what its base model said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from medbridge.config import RunSettings
from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.export import export_model
from medbridge.model import ModelSettings, Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.rollout.verify import verify

if TYPE_CHECKING:
    from medbridge.rollout.vllm.engine import VllmEngine

PROMPT = PromptSettings(answer_style="text", system="")


@pytest.fixture(scope="module")
def exported(
    tied_folder: Path,
    tiny_settings: Callable[..., RunSettings],
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model with one matrix for embedding and output layer, bridged with adapters, and exported with them merged."""
    folder = tmp_path_factory.mktemp("exported")
    model: dict[str, Any] = {"path": str(tied_folder), "lora": {"rank": 4}}
    settings = tiny_settings(model=model, sft={"steps": 8, "learning_rate": 1e-2, "warmup_steps": 0})
    run = Run(folder / "run", settings, base_dir=tiny_data, reporter=Reporter(Console(quiet=True)))
    run.train_once("bridge", ["side", "shade"])
    run.close()
    return export_model(folder / "run", folder / "out", dtype="float32").out


def test_an_exported_model_says_in_vllm_what_it_says_here(
    exported: Path,
    tied_folder: Path,
    start_engine: Callable[..., VllmEngine],
    train_items: list[Item],
    images: ImageCache,
) -> None:
    engine = start_engine(exported)
    asked: dict[str, Any] = {"dtype": torch.float32, "version": 0, "seed": 0}
    policy = Policy.load(str(exported), ModelSettings())
    found = verify(engine, policy, train_items, PROMPT, images, **asked)
    assert found.mean < 1e-4 and found.tokens > 20
    base = Policy.load(str(tied_folder), ModelSettings())
    with pytest.raises(MedbridgeError):  # so the comparison can tell
        verify(engine, base, train_items, PROMPT, images, **asked)
