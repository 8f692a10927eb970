"""Control images: blank ones of the same size, and exchanged ones that are never an item's own."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medbridge.data import Item, load_image
from medbridge.data.controls import blank, shuffled
from medbridge.errors import MedbridgeError

MakeItem = Callable[..., Item]
MakePng = Callable[..., Path]


def asked(images: Sequence[Sequence[str]]) -> list[Item]:
    return [
        Item(f"q{i}", "demo", "test", "What is seen?", "lung", None, tuple(own), {}, 0.0)
        for i, own in enumerate(images)
    ]


# -- blank ---------------------------------------------------------------------------------------------------


def test_blank_images_keep_the_size_and_nothing_else(tmp_path: Path, make_png: MakePng, make_item: MakeItem) -> None:
    wide, tall = make_png(tmp_path / "a.png", size=(9, 5)), make_png(tmp_path / "b.png", size=(4, 7))
    items = [
        make_item(id="one", images=(str(wide),)),
        make_item(id="two", images=(str(tall), str(wide), str(tall))),
        make_item(id="none", images=()),
    ]
    found = blank(items, tmp_path / "deep" / "blank")
    assert [item.id for item in found.items] == ["one", "two"]
    assert [(skip.item, "no images" in skip.reason) for skip in found.skipped] == [("none", True)]
    sizes = [[load_image(path).size for path in item.images] for item in found.items]
    assert sizes == [[(9, 5)], [(4, 7), (9, 5), (4, 7)]]
    for item in found.items:
        for path in item.images:
            assert Path(path).is_absolute()
            assert np.unique(np.asarray(load_image(path))).tolist() == [128]
    assert sorted(os.listdir(tmp_path / "deep" / "blank")) == ["blank-4x7.png", "blank-9x5.png"]
    for before, after in zip(items, found.items, strict=False):
        assert after.to_dict() | {"images": ()} == before.to_dict() | {"images": ()}


def test_blank_images_are_written_once(tmp_path: Path, make_png: MakePng, make_item: MakeItem) -> None:
    item = make_item(images=(str(make_png(tmp_path / "a.png")),))
    first = blank([item], tmp_path / "blank").items[0].images[0]
    stamp = os.stat(first)
    second = blank([item], tmp_path / "blank").items[0].images[0]
    assert first == second
    again = os.stat(second)
    assert (again.st_mtime_ns, again.st_ino) == (stamp.st_mtime_ns, stamp.st_ino)


def test_a_turned_photograph_is_blanked_upright(tmp_path: Path, make_item: MakeItem) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 4)).save(tmp_path / "turned.jpg", exif=exif)
    found = blank([make_item(images=(str(tmp_path / "turned.jpg"),))], tmp_path / "blank")
    assert load_image(found.items[0].images[0]).size == (4, 10)


def test_many_threads_write_one_file(tmp_path: Path, make_png: MakePng, make_item: MakeItem) -> None:
    item = make_item(images=(str(make_png(tmp_path / "a.png")),))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: blank([item], tmp_path / "blank").items[0].images, range(24)))
    assert len(set(found)) == 1
    assert os.listdir(tmp_path / "blank") == ["blank-4x3.png"]


def test_blank_names_what_is_wrong(tmp_path: Path, make_png: MakePng, make_item: MakeItem) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(MedbridgeError, match=r"broken\.png: not a readable image"):
        blank([make_item(images=(str(tmp_path / "broken.png"),))], tmp_path / "blank")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MedbridgeError, match=r"blank-4x3\.png: can't be written"):
        blank([make_item(images=(str(make_png(tmp_path / "a.png")),))], tmp_path / "file")


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, make_png: MakePng, make_item: MakeItem, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = make_item(images=(str(make_png(tmp_path / "a.png")),))

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MedbridgeError, match="no space left"):
        blank([item], tmp_path / "blank")
    assert os.listdir(tmp_path / "blank") == []


# -- shuffled ------------------------------------------------------------------------------------------------


def test_each_item_shows_the_images_of_another() -> None:
    items = asked([[f"{i // 3}.png"] for i in range(30)])
    found = shuffled(items, seed=0)
    assert [item.id for item in found.items] == [item.id for item in items]
    assert not found.skipped
    assert all(before.images != after.images for before, after in zip(items, found.items, strict=True))
    # every image once for each of its three questions, which go on sharing
    assert Counter(item.images for item in found.items) == Counter(item.images for item in items)
    assert len({(before.images, after.images) for before, after in zip(items, found.items, strict=True)}) == 10
    assert all(after.question == before.question for before, after in zip(items, found.items, strict=True))


def test_it_depends_on_the_seed_and_not_on_the_order() -> None:
    items = asked([[f"{i}.png"] for i in range(20)])
    mixed = random.Random(0).sample(items, 20)
    first = {item.id: item.images for item in shuffled(items, 1).items}
    assert {item.id: item.images for item in shuffled(mixed, 1).items} == first
    assert [item.id for item in shuffled(mixed, 1).items] == [item.id for item in mixed]
    assert {item.id: item.images for item in shuffled(items, 2).items} != first


def test_the_order_stays_the_same_over_versions() -> None:
    found = shuffled(asked([["a"], ["b"], ["c"], ["d"]]), 0).items
    assert [item.images for item in found] == [("d",), ("a",), ("b",), ("c",)]
    elsewhere = shuffled(asked([["/x/z"], ["/x/y"], ["/x/c"], ["/x/d"]]), 0).items
    assert [item.images for item in elsewhere] == [("/x/d",), ("/x/z",), ("/x/y",), ("/x/c",)]


def test_two_sets_change_places() -> None:
    assert [item.images for item in shuffled(asked([["a"], ["b"], ["a"]]), 5).items] == [("b",), ("a",), ("b",)]


def test_images_are_matched_by_their_number() -> None:
    items = asked([["a"], ["b"], ["c", "d"], ["e", "f"], ["g", "h", "i"], [], ["a", "a"]])
    found = shuffled(items, 0)
    assert {item.id: len(item.images) for item in found.items} == {"q0": 1, "q1": 1, "q2": 2, "q3": 2, "q6": 2}
    reasons = {skip.item: skip.reason for skip in found.skipped}
    assert "no other 3 images" in reasons["q4"]
    assert "has no images" in reasons["q5"]


def test_the_same_images_in_another_order_are_no_others() -> None:
    found = shuffled(asked([["a", "b"], ["b", "a"]]), 0)
    assert not found.items
    assert len(found.skipped) == 2


def test_none_and_one() -> None:
    assert shuffled([], 0).items == []
    assert len(shuffled(asked([["a"], ["a"]]), 0).skipped) == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=3), max_size=12), st.integers(0, 9))
def test_no_item_keeps_an_image_of_its_own(images: list[list[str]], seed: int) -> None:
    items = asked(images)
    found = shuffled(items, seed)
    kept = {item.id: item for item in found.items}
    assert {item.id: item for item in shuffled(items[::-1], seed).items} == kept
    assert len(kept) + len(found.skipped) == len(items)
    for item in items:
        if item.id in kept:
            assert len(kept[item.id].images) == len(item.images)
            assert set(kept[item.id].images).isdisjoint(item.images)
        elif len(item.images) == 1:
            assert all(other.images == item.images for other in items if len(other.images) == 1)
