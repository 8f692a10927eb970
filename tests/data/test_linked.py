"""Questions that show some images in common are one cluster wherever clusters matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from medbridge.data import DataSettings, Item, SourceSettings, open_items
from medbridge.data.linked import linked, with_links
from medbridge.measurement import by_stratum, cluster_of
from medbridge.measurement.order import whole_clusters

MakeItem = Callable[..., Item]
UNITS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=3, unique=True).map(tuple), max_size=10)


def _item(number: int, images: tuple[str, ...]) -> Item:
    return Item(f"q{number}", "d", "test", "Which?", "yes", ("yes", "no"), images, {}, 0.5)


def shown(make_item: MakeItem, units: Sequence[Sequence[str]]) -> list[Item]:
    return [make_item(id=str(number), images=tuple(unit)) for number, unit in enumerate(units)]


def reached(units: Sequence[Sequence[str]], start: int) -> set[int]:
    """The units that share images with a unit, directly or through others, found by walking."""
    found, edge = {start}, [start]
    while edge:
        own = set(units[edge.pop()])
        new = {other for other, unit in enumerate(units) if own & set(unit)} - found
        found |= new
        edge += new
    return found


@given(UNITS)
def test_clusters_are_what_shared_images_connect(units: list[tuple[str, ...]]) -> None:
    items = with_links([_item(number, unit) for number, unit in enumerate(units)])
    names = [cluster_of(item, ()) for item in items]
    for number in range(len(units)):
        assert {other for other, name in enumerate(names) if name == names[number]} == reached(units, number)


def test_numbers_of_clusters() -> None:
    assert linked([("a",), ("b", "c"), ("c", "d"), ("e",), ("d",)]) == [0, 1, 1, 2, 1]


def test_the_same_images_need_no_other_name(make_item: MakeItem) -> None:
    items = shown(make_item, ["ab", "ab", "c", "c", ""])
    assert with_links(items) == items


def test_a_link_is_kept_in_json_and_an_absent_one_is_not(make_item: MakeItem) -> None:
    one, other, alone = with_links(shown(make_item, ["ab", "bc", "d"]))
    assert one.linked == other.linked == "a"
    assert Item.from_json(one.to_json()) == one
    assert "linked" not in alone.to_dict()


def test_tags_come_first(make_item: MakeItem) -> None:
    one, other = with_links(shown(make_item, ["ab", "bc"]))
    assert cluster_of(one, ["patient"]) != cluster_of(other, ["patient"])


def test_items_that_are_read_are_linked_and_measured_together(
    tmp_path: Path,
    make_png: Callable[..., Path],
    make_row: Callable[..., dict[str, Any]],
    write_rows: Callable[..., Path],
) -> None:
    for number, name in enumerate("abcd"):
        make_png(tmp_path / f"{name}.png", number)
    shows = ["a b", "c", "b d", "a", "c", "b"]
    rows = [
        make_row(dataset_index=number, image_paths=[f"{name}.png" for name in names.split()])
        for number, names in enumerate(shows)
    ]
    write_rows(tmp_path / "test.jsonl", rows)
    settings = DataSettings(sources=[SourceSettings(kind="jsonl", path=".")])
    items = open_items(settings, base_dir=tmp_path, cache_dir=tmp_path / "cache").items
    (pool,) = by_stratum(items, (), 0).values()
    assert {frozenset(item.id.rpartition("/")[2] for item in cluster) for cluster in whole_clusters(pool, ())} == {
        frozenset("0235"), frozenset("14"),
    }  # fmt: skip
