"""Folders that are written whole or not at all, and known by a stamp. What they hold is not known here."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from medbridge.errors import MedbridgeError

STAMP = "stamp.json"


def ensure_folder(folder: Path, key: str, build: Callable[[Path], None], *, verify: bool = True) -> Path:
    """Return `folder` holding what `build` writes for `key`, building it only where that is needed.

    A folder counts as valid if its stamp has the same `key` and, with `verify`, if the hash of its files is
    the stamped one, so that a lost or changed file leads to a new build. Without `verify` no hash is taken,
    which takes long where files are many. A folder without a stamp that holds files is someone else's:
    MedbridgeError.
    """
    if is_valid(folder, key, verify=verify):
        return folder
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STAMP).is_file():
        raise MedbridgeError(
            f"{folder}: holds files but no {STAMP}, so medbridge did not make it and leaves it alone. "
            "Move it away or name another cache folder."
        )
    rebuild_folder(folder, key, build, verify=verify)
    return folder


def rebuild_folder(folder: Path, key: str, build: Callable[[Path], None], *, verify: bool = True) -> None:
    """Build `folder` for `key` anew, whatever it holds."""

    def stamped(fresh: Path) -> None:
        build(fresh)
        stamp = {"key": key, "content": content_hash(fresh) if verify else None}
        (fresh / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")

    write_folder(folder, stamped)


def is_valid(folder: Path, key: str, *, verify: bool = True) -> bool:
    """Whether the folder's stamp is for `key` and, with `verify`, its files hash to what the stamp says."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(stamp, dict) or stamp.get("key") != key:
        return False
    return not verify or stamp.get("content") == content_hash(folder)


def write_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Write `folder` through a temporary one beside it, replacing what was there; never half written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise MedbridgeError(f"{folder}: cannot be written ({error}). Name a folder you may write to.") from error
    try:
        fresh = workshop / "new"
        fresh.mkdir()
        build(fresh)
        for _ in range(3):
            # Another process may put its own folder here at the same time; the last one stays.
            if folder.exists():
                with contextlib.suppress(FileNotFoundError):
                    os.replace(folder, Path(tempfile.mkdtemp(dir=workshop)) / "old")
            try:
                os.replace(fresh, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        raise MedbridgeError(f"{folder}: other processes keep writing it. Try again when they are done.")
    except OSError as error:
        raise MedbridgeError(f"{folder}: cannot be written ({error}).") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def content_hash(folder: Path) -> str:
    """SHA-256 over the relative paths and bytes of all files of a folder but the stamp."""
    total = hashlib.sha256()
    for path in sorted(_files(folder)):
        total.update(hashlib.sha256(path.encode()).digest())
        total.update(hashlib.sha256((folder / path).read_bytes()).digest())
    return total.hexdigest()


def _files(folder: Path) -> list[str]:
    found: list[str] = []
    for root, _, names in os.walk(folder):
        base = Path(root).relative_to(folder)
        found.extend((base / name).as_posix() for name in names)
    return [name for name in found if name != STAMP]
