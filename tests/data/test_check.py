"""The full check of a data set, and the view of a few questions."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from medbridge.data import Item, ItemSet, PromptSettings, Skip, check_items, describe_items, format_items
from medbridge.errors import MedbridgeError

MakeItem = Callable[..., Item]
MakePng = Callable[..., Path]


@pytest.fixture
def found(tmp_path: Path, make_item: MakeItem, make_png: MakePng) -> ItemSet:
    paths = [str(make_png(tmp_path / f"{name}.png", value)) for name, value in (("a", 1), ("b", 1), ("c", 2))]
    (tmp_path / "bad.png").write_bytes(b"no image")
    items = [
        make_item(images=(paths[0], paths[2])),
        make_item(id="demo/train/1", images=(paths[0],), answer="Mass"),
        make_item(id="demo/train/2", images=(paths[0],), options=None, answer="3", floor=0.0),
        make_item(id="demo/test/0", images=(paths[1],), split="test", tags={}),
        make_item(id="demo/test/0", images=(str(tmp_path / "bad.png"),), split="test", tags={}),
    ]
    skipped = [
        Skip("q.jsonl", 3, None, "not valid JSON."),
        Skip("train.json", None, "x", "empty.", known=True),
    ]
    return ItemSet(items, skipped)


def test_everything_is_found(found: ItemSet) -> None:
    calls: list[tuple[int, int]] = []
    report = check_items(found, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 4) for n in (1, 2, 3, 4)]
    assert not report.ok and report.images == 4
    assert len(report.broken_images) == 1 and "bad.png" in report.broken_images[0]
    assert report.duplicate_ids == ["demo/test/0"]
    (shared,) = report.leaks.shared_images
    assert shared.splits == ("train", "test") and [Path(file).name for file in shared.files] == ["a.png", "b.png"]
    assert len(report.skipped) == 2
    (question,) = report.leaks.shared_questions
    assert question.items == {"demo/train": ["demo/train/1"], "demo/test": ["demo/test/0"]}
    titles = ["rows left out", "broken images", "ids given twice", "images shared between splits"]
    assert [finding.title for finding in report.findings] == [*titles, "questions shared between splits"]
    assert len(report.problems) == 5  # the known defect is listed, but is no problem
    train = report.splits["train"]
    assert (train.items, train.images, train.options) == (3, 2, {0: 1, 4: 2})
    assert train.answers == {"Effusion": 1, "Mass": 1, "3": 1}
    assert "validation" not in report.splits
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False


def test_missing_tags_are_problems(found: ItemSet) -> None:
    report = check_items(found, strata=["modality"])
    assert sum("has no tag 'modality'" in problem for problem in report.problems) == 2
    assert report.splits["train"].strata["CT"].items == 3
    assert report.splits["test"].items == 2


def test_a_sound_set_is_ok(tmp_path: Path, make_item: MakeItem, make_png: MakePng) -> None:
    image = str(make_png(tmp_path / "a.png"))
    report = check_items(ItemSet([make_item(images=(image,))], []), strata=["modality"])
    assert report.ok and report.problems == []
    stratum = report.splits["train"].strata["CT"]
    assert (stratum.commonest_answer, stratum.commonest_share) == ("Effusion", 1.0)


def test_same_bytes_in_another_shape_are_another_image(tmp_path: Path, make_item: MakeItem, make_png: MakePng) -> None:
    one = str(make_png(tmp_path / "a.png", 1, (6, 2)))
    two = str(make_png(tmp_path / "b.png", 1, (2, 6)))
    items = [make_item(images=(one,)), make_item(id="x", split="test", images=(two,))]
    assert check_items(ItemSet(items, [])).ok


def test_memory_grows_by_less_than_200_bytes_a_question(tmp_path: Path, make_item: MakeItem, make_png: MakePng) -> None:
    paths = [str(make_png(tmp_path / f"{number}.png", number)) for number in range(20)]

    def peak(count: int) -> int:
        items = [
            make_item(
                id=f"demo/{split}/{number}", split=split, images=(paths[number % 10 + 10 * (split == "test")],),
                question=f"Is finding {number} there?",
            )
            for number in range(count // 2) for split in ("train", "test")
        ]  # fmt: skip
        tracemalloc.start()
        try:
            assert check_items(ItemSet(items, []), threads=1).ok
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8000) - peak(2000) < 200 * 6000


def test_description(found: ItemSet) -> None:
    views = describe_items(found.items[:3], 2, PromptSettings(answer_style="text"))
    assert [view["id"] for view in views] == ["demo/train/0", "demo/train/1"]
    assert views[0]["image_sizes"] == [[4, 3], [4, 3]]
    assert views[0]["target"] == "<answer>Effusion</answer>" and "- Effusion" in views[0]["prompt"]
    assert json.loads(json.dumps(views)) == views
    text = format_items(views)
    assert "demo/train/1" in text and "4x3" in text and "<answer>Mass</answer>" in text
    assert describe_items([], 5, PromptSettings()) == []


def test_description_of_a_broken_image(found: ItemSet) -> None:
    with pytest.raises(MedbridgeError, match=r"bad\.png"):
        describe_items(found.items[-1:], 1, PromptSettings())
