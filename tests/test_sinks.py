"""Where metrics go beside the ledger: TensorBoard where it is installed, W&B where it is asked for."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import interrupted

from medbridge.config import RunSettings
from medbridge.errors import MedbridgeError
from medbridge.ledger import Stage
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.sinks import open_sinks

STAGE = Stage(3, 0, "bridge", "running", "m", None, ("side",), {}, 0.0, None, {})


def wandb_records(path: Path) -> list[Any]:
    """Of an offline run's file: a log of protobufs, each behind its checksum, length and kind (1 is a whole one)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found = path.read_bytes(), 7, []
    while at < len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1
        found.append(Record.FromString(data[at + 7 : at + 7 + length]))
        at += 7 + length
    return found


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
    assert open_sinks(tiny_settings(tensorboard="auto"), tmp_path, STAGE, first_step=1, say=print) == []
    assert open_sinks(tiny_settings(tensorboard=False), tmp_path, STAGE, first_step=1, say=print) == []
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


def test_a_missing_package_is_named_before_anything_is_trained(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = run(wandb="project")
    with monkeypatch.context() as patch:
        patch.setattr("medbridge.sinks.find_spec", lambda name: None)
        with pytest.raises(MedbridgeError, match=r"wandb is 'project', and the package is not installed"):
            opened.train_once("bridge", ["side"])
    assert opened.ledger.count("metrics") == 0
    opened.close()
    again = run(wandb=None)  # may be changed
    again.train_once("bridge", None)
    again.close()


@pytest.mark.skipif(find_spec("wandb") is None, reason="W&B is not installed")
def test_wandb_has_every_metric_of_every_step_and_a_resumed_stage_is_the_same_run(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # W&B advertises another product where it is imported
    opened = run(wandb="project", sft={"checkpoint_every": 2})
    interrupted(opened, 4, lambda: opened.train_once("bridge", ["side"]))
    opened.close()
    opened = run(wandb="project", sft={"checkpoint_every": 2})
    opened.train_once("bridge", None)
    stored = opened.ledger.metrics(1)
    opened.close()
    assert "wandb" not in capfd.readouterr().err  # nothing goes between the lines of the live table
    files = sorted((opened.folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    steps, ids = [], set()
    for file in files:
        records = wandb_records(file)
        [begun] = [record.run for record in records if record.HasField("run")]
        assert (begun.project, begun.run_group, begun.display_name) == ("project", "tiny", "tiny 01-bridge")
        [sft] = [entry.value_json for entry in begun.config.update if entry.key == "sft"]
        assert json.loads(sft)["steps"] == 4
        ids.add(begun.run_id)
        for record in records:
            if record.HasField("history"):
                values = {"/".join(entry.nested_key): json.loads(entry.value_json) for entry in record.history.item}
                metrics = {name: value for name, value in values.items() if not name.startswith("_")}
                steps.append(record.history.step.num)
                if len(files) == 1 or file == files[1]:
                    assert metrics == {name: dict(points)[steps[-1]] for name, points in stored.items()}
    assert len(files) == 2 and len(ids) == 1
    assert steps == [1, 2, 3, 3, 4]
