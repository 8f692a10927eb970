"""Questions as JSON lines in the form that MedBridgeRL and MedVLThinker-Eval publish, read and written.

One object a line: `dataset_name, dataset_index, image_paths, question, options, answer_label, answer`.
medbridge adds the optional keys `split`, `tags`, `trace` and `floor`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medbridge.data.images import ImageCheck, check_image, resolve_image
from medbridge.data.importers.lines import numbered_lines, parse_row, plain_text, shown
from medbridge.data.interning import Interner
from medbridge.data.items import SPLITS, Item, Place, Skip
from medbridge.data.prompts import LETTERS
from medbridge.errors import MedbridgeError

MAX_TAG_LENGTH = 64
"""Longest text under an unknown key that is taken for a tag; longer ones are prose."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of splits that published data uses -> ours."""

_LETTERED = re.compile(r"([A-Z])[.):]\s+(\S.*)")
_IMAGE_KEYS = ("image_paths", "image_path", "images")
_TRACE_KEYS = ("trace", "reasoning")
_KNOWN = {
    *_IMAGE_KEYS,
    *_TRACE_KEYS,
    *(
        "dataset_name",
        "dataset_index",
        "question",
        "options",
        "answer_label",
        "answer",
        "split",
        "tags",
        "floor",
    ),
}


def read_jsonl(
    file: Path,
    *,
    image_root: Path,
    split: str | None = None,
    override: bool = False,
    check: ImageCheck = "header",
    place: Place | None = None,
) -> Iterator[Item | Skip]:
    """The questions of a file, one line at a time; a Skip for every line that holds none.

    `split` is the split of rows that don't say, with `override` of all rows. Image paths are relative to
    `image_root`. `place` is kept at the line that is read. Raises MedbridgeError only if the file itself can't be read.
    """
    seen: set[str] = set()  # images already checked
    interned = Interner()
    for number, raw in numbered_lines(file):
        item_id = None
        if place is not None:
            place.reach(str(file), number)
        try:
            row = parse_row(raw)
            if override:
                row["split"] = split
            item_id = _row_id(row, split)
            yield row_to_item(row, image_root, split=split, check=check, checked=seen, interned=interned)
        except MedbridgeError as error:
            yield Skip(str(file), number, item_id, str(error))


def row_to_item(
    row: dict[str, Any],
    image_root: Path,
    *,
    split: str | None = None,
    check: ImageCheck = "header",
    checked: set[str] | None = None,
    interned: Interner | None = None,
) -> Item:
    """The item of one row. `checked` collects the image paths found good, so that each is checked once, and
    `interned` what rows have in common, so that each is kept once.

    Raises MedbridgeError saying which key is wrong.
    """
    item_id = _row_id(row, split)
    one = interned or Interner()
    options, labels = _options(row)
    options = one(options)
    images = []
    for name in _image_names(row):
        path = resolve_image(image_root, name)
        if checked is None or path not in checked:
            check_image(path, check)
            if checked is not None:
                checked.add(path)
        images.append(path)
    return Item(
        id=item_id,
        dataset=one(_text(row, "dataset_name")),
        split=_split(row, split),
        question=one(_text(row, "question")),
        answer=one(_answer(row, options, labels)),
        options=options,
        images=one(tuple(images)),
        tags=one.tags(_tags(row)),
        floor=one(_floor(row, options)),
        trace=_trace(row),
    )


def item_to_row(item: Item, index: str, image_names: Sequence[str]) -> dict[str, Any]:
    """The row of an item: `index` is the last part of its id, `image_names` are relative to the folder."""
    position = item.answer_index
    row: dict[str, Any] = {
        "dataset_name": item.dataset,
        "dataset_index": index,
        "image_paths": list(image_names),
        "question": item.question,
        "options": None if item.options is None else dict(zip(LETTERS, item.options, strict=False)),
        "answer_label": None if position is None else LETTERS[position],
        "answer": item.answer,
        "split": item.split,
        "tags": dict(item.tags),
        "floor": item.floor,
    }
    if item.trace is not None:
        row["trace"] = item.trace
    return row


def _text(row: dict[str, Any], key: str) -> str:
    """A text or number under `key`, without surrounding space."""
    if key not in row:
        raise MedbridgeError(f"the key {key!r} is missing (keys here: {', '.join(map(repr, row)) or 'none'}).")
    text = plain_text(row[key])
    if text is None:
        raise MedbridgeError(f"{key!r} must be a text, not {shown(row[key])}.")
    if not text:
        raise MedbridgeError(f"{key!r} is empty.")
    return text


def _split(row: dict[str, Any], default: str | None) -> str:
    name = row.get("split")
    if name is None:
        name = default
    if name is None:
        raise MedbridgeError("the row names no split; add the key 'split' to it or set `split` for the source.")
    found = SPLIT_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if found is None:
        raise MedbridgeError(f"'split' is {shown(name)}; the splits are {', '.join(SPLITS)}.")
    return found


def _row_id(row: dict[str, Any], split: str | None) -> str:
    return f"{_text(row, 'dataset_name')}/{_split(row, split)}/{_text(row, 'dataset_index')}"


def _image_names(row: dict[str, Any]) -> list[str]:
    key = next((key for key in _IMAGE_KEYS if key in row), None)
    if key is None:
        raise MedbridgeError(f"the key {_IMAGE_KEYS[0]!r} is missing: a question needs its images' file names.")
    names = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise MedbridgeError(f"{key!r} must be a list of one or more file names, not {shown(row[key])}.")
    return names


def _options(row: dict[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The options' texts and labels; (None, ()) for an open question."""
    value = row.get("options")
    if isinstance(value, str):
        value = _options_in_text(value)
    if value is None:
        return None, ()
    if isinstance(value, dict):
        # Some published rows fill unused letters with null.
        pairs = [(plain_text(label) or "", text) for label, text in value.items() if text is not None]
    elif isinstance(value, list):
        pairs = list(zip(LETTERS, value, strict=False))
        if len(value) > len(LETTERS):
            raise MedbridgeError(f"{len(value)} options; a choice has at most {len(LETTERS)}.")
    else:
        raise MedbridgeError(f"'options' must be an object, a list or null, not {shown(value)}.")
    if not pairs:
        raise MedbridgeError("'options' is empty; leave it out (or null) for an open question.")
    texts = [plain_text(text) for _, text in pairs]
    for (label, given), text in zip(pairs, texts, strict=True):
        if not text:
            raise MedbridgeError(f"option {label!r} is {shown(given)}, which is no text.")
    return tuple(text for text in texts if text), tuple(label for label, _ in pairs)


def _options_in_text(text: str) -> Any:
    """Options given as a text: JSON, or one lettered option a line ("A. lung")."""
    lines = [_LETTERED.fullmatch(line.strip()) for line in text.strip().splitlines()]
    if lines and all(lines):
        return {line.group(1): line.group(2) for line in lines if line}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MedbridgeError(f"'options' is a text that is neither JSON nor lettered lines: {shown(text)}.") from error


def _answer(row: dict[str, Any], options: tuple[str, ...] | None, labels: tuple[str, ...]) -> str:
    """The answer's text. Label and text must agree where both are there."""
    if options is None:
        return _text(row, "answer")
    label = plain_text(row.get("answer_label"))
    text = plain_text(row.get("answer"))
    if not label and not text:
        raise MedbridgeError("there is neither 'answer_label' nor 'answer'.")
    by_label = None
    if label:
        names = [name.casefold() for name in labels]
        if label.casefold() not in names:
            raise MedbridgeError(f"the answer's label {label!r} is not among the options' {', '.join(labels)}.")
        by_label = options[names.index(label.casefold())]
    if not text:
        assert by_label is not None
        return by_label
    by_text = next((option for option in options if option == text), None)
    if by_text is None:
        by_text = next((option for option in options if option.casefold() == text.casefold()), None)
    if by_text is None and text in labels:
        # Some data sets repeat the label as the answer.
        by_text = options[labels.index(text)]
    if by_text is None:
        raise MedbridgeError(f"the answer {shown(text)} is not among the options {shown(list(options))}.")
    if by_label is not None and by_label != by_text:
        raise MedbridgeError(f"label and answer disagree: {label!r} is {by_label!r}, but the answer is {text!r}.")
    return by_text


def _tags(row: dict[str, Any]) -> dict[str, str]:
    """The row's `tags`, and every unknown key with a short text."""
    tags = {}
    given = row.get("tags")
    if given is not None:
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise MedbridgeError(f"'tags' must be an object of texts, not {shown(given)}.")
        tags.update({plain_text(key) or "": plain_text(value) or "" for key, value in given.items()})
    for key, value in row.items():
        if key not in _KNOWN and isinstance(value, str):
            text = plain_text(value)
            if text and len(text) <= MAX_TAG_LENGTH and "\n" not in text:
                tags.setdefault(plain_text(key) or "", text)
    return tags


def _floor(row: dict[str, Any], options: tuple[str, ...] | None) -> float:
    value = row.get("floor")
    if value is None:
        return 0.0 if options is None else 1 / len(options)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise MedbridgeError(f"'floor' must be a number from 0 to below 1, not {shown(value)}.")
    return float(value)


def _trace(row: dict[str, Any]) -> str | None:
    """The reasoning to imitate, without the think tags that some data sets put around it."""
    for key in _TRACE_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise MedbridgeError(f"{key!r} must be a text, not {shown(value)}.")
        text = (plain_text(value) or "").removeprefix("<think>").removesuffix("</think>").strip()
        if text:
            return text
    return None
