"""The English questions of SLAKE 1.0 (CC BY 4.0): `train.json`, `validate.json`, `test.json` beside `imgs/`.

The Chinese rows are left out: they ask about the same images in other splits, so that both languages together
leak 142 images between train and test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medbridge.data.images import ImageCheck, check_image, resolve_image
from medbridge.data.items import Item, Skip
from medbridge.errors import MedbridgeError

FILES = {"train": "train.json", "validation": "validate.json", "test": "test.json"}
TAGS = ("modality", "location", "content_type", "answer_type", "base_type")


def read_slake(folder: Path, *, image_root: Path | None = None, check: ImageCheck = "header") -> Iterator[Item | Skip]:
    """The English questions, split by split; a Skip for every row that is none.

    A closed question answered yes or no gets these two options and the floor 1/2. The other closed questions
    ("liver or heart?") have no listed options: they are open questions with the floor 1/2, which is never
    below what guessing one of the named things would score. Open questions have the floor 0.

    One English row of the published train.json has an empty answer: such rows are listed as known skips, no
    errors. Raises MedbridgeError if a file is missing or not SLAKE's.
    """
    images = image_root if image_root is not None else folder / "imgs"
    seen: set[str] = set()
    for split, name in FILES.items():
        for number, row in enumerate(_rows(folder / name), start=1):
            if isinstance(row, dict) and row.get("q_lang") == "zh":
                continue
            item_id = None
            known = False
            try:
                item_id = f"slake/{split}/{_qid(row)}"
                known = isinstance(row.get("answer"), str) and not row["answer"].strip()
                yield _item(row, item_id, split, images, check, seen)
            except MedbridgeError as error:
                yield Skip(str(folder / name), None, item_id, f"row {number}: {error}", known)


def _rows(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MedbridgeError(
            f"{file}: can't be read ({error.strerror or error}). `path` must be SLAKE's folder with "
            f"{', '.join(FILES.values())} and imgs/."
        ) from error
    except (ValueError, RecursionError) as error:
        raise MedbridgeError(f"{file}: not valid JSON ({error}). Get the file again.") from error
    if not isinstance(rows, list):
        raise MedbridgeError(f"{file}: a list of questions is needed, found a {type(rows).__name__}.")
    return rows


def _qid(row: Any) -> int:
    if not isinstance(row, dict):
        raise MedbridgeError(f"an object is needed, not a {type(row).__name__}.")
    qid = row.get("qid")
    if not isinstance(qid, int) or isinstance(qid, bool):
        raise MedbridgeError("'qid' must be a whole number.")
    if row.get("q_lang") != "en":
        raise MedbridgeError(f"question {qid}: 'q_lang' is {row.get('q_lang')!r}, neither 'en' nor 'zh'.")
    return qid


def _item(row: dict[str, Any], item_id: str, split: str, images: Path, check: ImageCheck, seen: set[str]) -> Item:
    for key in ("question", "answer", "img_name", *TAGS):
        if not isinstance(row.get(key), str):
            raise MedbridgeError(f"the text {key!r} is missing.")
    if row["answer_type"] not in ("CLOSED", "OPEN"):
        raise MedbridgeError(f"'answer_type' is {row['answer_type']!r}, neither 'CLOSED' nor 'OPEN'.")
    path = resolve_image(images, row["img_name"])
    if path not in seen:
        check_image(path, check)
        seen.add(path)
    answer = " ".join(row["answer"].split())
    options = None
    floor = 0.0
    if row["answer_type"] == "CLOSED":
        floor = 0.5
        word = answer.rstrip(".").casefold()
        if word in ("yes", "no"):
            options, answer = ("Yes", "No"), word.capitalize()
    return Item(
        id=item_id,
        dataset="slake",
        split=split,
        question=" ".join(row["question"].split()),
        answer=answer,
        options=options,
        images=(path,),
        tags={key: row[key].strip() for key in TAGS},
        floor=floor,
    )
