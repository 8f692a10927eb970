"""One question of a log with its completions, and how its parts are found under the names that tools give them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medbridge.data import Item
from medbridge.data.prompts import LETTERS
from medbridge.errors import MedbridgeError

MAX_LINE = 64 << 20
"""Longest line, and largest JSON file within a zip, that is read, in bytes."""

QUESTION_KEYS = ("question", "query", "problem", "prompt", "input")
"""Where a question stands, in order of preference."""

_ANSWER_KEYS = ("answer", "answer_label", "target", "gold", "label", "answer_idx", "answerKey", "correct_option")
_IMAGE_KEYS = ("image_id", "image_name", "image_path", "image_paths", "img_name", "image", "input_media")
_STRATUM_KEYS = ("dataset_name", "category", "subject", "subset", "subfield", "task")


@dataclass(frozen=True, slots=True)
class Logged:
    """One question with its completions.

    Attributes:
        item: the question; without image files; its `cluster` tag says which images it shows, where that is known.
        completions: sampled ones, in order.
        greedy: the greedy one, where the log tells it apart.
        scores: what the log itself made of each completion, right or wrong; None where it says nothing.
    """

    item: Item
    completions: tuple[str, ...]
    greedy: str | None = None
    scores: tuple[bool | None, ...] = field(default=())


def message_text(content: Any) -> str:
    """The text of a chat message, without its images."""
    if isinstance(content, str):
        return content
    parts = [part.get("text", "") for part in content or [] if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(parts)


def logged_item(row: Mapping[str, Any], dataset: str, identity: str, whole: Mapping[str, Any]) -> Item:
    """The question of a row: without image files, and with a tag `cluster` for what shows the same images.

    Args:
        row: where question, options and answer stand, under any of the usual keys.
        dataset, identity: of the id, `dataset/identity`.
        whole: where the images are named, if not in `row`.

    Raises:
        MedbridgeError: there is no question, or no right answer among its options.
    """
    question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if question is None:
        raise MedbridgeError(f"no question under any of: {', '.join(QUESTION_KEYS)}.")
    options = _options(row)
    answer = _answer(row, options)
    tags = {key: str(row[key]) for key in _STRATUM_KEYS if isinstance(row.get(key), str) and row[key].strip()}
    named = ((one.get(key)) for key in _IMAGE_KEYS for one in (whole, row))
    image = next((value for value in named if value not in (None, "", [])), None)
    shown = json.dumps(image, sort_keys=True, default=str) if image is not None else question
    tags["cluster"] = hashlib.blake2b(shown.encode("utf-8", "replace"), digest_size=8).hexdigest()
    tags["task"] = dataset
    return Item(
        id=f"{dataset}/{identity}", dataset=dataset, split="test", question=question, answer=answer, options=options,
        images=(), tags=tags, floor=0.0 if options is None else 1 / len(options),
    )  # fmt: skip


def _options(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    found = row.get("options", row.get("choices"))
    if isinstance(found, str):
        found = _written(found)
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        found = found["text"]
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found)]
    if found is None and all(isinstance(row.get(letter), str) for letter in "AB"):
        letters = [letter for letter in LETTERS if isinstance(row.get(letter), str)]
        found = [row[letter] for letter in letters]
    if not isinstance(found, list | tuple) or not found:
        return None
    texts = [re.sub(r"^\(?[A-Z][.):]\s+", "", str(option)).strip() for option in found]
    return tuple(texts)


def _written(text: str) -> Any:
    """Options as JSON, or a line each ("A. heart")."""
    try:
        return json.loads(text)
    except ValueError:
        return [line.strip() for line in text.splitlines() if line.strip()] or None


def _answer(row: Mapping[str, Any], options: tuple[str, ...] | None) -> str:
    for key in _ANSWER_KEYS:
        value = row.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None or isinstance(value, bool | dict | list) or str(value).strip() == "":
            continue
        text = str(value).strip()
        if options is None:
            return text
        if text in options:
            return text
        letter = re.fullmatch(r"\(?([A-Za-z])[.):]?", text)
        if letter and LETTERS.index(letter[1].upper()) < len(options):
            return options[LETTERS.index(letter[1].upper())]
        if text.isdecimal() and int(text) < len(options):
            return options[int(text)]
        folded = [option for option in options if option.casefold() == text.casefold()]
        if len(folded) == 1:
            return folded[0]
    raise MedbridgeError(f"no right answer under any of {', '.join(_ANSWER_KEYS)} that is one of the options.")
