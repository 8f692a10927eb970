"""Questions from any table by a mapping of its columns: CSV, JSON, JSON lines, Parquet, Hugging Face data sets.

Each row is brought into the form of `jsonl.py`, which then checks it. Images that come as bytes are written once.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medbridge.data.images import MAX_PIXELS, ImageCheck
from medbridge.data.importers.jsonl import SPLIT_NAMES, row_to_item
from medbridge.data.importers.lines import plain_text, shown
from medbridge.data.importers.mapping import TableMapping
from medbridge.data.importers.rows import SUFFIXES, Row, read_hub, read_rows, read_saved
from medbridge.data.interning import Interner
from medbridge.data.items import Item, Place, Skip
from medbridge.data.prompts import LETTERS
from medbridge.errors import MedbridgeError
from medbridge.files import replace_file

MAX_IMAGE_BYTES = 3 * MAX_PIXELS
"""Most bytes of one embedded image: no image that is read is larger as a file without compression."""

_PREFIX = re.compile(r"\s*([A-Za-z])\s*[:.)]\s*")
_YES_NO = {"yes": "Yes", "no": "No"}


def read_table(
    mapping: TableMapping,
    path: Path | None,
    *,
    cache_dir: Path,
    image_root: Path | None = None,
    split: str | None = None,
    check: ImageCheck = "header",
    place: Place | None = None,
) -> Iterator[Item | Skip]:
    """The questions of `path` (a table, a folder of tables, a saved data set) or of the mapping's `hub` name.

    A row that holds no good question is a Skip, and so, as a known one, is a number of questions that isn't the
    published one and the number of rows passed over. `place` is kept at the row that is read. Raises MedbridgeError if
    a file is broken or nothing is there.
    """
    cache = cache_dir / "table"
    root = image_root or (cache if path is None else path if path.is_dir() else path.parent)
    counts: Counter[str] = Counter()
    checked: set[str] = set()
    interned = Interner()
    name = mapping.hub or str(path)
    passed = 0
    for source, given, number, row in _all_rows(mapping, path):
        item_id = None
        if place is not None:
            place.reach(source, number)
        try:
            if isinstance(row, MedbridgeError):
                raise row
            found = _wanted(mapping, row)
            if found is None:
                passed += 1
                continue
            known, embedded = _row(mapping, row, given or split, number, cache)
            known["tags"] |= found
            item_id = f"{known['dataset_name']}/{known['split']}/{known['dataset_index']}"
            item = row_to_item(known, cache if embedded else root, check=check, checked=checked, interned=interned)
        except MedbridgeError as error:
            yield Skip(source, number, item_id, str(error))
            continue
        counts.update({item.dataset, f"{item.dataset}/{item.split}"})
        yield item
    if passed:
        yield Skip(name, None, None, f"{passed} rows were passed over, as `where` says.", known=True)
    for key, published in mapping.counts.items():
        # A file with one of the sets or splits only says nothing about the others.
        if counts[key] not in (0, published):
            yield Skip(name, None, key, f"{counts[key]} questions were read, {published} are published.", known=True)


def _all_rows(mapping: TableMapping, path: Path | None) -> Iterator[tuple[str, str | None, int, Row | MedbridgeError]]:
    """Source, split, number and row."""
    if path is None:
        if mapping.hub is None:
            raise MedbridgeError("a table needs `path`, or a mapping that names its `path` or `hub`.")
        for found, number, row in read_hub(mapping.hub, mapping.hub_config):
            yield mapping.hub, _split_of(found), number, row
    elif path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        for found, number, row in read_saved(path):
            yield str(path), _split_of(found), number, row
    else:
        for file, given in _files(mapping, path):
            for number, line in read_rows(file):
                yield str(file), given, number, line


def _files(mapping: TableMapping, path: Path) -> list[tuple[Path, str | None]]:
    if not path.is_dir():
        return [(path, _file_split(mapping, path))]
    found: list[tuple[Path, str | None]] = []
    for pattern, split in mapping.files.items():
        if ".." in Path(pattern).parts or Path(pattern).is_absolute():
            raise MedbridgeError(f"the pattern {pattern!r} leaves {path}; name files below it.")
        try:
            found.extend((file, split) for file in sorted(path.glob(pattern)))
        except (ValueError, NotImplementedError, OSError) as error:
            raise MedbridgeError(f"the pattern {pattern!r} can't be looked for in {path}: {error}.") from error
    if not mapping.files:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        found = [(file, _split_of(re.split(r"[-_.]", file.name)[0])) for file in files]
    if not found:
        raise MedbridgeError(f"{path}: no table {' or '.join(mapping.files) or 'file'} in it.")
    return found


def _file_split(mapping: TableMapping, file: Path) -> str | None:
    for pattern, split in mapping.files.items():
        if split and file.match(pattern):
            return split
    return _split_of(re.split(r"[-_.]", file.name)[0])


def _split_of(name: str | None) -> str | None:
    return None if name is None else SPLIT_NAMES.get(name.lower())


def _row(mapping: TableMapping, row: Row, given: str | None, number: int, cache: Path) -> tuple[Row, bool]:
    """The row in the form of JSON lines, and whether its images are files of the cache."""
    dataset = mapping.dataset
    if mapping.dataset_column:
        dataset = plain_text(_cell(row, mapping.dataset_column)) or ""
        dataset = mapping.dataset_names.get(dataset, dataset)
    known: Row = {
        "dataset_name": dataset,
        "dataset_index": number if mapping.id is None else _cell(row, mapping.id),
        "question": _cell(row, mapping.question),
        "split": _split(mapping, row, given),
        "tags": {tag: text for tag, column in mapping.tags.items() if (text := plain_text(row.get(column)))},
        "floor": mapping.floor,
    }
    known["image_paths"], embedded = _images(mapping, row, cache)
    options = _options(mapping, row)
    known["options"] = options
    if mapping.question_until and options is not None and isinstance(known["question"], str):
        kept = re.split(mapping.question_until, known["question"], maxsplit=1)[0]
        known["question"] = kept if kept.strip() else known["question"]
    if mapping.answer:
        known["answer"] = _unprefixed(_cell(row, mapping.answer), options)
        word = (plain_text(known["answer"]) or "").rstrip(".").casefold()
        if mapping.yes_no and options is None and word in _YES_NO:
            known |= {"options": ["Yes", "No"], "answer": _YES_NO[word], "floor": None}
    if mapping.answer_label:
        key = "answer_label" if options is not None or mapping.answer else "answer"
        known[key] = _cell(row, mapping.answer_label)
    if mapping.answer_index:
        known["answer_label"] = _letter(_cell(row, mapping.answer_index), options)
    if options is not None:
        known["floor"] = None
    return known, embedded


def _wanted(mapping: TableMapping, row: Row) -> dict[str, str] | None:
    """The tags that `where` finds in a row, None if the row is to be passed over."""
    tags: dict[str, str] = {}
    for column, pattern in mapping.where.items():
        match = re.fullmatch(pattern, plain_text(_cell(row, column)) or "")
        if match is None:
            return None
        tags |= {tag: text for tag, text in match.groupdict().items() if text}
    return tags


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise MedbridgeError(f"there is no column {column!r} (columns here: {', '.join(map(repr, row)) or 'none'}).")
    return row[column]


def _split(mapping: TableMapping, row: Row, given: str | None) -> str | None:
    if mapping.split is None:
        return given or mapping.split_default
    value = plain_text(_cell(row, mapping.split)) or ""
    return mapping.split_names.get(value) or _split_of(value) or mapping.split_default or given or value


def _options(mapping: TableMapping, row: Row) -> Any:
    if mapping.options is None:
        return None
    if isinstance(mapping.options, list):
        cells = [plain_text(_cell(row, column)) for column in mapping.options]
        return [_unlettered(cell, letter) for cell, letter in zip(cells, LETTERS, strict=False) if cell] or None
    value = _cell(row, mapping.options)
    if isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, str) and value.strip()[0] in "[{":
        value = _structure(value)
    if isinstance(value, list):
        if not value:
            return None
        texts = [plain_text(text) for text in value]
        if texts and all(text and _lettered_as(text, letter) for text, letter in zip(texts, LETTERS, strict=False)):
            return [_unlettered(text or "", letter) for text, letter in zip(texts, LETTERS, strict=False)]
    return value


def _structure(text: str) -> Any:
    """A list or object written as JSON, or as Python writes one (MMMU)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise MedbridgeError(f"the options {shown(text)} are no valid list or object.") from error


def _lettered_as(text: str, letter: str) -> bool:
    match = _PREFIX.match(text)
    return match is not None and match.group(1).upper() == letter and match.end() < len(text)


def _unlettered(text: str, letter: str) -> str:
    """`A:Edema` under the letter A is `Edema`."""
    return _PREFIX.sub("", text, count=1) if _lettered_as(text, letter) else text


def _unprefixed(answer: Any, options: Any) -> Any:
    """An answer that repeats its letter (`B: Edema`), unless an option reads so."""
    text = plain_text(answer)
    if text is None or not isinstance(options, list) or text in options:
        return answer
    bare = _PREFIX.sub("", text, count=1)
    return bare if bare in options else answer


def _letter(value: Any, options: Any) -> str:
    count = len(options) if isinstance(options, list | dict) else 0
    text = plain_text(value) or ""
    if isinstance(options, list) and not text.isdecimal() and text in options:  # a class that goes by its name
        return LETTERS[options.index(text)]
    # The length bound also keeps a number of thousands of digits from being read at all.
    if not re.fullmatch(r"[0-9]{1,3}(\.0)?", text) or int(float(text)) >= count:
        raise MedbridgeError(f"the answer's number {shown(value)} is none of 0 to {count - 1}.")
    position = int(float(text))
    return str(list(options)[position]) if isinstance(options, dict) else LETTERS[position]


def _images(mapping: TableMapping, row: Row, cache: Path) -> tuple[list[str], bool]:
    columns = [mapping.images] if isinstance(mapping.images, str) else mapping.images
    values: list[Any] = []
    for column in columns:
        value = _cell(row, column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            # A file name may begin with a bracket.
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        values.extend(value if isinstance(value, list) else [value])
    values = [value for value in values if value is not None and value != ""]
    if not values:
        raise MedbridgeError("the row has no image.")
    named = [_one_image(value, mapping, cache) for value in values]
    if len({embedded for _, embedded in named}) > 1:
        raise MedbridgeError("some of its images are paths and some are bytes; give all in one form.")
    return [name for name, _ in named], named[0][1]


def _one_image(value: Any, mapping: TableMapping, cache: Path) -> tuple[str, bool]:
    """The image's file name, and whether it is one of the cache."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _kept(value, cache), True
    if not isinstance(value, str):
        raise MedbridgeError(f"the image {shown(value)} is neither a path nor bytes.")
    if value.startswith("data:") or len(value) > 1024:
        try:
            return _kept(base64.b64decode(value.rpartition(",")[2], validate=True), cache), True
        except (binascii.Error, ValueError) as error:
            raise MedbridgeError(f"the image {shown(value)} is no valid base64 ({error}).") from error
    if any(len(part) > 255 for part in re.split(r"[/\\]", value)):
        raise MedbridgeError(f"the image path {shown(value)} is longer than any file's name.")
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return value if absolute else mapping.image_prefix + value, False


def _kept(content: bytes, cache: Path) -> str:
    """Write an image below the cache under the hash of its bytes, unless it is there; its name there."""
    if not content or len(content) > MAX_IMAGE_BYTES:
        raise MedbridgeError(f"an image of {len(content)} bytes; 1 to {MAX_IMAGE_BYTES} are read.")
    digest = hashlib.sha256(content).hexdigest()
    name = f"{digest[:2]}/{digest[:32]}"
    path = cache / name
    if not path.is_file() or path.stat().st_size != len(content):
        replace_file(path, lambda stream: stream.write(content))
    return name
