"""Whether a model's folder still holds the weights that were measured."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medbridge.errors import MedbridgeError
from medbridge.ledger import Ledger

_WEIGHTS = (".safetensors", ".bin", ".pt", ".json")


def refuse_changed(ledger: Ledger, folder: Path, key: str) -> None:
    """Remember what a model's folder holds, and refuse it where that is not what it held when it was measured.

    Files are read again only where their sizes or times have changed.

    Raises:
        MedbridgeError: naming the configuration's `key`.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS and file.is_file())
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = f"weights of {folder}"
    known = ledger.meta(name)
    if known is not None and known["stamp"] == stamp:
        return
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    measured = any((stage.kind, stage.model) == ("diagnose", str(folder)) for stage in ledger.stages())
    if measured and known is not None and known["sha256"] != total.hexdigest():
        raise MedbridgeError(
            f"{key}: {folder} holds other weights than those that this run folder measured. Put the new model into a "
            "folder of its own, or name another run folder with --run."
        )
    ledger.set_meta(name, {"stamp": stamp, "sha256": total.hexdigest()})
