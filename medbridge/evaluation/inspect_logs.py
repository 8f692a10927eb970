"""Logs of Inspect: one JSON file (`.json`), or a zip of them (`.eval`)."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medbridge.data import Skip
from medbridge.errors import MedbridgeError
from medbridge.evaluation.logged import MAX_LINE, Logged, logged, message_text, reason_of, storable

_UNREADABLE = (
    MedbridgeError, ValueError, TypeError, AttributeError, KeyError, OSError, EOFError, RuntimeError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
"""What reading one sample of any shape can end in."""

_CUT = ("max_tokens", "model_length")
"""Inspect's reasons to stop that cut a completion off."""


def read_inspect(file: Path) -> Iterator[Logged | Skip]:
    """The samples of a log; epochs are completions of one question."""
    for name, read, task in _inspect_samples(file):
        try:
            yield _inspected(storable(read()), task)
        except _UNREADABLE as error:
            yield Skip(f"{file}/{name}", None, None, reason_of(error))


def _inspect_samples(file: Path) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Each sample's name, what reads it, and the task."""
    try:
        if not zipfile.is_zipfile(file):
            if file.suffix == ".eval":
                raise zipfile.BadZipFile("not a whole zip, which this format is")
            log = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(log, dict) or not isinstance(log.get("samples"), list):
                raise MedbridgeError(f"{file}: not a log of Inspect: it has no list of samples.")
            for number, sample in enumerate(log["samples"]):
                yield f"sample {number}", partial(_held, sample), _task(log)
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            header = next((m for m in members if m.filename in ("header.json", "_journal/start.json")), None)
            task = "inspect" if header is None else _task(_member(archive, header, file))
            for member in members:
                if member.filename.startswith("samples/") and member.filename.endswith(".json"):
                    yield member.filename, partial(_member, archive, member, file), task
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise MedbridgeError(f"{file}: can't be read ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise MedbridgeError(f"{file}: not valid JSON ({error}).") from error


def _held(sample: Any) -> dict[str, Any]:
    if not isinstance(sample, dict):
        raise TypeError
    return sample


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> Any:
    with archive.open(member) as stream:
        content = stream.read(MAX_LINE + 1)  # what the zip says of sizes is not trusted
    if len(content) > MAX_LINE:
        raise MedbridgeError(f"{file}: {member.filename} holds more than {MAX_LINE >> 20} MiB, which is no sample.")
    try:
        return json.loads(content)
    except ValueError as error:
        raise MedbridgeError(f"{member.filename} is not valid JSON ({error}).") from error


def _task(log: Any) -> str:
    found = log.get("eval", {}).get("task") if isinstance(log, dict) and isinstance(log.get("eval"), dict) else None
    return str(found or "inspect")


def _inspected(sample: dict[str, Any], task: str) -> Logged:
    output = sample.get("output") or {}
    choices = output.get("choices") or []
    texts = [message_text(choice.get("message", {}).get("content")) for choice in choices] or [
        output.get("completion") or ""
    ]
    if sample.get("error") and not any(texts):
        raise MedbridgeError(f"the sample {sample.get('id')} failed in Inspect, and has no completion.")
    stops = [choice.get("stop_reason") for choice in choices]
    question = sample.get("input")
    if isinstance(question, list):
        question = next((message_text(m.get("content")) for m in reversed(question) if m.get("role") == "user"), "")
    given = sample.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    row = {
        **metadata, "question": question, "options": sample.get("choices") or metadata.get("options"),
        "target": sample.get("target"),
    }  # fmt: skip
    values = [score.get("value") for score in (sample.get("scores") or {}).values() if isinstance(score, dict)]
    right = {"C": True, "I": False, 1: True, 0: False}
    known = [right[value] for value in values if isinstance(value, str | int | float) and value in right]
    score = known[0] if known and len(texts) == 1 else None
    return logged(
        row, task, str(sample.get("id")), texts, whole=row, scores=(score,) * len(texts),
        cut=sum(stop in _CUT for stop in stops) if stops and None not in stops else None,
    )  # fmt: skip
