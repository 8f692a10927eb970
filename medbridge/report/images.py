"""Images as small data: URIs within a budget of bytes. Reading image files is `medbridge.data`'s work."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from medbridge.data.images import load_image
from medbridge.errors import MedbridgeError

LONGEST_SIDE = 224
"""Pixels of an embedded image's longer side at most."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image to show, or, with an empty `uri`, a note that says why there is none."""

    name: str
    uri: str
    width: int
    height: int
    note: str


class Embedder:
    """Turns image files into `Picture`s until `budget` bytes of URIs are used up.

    Attributes:
        left: bytes that are left.
        full: an image did not fit, so that others of its kind won't either.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.full = False

    def embed(self, path: str) -> Picture:
        """The image at `path`, made small, or a note where it can't be read or kept."""
        name = Path(path).name
        try:
            image = load_image(path)
        except (MedbridgeError, OSError, ValueError) as error:
            reason = (
                "The image file is missing."
                if not _exists(path)
                else f"The image can't be read: {str(error).replace(path, name)}"
            )
            return Picture(name, "", 0, 0, reason)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        kind, content = _smaller(_without_colour(image))
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
        if len(uri) > self.left:
            self.full = True
            return Picture(name, "", 0, 0, "Left out to keep this file small.")
        self.left -= len(uri)
        return Picture(name, uri, image.width, image.height, "")


def _exists(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long a name, or one with a null character
        return False


def _without_colour(image: Image.Image) -> Image.Image:
    """A grey image as one channel, which is what most medical images are."""
    red, green, blue = image.convert("RGB").split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image.convert("RGB")


def _smaller(image: Image.Image) -> tuple[str, bytes]:
    """PNG where it costs little more than JPEG, since it shows every grey level as it is."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=85)
    if png.tell() <= 1.5 * jpeg.tell():
        return "png", png.getvalue()
    return "jpeg", jpeg.getvalue()
