"""Features are computed once for each content, kept through a kill, and again where they can't be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medbridge.errors import MedbridgeError
from medbridge.probe import FeatureStore


class Means:
    """An encoder that counts: the mean colour of an image."""

    name = "means"
    key = "abc"

    def __init__(self, most: int = 10_000) -> None:
        self.encoded = 0
        self.most = most

    def encode(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        if self.encoded + len(images) > self.most:
            raise KeyboardInterrupt
        self.encoded += len(images)
        return np.array([np.asarray(image).mean((0, 1)) for image in images], np.float32)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    made = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), (number, 2 * number, 0)).save(path)
        made.append(str(path))
    return made


def test_each_content_once(files: list[str], tmp_path: Path) -> None:
    encoder, store = Means(), FeatureStore(tmp_path / "store")
    told: list[tuple[int, int]] = []
    Image.open(files[3]).save(tmp_path / "copy.png")
    asked = [*files, files[0], str(tmp_path / "copy.png")]
    rows = store.features(encoder, asked, lambda done, total: told.append((done, total)))
    assert encoder.encoded == 40 and told[-1] == (42, 42)
    np.testing.assert_array_equal(rows[:, 0], [*range(40), 0, 3])
    np.testing.assert_array_equal(store.features(encoder, asked[::-1])[:, 1], 2 * rows[::-1, 0])
    assert encoder.encoded == 40


def test_a_changed_file_and_another_key_are_encoded_again(files: list[str], tmp_path: Path) -> None:
    encoder, store = Means(), FeatureStore(tmp_path / "store")
    store.features(encoder, files)
    Image.new("RGB", (4, 4), (99, 0, 0)).save(files[7])
    assert store.features(encoder, files)[7, 0] == 99 and encoder.encoded == 41
    encoder.key = "def"
    store.features(encoder, files)
    assert encoder.encoded == 81


def test_what_was_finished_before_a_kill_is_kept(files: list[str], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        store.features(Means(most=32), files)
    encoder = Means()
    assert len(store.features(encoder, files)) == 40 and encoder.encoded == 8


@pytest.mark.parametrize("damage", [lambda data: b"nothing", lambda data: data[:3000], lambda data: data[:100] * 50])
def test_a_damaged_store_is_made_again(files: list[str], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    said: list[str] = []
    store = FeatureStore(tmp_path / "store", said.append)
    expected = store.features(Means(), files)
    [path] = (tmp_path / "store").glob("*.sqlite")
    path.write_bytes(damage(path.read_bytes()))
    encoder = Means()
    np.testing.assert_array_equal(store.features(encoder, files), expected)
    assert encoder.encoded == 40 and "computed again" in said[0]


def test_a_file_that_is_missing_or_no_image(files: list[str], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(MedbridgeError, match=r"none\.png"):
        store.features(Means(), [str(tmp_path / "none.png")])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(MedbridgeError, match=r"text\.png: not a readable image"):
        store.features(Means(), [str(tmp_path / "text.png")])


def test_no_files(tmp_path: Path) -> None:
    assert FeatureStore(tmp_path / "store").features(Means(), []).shape == (0, 0)


def test_a_store_that_can_not_be_opened_leaves_the_others_alone(files: list[str], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store")
    store.features(Means(), files)
    (tmp_path / "store" / "def.sqlite").mkdir()
    other = Means()
    other.key = "def"
    with pytest.raises(MedbridgeError, match=r"def\.sqlite: stored features can't be opened"):
        store.features(other, files)
    again = Means()
    store.features(again, files)
    assert again.encoded == 0
