"""One question of a log with its completions, and how its parts are found under the names that tools give them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medbridge.data import Item
from medbridge.data.prompts import LETTERS
from medbridge.errors import MedbridgeError

MAX_LINE = 64 << 20
"""Longest line, and largest JSON file within a zip, that is read, in bytes."""

QUESTION_KEYS = ("question", "query", "problem", "prompt", "input")
"""Where a question stands, in order of preference."""

YES_NO = ("yes", "no")

_ANSWER_KEYS = ("answer", "answer_label", "target", "gold", "label", "answer_idx", "answerKey", "correct_option")
_IMAGE_KEYS = ("image_id", "image_name", "image_path", "image_paths", "img_name", "image", "input_media")
_STRATUM_KEYS = ("dataset_name", "category", "subject", "subset", "subfield", "task")


@dataclass(frozen=True, slots=True)
class Logged:
    """One question with its completions.

    Attributes:
        item: the question; without image files.
        completions: sampled ones, in order.
        greedy: the greedy one, where the log tells it apart.
        scores: what the log itself made of each completion, right or wrong; None where it says nothing.
        cut: how many completions ended at their token limit; None where the log doesn't say.
        accepted: of an open question, answers that are as right as the item's.
        shows: what tells the images apart that it shows, or else the question.
        files: logs that hold completions of it.
    """

    item: Item
    completions: tuple[str, ...]
    greedy: str | None = None
    scores: tuple[bool | None, ...] = field(default=())
    cut: int | None = None
    accepted: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    files: int = 1

    def joined(self, other: Logged) -> Logged:
        """This question with the completions of another row of it, too."""
        return replace(
            self, completions=self.completions + other.completions, greedy=self.greedy or other.greedy,
            scores=self.scores + other.scores,
            cut=None if self.cut is None or other.cut is None else self.cut + other.cut,
        )  # fmt: skip


def message_text(content: Any) -> str:
    """The text of a chat message, without its images."""
    if isinstance(content, str):
        return content
    parts = [part.get("text", "") for part in content or [] if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(parts)


def reason_of(error: Exception) -> str:
    """Why a row is left out; what Python says of a wrong type is no help."""
    if isinstance(error, TypeError | AttributeError | KeyError):
        return f"not in the form of its format ({type(error).__name__})."
    return str(error) or type(error).__name__


def storable(value: Any) -> Any:
    """JSON without lone surrogates, which can be neither shown nor stored."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode("utf-8", "replace"))
    return value


def logged(
    row: Mapping[str, Any],
    dataset: str,
    identity: str,
    completions: Sequence[str],
    *,
    whole: Mapping[str, Any],
    **more: Any,
) -> Logged:
    """The question of a row with its completions.

    Args:
        row: where question, options and answer stand, under any of the usual keys.
        dataset, identity: of the id, `dataset/identity`.
        completions: at least one, or `greedy` is given.
        whole: where the images are named, if not in `row`.
        more: other fields.

    Raises:
        MedbridgeError: there is no question, or no one right answer among its options.
    """
    question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if question is None:
        raise MedbridgeError(f"no question under any of: {', '.join(QUESTION_KEYS)}.")
    options = options_of(row)
    answer, *accepted = [right_option(row, options)] if options is not None else _open_answers(row)
    tags = {key: str(row[key]) for key in _STRATUM_KEYS if isinstance(row.get(key), str) and row[key].strip()}
    tags["task"] = dataset
    named = ((one.get(key)) for key in _IMAGE_KEYS for one in (whole, row))
    image = next((value for value in named if value not in (None, "", [])), question)
    images = image if isinstance(image, list) else [image]
    # A question that a coin answers is no open one: guessing is right half of the time.
    floor = 1 / len(options) if options is not None else 0.5 if answer.casefold() in YES_NO else 0.0
    item = Item(
        id=f"{dataset}/{identity}", dataset=dataset, split="test", question=question, answer=answer, options=options,
        images=(), tags=tags, floor=floor,
    )  # fmt: skip
    return Logged(item, tuple(completions), accepted=tuple(accepted), shows=tuple(map(_digest, images)), **more)


def _digest(image: Any) -> str:
    """A short name of whatever a log puts for an image, which may be the image itself."""
    content = json.dumps(image, sort_keys=True, default=str).encode("utf-8", "replace")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def options_of(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The options of a row, under any of the usual keys; None where there are none."""
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


def right_option(row: Mapping[str, Any], options: Sequence[str]) -> str:
    """The one option that a row says is right, by text, letter or number (from 0).

    A number beside options that are numbers themselves is one of them as a text ("1"), and the place of one as a
    number (1). Texts and letters go before numbers; where they name different options, none is right for sure.
    """
    named: dict[str, str] = {}  # the option -> where it is said to be right
    numbered: dict[str, str] = {}
    for key in _ANSWER_KEYS:
        value = row.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < len(options):
                numbered.setdefault(options[one], key)
            elif isinstance(one, str) and (option := _named(one.strip(), options)) is not None:
                named.setdefault(option, key)
            elif isinstance(one, str) and one.strip().isdecimal() and int(one) < len(options):
                numbered.setdefault(options[int(one)], key)
            elif isinstance(one, int | float) and str(one) in options:
                named.setdefault(str(one), key)
    if len(named) > 1:
        told = ", ".join(f"{text!r} under {key!r}" for text, key in named.items())
        raise MedbridgeError(f"several right answers ({told}); one is compared with.")
    for found in (named, numbered):
        if found:
            return next(iter(found))
    raise MedbridgeError(f"no right answer under any of {', '.join(_ANSWER_KEYS)} that is one of the options.")


def _named(text: str, options: Sequence[str]) -> str | None:
    """The option that a text is, or whose letter."""
    if text in options:
        return text
    letter = re.fullmatch(r"\(?([A-Za-z])[.):]?", text)
    if letter and LETTERS.index(letter[1].upper()) < len(options):
        return options[LETTERS.index(letter[1].upper())]
    folded = [option for option in options if option.casefold() == text.casefold()]
    return folded[0] if len(folded) == 1 else None


def _open_answers(row: Mapping[str, Any]) -> list[str]:
    """The right answer of an open question, and others that are accepted as well."""
    for key in _ANSWER_KEYS:
        value = row.get(key)
        found = [
            str(one).strip()
            for one in (value if isinstance(value, list) else [value])
            if isinstance(one, str | int | float) and not isinstance(one, bool) and str(one).strip()
        ]
        if found:
            return list(dict.fromkeys(found))
    raise MedbridgeError(f"no right answer under any of {', '.join(_ANSWER_KEYS)}.")
