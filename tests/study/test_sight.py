"""What linear probes find in features of which it is known what they show."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medbridge.data import Item
from medbridge.study.result import Sight
from medbridge.study.sight import Asked, look

COUNT = 60


def item(split: str, number: int, question: str, answer: str, images: int = 1) -> Item:
    return Item(
        f"d/{split}/{number}-{question}", "d", split, question, answer, ("Yes", "No"),
        tuple(f"{split}{number}-{index}" for index in range(images)), {}, 0.5,
    )  # fmt: skip


def truth(image: str) -> bool:
    return int(image.split("-")[0].lstrip("abcdefghijklmnopqrstuvwxyz")) % 2 == 0


def features(informative: float) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Four numbers an image; the first tells its answer, with a weight."""

    def make(files: Sequence[str]) -> NDArray[np.float32]:
        rows = []
        for file in files:
            noise = np.random.default_rng(zlib.crc32(file.encode()))
            row = noise.normal(size=4)
            row[0] += informative * (1 if truth(file) else -1)
            rows.append(row)
        return np.array(rows, dtype=np.float32)

    return make


def asked(split: str, count: int, question: str = "Is it even?") -> list[Item]:
    return [item(split, n, question, "Yes" if n % 2 == 0 else "No") for n in range(count)]


def wanted(**changes: Any) -> Asked:
    given: dict[str, Any] = {
        "train": asked("train", COUNT), "validation": asked("validation", 20), "measured": {"s": asked("test", COUNT)},
        "cluster": lambda one: one.images[0], "min_images": 20, "alpha": 0.05, "replicates": 200, "seed": 0,
    }  # fmt: skip
    return Asked(**{**given, **changes})


def seen(informative: float, **changes: Any) -> dict[str, Sight | None]:
    return look(features(informative), wanted(**changes))


def test_features_that_show_the_answer() -> None:
    found = seen(6.0)["s"]
    assert found is not None and found.gain is not None and found.gain.low is not None
    assert found.accuracy > 0.95 and found.commonest == pytest.approx(0.5)
    assert found.gain.value == pytest.approx((found.accuracy - 0.5) / 0.5) and found.gain.low > 0.7
    assert (found.items, found.asked, found.questions) == (COUNT, COUNT, 1)


def test_features_that_do_not() -> None:
    found = seen(0.0)["s"]
    assert found is not None and found.gain is not None and found.gain.high is not None and found.gain.low is not None
    assert found.gain.low < 0 < found.gain.high < 0.7


@pytest.mark.parametrize("validation", [[], asked("validation", 1, "Something else?")])
def test_without_a_validation_split_training_images_choose(validation: list[Item]) -> None:
    found = seen(6.0, validation=validation)["s"]
    assert found is not None and found.accuracy > 0.95


def test_questions_of_few_images_are_left_out_and_counted() -> None:
    rare = asked("test", 9, "Is it rare?")
    found = seen(6.0, train=asked("train", COUNT) + asked("train", 19, "Is it rare?"), measured={"s": rare, "t": rare})
    assert found == {"s": None, "t": None}
    some = seen(6.0, measured={"s": rare + asked("test", 5)})["s"]
    assert some is not None and (some.items, some.asked) == (5, 14)


def test_an_answer_that_is_always_the_same() -> None:
    always = [item("train", n, "Is it?", "Yes") for n in range(COUNT)]
    found = seen(6.0, train=always, validation=[], measured={"s": [item("test", n, "Is it?", "Yes") for n in range(9)]})
    assert found["s"] == Sight(9, 9, 1, 1.0, 1.0, None)


def test_two_questions_have_their_own_probes() -> None:
    """Opposite answers to the same features: one probe for both would be right by chance."""
    odd = [
        item(split, n, "Is it odd?", "No" if n % 2 == 0 else "Yes") for split in ("train", "test") for n in range(50)
    ]
    train = asked("train", 50) + [one for one in odd if one.split == "train"]
    measured = {"s": asked("test", 50) + [one for one in odd if one.split == "test"]}
    found = seen(6.0, train=train, measured=measured)["s"]
    assert found is not None and found.accuracy > 0.95 and found.questions == 2


def test_the_features_of_several_images_are_their_mean() -> None:
    train = [item("train", n, "Is it even?", "Yes" if n % 2 == 0 else "No", images=3) for n in range(COUNT)]
    test = [item("test", n, "Is it even?", "Yes" if n % 2 == 0 else "No", images=2) for n in range(30)]
    found = seen(6.0, train=train, validation=[], measured={"s": test})["s"]
    assert found is not None and found.accuracy > 0.95


def test_items_without_images_are_not_probed() -> None:
    bare = [item("train", n, "Is it even?", "Yes", images=0) for n in range(COUNT)]
    assert seen(6.0, train=bare) == {"s": None}


@pytest.mark.parametrize(
    "change",
    [
        {"train": asked("train", COUNT - 1)}, {"validation": asked("validation", 19)},
        {"measured": {"t": asked("test", COUNT)}}, {"measured": {"s": asked("test", COUNT, "Is it odd?")}},
        {"cluster": lambda one: "all"}, {"min_images": 21}, {"alpha": 0.1}, {"replicates": 300}, {"seed": 1},
    ],
)  # fmt: skip
def test_the_key_tells_all_that_is_asked_apart(change: dict[str, Any]) -> None:
    assert wanted().key("encoder") == wanted().key("encoder")
    assert wanted(**change).key("encoder") != wanted().key("encoder")
    assert wanted().key("encoder") != wanted().key("another")


def test_the_key_changes_with_the_images(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"one")
    train = [replace(item("train", 0, "Is it?", "Yes"), images=(str(picture),))]
    before = wanted(train=train).key("encoder")
    assert wanted(train=train).key("encoder") == before
    picture.write_bytes(b"another")
    assert wanted(train=train).key("encoder") != before
    picture.unlink()
    assert wanted(train=train).key("encoder") != before
