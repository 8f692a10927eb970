"""Arrays of pixels written as PNG files of the cache, once each, under the hash of what they show."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from medbridge.files import replace_file


def pixel_hash(pixels: np.ndarray) -> str:
    """SHA-256 over shape and bytes, 32 letters of it. pixels: uint8 [height, width] or [height, width, 3]."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:32]


def keep_png(pixels: np.ndarray, folder: Path) -> str:
    """Write the image below `folder` unless it is there; its path. Raises MedbridgeError if that can't be done."""
    digest = pixel_hash(pixels)
    path = folder / digest[:2] / f"{digest}.png"
    if not path.is_file():
        picture = Image.fromarray(pixels)
        replace_file(path, lambda stream: picture.save(stream, format="PNG", compress_level=1))
    return str(path)


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` to `high` as 0 to 255, uint8; what is no number is black."""
    scaled = (np.nan_to_num(values.astype(np.float32), nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-30)
    return np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
