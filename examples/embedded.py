"""What the examples run on when nothing is downloaded: medbridge's small vision-language model, made from nothing, and
its questions on brain slices. Nothing of it is needed to use the kernels with a model and data of one's own.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from medbridge.data import (
    DataSettings,
    PromptSettings,
    SourceSettings,
    build_prompt,
    load_image,
    open_items,
    permutation,
    target_completion,
)
from medbridge.model import FromNothing, init_model  # makes torchvision importable beside a CPU build of torch


def questions(folder: Path, data: str | None) -> list[dict[str, Any]]:
    """Training questions as rows of `text`, `image` and `target`, the completion to be found.

    From JSON lines in the folder `data` (see the README), or on slices of an average brain, built in `folder` at first
    use.
    """
    source = SourceSettings(kind="brain") if data is None else SourceSettings(kind="jsonl", path=data)
    items = open_items(DataSettings(sources=[source]), base_dir=Path.cwd(), cache_dir=folder).split("train")
    style = PromptSettings(answer_style="text", system="")
    rows = []
    for item in items:
        order = permutation(item, 0, 0)
        (message,) = build_prompt(item, order, style)
        target = target_completion(item, order, style)
        rows.append({"text": message["content"][-1]["text"], "image": item.images[0], "target": target})
    return rows


def model_from_nothing(folder: Path, rows: list[dict[str, Any]]) -> str:
    """A Qwen2.5-VL of 1.4 million random parameters as a Hugging Face folder."""
    path = folder / "model"
    if not path.is_dir():
        init_model(path, FromNothing(), sorted({row[name] for row in rows for name in ("text", "target")}), seed=0)
    return str(path)


def chat(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A question in the chat format of Hugging Face."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}]


def picture(row: dict[str, Any]) -> Any:
    """The image of a question."""
    return load_image(row["image"])


def likeness(completion: str, target: str) -> float:
    """The reward, from 0 to 1: how much of the right completion is there.

    Right or wrong alone would tell a model that knows nothing the same each time.
    """
    return SequenceMatcher(None, completion, target).ratio()
