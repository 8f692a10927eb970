"""Features that were computed before: one SQLite file for each encoder key. What they mean is not known here."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medbridge.data.images import load_image
from medbridge.errors import MedbridgeError
from medbridge.probe.encoders import Encoder

Floats = NDArray[np.float32]

_BATCH = 16
"""Images that are decoded and encoded at once; they are stored together."""


class FeatureStore:
    """Features by the content of image files, under `folder`. Killed at any moment, it keeps what it had finished."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self._folder = folder
        self._say = say

    def features(
        self, encoder: Encoder, files: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> Floats:
        """Features [files, width], of each file once; `progress(done, total)` counts files.

        Raises:
            MedbridgeError: a file is missing or no image.
        """
        hashes = [_content_hash(file) for file in files]
        with contextlib.closing(self._open(encoder.key)) as database:
            known = _read(database, hashes)
            missing = list({h: f for h, f in zip(hashes, files, strict=True) if h not in known}.items())
            done = len(files) - len(missing)
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                rows = encoder.encode([load_image(file) for _, file in batch])
                fresh = {h: np.ascontiguousarray(row, np.float32) for (h, _), row in zip(batch, rows, strict=True)}
                with database:
                    database.executemany(
                        "INSERT OR REPLACE INTO features VALUES (?, ?)",
                        [(h, row.tobytes()) for h, row in fresh.items()],
                    )
                known |= fresh
                done += len(batch)
                if progress is not None:
                    progress(done, len(files))
        return np.stack([known[h] for h in hashes]) if files else np.zeros((0, 0), np.float32)

    def _open(self, key: str) -> sqlite3.Connection:
        path = self._folder / f"{key}.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _connect(path)
        except (OSError, sqlite3.OperationalError) as error:  # another process holds it, or the disk does not take it
            raise MedbridgeError(
                f"{path}: stored features can't be opened ({error}). Try again, or free the folder."
            ) from error
        except sqlite3.DatabaseError as error:
            self._say(f"{path}: stored features can't be read ({error}); they are computed again.")
            path.unlink()
            return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60)
    try:
        if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("its pages are damaged")
        database.execute("CREATE TABLE IF NOT EXISTS features (image BLOB PRIMARY KEY, value BLOB NOT NULL)")
    except BaseException:
        database.close()
        raise
    return database


def _read(database: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, Floats]:
    found = {}
    for wanted in dict.fromkeys(hashes):
        row = database.execute("SELECT value FROM features WHERE image = ?", (wanted,)).fetchone()
        if row is not None:
            found[wanted] = np.frombuffer(row[0], np.float32)
    return found


def _content_hash(file: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise MedbridgeError(f"{file}: the image can't be read ({error.strerror or error}).") from error
    return digest.digest()
