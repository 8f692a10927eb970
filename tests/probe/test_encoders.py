"""Encoders on real tiny models and images: features of an image are its own, and a changed model has another key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from medbridge.data import load_image
from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings, Policy
from medbridge.probe import EncoderSettings, open_encoder
from medbridge.probe.encoders import Encoder
from medbridge.probe.networks import LITE0

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")


@pytest.fixture
def pictures(odd_pictures: list[str]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((28, 28), (56, 84))]
    return [*(load_image(path) for path in odd_pictures), *(Image.fromarray(pixels) for pixels in noise)]


@pytest.fixture
def tower(model_folder: Callable[[str], Path]) -> Callable[..., Encoder]:
    def make(architecture: str, **settings: str) -> Encoder:
        encoder = open_encoder(
            str(model_folder(architecture)), EncoderSettings.model_validate(settings), ModelSettings(device="cpu")
        )
        for name, parameter in encoder._model.named_parameters():  # type: ignore[attr-defined]
            if "mm_input_projection" in name:  # zero in a new Gemma 3
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        return encoder

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", ["before", "after"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_features_do_not_depend_on_the_other_images(
    architecture: str, layer: str, pool: str, tower: Callable[..., Encoder], pictures: list[Image.Image]
) -> None:
    encoder = tower(architecture, layer=layer, pool=pool)
    together = encoder.encode(pictures)
    alone = np.concatenate([encoder.encode([picture]) for picture in pictures])
    assert together.shape[0] == len(pictures) and together.dtype == np.float32 and np.isfinite(together).all()
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together[0], together[-1], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES[:3])
def test_behind_the_merger_are_the_features_that_the_language_model_gets(
    architecture: str, tower: Callable[..., Encoder], load_policy: Callable[..., Policy], pictures: list[Image.Image]
) -> None:
    """The mean over an image's tokens of what stands in for its placeholders."""
    policy = load_policy(architecture)
    inputs = policy.processor.image_processor(images=[[pictures[-1]]], return_tensors="pt")
    with torch.no_grad():
        found = policy.model.base_model.get_image_features(**inputs)
    tokens = torch.cat(list(found.pooler_output)).reshape(-1, policy.model.config.get_text_config().hidden_size)
    merged = policy.model.config.vision_config.spatial_merge_size**2
    assert len(tokens) == int(inputs["image_grid_thw"].prod()) // merged
    np.testing.assert_allclose(tower(architecture).encode([pictures[-1]])[0], tokens.mean(0), rtol=1e-4, atol=1e-6)


def test_keys(tower: Callable[..., Encoder], load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    keys = [
        tower("qwen2_5_vl").key, tower("qwen2_5_vl", layer="before").key, tower("qwen2_5_vl", pool="max").key,
        tower("qwen3_vl").key,
    ]  # fmt: skip
    assert len(set(keys)) == 4 and keys[0] == tower("qwen2_5_vl").key

    def saved(name: str, part: str) -> str:
        policy = load_policy("qwen2_5_vl")
        with torch.no_grad():
            changed = next(p for key, p in policy.model.named_parameters() if part in key)
            changed.view(-1)[0] += 1e-3
        folder = policy.save(tmp_path / name)
        return open_encoder(str(folder), EncoderSettings(), ModelSettings(device="cpu")).key

    assert saved("seen", "visual") not in keys
    assert saved("said", "language_model") == keys[0]  # the same tower: its features hold


def test_a_vision_only_encoder(pictures: list[Image.Image]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = open_encoder(LITE0, EncoderSettings(), ModelSettings(device="cpu"))
    together = encoder.encode(pictures[:3])
    assert together.shape == (3, 1280)
    np.testing.assert_allclose(together[1:2], encoder.encode(pictures[1:2]), rtol=1e-3, atol=1e-5)
    assert encoder.key != open_encoder(LITE0, EncoderSettings(pool="max"), ModelSettings(device="cpu")).key


def made_weights(kind: str, name: str, labels: int) -> dict[str, torch.Tensor]:
    """Of a random network with a classifier of `labels` labels."""
    torch.manual_seed(3)
    if kind == "timm":
        return dict(timm.create_model(name, pretrained=False, num_classes=labels).state_dict())
    return dict(torchvision.models.get_model(name, num_classes=labels).state_dict())


@pytest.mark.parametrize(("kind", "name"), [("torchvision", "resnet18"), ("timm", "test_vit"), ("timm", "test_resnet")])
@pytest.mark.parametrize("saved", ["safetensors", "pt", "checkpoint"])
def test_weights_of_ones_own(kind: str, name: str, saved: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    """Whatever classifier they have; a checkpoint of data-parallel training too."""
    weights = made_weights(kind, name, 7)
    file = tmp_path / f"own.{'safetensors' if saved == 'safetensors' else 'pt'}"
    if saved == "safetensors":
        save_file(weights, file)
    elif saved == "pt":
        torch.save(weights, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, file)
    encoder = open_encoder(f"{kind}:{name}@{file}", EncoderSettings(), ModelSettings(device="cpu"))
    found = encoder.encode(pictures[:3])
    assert found.shape[0] == 3 and np.isfinite(found).all() and found.std() > 0
    weights[next(iter(weights))].view(-1)[0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    beside = f"{kind}:{name}@{tmp_path / 'other.safetensors'}"
    other = open_encoder(beside, EncoderSettings(), ModelSettings(device="cpu"))
    assert other.key != encoder.key and not np.array_equal(other.encode(pictures[:3]), found)


def test_networks_pool_as_they_were_trained(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """A transformer of timm gives its class token, after its last norm; another pooling is refused."""
    weights = made_weights("timm", "test_vit", 2)
    save_file(weights, tmp_path / "w.safetensors")
    name = f"timm:test_vit@{tmp_path / 'w.safetensors'}"
    encoder = open_encoder(name, EncoderSettings(), ModelSettings(device="cpu"))
    network = timm.create_model("test_vit", pretrained=False, num_classes=2)
    network.load_state_dict(weights)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad():
        expected = network.eval().forward_features(prepare(pictures[0])[None])[:, 0]
    np.testing.assert_allclose(encoder.encode(pictures[:1]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(MedbridgeError, match="timm's networks pool as they were trained"):
        open_encoder(name, EncoderSettings(pool="max"), ModelSettings(device="cpu"))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    weights = made_weights("torchvision", "resnet18", 2)
    for name, content, message in (
        ("less.pt", {key: value for key, value in weights.items() if "layer4" not in key}, "lacks 'layer4"),
        ("shape.pt", {**weights, "conv1.weight": torch.zeros(64, 1, 7, 7)}, "shape"),
        ("code.pt", {"model": made_weights}, "holds more than tensors"),
        ("list.pt", [torch.zeros(2)], "holds a list"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(MedbridgeError, match=message):
            open_encoder(f"torchvision:resnet18@{tmp_path / name}", EncoderSettings(), ModelSettings(device="cpu"))
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.safetensors", "none.pt"):
        with pytest.raises(MedbridgeError, match="can't be read as weights"):
            open_encoder(f"torchvision:resnet18@{tmp_path / name}", EncoderSettings(), ModelSettings(device="cpu"))


@pytest.mark.parametrize("name", ["torchvision:resnet1", "timm:vit", "/no/such/folder"])
def test_what_cannot_be_loaded(name: str) -> None:
    with pytest.raises(MedbridgeError, match=r"can't be loaded|not installed"):
        open_encoder(name, EncoderSettings(), ModelSettings(device="cpu"))
