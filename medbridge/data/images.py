"""Image files: where they may lie, whether they are whole, and their pixels in RGB; not what they show."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from medbridge.errors import MedbridgeError

MAX_PIXELS = 89_478_485
"""Largest image, in pixels: Pillow's own bound, 256 MiB as RGB. A larger one counts as a bomb."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
"""File formats that are read. Pillow knows more, but for one of them (EPS) it starts another program."""

ImageCheck = Literal["exists", "header", "decode"]


def load_image(path: str | Path) -> Image.Image:
    """The whole image in RGB (8 bits a channel), upright as its EXIF orientation says, first frame of many.

    16-bit, 32-bit and float images are stretched from their own least to their own greatest value;
    transparent parts are laid on black. Raises MedbridgeError naming the file if it is missing, broken, cut
    short, in an unknown format or larger than MAX_PIXELS.
    """
    with _opened(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def check_image(path: str | Path, how: ImageCheck) -> None:
    """Raise MedbridgeError unless the file exists, has an image's header, or decodes, as `how` says."""
    if how == "exists":
        if not os.path.isfile(path):
            raise MedbridgeError(f"{path}: no such image file.")
    elif how == "header":
        with _opened(path):
            pass
    else:
        load_image(path)


def resolve_image(root: Path, name: str) -> str:
    """Absolute path of the image `name` of the data folder `root`.

    Raises MedbridgeError for a path that is absolute or leaves the folder, by `..` or through a link, and for
    a missing file.
    """
    problem = None
    if not name.strip() or "\x00" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        problem = "is not a file name"
    elif "://" in name:
        problem = "is an address; images are read from files only"
    elif PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or PureWindowsPath(name).root:
        problem = "is absolute"
    elif ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        problem = "leaves the data folder"
    if problem:
        raise MedbridgeError(f"the image path {name!r} {problem}; write it relative to {root} (or set `image_root`).")
    path = os.path.join(os.path.realpath(root), name)
    try:
        real = os.path.realpath(path)
    except OSError as error:
        raise MedbridgeError(f"the image path {name!r} can't be followed ({error}).") from error
    if not real.startswith(os.path.join(os.path.realpath(root), "")):
        raise MedbridgeError(
            f"the image path {name!r} is a link that leaves the data folder {root}; copy the file into the "
            "folder (or set `image_root`)."
        )
    if not os.path.isfile(real):
        raise MedbridgeError(f"the image {name!r} is missing: there is no file {path}.")
    return path


class ImageCache:
    """Decoded images up to a number of bytes; the least recently used go first. Safe to share by threads.

    The images it returns are shared: copy one before changing it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> Image.Image:
        """The image as `load_image` gives it, read from its file only if it is not held."""
        with self._lock:
            held = self._images.get(path)
            if held is not None:
                self._images.move_to_end(path)
                return held
        image = load_image(path)
        with self._lock:
            if path not in self._images and _size(image) <= self._max_bytes:
                self._images[path] = image
                self._bytes += _size(image)
                while self._bytes > self._max_bytes:
                    _, dropped = self._images.popitem(last=False)
                    self._bytes -= _size(dropped)
            return self._images.get(path, image)

    def __len__(self) -> int:
        return len(self._images)


def _size(image: Image.Image) -> int:
    return 3 * image.width * image.height


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The opened file with its header read; every error of Pillow, also in the block, as MedbridgeError."""
    try:
        with warnings.catch_warnings():
            # The bound on the size is our own; Pillow's warning about it would come first.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise MedbridgeError(
                        f"{path}: {image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are "
                        "read. Scale the image down."
                    )
                yield image
    except FileNotFoundError as error:
        raise MedbridgeError(f"{path}: no such image file.") from error
    except MedbridgeError:
        raise
    # Pillow's readers raise nearly anything on a broken file: OSError, ValueError, SyntaxError, struct.error,
    # ...
    except Exception as error:
        raise MedbridgeError(
            f"{path}: not a readable image ({str(error) or type(error).__name__}). Replace or remove the file."
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-300)
        return Image.fromarray(np.round(scaled * 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")
