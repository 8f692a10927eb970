"""A run's folder: its ledger, settings and items, held by one process; what a resumed run may not change.

What happens in it is decided in `pipeline`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError

import medbridge
from medbridge.config import RunSettings, dump_config
from medbridge.data import ImageCache, ItemSet, open_items
from medbridge.errors import MedbridgeError
from medbridge.ledger import Ledger, to_json
from medbridge.progress import Reporter

_FREE = ("name", "budget", "tensorboard", "wandb", "rollout.vllm.", "rollout.server.", "rollout.failure.")
"""Settings that a resumed run may change: they decide how far and where it goes, not what it finds."""


class RunFolder:
    """One run folder with its settings, items and ledger. Only one process may hold it."""

    def __init__(self, folder: Path, settings: RunSettings, *, base_dir: Path, reporter: Reporter) -> None:
        """Open or create the run.

        Args:
            folder: run folder.
            settings: of the run; a resumed run must not change what its results depend on.
            base_dir: folder that relative data paths start from (the YAML file's).
            reporter: where progress is shown.
        """
        self.folder = folder
        self.settings = settings
        self.reporter = reporter
        self._lock = _lock(folder)
        try:
            for left in (folder / "models").glob(".*"):  # half a model, of a process killed while it wrote
                if left.is_dir():
                    shutil.rmtree(left)
            self.ledger = Ledger(folder / "run.sqlite")
            self._opened = time.monotonic()
            self._worked: float = self.ledger.meta("worked_seconds") or 0.0
            self._refuse_changed_settings()
            self.images = ImageCache(settings.data.image_cache_mb << 20)
            self.base_dir = base_dir
            self.items: ItemSet = open_items(settings.data, base_dir=base_dir, cache_dir=folder / "data")
            self._check_tags()
            self._refuse_changed_items()
        except BaseException:
            self._lock.close()  # also where the error is kept, and with it this object
            raise
        self._store_settings(base_dir)  # only now: a run that could not begin binds nobody to its settings
        if self.items.skipped:
            reporter.say(f"{len(self.items.skipped)} rows skipped; the first: {self.items.skipped[0]}")
        self.strata_keys = settings.data.strata

    def close(self) -> None:
        self.keep_time()
        self.ledger.close()
        self._lock.close()

    def minutes(self) -> float:
        """Minutes of work so far, those of earlier processes included."""
        return (self._worked + time.monotonic() - self._opened) / 60

    def keep_time(self) -> None:
        """Store the time worked, for the process that goes on after a kill."""
        self.ledger.set_meta("worked_seconds", 60 * self.minutes())

    def _refuse_changed_settings(self) -> None:
        """Hold a resumed run to the settings that its results so far came from."""
        new = json.loads(to_json(self.settings.model_dump(mode="json")))  # as stored: an infinity reads as null
        old = self.ledger.meta("config")
        if old is not None:
            with suppress(ValidationError):  # keys that came since then have their defaults
                old = json.loads(to_json(type(self.settings).model_validate(old).model_dump(mode="json")))
            changed = [key for key in _differences(old, new) if not key.startswith(_FREE)]
            if changed and self.ledger.stages():
                raise MedbridgeError(
                    f"{self.folder}: this run was begun with other settings ({', '.join(changed[:8])}). Its results "
                    "would mix. Give the settings it was begun with (its config.yaml), or another run folder."
                )
            if changed:
                shutil.rmtree(self.folder / "models", ignore_errors=True)  # perhaps one of another shape

    def _refuse_changed_items(self) -> None:
        """Hold a resumed run to the questions that its results so far came from."""
        digest = hashlib.sha256()
        for item in self.items.items:
            record = [item.id, item.split, item.question, item.options, item.answer, dict(item.tags), item.floor]
            digest.update(to_json(record).encode("utf-8", "replace"))
        old = self.ledger.meta("items_digest")
        if old not in (None, digest.hexdigest()) and self.ledger.stages():
            raise MedbridgeError(
                f"{self.folder}: the questions are not those that this run was begun with: texts, answers, splits or "
                "tags changed. Its results would mix. Restore the data, or use another run folder."
            )
        self.ledger.set_meta("items_digest", digest.hexdigest())

    def _check_tags(self) -> None:
        """Refuse tags that no item has: they would quietly mean something else."""
        settings = self.settings.diagnosis
        for key, tags in (("cluster", settings.cluster), ("kind_of_question", settings.kind_of_question)):
            for tag in tags:
                if not any(tag in item.tags for item in self.items.items):
                    have = sorted({name for item in self.items.items for name in item.tags})
                    raise MedbridgeError(
                        f"diagnosis.{key} names the tag {tag!r}, which no item has; there are: "
                        f"{', '.join(have) or 'none'}."
                    )

    def _store_settings(self, base_dir: Path) -> None:
        self.ledger.set_meta("config", self.settings.model_dump(mode="json"))
        self.ledger.set_meta("name", self.settings.name)
        self.ledger.set_meta("base_dir", str(base_dir.resolve()))
        self.ledger.set_meta("environment", environment())
        written = self.folder / ".config.yaml"
        written.write_text(dump_config(self.settings), encoding="utf-8")
        written.replace(self.folder / "config.yaml")  # never half a file


def environment() -> dict[str, str]:
    """Versions and machine, for the record."""
    found = {"medbridge": medbridge.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "transformers", "peft", "numpy", "vllm", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found["threads"] = str(torch.get_num_threads())
    return found


def _lock(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "run.lock").open("w")
    except OSError as error:
        raise MedbridgeError(f"{folder}: can't be used as a run folder ({error}). Name another one.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise MedbridgeError(
            f"{folder}: another medbridge process is working in this run folder. Wait for it, or use another folder."
        ) from None
    return handle


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            key
            for name in sorted(old.keys() | new.keys())
            for key in _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if old == new else [prefix]
