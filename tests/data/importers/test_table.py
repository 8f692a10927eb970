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
from medbridge.data.importers.rows import read_rows
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


def test_medxpertqa_as_published(tmp_path: Path, make_png: Callable[..., Path]) -> None:
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


MEDICAL = (
    "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
)  # fmt: skip


def mmmu_row(subject: str, split: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row of MMMU in its published form: seven columns of images, options as a Python text."""
    images = {f"image_{n}": {"bytes": png(n), "path": f"{n}.png"} if n == 1 else None for n in range(1, 8)}
    return {
        "id": f"{split}_{subject}_{number}", "question": "What does <image 1> show?",
        "options": "['one', \"two's\", '<image 1>']", "explanation": "", **images, "img_type": "['Body Scans']",
        "answer": "?" if split == "test" else "B", "topic_difficulty": "Easy", "question_type": "multiple-choice",
        "subfield": "Anatomy", **changes,
    }  # fmt: skip


def mmmu_folder(root: Path, *, merged: bool) -> Path:
    """MMMU of six subjects, one of them not medical: a folder each (MMMU/MMMU) or all together (lmms-lab/MMMU)."""
    for split, count in (("dev", 1), ("validation", 3), ("test", 2)):
        tables = {
            subject: [mmmu_row(subject, split, number) for number in range(1, count + 1)]
            for subject in (*MEDICAL, "Accounting")
        }
        if merged:
            tables = {"data": [row for rows in tables.values() for row in rows]}
        for folder, rows in tables.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), root / folder / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("merged", [False, True])
def test_mmmu_takes_the_medical_subjects_only(tmp_path: Path, merged: bool) -> None:
    found = opened(mmmu_folder(tmp_path / "MMMU", merged=merged), path=".", mapping="mmmu_medical")
    assert [len(found.split(name)) for name in ("train", "validation", "test")] == [5, 15, 0]
    assert {item.tags["subject"] for item in found.items} == set(MEDICAL)
    item = next(item for item in found.items if item.id == "mmmu_medical/validation/validation_Pharmacy_1")
    assert (item.answer, item.options, item.floor) == ("two's", ("one", "two's", "<image 1>"), 1 / 3)
    assert item.tags == {
        "subfield": "Anatomy", "question_type": "multiple-choice", "difficulty": "Easy", "subject": "Pharmacy",
    }  # fmt: skip
    said = [str(skip) for skip in found.skipped]
    assert all(skip.known for skip in found.skipped) and len(said) == 3
    assert "4 rows were passed over" in said[0] and "15 questions were read, 150 are published" in said[2]


def test_mmmu_keeps_several_images_in_order_and_open_questions(tmp_path: Path) -> None:
    images = {f"image_{n}": {"bytes": png(9 - n), "path": None} for n in (1, 2, 4)}
    rows = [
        mmmu_row("Pharmacy", "validation", 1, question="<image 2> or <image 1>, not <image 4>?", **images),
        mmmu_row("Pharmacy", "validation", 2, question_type="open", options="[]", answer="Transformation"),
    ]
    (tmp_path / "Pharmacy").mkdir()
    file = tmp_path / "Pharmacy" / "validation-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    several, open_one = opened(tmp_path, path=str(file), mapping="mmmu_medical").items
    assert [load_image(path).getpixel((0, 0))[0] for path in several.images] == [8, 7, 5]
    assert several.question == "<image 2> or <image 1>, not <image 4>?"
    assert (open_one.options, open_one.answer, open_one.floor) == (None, "Transformation", 0.0)
    assert open_one.tags["question_type"] == "open"
    # The choices only, by the mapping that docs/data.md shows.
    subjects = "(dev|validation)_(Basic_Med|Clinical_Med|Diagnostics|Pharmacy|Public_Health).*"
    where = {"id": subjects, "question_type": "multiple-choice"}
    own = {"base": "mmmu_medical", "path": str(file), "where": where, "counts": {}}
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump(own))
    assert only(tmp_path, path="choices.yaml").id == several.id


def test_another_subject_of_mmmu_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "validation-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([mmmu_row("Accounting", "validation", 1)]), file)
    with pytest.raises(MedbridgeError, match=r"no question could be read .*1 rows were passed over, as `where` says"):
        opened(tmp_path, path=str(file), mapping="mmmu_medical")


def test_where_of_a_mapping(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    make_png(tmp_path / "a.png")
    rows = [{"i": "a.png", "q": f"{number}?", "a": "x", "lang": lang, "year": 2000 + number}
            for number, lang in enumerate(("en", "zh", "en", None))]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(rows))
    mapping = {"path": "t.json", "question": "q", "images": "i", "answer": "a", "split_default": "test"}

    def questions(where: Any) -> list[str]:
        (tmp_path / "m.yaml").write_text(yaml.safe_dump({**mapping, "where": where}))
        return [item.question for item in opened(tmp_path, path="m.yaml").items]

    assert questions({}) == ["0?", "1?", "2?", "3?"]
    assert questions({"lang": "en"}) == ["0?", "2?"] and questions({"lang": "en|zh", "year": "200[12]"}) == ["1?", "2?"]
    with pytest.raises(MedbridgeError, match="no column 'language'"):
        questions({"language": "en"})
    with pytest.raises(MedbridgeError, match=r"`where` of 'lang' is no regular expression"):
        questions({"lang": "("})


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


def test_a_base_on_the_hub_with_data_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: path_vqa\npath: rows\n")
    mapping, _ = read_mapping("own.yaml", tmp_path)
    assert (mapping.path, mapping.hub) == ("rows", None)
    (tmp_path / "back.yaml").write_text("base: own.yaml\nhub: a/b\n")
    mapping, _ = read_mapping("back.yaml", tmp_path)
    assert (mapping.path, mapping.hub) == (None, "a/b")


def test_class_labels_go_by_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "question": datasets.Value("string"), "image": datasets.Image(), "modality": datasets.List(
                datasets.ClassLabel(names=["CT", "MRI"])),
            "answer": datasets.ClassLabel(names=["no", "yes"]), "organ": datasets.ClassLabel(names=["heart", "liver"]),
        }
    )  # fmt: skip
    rows = [
        {"question": f"Is it {n}?", "image": {"bytes": png(n)}, "modality": [n], "answer": n, "organ": 1 - n}
        for n in (0, 1)
    ]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    own = {"path": "saved", "question": "question", "images": "image", "answer": "answer", "yes_no": True}
    own |= {"tags": {"organ": "organ"}, "split_default": "test"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    first, second = opened(tmp_path, mapping="own.yaml").items
    assert (first.options, first.answer, second.answer) == (("Yes", "No"), "No", "Yes")
    assert (first.tags["organ"], second.tags["organ"]) == ("liver", "heart") and first.floor == 0.5


def test_the_number_of_an_answer_may_be_a_class(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    make_png(tmp_path / "a.png")
    own = {"path": "t.jsonl", "question": "q", "images": "i", "options": "o", "answer_index": "a"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**own, "split_default": "test"}))
    for answer, options, right in (
        ("liver", ["heart", "liver"], "liver"), (1, ["1", "2"], "2"), ("1", ["1", "2"], "2"), ("B", ["B", "A"], "B"),
    ):  # fmt: skip
        row = {"q": "Which?", "i": "a.png", "o": options, "a": answer}
        (tmp_path / "t.jsonl").write_text(json.dumps(row))
        assert only(tmp_path, mapping="own.yaml").answer == right


@pytest.mark.parametrize(
    ("question", "options", "kept"),
    [
        ("What is shown?\nAnswer Choices: (A) lung (B) liver", ["lung", "liver"], "What is shown?"),
        ("What? Answer Choices:\n(A) lung", ["lung", "liver"], "What?"),
        ("What is shown?", ["lung", "liver"], "What is shown?"),
        ("Answer Choices: (A) lung", ["lung", "liver"], "Answer Choices: (A) lung"),
        ("What? Answer Choices: any", None, "What? Answer Choices: any"),
    ],
)
def test_what_a_question_says_of_its_options_is_left_out(
    tmp_path: Path, make_png: Callable[..., Path], question: str, options: list[str] | None, kept: str
) -> None:
    """The published order of MedXpertQA's options contradicts any other."""
    make_png(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text(json.dumps({"q": question, "i": "a.png", "o": options, "a": "lung"}))
    until = read_mapping("medxpertqa_mm", tmp_path)[0].question_until
    own = {"path": "t.jsonl", "question": "q", "images": "i", "options": "o", "answer": "a", "question_until": until}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**own, "split_default": "test"}))
    assert until is not None and only(tmp_path, mapping="own.yaml").question == kept
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**own, "question_until": "("}))
    with pytest.raises(MedbridgeError, match="`question_until` is no regular expression"):
        opened(tmp_path, mapping="bad.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'q,i\n"a"b,c\n', r"t\.csv:2: not valid CSV"),
        (b"q,i\nfine,1\ncaf\xe9,1\n", r"t\.csv:3: not UTF-8 text"),
        (b"\n\n", "is empty"),
    ],
)
def test_csv_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(MedbridgeError, match=message):
        list(read_rows(tmp_path / "t.csv"))


def test_empty_lines_before_the_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\r\n\r\nq,i\r\na,b\r\n")
    assert list(read_rows(tmp_path / "t.csv")) == [(4, {"q": "a", "i": "b"})]


def test_a_row_whose_id_is_taken_is_named(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    make_png(tmp_path / "a.png")
    own = {"path": "t.csv", "question": "q", "images": "i", "answer": "a", "id": "n", "split_default": "test"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "t.csv").write_text("n,q,i,a\n1,Which?,a.png,liver\n2,Which?,a.png,lung\n1,What?,a.png,CT\n")
    with pytest.raises(MedbridgeError, match=r"/t\.csv:4: a question of the id '.*/1' is already there"):
        opened(tmp_path, mapping="own.yaml")


def test_a_table_without_a_mapping_names_them(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"needs a `mapping`.*pmc_vqa"):
        opened(tmp_path, path="t.csv")
