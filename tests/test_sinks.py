"""Where metrics go beside the ledger: TensorBoard where it is installed, W&B where it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medbridge.config import RunSettings
from medbridge.errors import MedbridgeError
from medbridge.ledger import Stage
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.sinks import open_sinks

STAGE = Stage(3, 0, "bridge", "running", "m", None, ("side",), {}, 0.0, None, {})

STANDS_IN = '''
"""Records what the package of this name would be told."""
calls = []


class _Run:
    def __init__(self, given):
        self.given = given

    def log(self, metrics, step):
        calls.append(("log", self.given["id"], step, metrics))

    def finish(self):
        calls.append(("finish", self.given["id"]))


def init(**given):
    calls.append(("init", given))
    return _Run(given)
'''


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of that name with the three functions that are called, imported as the real one would be."""
    if find_spec("wandb") is not None:
        pytest.skip("the real one is installed")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STANDS_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    import wandb as module  # type: ignore[import-not-found]

    yield module
    del sys.modules["wandb"]


@pytest.fixture
def run(tmp_path: Path, tiny_settings: Callable[..., RunSettings], tiny_data: Path, formed: Path) -> Callable[..., Run]:
    """A run folder with a given model; keywords are laid over the tiny settings."""

    def make(**sections: Any) -> Run:
        settings = tiny_settings(**{"model": {"path": str(formed)}, **sections})
        return Run(tmp_path / "run", settings, base_dir=tiny_data, reporter=Reporter(Console(quiet=True)))

    return make


def test_auto_is_where_it_is_installed(
    tiny_settings: Callable[..., RunSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medbridge.sinks.find_spec", lambda name: None)
    assert open_sinks(tiny_settings(tensorboard="auto"), tmp_path, STAGE, first_step=1) == []
    assert open_sinks(tiny_settings(tensorboard=False), tmp_path, STAGE, first_step=1) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_has_every_metric_of_every_step(run: Callable[..., Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = run(tensorboard="auto")
    opened.train_once("bridge", ["side"])
    stored = opened.ledger.metrics(1)
    opened.close()
    events = EventAccumulator(str(opened.folder / "tensorboard" / "01-bridge")).Reload()
    assert set(events.Tags()["scalars"]) == set(stored)
    for name, points in stored.items():
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


def test_a_missing_package_is_named_before_anything_is_trained(run: Callable[..., Run]) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("it is installed")
    opened = run(wandb="project")
    with pytest.raises(MedbridgeError, match=r"wandb is 'project', and the package is not installed"):
        opened.train_once("bridge", ["side"])
    assert opened.ledger.count("metrics") == 0
    opened.close()
    again = run(wandb=None)  # may be changed
    again.train_once("bridge", None)
    again.close()


def test_wandb_is_told_every_step_and_a_resumed_stage_is_the_same_run(
    run: Callable[..., Run], wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = run(wandb="project", sft={"checkpoint_every": 2})
    log_step = opened.ledger.log_step

    def dies(stage: int, step: int, metrics: Any, ids: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        log_step(stage, step, metrics, ids)

    with monkeypatch.context() as patch:
        patch.setattr(opened.ledger, "log_step", dies)
        with pytest.raises(KeyboardInterrupt):
            opened.train_once("bridge", ["side"])
    opened.close()
    opened = run(wandb="project", sft={"checkpoint_every": 2})
    opened.train_once("bridge", None)
    stored = opened.ledger.metrics(1)
    opened.close()
    [first, *told] = wandb.calls
    assert first[1] | {"id": "", "config": {}, "dir": ""} == {
        "project": "project", "name": "tiny 01-bridge", "group": "tiny", "resume": "allow", "id": "", "config": {},
        "dir": "",
    }  # fmt: skip
    assert first[1]["config"]["sft"]["steps"] == 4 and first[1]["dir"] == str(opened.folder)
    kinds = [(call[0], call[2] if call[0] == "log" else None) for call in told]
    assert kinds == [
        ("log", 1), ("log", 2), ("log", 3), ("finish", None), ("init", None), ("log", 3), ("log", 4), ("finish", None),
    ]  # fmt: skip
    assert told[4][1]["id"] == first[1]["id"] and told[4][1]["resume"] == "allow"
    assert told[-2][3]["loss"] == dict(stored["loss"])[4] and set(told[-2][3]) == set(stored)
