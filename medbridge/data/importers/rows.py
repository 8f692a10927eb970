"""Rows of CSV, JSON, JSON lines, Parquet and saved Hugging Face data sets, a batch at a time.

What they mean is not known here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medbridge.data.importers.lines import MAX_LINE_BYTES, numbered_lines, parse_row
from medbridge.errors import MedbridgeError

Row = dict[str, Any]

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
MAX_JSON_BYTES = 512 * 2**20
"""A JSON list is read whole; a larger one must come as JSON lines."""

_BATCH = 32
_MAX_GROUP_BYTES = 4 * 2**30


def read_rows(file: Path) -> Iterator[tuple[int, Row | MedbridgeError]]:
    """The rows of a file, numbered from 1, or what is wrong with one. Raises MedbridgeError if the file is broken."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise MedbridgeError(f"{file}: no table that is known; the endings are {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise MedbridgeError(f"{file}: no such file.")
    if suffix == ".parquet":
        yield from _parquet(file)
    elif suffix == ".json":
        yield from _json(file)
    elif suffix in (".csv", ".tsv"):
        yield from _csv(file, "\t" if suffix == ".tsv" else ",")
    else:
        for number, raw in numbered_lines(file):
            try:
                yield number, parse_row(raw)
            except MedbridgeError as error:
                yield number, error


def read_saved(folder: Path) -> Iterator[tuple[str | None, int, Row]]:
    """Split, number and row of a folder that `datasets` wrote with save_to_disk."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its readers of JSON and Arrow raise
        raise MedbridgeError(f"{folder}: not a whole saved data set ({_short(error)}). Save it again.") from error
    yield from _hugging_face(str(folder), found)


def read_hub(name: str, config: str | None) -> Iterator[tuple[str | None, int, Row]]:
    """The same of a data set on the hub, loaded and kept by the user's own `datasets`; its code is never run."""
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # the network's errors too
        raise MedbridgeError(f"{name}: `datasets` can't load it ({_short(error)}). Load it yourself first.") from error
    yield from _hugging_face(name, found)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MedbridgeError("Hugging Face data sets need `pip install medbridge[tables]`.") from error
    return datasets


def _hugging_face(name: str, found: Any) -> Iterator[tuple[str | None, int, Row]]:
    parts = found.items() if isinstance(found, dict) else [(getattr(found, "split", None), found)]
    for split, part in parts:
        number = 0
        try:
            named = {column: names for column, kind in part.features.items() if (names := _class_names(kind))}
            # As Arrow, images stay the bytes that they are and aren't decoded.
            for batch in part.with_format("arrow").iter(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    row |= {column: _by_name(row[column], names) for column, names in named.items()}
                    yield None if split is None else str(split), number, row
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise MedbridgeError(f"{name}: row {number + 1} can't be read ({_short(error)}).") from error


def _class_names(kind: Any) -> list[str] | None:
    """The names behind the numbers of a ClassLabel, or of a list of them."""
    inner = getattr(kind, "feature", None)
    return getattr(kind, "names", None) if inner is None else _class_names(inner)


def _by_name(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_by_name(one, names) for one in value]
    # -1 stands for a label that isn't known.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _csv(file: Path, delimiter: str) -> Iterator[tuple[int, Row | MedbridgeError]]:
    # A process-wide setting of the module; 128 KiB, the default, is less than an image in base64.
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            names = reader.fieldnames
            while names == []:  # an empty line before that of the columns
                reader.fieldnames = None
                names = reader.fieldnames
            if not names:
                raise MedbridgeError(f"{file}: is empty; its first line must name the columns.")
            if len(set(names)) < len(names):
                raise MedbridgeError(f"{file}: two columns have the same name. Rename one.")
            for row in reader:
                if None in row or None in row.values():
                    yield reader.line_num, MedbridgeError(f"not {len(names)} fields, as the first line has.")
                else:
                    yield reader.line_num, dict(row)
    except csv.Error as error:
        raise MedbridgeError(f"{file}:{reader.reader.line_num}: not valid CSV ({error}).") from error
    except UnicodeDecodeError as error:
        raise MedbridgeError(
            f"{file}:{_undecodable(file)}: not UTF-8 text ({error.reason}); save the file as UTF-8."
        ) from error
    except OSError as error:
        raise MedbridgeError(f"{file}: can't be read ({error.strerror or error}).") from error


def _undecodable(file: Path) -> int:
    """The first line that is no UTF-8: text is decoded in blocks, so that the reader's own place lies before it."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _json(file: Path) -> Iterator[tuple[int, Row | MedbridgeError]]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise MedbridgeError(f"{file}: more than {MAX_JSON_BYTES} bytes of JSON; write JSON lines instead.")
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MedbridgeError(f"{file}: can't be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise MedbridgeError(f"{file}: not valid JSON ({_short(error)}).") from error
    if not isinstance(rows, list):
        raise MedbridgeError(f"{file}: a list of questions is needed, found a {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        good = isinstance(row, dict)
        yield number, row if good else MedbridgeError(f"an object is needed, not a {type(row).__name__}.")


def _parquet(file: Path) -> Iterator[tuple[int, Row | MedbridgeError]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MedbridgeError("Parquet files need `pip install medbridge[tables]`.") from error
    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            for index in range(opened.metadata.num_row_groups):
                if not 0 <= opened.metadata.row_group(index).total_byte_size <= _MAX_GROUP_BYTES:
                    raise MedbridgeError(f"{file}: row group {index} says it has more than {_MAX_GROUP_BYTES} bytes.")
            for batch in opened.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise MedbridgeError(
            f"{file}: row {number + 1} can't be read ({_short(error)}). Get the file again."
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
