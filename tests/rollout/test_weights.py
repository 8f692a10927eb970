"""Weights on their way: what `save_pretrained` would write, merged without touching the model, whole or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from medbridge.errors import MedbridgeError
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.rollout import scratch, weights
from medbridge.rollout.weights import INDEX, Weights, check_folder
from medbridge.train import OptimizerSettings
from medbridge.train.optimization import Trainable

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of /dev/shm, which must be empty in the end."""
    place = tmp_path / "memory"
    place.mkdir()
    monkeypatch.setattr(scratch, "MEMORY", place)
    yield place


@pytest.fixture
def tied_folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model whose output layer is its embedding."""

    def make(architecture: str) -> Path:
        source = model_folder(architecture)
        config = AutoConfig.from_pretrained(source)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        model = AutoModelForImageTextToText.from_pretrained(source, config=config)
        model.tie_weights()
        model.save_pretrained(tmp_path / "tied")
        AutoProcessor.from_pretrained(source).save_pretrained(tmp_path / "tied")
        return tmp_path / "tied"

    return make


def adapt(policy: Policy) -> Trainable:
    """Adapters that say something, on a policy."""
    trainable = Trainable(policy, ModelSettings(lora=LoraSettings(rank=3)), OptimizerSettings(), 1, seed=0)
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainable


def read(folder: Path, version: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in check_folder(folder, version):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_holds_what_save_pretrained_writes(
    architecture: str,
    tied: bool,
    model_folder: Callable[[str], Path],
    tied_folder: Callable[[str], Path],
    load_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    policy = load_policy(path=tied_folder(architecture) if tied else model_folder(architecture), trainable=True)
    held = Weights(policy, 7, tmp_path)
    written = read(held.folder(), 7)
    assert_same(written, load_file(policy.save(tmp_path / "saved") / "model.safetensors"))
    assert any("lm_head" in name for name in written) != tied
    assert held.nbytes() == sum(tensor.nbytes for tensor in written.values())
    loaded, info = AutoModelForImageTextToText.from_pretrained(held.folder(), dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(dict(loaded.state_dict()), dict(policy.model.state_dict()))
    held.release()


def test_float32_masters_are_cast_and_the_folder_says_so(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = load_policy(trainable=True, dtype="bfloat16")
    assert next(policy.model.parameters()).dtype == torch.float32
    held = Weights(policy, 1, tmp_path)
    written = read(held.folder(), 1)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(held.folder(), dtype="auto").dtype == torch.bfloat16
    assert policy.model.config.dtype == torch.float32 == next(policy.model.parameters()).dtype


def test_one_folder_until_it_is_released(load_policy: Callable[..., Policy], memory: Path, tmp_path: Path) -> None:
    held = Weights(load_policy(trainable=True), 1, tmp_path)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(held.folder())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(list(memory.iterdir())) == 1
    held.release()
    assert list(memory.iterdir()) == []
    held.release()
    assert read(held.folder(), 1)


def test_large_models_are_written_in_parts(
    load_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SHARD_BYTES", 100_000)
    policy = load_policy(trainable=True)
    held = Weights(policy, 1, tmp_path)
    files = check_folder(held.folder(), 1)
    assert len(files) > 5
    assert sorted(file.name for file in held.folder().glob("*.safetensors")) == [file.name for file in files]
    assert_same(read(held.folder(), 1), load_file(policy.save(tmp_path / "saved") / "model.safetensors"))
    assert AutoModelForImageTextToText.from_pretrained(held.folder()) is not None


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_are_merged_on_the_way_and_not_in_the_model(
    architecture: str, load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = load_policy(architecture, trainable=True, lora=LoraSettings(rank=3))
    plain = dict(Weights(policy, 0, tmp_path).tensors())
    trainable = adapt(policy)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    held = Weights(policy, 1, tmp_path)
    assert held.adapted
    merged, base = read(held.folder(), 1), read(held.base_folder(), 1)
    assert_same(dict(policy.model.state_dict()), before)
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert_same(base, plain)
    trainable.finish()
    after = load_file(policy.save(tmp_path / "saved") / "model.safetensors")
    assert merged.keys() == after.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, after[name], atol=1e-6, rtol=1e-5)
    assert sum(not torch.equal(merged[name], base[name]) for name in merged) == 14  # seven matrices in two layers


def test_adapters_alone_are_what_peft_loads(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    from peft import PeftModel

    policy = load_policy(trainable=True, lora=LoraSettings(rank=3))
    adapt(policy)
    held = Weights(policy, 1, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = policy.model.eval()(ids).logits
        fresh = load_policy().model
        assert not torch.allclose(fresh(ids).logits, expected, atol=1e-2)
        found = PeftModel.from_pretrained(fresh, held.adapter_folder())(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(MedbridgeError, match="no adapters"):
        Weights(load_policy(), 1, tmp_path).adapter_folder()


def test_the_base_is_told_from_another(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = load_policy(trainable=True, lora=LoraSettings(rank=3))
    start = Weights(policy, 0, tmp_path).base()
    trainable = adapt(policy)
    assert Weights(policy, 1, tmp_path).base() == start
    trainable.finish()
    assert Weights(policy, 2, tmp_path).base() != start
    assert Weights(load_policy(), 0, tmp_path).base() == start


# -- what may go wrong ---------------------------------------------------------------------------------------------


def tear(folder: Path, how: str) -> None:
    file = next(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    tensors = load_file(file)
    if how == "no index":
        (folder / INDEX).unlink()
    elif how == "half an index":
        (folder / INDEX).write_text(json.dumps(index)[:-40])
    elif how == "no file":
        file.unlink()
    elif how == "cut":
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 8)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "lacks one":
        save_file({name: tensor for name, tensor in tensors.items() if "k_proj.weight" not in name}, file)
    elif how == "has one more":
        save_file(tensors | {"another.weight": torch.zeros(2)}, file)
    elif how == "no version":
        (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))


@pytest.mark.parametrize(
    "how", ["no index", "half an index", "no file", "cut", "empty", "lacks one", "has one more", "no version"]
)
def test_a_torn_folder_is_refused(how: str, load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    held = Weights(load_policy(trainable=True), 3, tmp_path)
    assert check_folder(held.folder(), 3)
    tear(held.folder(), how)
    with pytest.raises(MedbridgeError, match=r"version 3 are torn: .*Nothing was loaded"):
        check_folder(held.folder(), 3)


def test_another_version_is_refused(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    held = Weights(load_policy(trainable=True), 3, tmp_path)
    with pytest.raises(MedbridgeError, match="version 3, and version 4 was"):
        check_folder(held.folder(), 4)


def test_a_disk_that_fills_up_ends_cleanly(model_folder: Callable[[str], Path], memory: Path, tmp_path: Path) -> None:
    """Real failing writes: the process may write no file of more than 100 kB. The space was measured before."""
    script = """
import resource, sys
from pathlib import Path
from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings, Policy
from medbridge.rollout import scratch
from medbridge.rollout.weights import Weights
scratch.MEMORY = Path(sys.argv[2])
held = Weights(Policy.load(sys.argv[1], ModelSettings(), trainable=True), 1, Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    held.folder()
except MedbridgeError as error:
    print(error)
left = list(Path(sys.argv[2]).iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(left, held.folder().is_dir())  # and it can go on once there is room
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model_folder("qwen2_5_vl")), str(memory)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    message, left = done.stdout.strip().splitlines()[-2:]
    assert "weights of version 1 can't be written" in message and "Free some space" in message
    assert left == "[] True"
    assert list(memory.iterdir()) == []


def test_no_room_is_said_before_anything_is_written(
    load_policy: Callable[..., Policy], memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Weights(load_policy(trainable=True), 1, tmp_path / "run")
    monkeypatch.setattr(Weights, "nbytes", lambda self: 10**18)
    with pytest.raises(MedbridgeError, match="there is no room"):
        held.folder()
    assert list(memory.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_an_error_with_its_name(
    load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MedbridgeError, match="file/run"):
        Weights(load_policy(trainable=True), 1, tmp_path / "file" / "run").folder()


def test_weights_that_are_trained_on_are_read_from_what_was_written(
    load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """An engine that is started anew in the middle of a step must not get half a step's weights under an old number."""
    weights = Weights(load_policy(), 3, tmp_path)
    before = read(weights.folder(), 3)
    weights.train_on()
    with torch.no_grad():
        for parameter in weights.policy.model.parameters():
            parameter.add_(1.0)
    assert_same(read(weights.folder(), 3), before)
    with pytest.raises(MedbridgeError, match="version 3, which are being trained on"):
        list(weights.tensors())
    unwritten = Weights(weights.policy, 4, tmp_path)
    unwritten.train_on()
    with pytest.raises(MedbridgeError, match="version 4, which are being trained on"):
        unwritten.folder()
    weights.release()
