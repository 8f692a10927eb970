"""Checkpoints of a training stage on disk: whole or not there at all, and checked before they are trusted.

A checkpoint is a folder `step-N` of safetensors files, `state.json`, and `manifest.json` with the digest of each of
them. It is written beside its place, synced, renamed into it, and only then named by `newest.json`. What stands in the
tensors and in the state is the caller's.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medbridge.errors import MedbridgeError
from medbridge.train.tensor_files import (
    Stored,
    digest_of,
    in_order,
    read_shapes,
    read_tensors,
    sync_folder,
    write_bytes,
    write_tensors,
)

MANIFEST, STATE, POINTER = "manifest.json", "state.json", "newest.json"
_WRITING, _DAMAGED, _DROPPED = ".writing-", "damaged-", ".dropped-"


class _Damaged(Exception):
    """Why a folder is not a whole checkpoint."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole. `score`: the number it was saved with, the higher the better."""

    folder: Path
    step: int
    score: float | None

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / STATE).read_text())
        return found

    def tensors(self, name: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The tensors saved as `name`, one after the other on a device."""
        return read_tensors(self._path(name), device)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors saved as `name`; none where nothing was."""
        return read_shapes(self._path(name)) if self._path(name).is_file() else {}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Checkpoints:
    """The checkpoints under one folder, which only one process writes to."""

    def __init__(self, folder: Path, *, keep: int = 2, say: Callable[[str], None] = warnings.warn) -> None:
        """`keep`: how many of the newest stay, beside the best; `say` is told of damage."""
        self.folder = folder
        self.keep = keep
        self.say = say

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Stored]],
        state: Mapping[str, Any],
        score: float | None = None,
    ) -> Path:
        """Write the checkpoint of a step (a file for each entry of `tensors`), then drop what need not stay.

        Raises:
            MedbridgeError: the disk is full or refuses; what stood there before still does.
            ValueError: a score that is not finite, which would be no rank.
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"the score of a checkpoint is finite, and not {score}")
        target = self.folder / f"step-{step:06d}"
        part = self.folder / f"{_WRITING}{target.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep(_WRITING, _DROPPED)
            part.mkdir()
            _write(part, step, tensors, state, score)
            if target.exists():
                target.rename(self.folder / f"{_DROPPED}{target.name}")
            part.rename(target)
            sync_folder(self.folder)
            self._point_to(target)
        except OSError as error:
            raise self._unwritable(step, tensors, error) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._drop_old(target)
        return target

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; newer ones that are damaged are set aside, and `say` is told why.

        They keep their files, as `damaged-step-N`, until the next checkpoint is saved.
        """
        damage, found = [], None
        present = checkpoints(self.folder)
        promised = self._promised()
        if promised is not None and promised not in [folder.name for folder in present]:
            damage.append(f"{promised} is gone")
        while present and found is None:
            folder = present.pop()
            try:
                found = _whole(folder)
            except _Damaged as reason:
                aside = self.folder / f"{_DAMAGED}{folder.name}"
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                damage.append(f"{folder.name} is damaged ({reason}) and set aside as {aside.name}")
        if damage:
            (self.folder / POINTER).unlink(missing_ok=True)  # said once
            next_best = f"goes on from {found.folder.name}" if found else "begins again: no whole checkpoint is left"
            self.say(f"{self.folder}: {'; '.join(damage)}. Training {next_best}.")
        return found

    def _promised(self) -> str | None:
        """The folder that was named last as the newest, where that is known."""
        try:
            name = json.loads((self.folder / POINTER).read_text())["newest"]
        except (OSError, ValueError, KeyError, TypeError):  # never written, or itself torn: the folders tell as well
            return None
        return str(name)

    def _point_to(self, target: Path) -> None:
        ranked = self._ranked()
        content = {"newest": target.name, "best": ranked[-1].name if ranked else None}
        part = self.folder / f"{_WRITING}{POINTER}"
        write_bytes(part, json.dumps(content).encode())
        part.rename(self.folder / POINTER)
        sync_folder(self.folder)

    def _ranked(self) -> list[Path]:
        """Checkpoints that have a score, the best last; of equals the one that had it first."""
        scores = {folder: _score(folder) for folder in reversed(checkpoints(self.folder))}
        return sorted((f for f, s in scores.items() if s is not None), key=lambda f: scores[f] or 0.0)

    def _drop_old(self, newest: Path) -> None:
        present = checkpoints(self.folder)
        kept = {newest, *present[-self.keep :], *self._ranked()[-1:]}
        for folder in present:
            if folder not in kept:  # out of sight first: a kill half-way leaves nothing that looks damaged
                folder.rename(self.folder / f"{_DROPPED}{folder.name}")
        self._sweep(_DROPPED, _DAMAGED)

    def _sweep(self, *prefixes: str) -> None:
        """Remove what killed processes left, and what is no longer needed."""
        for prefix in prefixes:
            for left in self.folder.glob(f"{prefix}*"):
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()

    def _unwritable(self, step: int, tensors: Mapping[str, Mapping[str, Stored]], error: OSError) -> MedbridgeError:
        needed = sum(tensor.nbytes for entry in tensors.values() for tensor in entry.values()) / 1e9
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free / 1e9
        older = checkpoints(self.folder)
        resumes = f"at {older[-1].name}" if older else "at its first step"
        return MedbridgeError(
            f"{self.folder}: the checkpoint of step {step} can't be written ({error}). It needs {needed:.3g} GB beside "
            f"the older ones, and {free:.3g} GB are free. Make room there, or give a run folder on another disk; begun "
            f"again, the run resumes {resumes}."
        )


def give_parts(tensors: Mapping[str, Mapping[str, Stored]]) -> None:
    """What the other ranks do while rank 0 saves: give it their part of each tensor, in the order of the files.

    Not torch's distributed checkpoint: one file for any number of ranks can be read by all of them, hashed while it is
    written, and opened by any tool. It costs that rank 0 writes alone, and no memory: tensors come one at a time.
    """
    for name in tensors:
        for key in in_order(tensors[name]):
            tensors[name][key].detach()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; whether they are whole is not looked at."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]))


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The whole checkpoint with the highest score under a folder; None where none has one."""
    for path in reversed(Checkpoints(folder)._ranked()):
        try:
            return _whole(path)
        except _Damaged:
            continue
    return None


def _write(
    part: Path, step: int, tensors: Mapping[str, Mapping[str, Stored]], state: Mapping[str, Any], score: float | None
) -> None:
    """Fill a folder with a whole checkpoint and sync it."""
    digests = {f"{name}.safetensors": write_tensors(part / f"{name}.safetensors", tensors[name]) for name in tensors}
    digests[STATE] = write_bytes(part / STATE, json.dumps({"step": step, **state}, allow_nan=False).encode())
    manifest = {"step": step, "score": score, "sha256": digests}
    write_bytes(part / MANIFEST, json.dumps({**manifest, "own": _own_digest(manifest)}, indent=1).encode())
    sync_folder(part)


def _own_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of a manifest's content: its own bytes can be damaged too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _whole(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every file of it checked.

    Raises:
        _Damaged: it is not whole.
    """
    manifest = _manifest(folder)

    def check(name: str) -> None:
        try:
            found = digest_of(folder / name)
        except PermissionError:
            raise
        except OSError as error:
            raise _Damaged(f"{name}: {error.strerror}") from error
        if found != manifest["sha256"][name]:
            raise _Damaged(f"{name} is not as it was written")

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest["sha256"]))
    return Checkpoint(folder, manifest["step"], manifest["score"])


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.pop("own") != _own_digest(manifest):
            raise ValueError
    except PermissionError:
        raise
    except OSError as error:
        raise _Damaged(f"{MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{MANIFEST} is not as it was written") from error
    found: dict[str, Any] = manifest
    return found


def _score(folder: Path) -> float | None:
    try:
        score: float | None = _manifest(folder)["score"]
    except _Damaged:
        return None
    return score
