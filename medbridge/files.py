"""Single files that appear whole or not at all; `data.folder` does the same for folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from medbridge.errors import MedbridgeError


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file through a temporary one beside it, so that no reader sees half of it; anybody may read it (0644).

    Folders on the way are made. What was there is replaced, and stays if `write` raises. Raises MedbridgeError where
    the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                write(stream)
                os.fchmod(stream.fileno(), 0o644)  # mkstemp's files are their owner's only
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
    except OSError as error:
        cure = "Name a file in a folder you may write to."
        raise MedbridgeError(f"{path}: can't be written ({error}). {cure}") from error


def replace_text(path: Path, content: str) -> None:
    """`replace_file` with `content` in UTF-8."""
    replace_file(path, lambda stream: stream.write(content.encode("utf-8")))
