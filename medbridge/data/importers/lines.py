"""Files of one JSON object a line, and values of such rows as text. What the keys mean is the importers' business."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from medbridge.errors import MedbridgeError

MAX_LINE_BYTES = 16 * 2**20
"""Longest line that is read: a line break missing from a large file must not fill the memory."""


def _open(file: Path) -> IO[bytes]:
    return file.open("rb")


def numbered_lines(
    file: Path, *, longest: int = MAX_LINE_BYTES, opener: Callable[[Path], IO[bytes]] = _open
) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1.

    Raises:
        MedbridgeError: the file can't be read, or a line has more than `longest` bytes.
    """
    try:
        with opener(file) as stream:
            number = 0
            while raw := stream.readline(longest + 1):
                number += 1
                if len(raw) > longest:
                    raise MedbridgeError(
                        f"{file}:{number}: a line of more than {longest} bytes. "
                        "Write one JSON object a line, images as file names."
                    )
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise MedbridgeError(f"{file}: can't be read ({error.strerror or error}).") from error


def parse_row(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line; MedbridgeError says what else it is."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MedbridgeError(f"not UTF-8 text (byte {error.start + 1}); save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise MedbridgeError(f"not valid JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise MedbridgeError(f"not valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise MedbridgeError(f"a JSON object is needed, this line holds a {type(row).__name__}.")
    return row


def plain_text(value: Any) -> str | None:
    """A JSON text or number as stripped text; None for anything else."""
    if isinstance(value, str):
        # A lone surrogate can be neither shown nor stored.
        return value.encode("utf-8", "replace").decode("utf-8").strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None


def shown(value: Any) -> str:
    """Any value, cut short, as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
