"""The embedded brain slices: exact labels, balance, blocks of slices kept apart, and deterministic bytes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medbridge.data import DataSettings, Item, ItemSet, check_items, load_image, open_items
from medbridge.data.folder import STAMP
from medbridge.data.importers import brain as builder
from medbridge.data.items import SPLITS
from medbridge.errors import MedbridgeError


@pytest.fixture(scope="module")
def found(brain: Path) -> ItemSet:
    return open_items(DataSettings(), base_dir=brain, cache_dir=brain.parent)


def test_counts_and_balance(found: ItemSet) -> None:
    assert not found.skipped
    for split in SPLITS:
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for item in found.split(split):
            answers[item.tags["task"]][item.answer] += 1
            assert item.options == builder.QUESTIONS[item.tags["task"]][1]
            assert item.floor == 1 / len(item.options)
        assert set(answers) == set(builder.QUESTIONS)
        for counts in answers.values():
            assert counts.total() == builder.COUNTS[split] and len(set(counts.values())) == 1


def test_no_slice_is_in_two_splits_and_there_are_gaps(found: ItemSet) -> None:
    slices = {split: {item.tags["slice"] for item in found.split(split)} for split in SPLITS}
    numbers = {
        split: {(plane, int(number)) for plane, number in (name.split() for name in names)}
        for split, names in slices.items()
    }
    for one, two in (("train", "validation"), ("train", "test"), ("validation", "test")):
        near = {(plane, number + step) for plane, number in numbers[one] for step in range(-3, 4)}
        assert not near & numbers[two]
    # The template is symmetric: the other half would repeat a slice of another split.
    assert all(number >= 98 for plane, number in set().union(*numbers.values()) if plane == "sagittal")


def test_images_are_whole_and_never_shared_between_splits(found: ItemSet) -> None:
    report = check_items(found, strata=["task"])
    assert report.ok and report.images == len(found.items)
    assert report.splits["test"].strata["rotation"].commonest_share == 0.25


def features(items: list[Item]) -> np.ndarray:
    """Each image as 14 x 14 block means, standardised."""
    rows = [np.asarray(load_image(item.images[0]).convert("L"), dtype=np.float64) for item in items]
    small = np.stack(rows).reshape(len(rows), 14, 4, 14, 4).mean(axis=(2, 4)).reshape(len(rows), -1)
    return (small - small.mean(axis=1, keepdims=True)) / small.std(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("task", "least"), [("plane", 0.85), ("tissue", 0.8), ("level", 0.65), ("contrast", 0.9), ("rotation", 0.6)]
)
def test_each_task_can_be_solved_from_held_out_images(found: ItemSet, task: str, least: float) -> None:
    train, test = ([i for i in found.split(s) if i.tags["task"] == task] for s in ("train", "test"))
    known, asked = features(train), features(test)
    nearest = np.argsort(-(asked @ known.T), axis=1)[:, :5]
    right = 0
    for item, neighbours in zip(test, nearest, strict=True):
        right += Counter(train[n].answer for n in neighbours).most_common(1)[0][0] == item.answer
    assert right / len(test) >= least


def test_rows_and_card(brain: Path) -> None:
    row = json.loads((brain / "test.jsonl").read_text().splitlines()[0])
    published = {"dataset_name", "dataset_index", "image_paths", "question", "options", "answer_label", "answer"}
    assert published <= set(row) and row["split"] == "test"
    assert "not a clinical benchmark" in " ".join((brain / "README.md").read_text().split())
    assert load_image(brain / row["image_paths"][0]).size == (56, 56)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(builder, "COUNTS", {"train": 12, "validation": 12, "test": 12})
    yield


@pytest.mark.usefixtures("few")
def test_bytes_are_deterministic_and_damage_is_mended(tmp_path: Path) -> None:
    one, two = builder.brain_folder(tmp_path / "one"), builder.brain_folder(tmp_path / "two")
    stamp = (one / STAMP).read_bytes()
    assert stamp == (two / STAMP).read_bytes()
    built = (one / "train.jsonl").stat().st_mtime_ns
    assert (builder.brain_folder(tmp_path / "one") / "train.jsonl").stat().st_mtime_ns == built
    (one / "images/test/plane-0000.png").unlink()
    (one / "images/test/plane-0001.png").write_bytes(b"changed")
    assert (builder.brain_folder(tmp_path / "one") / STAMP).read_bytes() == stamp
    assert load_image(one / "images/test/plane-0001.png").size == (56, 56)
    (one / STAMP).write_text('{"key": "an older version"}')
    assert (builder.brain_folder(tmp_path / "one") / STAMP).read_bytes() == stamp
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["brain"]


def test_missing_nilearn_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MedbridgeError, match="install nilearn"):
        builder.brain_folder(tmp_path)
