"""Probes on features of which it is known what they show."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from medbridge.data import Item
from medbridge.errors import MedbridgeError
from medbridge.probe import ProbeResult, ProbeSettings, probe

KINDS = ("CT", "MRI", "X-Ray")


def items(split: str, count: int, **changes: object) -> list[Item]:
    """`count` images of three kinds, two questions about each."""
    found = []
    for number in range(count):
        for question in ("one", "two"):
            values: dict[str, object] = {
                "id": f"d/{split}/{number}{question}", "dataset": "d", "split": split, "question": question,
                "answer": f"answer {question}", "options": None, "images": (f"{split}-{number}",),
                "tags": {"kind": KINDS[number % 3]}, "floor": 0.0, **changes,
            }  # fmt: skip
            found.append(Item(**values))  # type: ignore[arg-type]
    return found


def features(informative: float, width: int = 8) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    def make(files: Sequence[str]) -> NDArray[np.float32]:
        rows = []
        for file in files:
            row = np.random.default_rng(zlib.crc32(file.encode())).normal(size=width)
            row[int(file.split("-")[1]) % 3] += informative
            rows.append(row)
        return np.array(rows, np.float32)

    return make


def found(informative: float, data: Sequence[Item], target: str = "kind", width: int = 8) -> ProbeResult:
    return probe(features(informative, width), data, target, ProbeSettings(replicates=200), encoder="made up")


DATA = [*items("train", 90), *items("validation", 30), *items("test", 60)]


@pytest.mark.parametrize(("width", "informative"), [(8, 8.0), (200, 20.0)])  # fewer and more numbers than units
def test_a_label_that_shows(width: int, informative: float) -> None:
    result = found(informative, DATA, width=width)
    assert (result.train, result.validation, result.test) == (90, 30, 60)  # images, not questions
    assert result.classes == KINDS and result.commonest == ("CT", pytest.approx(1 / 3))
    assert result.linear.accuracy.value > 0.8 and result.linear.auc is not None and result.linear.auc.value > 0.95
    assert result.knn.accuracy.value > 0.6
    json.dumps(result.to_dict())


def test_a_label_that_does_not() -> None:
    result = found(0.0, DATA)
    assert result.linear.accuracy.low < 1 / 3 < result.linear.accuracy.high
    assert result.linear.auc is not None and result.linear.auc.low < 0.5 < result.linear.auc.high


def test_the_test_split_chooses_nothing() -> None:
    """Other labels of the test images change the scores, and neither strength nor neighbours."""
    moved = [*DATA[:240], *items("test", 60, tags={"kind": "MRI"})]
    one, other = found(1.0, DATA), found(1.0, moved)
    assert (one.strength, one.neighbours) == (other.strength, other.neighbours)
    assert one.linear.accuracy != other.linear.accuracy


def test_without_a_validation_split_a_part_of_the_training_images_chooses() -> None:
    result = found(8.0, [*items("train", 90), *items("test", 60)])
    assert (result.train, result.validation) == (72, 18)
    assert result == found(8.0, [*reversed(items("train", 90)), *items("test", 60)])


def test_what_has_no_label_or_several_is_left_out() -> None:
    clash = items("test", 1, tags={"kind": "CT"})[:1] + items("test", 1, tags={"kind": "MRI"})[1:]
    bare = items("train", 1, images=("train-1000",), tags={})
    result = found(8.0, [*DATA[:-120], *items("test", 60)[2:], *clash, *bare])
    assert result.left_out == 2 and result.test == 59


def test_a_label_that_training_lacks_is_always_wrong() -> None:
    result = found(8.0, [*DATA, *items("test", 1, images=("test-1000",), tags={"kind": "PET"})])
    assert result.unseen == 1 and result.linear.accuracy.value <= 60 / 61


def test_the_answer_as_target() -> None:
    single = [item for item in DATA if item.question == "one"]
    answered = [Item(**{**item.to_dict(), "answer": KINDS[int(item.images[0].split("-")[1]) % 3], "images": item.images,
                        "options": KINDS}) for item in single]  # fmt: skip
    assert found(8.0, answered, "answer").linear.accuracy.value > 0.9


def test_what_depends_on_each_other_widens_the_intervals() -> None:
    """By a tag, and by images that questions share."""

    def patients(split: str, count: int) -> list[Item]:
        return [
            replace(item, tags={**item.tags, "patient": f"p{number // 16}"})
            for number, item in enumerate(items(split, count))
        ]

    data = [*patients("train", 60), *patients("validation", 30), *patients("test", 48)]

    def width(data: Sequence[Item], **settings: tuple[str, ...]) -> float:
        made = probe(features(1.0), data, "kind", ProbeSettings(replicates=800, **settings))  # type: ignore[arg-type]
        return made.linear.accuracy.high - made.linear.accuracy.low

    alone = width(data)
    assert width(data, cluster=("patient",)) > 1.2 * alone
    pairs = [*data, *(replace(item, id=f"{item.id}+", images=(*item.images, "test-0")) for item in data[-96:])]
    assert width(pairs) > 1.2 * alone  # test-0 ties them all together
    with pytest.raises(MedbridgeError, match="no item has the tag 'ward' to cluster by"):
        width(data, cluster=("ward",))


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (DATA, "organ", "0 images with one value of the tag 'organ', of 180 images. .*: kind"),
        (DATA, "answer", "0 images with one answer each, of 180"),
        (items("test", 9), "kind", "the train split has no image"),
        (items("train", 9), "kind", "the test split has no image"),
        (
            [*items("train", 9, tags={"kind": "CT"}), *items("test", 9)],
            "kind",
            "all training images have the label 'CT'",
        ),
        ([], "kind", "0 images"),
    ],
)
def test_refusals(data: list[Item], target: str, message: str) -> None:
    with pytest.raises(MedbridgeError, match=message):
        found(1.0, data, target)
