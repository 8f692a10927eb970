"""Leaks between splits and data sets, and duplicates within a split, on pictures made for it and on published sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medbridge.data import DataSettings, Item, ItemSet, SourceSettings, check_items, open_items
from medbridge.data.check import CheckReport
from medbridge.data.leaks import Exposure, normalised

MakeItem = Callable[..., Item]


@pytest.fixture
def scan(tmp_path: Path) -> Callable[..., str]:
    """Write a picture with smooth shapes, of its own for each seed."""

    def make(name: str, seed: int, size: int = 160, **options: Any) -> str:
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 9), np.uint8)
        image = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).resize((size, size))
        image.save(tmp_path / name, **options)
        return str(tmp_path / name)

    return make


@pytest.fixture
def ask(make_item: MakeItem) -> Callable[..., Item]:
    """A question by its id "DATASET/SPLIT/INDEX"."""

    def make(item_id: str, *images: str, **changes: Any) -> Item:
        dataset, split, _ = item_id.split("/")
        return make_item(id=item_id, dataset=dataset, split=split, images=images, **changes)

    return make


def exposure(report: CheckReport, held_out: str, seen_in: str) -> Exposure:
    (found,) = [entry for entry in report.leaks.exposures if (entry.held_out, entry.seen_in) == (held_out, seen_in)]
    return found


def test_a_benchmark_that_another_data_set_trains_on(scan: Callable[..., str], ask: Callable[..., Item]) -> None:
    same, other = scan("same.png", 1), scan("other.png", 2)
    copy, near = scan("copy.bmp", 1), scan("near.jpg", 2, 130, quality=70)
    items = [
        ask("web/train/0", same),
        ask("web/train/1", other, question="Is it large?"),
        ask("web/validation/0", scan("third.png", 3)),
        ask("bench/test/0", copy, question="what is  seen"),
        ask("bench/test/1", copy, question="Something else?", answer="Mass"),
        ask("bench/test/2", near, question="Is it large?", answer="Mass"),
        ask("bench/test/3", scan("fourth.png", 4), options=None, answer="3", floor=0.0),
    ]
    report = check_items(ItemSet(items, []))
    leaks = report.leaks
    (shared,) = leaks.shared_images
    assert [Path(file).name for file in shared.files] == ["same.png", "copy.bmp"]
    assert shared.items == {"web/train": ["web/train/0"], "bench/test": ["bench/test/0", "bench/test/1"]}
    (question,) = leaks.shared_questions
    assert question.items == {"web/train": ["web/train/0"], "bench/test": ["bench/test/0"]}
    (alike,) = leaks.near_images
    assert (Path(alike.file).name, Path(alike.seen).name, alike.splits) == ("near.jpg", "other.png", ("train", "test"))
    assert alike.distance <= 6 and alike.correlation >= 0.998
    (nearly,) = leaks.near_questions
    assert nearly.items == {"web/train": ["web/train/1"], "bench/test": ["bench/test/2"]}
    assert exposure(report, "bench/test", "web/train") == Exposure(
        "bench/test", "web/train", of_items=4, images=1, items=2, share=0.5, questions=1,
        near_images=1, near_items=1, near_questions=1, same_text=1,
    )  # fmt: skip
    assert len(report.problems) == 2 and len(report.remarks) == 2
    assert "web/train and bench/test" in report.problems[1] and "same.png" in report.problems[0]
    assert json.loads(json.dumps(report.to_dict()))["exposures"][0]["questions"] == 1


def test_what_is_seen_by_several_is_counted_once(scan: Callable[..., str], ask: Callable[..., Item]) -> None:
    image, later = scan("a.png", 1), scan("b.png", 2)
    items = [
        ask("one/train/0", image, question="First?"),
        ask("two/train/0", image, question="First?"),
        ask("two/validation/0", later),
        ask("two/test/0", image, later, question="Both?"),
        ask("two/test/1", later),
    ]
    report = check_items(ItemSet(items, []))
    counted = {entry.seen_in: (entry.images, entry.items, entry.questions) for entry in report.leaks.exposures}
    assert counted == {"one/train": (1, 1, 0), "two/train": (1, 1, 0), "two/validation": (1, 2, 1), "any": (2, 2, 1)}
    # Two training sets that share an image leak nothing, but ask a question twice.
    (duplicate,) = report.leaks.duplicates
    assert duplicate.items == ("one/train/0", "two/train/0") and duplicate.agree


def test_duplicates_are_no_leaks(scan: Callable[..., str], ask: Callable[..., Item]) -> None:
    image, again = scan("a.png", 1), scan("again.bmp", 1)
    items = [
        ask("d/train/0", image),
        ask("d/train/1", again, question="WHAT is seen ?"),
        ask("d/train/2", image, options=("Effusion", "Mass", "Nodule", "Edema"), answer="Mass"),
        ask("d/train/3", image, options=("Effusion", "Mass")),
        ask("d/train/4", image, again),
    ]
    report = check_items(ItemSet(items, []))
    assert report.ok and report.leaks.shared_images == []
    (duplicate,) = report.leaks.duplicates
    assert duplicate.items == ("d/train/0", "d/train/1", "d/train/2") and not duplicate.agree
    assert report.remarks == [
        "asked 3 times about the same image in train, with different answers: 'What is seen?' "
        "(d/train/0, d/train/1, d/train/2)"
    ]


def test_the_order_of_images_makes_another_question(scan: Callable[..., str], ask: Callable[..., Item]) -> None:
    one, two = scan("a.png", 1), scan("b.png", 2)
    report = check_items(ItemSet([ask("d/train/0", one, two), ask("d/test/0", two, one)], []))
    assert len(report.leaks.shared_images) == 2 and report.leaks.shared_questions == []
    assert exposure(report, "d/test", "d/train").images == 2 and exposure(report, "d/test", "d/train").items == 1


def test_broken_images_and_questions_without_one(scan: Callable[..., str], ask: Callable[..., Item]) -> None:
    image = scan("a.png", 1)
    items = [
        ask("d/train/0", image, "/nowhere.png"),
        ask("d/train/1", question="No image?"),
        ask("d/test/0", image, "/nowhere.png"),
        ask("d/test/1", question="no image"),
    ]
    report = check_items(ItemSet(items, []))
    assert report.broken_images == ["/nowhere.png: no such image file."]
    (shared,) = report.leaks.shared_images
    assert shared.items == {"d/train": ["d/train/0"], "d/test": ["d/test/0"]}
    (question,) = report.leaks.shared_questions  # of the other two it isn't known
    assert question.items == {"d/train": ["d/train/1"], "d/test": ["d/test/1"]}
    assert check_items(ItemSet([], [])).ok


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("What is  seen?", "what is seen", True),
        ("\uff37hat is seen\u2026", "What is seen...", True),
        ("Is it <5 cm?", "Is it >5 cm?", False),
        ("Is it 0.5 cm?", "Is it 5 cm?", False),
        ("T1 or T2?", "T2 or T1?", False),
        ("?", "!", False),
        ("\u53f3\u80ba\uff1f", "\u53f3\u80ba", True),
    ],
)
def test_normalised_texts(one: str, other: str, equal: bool) -> None:
    assert (normalised(one) == normalised(other)) == equal


def slake_folder(published: Path, out: Path, languages: Iterable[str]) -> Path:
    """SLAKE's published rows of these languages as a data folder."""
    out.mkdir()
    for split, name in (("train", "train"), ("validation", "validate"), ("test", "test")):
        rows = [row for row in json.loads((published / f"{name}.json").read_text()) if row["answer"].strip()]
        lines = [
            {"dataset_name": "slake", "dataset_index": row["qid"], "image_paths": [row["img_name"]],
             "question": row["question"], "answer": row["answer"], "language": row["q_lang"]}
            for row in rows if row["q_lang"] in languages
        ]  # fmt: skip
        (out / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return out


def checked(folder: Path, image_root: Path) -> CheckReport:
    source = SourceSettings(kind="jsonl", path=str(folder), image_root=str(image_root))
    return check_items(open_items(DataSettings(sources=[source]), base_dir=folder, cache_dir=folder))


def test_slake_in_both_languages_leaks_142_images(real_data: Path, tmp_path: Path) -> None:
    published = real_data / "slake"
    both = checked(slake_folder(published, tmp_path / "both", ("en", "zh")), published / "imgs")
    shared = [entry for entry in both.leaks.shared_images if {"train", "test"} <= set(entry.splits)]
    assert len(shared) == 142 == exposure(both, "slake/test", "slake/train").images
    assert all(entry.items["slake/train"] and entry.items["slake/test"] for entry in shared)
    named = {line.partition("/imgs/")[2].partition("/")[0] for line in both.problems if "train" in line}
    assert {Path(entry.files[0]).parent.name for entry in shared} <= named
    assert not both.ok

    english = checked(slake_folder(published, tmp_path / "en", ("en",)), published / "imgs")
    assert english.ok and english.leaks.shared_images == [] == english.leaks.shared_questions
    # Its splits hold neighbouring slices of the same patients, which is what near duplicates are for.
    assert 0 < len(english.leaks.near_images) < 40


def test_near_duplicates_of_medmnist(real_data: Path, tmp_path: Path) -> None:
    def near(name: str) -> tuple[int, int]:
        source = SourceSettings(kind="medmnist", path=str(real_data / "medmnist" / f"{name}.npz"))
        found = open_items(DataSettings(sources=[source]), base_dir=tmp_path, cache_dir=tmp_path)
        leaks = check_items(found).leaks
        return len(leaks.shared_images), len(leaks.near_images)

    assert near("retinamnist") == (0, 0)  # 1,600 eyes that look much alike, and no two are taken for one
    exact, alike = near("breastmnist")  # published with several frames of one lesion in different splits
    assert exact == 1 and alike > 20


def test_vqa_rad_as_published_shares_images(tmp_path: Path, scan: Callable[..., str]) -> None:
    """VQA-RAD is one JSON list beside a folder of images; `phrase_type` tells train from test, often of one image."""
    root = tmp_path / "VQA-RAD"
    (root / "VQA_RAD Image Folder").mkdir(parents=True)
    names = [f"synpic{number}.jpg" for number in range(8)]
    for number, name in enumerate(names):
        Path(scan(name, number, quality=92)).rename(root / "VQA_RAD Image Folder" / name)
    # One image is there under two names, as in a download that was mended by hand.
    (root / "VQA_RAD Image Folder" / "synpic9.jpg").write_bytes((root / "VQA_RAD Image Folder" / names[7]).read_bytes())
    asked = {
        "synpic0.jpg": ("freeform", "para"),
        "synpic1.jpg": ("freeform", "test_freeform"),
        "synpic2.jpg": ("para", "test_para", "test_para"),
        "synpic3.jpg": ("test_freeform", "test_para"),
        "synpic4.jpg": ("freeform", "para", "test_freeform", "test_para"),
        "synpic5.jpg": ("para",),
        "synpic6.jpg": ("test_para",),
        "synpic7.jpg": ("freeform",),
        "synpic9.jpg": ("test_freeform",),
    }
    rows = [
        {"qid": f"{name[6]}{number}", "image_name": name, "image_organ": "CHEST", "question_type": "PRES",
         "answer_type": "CLOSED", "question": f"Is finding {number} there?", "answer": "Yes", "phrase_type": phrase}
        for name, phrases in asked.items() for number, phrase in enumerate(phrases)
    ]  # fmt: skip
    (root / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    source = SourceSettings(kind="table", path=str(root), mapping="vqa_rad")
    report = check_items(open_items(DataSettings(sources=[source]), base_dir=root, cache_dir=tmp_path))

    named = [{Path(file).name for file in entry.files} for entry in report.leaks.shared_images]
    assert named == [{"synpic1.jpg"}, {"synpic2.jpg"}, {"synpic4.jpg"}, {"synpic7.jpg", "synpic9.jpg"}]
    assert all(entry.splits == ("train", "test") for entry in report.leaks.shared_images)
    ids = report.leaks.shared_images[1].items
    assert ids == {"vqa_rad/train": ["vqa_rad/train/20"], "vqa_rad/test": ["vqa_rad/test/21", "vqa_rad/test/22"]}
    found = exposure(report, "vqa_rad/test", "vqa_rad/train")
    assert (found.images, found.items, found.of_items, found.near_images) == (4, 6, 9, 0)
    lines = [line for line in report.problems if line.startswith("the same image is in train and test")]
    assert not report.ok and len(lines) == 4 and "synpic9.jpg" in lines[3]
