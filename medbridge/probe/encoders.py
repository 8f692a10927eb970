"""Encoders: images to features. The vision tower of a vision-language model, or a vision-only network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings, Policy, pick_device
from medbridge.probe.networks import LITE0, lite0, timm_network, torchvision_network

Floats = NDArray[np.float32]

_TOWERS = ("visual", "vision_tower", "multi_modal_projector")
"""Names of the modules that make up a vision tower and its merger."""


class EncoderSettings(BaseModel):
    """Which features of an encoder are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Literal["before", "after"] = Field(
        "after",
        description="Features of a model's vision tower: before or after the merger (projector) to the language model. "
        "Vision-only encoders have but one layer.",
    )
    pool: Literal["mean", "max"] = Field("mean", description="How the features of an image's tokens become one.")


class Encoder(Protocol):
    """Images to features.

    Attributes:
        name: as it was asked for.
        key: of the weights and of all that features depend on, hexadecimal: equal keys give equal features.
    """

    name: str
    key: str

    def encode(self, images: Sequence[Image.Image]) -> Floats:
        """Features [images, width] of RGB images."""
        ...


def open_encoder(name: str, settings: EncoderSettings, model: ModelSettings) -> Encoder:
    """The encoder of a name.

    Args:
        name: `efficientnet-lite0`, `torchvision:NAME`, `timm:NAME`, each of the last two also with a file of weights
            behind it (`torchvision:resnet50@radimagenet.pt`), or the folder or Hugging Face id of a vision-language
            model.
        settings: layer and pooling.
        model: device and compute type; its `path` is not read.

    Raises:
        MedbridgeError: it can't be loaded, or a package is missing.
    """
    device = pick_device(model.device)
    if name == LITE0:
        return _Network(name, *lite0(), settings.pool, device)
    kind, _, which = name.partition(":")
    if kind in ("torchvision", "timm") and which:
        if settings.pool == "max":
            raise MedbridgeError(f"encoder {name}: {kind}'s networks pool as they were trained. Leave pool at mean.")
        parts = torchvision_network(which) if kind == "torchvision" else timm_network(which)
        return _Network(name, *parts, settings.pool, device)
    try:
        return _Tower(name, Policy.load(name, model), settings)
    except MedbridgeError as error:
        if Path(name).is_dir():
            raise
        known = f"{LITE0}, torchvision:NAME, timm:NAME, or the folder or Hugging Face id of a vision-language model"
        raise MedbridgeError(f"encoder {name!r}: {error} Known encoders are {known}.") from error


class _Tower:
    """The vision tower of a vision-language model.

    Every image is pooled over its own tokens: as many as its grid has before the merger, and a merge-size squared fewer
    behind it. Qwen2.5-VL reorders tokens by windows, but within an image.
    """

    def __init__(self, name: str, policy: Policy, settings: EncoderSettings) -> None:
        self.name = name
        self._policy = policy
        self._settings = settings
        self._model = policy.model.base_model
        if not hasattr(self._model, "get_image_features"):
            raise MedbridgeError(
                f"{name}: no vision tower is known of a {type(self._model).__name__}. Name a Qwen2-VL, Qwen2.5-VL, "
                "Qwen3-VL or Gemma 3 model, or a vision-only encoder."
            )
        towers = [module for module_name, module in policy.model.named_modules() if _is_tower(module_name)]
        if not towers:
            raise MedbridgeError(
                f"{name}: no module of it is called {' or '.join(_TOWERS)}, so that its tower is not known."
            )
        shown = [str(policy.processor.image_processor.to_dict()), str(policy.model.config.vision_config.to_dict())]
        self.key = _fingerprint(
            towers, [*shown, settings.layer, settings.pool, str(policy.compute_dtype), version("transformers")]
        )

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Floats:
        inputs = self._policy.processor.image_processor(images=[[image] for image in images], return_tensors="pt")
        vision = {key: value.to(self._policy.device) for key, value in inputs.items() if isinstance(value, Tensor)}
        grid = vision.get("image_grid_thw")
        kept = {"image_grid_thw": grid} if grid is not None else {}
        pixels = vision["pixel_values"].to(next(self._policy.model.parameters()).dtype)
        found = self._model.get_image_features(pixel_values=pixels, **kept)
        if self._settings.layer == "after":
            tokens = list(found.pooler_output)
        elif grid is not None:
            tokens = list(found.last_hidden_state.split(grid.prod(-1).tolist()))
        else:
            tokens = list(found.last_hidden_state)
        if len(tokens) != len(images):
            raise MedbridgeError(f"{self.name}: its tower gives features of {len(tokens)} images for {len(images)}.")
        pooled = [(each.float().mean(0) if self._settings.pool == "mean" else each.float().amax(0)) for each in tokens]
        return torch.stack(pooled).cpu().numpy()


class _Network:
    """A vision-only network that gives feature maps [images, channels, height, width] or features [images, width]."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        run: Callable[[Tensor], Tensor],
        prepare: Callable[[Image.Image], Tensor],
        pool: str,
        device: torch.device,
    ) -> None:
        self.name = name
        network.eval().to(device)
        self._run, self._prepare, self._pool, self._device = run, prepare, pool, device
        probe_image = Image.new("RGB", (7, 5), (10, 200, 90))
        shown = hashlib.blake2b(prepare(probe_image).numpy().tobytes(), digest_size=8).hexdigest()  # of the preparation
        self.key = _fingerprint([network], [name, pool, shown])

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Floats:
        maps = self._run(torch.stack([self._prepare(image) for image in images]).to(self._device)).float()
        if maps.ndim == 4:
            maps = maps.mean((2, 3)) if self._pool == "mean" else maps.amax((2, 3))
        return maps.cpu().numpy()


def _is_tower(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _TOWERS


def _fingerprint(modules: Sequence[nn.Module], words: Sequence[str]) -> str:
    """Of weights and words."""
    digest = hashlib.blake2b("\0".join(words).encode(), digest_size=16)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
