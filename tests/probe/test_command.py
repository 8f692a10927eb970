"""`medbridge probe`: on a tiny model from the command line, and EfficientNet-Lite0 on SLAKE's images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medbridge.cli import app
from medbridge.data import DataSettings, SourceSettings, open_items
from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings
from medbridge.probe import EncoderSettings, FeatureStore, ProbeSettings, open_encoder, probe
from medbridge.probe.networks import LITE0


def test_a_tiny_model(
    model_folder: Callable[[str], Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for file in data.glob("*.jsonl"):  # one of two questions about each image
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["tags"]["task"] == "shade"))
    command = [
        "probe",
        "--encoder",
        str(model_folder("qwen2_5_vl")),
        "--data",
        f"jsonl:{data}",
        "--target",
        "answer",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "linear" in shown.output and "kNN" in shown.output
    [store] = (tmp_path / "medbridge" / "features").glob("*.sqlite")
    written = store.stat().st_mtime_ns
    told = CliRunner().invoke(app, [*command, "--json", "--out", str(tmp_path / "out.json")])
    [found] = json.loads(told.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())[0]
    assert found["test"] == 6 and len(found["classes"]) > 1 and found["confidence"] == 0.9
    assert store.stat().st_mtime_ns == written  # nothing was encoded again
    for wrong, message in (
        (["--layer", "between"], "--layer is 'between'; valid are: 'before' or 'after'"),
        (["--target", "organ"], "0 images with one value of the tag 'organ'"),
    ):
        refused = CliRunner().invoke(app, [*command[:5], *wrong])
        assert isinstance(refused.exception, MedbridgeError) and message in str(refused.exception)


@pytest.mark.slow
def test_efficientnet_on_slake(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = real_data / "slake"
    data = DataSettings(sources=[SourceSettings(kind="slake", path=str(folder))], on_bad="skip")
    items = open_items(data, base_dir=folder, cache_dir=tmp_path).items
    encoder, store = open_encoder(LITE0, EncoderSettings(), ModelSettings(device="cpu")), FeatureStore(tmp_path)
    found = {
        target: probe(lambda files: store.features(encoder, files), items, target, ProbeSettings(replicates=200))
        for target in ("modality", "location")
    }
    assert (found["modality"].train, found["modality"].validation, found["modality"].test) == (450, 96, 96)
    assert found["modality"].linear.accuracy.value >= 0.98 > found["modality"].commonest[1]
    assert found["location"].linear.accuracy.value >= 0.85 > found["location"].commonest[1]
