"""Sizes of a vision-language model that families name differently, read off transformers' configuration of it.

What they cost is not told here: memory stands in `train/activations`, operations in `train/flops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def head_width(text: Any) -> int:
    """Channels of an attention head, of the text model's configuration."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def vision_depth(vision: Any) -> int:
    """Layers of the vision tower, of its configuration."""
    return int(getattr(vision, "depth", None) or vision.num_hidden_layers)


def vision_width(vision: Any) -> int:
    """Channels of the vision tower's layers, of its configuration."""
    return int(getattr(vision, "embed_dim", None) or vision.hidden_size)  # Qwen2-VL's hidden_size is the text's


def patches_of_frames(vision: Any, given: Mapping[str, Any]) -> list[int]:
    """How many patches each image, or each frame of a video, has before they are merged to tokens.

    Args:
        vision: configuration of the vision tower.
        given: the processor's tensors: `pixel_values` [patches, values] with `image_grid_thw` [images, 3], or
            `pixel_values` [images, channels, height, width]; none of them where there are no images.
    """
    pixels: Tensor | None = given.get("pixel_values")
    if pixels is None:
        return []
    if pixels.ndim == 2:
        return [height * across for frames, height, across in given["image_grid_thw"].tolist() for _ in range(frames)]
    return [(vision.image_size // vision.patch_size) ** 2] * len(pixels)
