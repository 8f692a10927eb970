"""Tables by a mapping: the published formats of the ready-made mappings, made on the spot, and every form of cells."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from medbridge.data import DataSettings, Item, ItemSet, SourceSettings, import_to_folder, load_image, open_items
from medbridge.data.importers.mapping import read_mapping, ready_made
from medbridge.errors import MedbridgeError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def opened(root: Path, **source: Any) -> ItemSet:
    data = DataSettings(sources=[SourceSettings(kind="table", **source)])
    return open_items(data, base_dir=root, cache_dir=root / "cache")


def only(root: Path, **source: Any) -> Item:
    (item,) = opened(root, **source).items
    return item


def test_pmc_vqa_as_published(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    make_png(tmp_path / "images" / "PMC1064097_F1.jpg")
    columns = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]
    choices = ["A:Diffuse uptake pattern", "B:Focal uptake pattern", "C:No uptake pattern", " D: Cannot determine"]
    row = ["PMC1064097_F1.jpg", "What is the uptake pattern in the breast?", "Focal uptake pattern", *choices, "B"]
    for name in ("train", "test"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([columns, row])
    found = opened(tmp_path, path=".", mapping="pmc_vqa")
    assert [item.split for item in found.items] == ["train", "test"]
    assert found.items[0].options == (
        "Diffuse uptake pattern", "Focal uptake pattern", "No uptake pattern", "Cannot determine",
    )  # fmt: skip
    assert found.items[0].answer == "Focal uptake pattern"


def test_vqa_rad_as_published(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    make_png(tmp_path / "VQA_RAD Image Folder" / "synpic54610.jpg")
    shared = {"image_name": "synpic54610.jpg", "image_organ": "HEAD", "question_type": "PRES"}
    rows = [
        {"qid": "0", "phrase_type": "freeform", "answer": "Yes", "answer_type": "CLOSED", "question": "Infarcted?"},
        {"qid": 1, "phrase_type": "test_para", "answer": "no", "answer_type": "CLOSED", "question": "Any mass?"},
        {"qid": "2", "phrase_type": "test_freeform", "answer": 4, "answer_type": "OPEN", "question": "How many?"},
    ]
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps([{**shared, **row} for row in rows]))
    found = opened(tmp_path, path=".", mapping="vqa_rad")
    assert [item.split for item in found.items] == ["train", "test", "test"]
    assert [item.options for item in found.items] == [("Yes", "No"), ("Yes", "No"), None]
    assert [item.floor for item in found.items] == [0.5, 0.5, 0.0] and found.items[2].answer == "4"
    assert found.items[0].tags["modality_organ"] == "HEAD"
    assert any("3 questions were read, 2248 are published" in str(skip) and skip.known for skip in found.skipped)


def test_medvlthinker_eval_keeps_the_order_of_images(tmp_path: Path) -> None:
    images = [{"bytes": png(value), "path": None} for value in (9, 3, 6)]
    row = {
        "images": images, "question": "What?", "options": "A. Edema\nB. Mass", "answer_label": "B", "answer": "Mass",
        "dataset_name": "MedXpertQA-MM", "dataset_index": 7,
    }  # fmt: skip
    other = {**row, "dataset_name": "slake_closed", "options": '{"A": "Edema", "B": "Mass"}', "images": images[:1]}
    pq.write_table(pa.Table.from_pylist([row, other]), tmp_path / "test-00000-of-00001.parquet")
    found = opened(tmp_path, path=".", mapping="medvlthinker_eval")
    assert [item.id for item in found.items] == ["medxpertqa_mm/test/7", "slake/test/7"]
    assert [load_image(path).getpixel((0, 0)) for path in found.items[0].images] == [(9, 0, 0), (3, 0, 0), (6, 0, 0)]
    assert found.items[0].images[0] == found.items[1].images[0]
    assert sorted(skip.item or "" for skip in found.skipped) == ["medxpertqa_mm", "slake"]


def test_medxpertqa_and_mmmu(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    make_png(tmp_path / "images" / "MM-2000-a.jpeg")
    row = {
        "id": "MM-2000", "question": "A woman ...", "options": dict(zip("ABCDE", "vwxyz", strict=True)), "label": "D",
        "images": ["MM-2000-a.jpeg"], "medical_task": "Diagnosis", "body_system": "Digestive",
        "question_type": "Reasoning",
    }  # fmt: skip
    (tmp_path / "MM").mkdir()
    (tmp_path / "MM" / "test.jsonl").write_text(json.dumps(row) + "\n")
    item = only(tmp_path, path=".", mapping="medxpertqa_mm")
    assert (item.answer, item.floor, item.tags["body_system"]) == ("y", 0.2, "Digestive")
    images = {f"image_{n}": {"bytes": png(n), "path": None} if n < 3 else None for n in range(1, 8)}
    mmmu = {
        "id": "validation_Pharmacy_1", "question": "<image 1>?", "options": "['one', \"two's\"]", "answer": "B",
        "subfield": "Pharmacy", "question_type": "multiple-choice", "topic_difficulty": "Easy", **images,
    }  # fmt: skip
    (tmp_path / "Pharmacy").mkdir()
    pq.write_table(pa.Table.from_pylist([mmmu]), tmp_path / "Pharmacy" / "validation-00000-of-00001.parquet")
    item = only(tmp_path, path=".", mapping="mmmu_medical")
    assert item.answer == "two's" and len(item.images) == 2 and item.split == "validation"


def test_a_saved_data_set_and_a_mapping_of_ones_own(tmp_path: Path) -> None:
    features = datasets.Features({"pic": datasets.Image(), "q": datasets.Value("string"), "n": datasets.Value("int32"),
                                  "o": datasets.List(datasets.Value("string"))})  # fmt: skip
    rows = {"pic": [{"bytes": png(n), "path": None} for n in range(40)], "q": ["Which?"] * 40, "n": [1] * 40,
            "o": [["red", "blue"]] * 40}  # fmt: skip
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)})
    saved.save_to_disk(str(tmp_path / "saved"))
    mapping = {"path": "saved", "dataset": "mine", "question": "q", "images": "pic", "options": "o",
               "answer_index": "n", "licence": "Mine."}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mapping))
    found = opened(tmp_path, path="mine.yaml")
    assert len(found.items) == 40 and {item.answer for item in found.items} == {"blue"}
    source = SourceSettings(kind="table", path="mine.yaml")
    import_to_folder(source, tmp_path / "out", base_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert "Mine." in (tmp_path / "out" / "README.md").read_text()


def test_a_mapping_that_starts_from_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: pmc_vqa\npath: PMC\nimage_prefix: figures/\n")
    mapping, folder = read_mapping("mine.yaml", tmp_path)
    assert (mapping.image_prefix, mapping.question, mapping.path, folder) == ("figures/", "Question", "PMC", tmp_path)


@pytest.mark.parametrize("name", ready_made())
def test_ready_made_mappings_say_licence_and_traps(name: str, tmp_path: Path) -> None:
    mapping, _ = read_mapping(name, tmp_path)
    assert "published" in mapping.licence or "licence" in mapping.licence
    assert mapping.traps


def test_a_table_without_a_mapping_names_them(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"needs a `mapping`.*pmc_vqa"):
        opened(tmp_path, path="t.csv")
