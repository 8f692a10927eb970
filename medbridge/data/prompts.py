"""How a question is put to a model and what a right completion looks like; `answers` reads completions."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medbridge.data.items import MAX_OPTIONS, Item, Permutation
from medbridge.errors import MedbridgeError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:MAX_OPTIONS]

DEFAULT_SYSTEM = (
    "Look at the image and answer the question. First reason inside <think></think>, then give the final "
    "answer inside <answer></answer>: the letter of the right option, or its text where there are no letters."
)


class PromptSettings(BaseModel):
    """How questions are asked and answers are given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    answer_style: Literal["letter", "text"] = Field(
        "letter",
        description="What a model answers a multiple-choice question with: the displayed option's `letter`, "
        "or its `text`. Very small models learn texts far sooner than letters.",
    )
    system: str = Field(
        DEFAULT_SYSTEM,
        description="System message. An empty text sends none, which keeps prompts short for a tiny model.",
    )
    number_tolerance: float | None = Field(
        0.0,
        ge=0,
        lt=1,
        description="An open question whose right answer is a number, with a unit or without, takes any number within "
        "this relative tolerance, in any unit of the same kind: `5 cm` for `50 mm`, `two` for `2`. "
        "None: numbers are words like others.",
    )
    f1_from: float | None = Field(
        None,
        gt=0,
        le=1,
        description="An open answer is also right where the F1 of its words and those of the right answer is at least "
        "this. None: all words must agree.",
    )


def permutation(item: Item, seed: int, sample: int) -> Permutation:
    """Order in which sample `sample` of an item shows its options: displayed position -> canonical index.

    Each sample's order is drawn uniformly and independently. Balanced orders would look tidier and be wrong:
    a model that always picks one position would then be right in exactly n/m of n samples, more evenly than
    by chance, and its Pass@k would stand above the guessing floor 1 - (1 - 1/m)^k. Depends on the item's id,
    `seed` and `sample` only; any integer `sample` is valid (the greedy sample is -1). An open question has
    the empty permutation.
    """
    if item.options is None:
        return ()

    def rank(index: int) -> bytes:
        # A keyed hash instead of a random generator: the order can never change with a library's version.
        return hashlib.blake2b(f"{seed}\x00{item.id}\x00{sample}\x00{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(len(item.options)), key=rank))


def build_prompt(item: Item, permutation: Permutation, settings: PromptSettings) -> list[dict[str, Any]]:
    """Chat messages in the Hugging Face format, with one `{"type": "image"}` entry for each of the images.

    The images come first, then the question, then the options, one a line: `A) text` with answer style
    "letter", `- text` with "text". Options are last so that all permutations of an item share everything
    before them.
    """
    check_permutation(item, permutation)
    lines = [item.question]
    if item.options is not None:
        for position, index in enumerate(permutation):
            mark = f"{LETTERS[position]})" if settings.answer_style == "letter" else "-"
            lines.append(f"{mark} {item.options[index]}")
    content: list[dict[str, Any]] = [{"type": "image"} for _ in item.images]
    content.append({"type": "text", "text": "\n".join(lines)})
    messages: list[dict[str, Any]] = []
    if settings.system:
        messages.append({"role": "system", "content": [{"type": "text", "text": settings.system}]})
    messages.append({"role": "user", "content": content})
    return messages


def target_completion(item: Item, permutation: Permutation, settings: PromptSettings) -> str:
    """The completion to imitate: `<think>trace</think><answer>X</answer>`, without a trace the answer alone.

    X is the displayed letter of the right option, or the answer's text (answer style "text", or an open
    question). A trace is used as it stands, so it should name options by their text: letters change with the
    permutation.
    """
    check_permutation(item, permutation)
    answer = item.answer
    if item.answer_index is not None and settings.answer_style == "letter":
        answer = LETTERS[permutation.index(item.answer_index)]
    thought = f"<think>{item.trace}</think>" if item.trace else ""
    return f"{thought}<answer>{answer}</answer>"


def check_permutation(item: Item, permutation: Permutation) -> None:
    """Raise MedbridgeError unless `permutation` orders exactly the options of `item`."""
    size = 0 if item.options is None else len(item.options)
    if sorted(permutation) == list(range(size)):
        return
    if item.options is None:
        raise MedbridgeError(f"item {item.id!r} is open: its permutation must be empty, not {permutation}.")
    raise MedbridgeError(
        f"item {item.id!r} has {size} options, which {permutation} does not order: each of the indices "
        f"0 to {size - 1} must stand there once."
    )
