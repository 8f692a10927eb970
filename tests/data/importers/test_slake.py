"""SLAKE: a folder in its published form, and the real one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import DataSettings, Item, Skip, SourceSettings, open_items
from medbridge.data.importers.slake import FILES, read_slake
from medbridge.errors import MedbridgeError


def slake_row(qid: int, **changes: Any) -> dict[str, Any]:
    row = {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "Does the picture contain  liver?",
        "answer": "Yes",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "CLOSED",
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    }
    return {**row, **changes}


@pytest.fixture
def folder(tmp_path: Path, make_png: Callable[..., Path]) -> Path:
    make_png(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    rows = {
        "train.json": [slake_row(0), slake_row(1, q_lang="zh", answer="\u662f"), slake_row(2, answer="no.")],
        "validate.json": [slake_row(10, answer_type="OPEN", answer="Liver, Heart")],
        "test.json": [slake_row(20, question="Lung or liver?", answer="Liver")],
    }
    for name, content in rows.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_english_rows_become_items(folder: Path) -> None:
    items = [entry for entry in read_slake(folder) if isinstance(entry, Item)]
    assert [(item.id, item.answer, item.options, item.floor) for item in items] == [
        ("slake/train/0", "Yes", ("Yes", "No"), 0.5),
        ("slake/train/2", "No", ("Yes", "No"), 0.5),
        ("slake/validation/10", "Liver, Heart", None, 0.0),
        ("slake/test/20", "Liver", None, 0.5),
    ]
    assert items[0].question == "Does the picture contain liver?"
    assert items[0].stratum(["modality", "location", "content_type", "answer_type", "base_type"]) == (
        "MRI / Abdomen / Organ / CLOSED / vqa"
    )
    assert items[0].images == (str(folder / "imgs/xmlab1/source.jpg"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (slake_row(0, img_name="../../secret.png"), "leaves the data folder"),
        (slake_row(0, img_name="xmlab2/source.jpg"), "is missing"),
        (slake_row(0, q_lang="fr"), "neither 'en' nor 'zh'"),
        (slake_row(0, answer_type="MAYBE"), "neither 'CLOSED' nor 'OPEN'"),
        (slake_row(0, modality=None), "'modality' is missing"),
        ({**slake_row(0), "qid": "seven"}, "'qid' must be"),
        ("text", "an object is needed"),
    ],
)
def test_bad_rows_are_skips(folder: Path, row: Any, message: str) -> None:
    (folder / "train.json").write_text(json.dumps([row, slake_row(5)]))
    skip, item, *_ = read_slake(folder)
    assert isinstance(skip, Skip) and message in str(skip) and "row 1" in str(skip) and not skip.known
    assert isinstance(item, Item)


def test_an_empty_answer_is_a_known_defect(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps([slake_row(0, answer=" "), slake_row(1)]))
    source = SourceSettings(kind="slake", path=str(folder))
    found = open_items(DataSettings(sources=[source]), base_dir=folder, cache_dir=folder)
    assert [skip.item for skip in found.skipped] == ["slake/train/0"]
    assert len(found.items) == 3


@pytest.mark.parametrize("content", ["{", '{"a": 1}', None])
def test_broken_files_are_errors(folder: Path, content: str | None) -> None:
    if content is None:
        (folder / "test.json").unlink()
    else:
        (folder / "test.json").write_text(content)
    with pytest.raises(MedbridgeError, match=r"test\.json: (can't be read|not valid JSON|a list)"):
        list(read_slake(folder))


def test_the_real_slake(real_data: Path) -> None:
    source = SourceSettings(kind="slake", path=str(real_data / "slake"))
    found = open_items(DataSettings(sources=[source]), base_dir=real_data, cache_dir=real_data)
    # The published train.json has one question without an answer.
    assert [skip.item for skip in found.skipped] == ["slake/train/1622"]
    assert [len(found.split(split)) for split in FILES] == [4918, 1053, 1061]
    closed = Counter(item.split for item in found.items if item.tags["answer_type"] == "CLOSED")
    assert closed == {"train": 1943, "validation": 422, "test": 416}
    images = {split: {image for item in found.split(split) for image in item.images} for split in FILES}
    assert [len(images[split]) for split in FILES] == [450, 96, 96]
    assert not images["train"] & images["test"] and not images["train"] & images["validation"]
