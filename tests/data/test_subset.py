"""Balanced subsets: equal shares, what fills small groups, the same bytes at every call, and the card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import DataSettings, Item, SourceSettings, load_image, open_items
from medbridge.data.folder import content_hash
from medbridge.data.subset import NOT_MEASURED, Drawing, draw, equal_shares, write_subset
from medbridge.errors import MedbridgeError

OPTIONS = ("Edema", "Effusion", "Mass", "Nodule")


@pytest.fixture
def pool(make_item: Callable[..., Item]) -> list[Item]:
    """600 questions: CT 400, MRI 190, X-ray 10; answer A in most of them."""
    items = []
    for index in range(600):
        modality = "CT" if index < 400 else "MRI" if index < 590 else "X-ray"
        answer = OPTIONS[index % 4 if index % 3 == 0 else 0]
        items.append(make_item(id=f"demo/train/{index}", answer=answer, tags={"modality": modality, "hand": "l"}))
    return items


@pytest.mark.parametrize(
    ("room", "size", "shares"),
    [
        ({"a": 10, "b": 10}, 7, {"a": 4, "b": 3}),
        ({"b": 10, "a": 10}, 7, {"b": 4, "a": 3}),
        ({"a": 1, "b": 10, "c": 10}, 13, {"a": 1, "b": 6, "c": 6}),
        ({"a": 1, "b": 3, "c": 10}, 14, {"a": 1, "b": 3, "c": 10}),
        ({"a": 1, "b": 3}, 9, {"a": 1, "b": 3}),
        ({"a": 5, "b": 5, "c": 5}, 2, {"a": 1, "b": 1, "c": 0}),
        ({"a": 0, "b": 2}, 1, {"a": 0, "b": 1}),
        ({}, 3, {}),
    ],
)
def test_equal_shares(room: dict[str, int], size: int, shares: dict[str, int]) -> None:
    assert equal_shares(room, size) == shares


def test_strata_and_letters_are_as_equal_as_the_data_allows(pool: list[Item]) -> None:
    drawn = draw(pool, Drawing(120, by=("modality",), balance_answers=True))
    assert Counter(item.tags["modality"] for item in drawn.items) == {"CT": 55, "MRI": 55, "X-ray": 10}
    for modality in ("CT", "MRI"):
        answers = Counter(item.answer for item in drawn.items if item.tags["modality"] == modality)
        assert max(answers.values()) - min(answers.values()) <= 1
    assert ("X-ray",) in [group.path for group in drawn.short]
    assert next(group for group in drawn.short if group.path == ("X-ray",)).items == 10
    # Against the pool, in which A is right in three of four.
    assert Counter(item.answer for item in pool)["Edema"] > 400


def test_what_can_not_be_divided_adds_up_over_the_strata(make_item: Callable[..., Item]) -> None:
    items = [
        make_item(id=f"demo/train/{stratum}-{index}", answer=OPTIONS[index % 4], tags={"organ": str(stratum)})
        for stratum in range(40) for index in range(20)
    ]  # fmt: skip
    drawn = draw(items, Drawing(200, by=("organ",), balance_answers=True))
    assert set(Counter(item.tags["organ"] for item in drawn.items).values()) == {5}
    assert set(Counter(item.answer for item in drawn.items).values()) == {50}


def test_difficulty(pool: list[Item]) -> None:
    rates = {item.id: (index % 10) / 10 for index, item in enumerate(pool[:300])}
    drawing = Drawing(80, difficulty=rates, measured_in="runs/a")
    drawn = draw(pool, drawing)
    value = dict(drawing.criteria())["difficulty"]
    assert Counter(map(value, drawn.items)) == {"hard": 20, "medium": 20, "easy": 20, NOT_MEASURED: 20}
    edges = Drawing(1, difficulty={"demo/train/0": 1.0, "demo/train/1": 1 / 3, "demo/train/2": 0.0})
    assert [dict(edges.criteria())["difficulty"](item) for item in pool[:3]] == ["easy", "medium", "hard"]
    with pytest.raises(MedbridgeError, match="no success rate"):
        draw(pool, Drawing(80, difficulty={"other": 0.5}, measured_in="runs/a"))


def test_letters_are_those_of_as_many_options(make_item: Callable[..., Item]) -> None:
    items = [
        make_item(id="a"), make_item(id="b", options=("Yes", "No"), answer="No", floor=0.5),
        make_item(id="c", options=None, answer="3", floor=0.0),
    ]  # fmt: skip
    value = dict(Drawing(1, balance_answers=True).criteria())["answer"]
    assert [value(item) for item in items] == ["B of 4", "B of 2", "open"]


def test_seeds_and_refusals(pool: list[Item]) -> None:
    drawing = Drawing(50, by=("hand",))
    ids = [item.id for item in draw(pool, drawing).items]
    assert ids == [item.id for item in draw(pool[::-1], drawing).items][::-1]  # whatever the order of the rows
    assert ids != [item.id for item in draw(pool, Drawing(50, by=("hand",), seed=1)).items]
    assert len(draw(pool, Drawing(600)).items) == 600
    with pytest.raises(MedbridgeError, match="601 questions are asked for"):
        draw(pool, Drawing(601))
    with pytest.raises(MedbridgeError, match="has no tag 'organ'"):
        draw(pool, Drawing(6, by=("organ",)))


@pytest.fixture
def source(
    tmp_path: Path, make_png: Callable[..., Path], make_row: Callable[..., Any], write_rows: Callable[..., Path]
) -> SourceSettings:
    for index in range(8):
        make_png(tmp_path / "in" / f"{index}.png", index)
    rows = [
        make_row(dataset_index=index, image_paths=[f"{index % 8}.png"], answer="Edema", answer_label="A", split="train",
                 tags={"modality": "C|T" if index % 4 else "<b>"}, question=f"Question {index}?")
        for index in range(40)
    ]  # fmt: skip
    write_rows(tmp_path / "in" / "q.jsonl", [*rows, make_row(dataset_index=99, image_paths=["0.png"])])
    return SourceSettings(kind="jsonl", path=str(tmp_path / "in" / "q.jsonl"))


def opened(source: SourceSettings) -> list[Item]:
    return open_items(DataSettings(sources=[source]), base_dir=Path("/"), cache_dir=Path("/")).items


def test_the_folder_reads_back_and_says_how_it_was_drawn(source: SourceSettings, tmp_path: Path) -> None:
    items = opened(source)
    drawing = Drawing(24, by=("modality",), balance_answers=True)
    summary = write_subset(items, [source], tmp_path / "out", drawing, base_dir=tmp_path)
    assert (summary["items"], summary["of_items"], summary["of_images"]) == (24, 40, 8)
    assert summary["counts"]["modality"] == {"<b>": [10, 10], "C|T": [30, 14]}
    assert json.loads(json.dumps(summary)) == summary
    again = opened(SourceSettings(kind="jsonl", path=str(tmp_path / "out")))
    by_id = {item.id: item for item in items}
    assert [item.id for item in again] == [item.id for item in draw(items[:40], drawing).items]
    for item in again:
        assert (item.question, item.tags) == (by_id[item.id].question, by_id[item.id].tags)
        assert load_image(item.images[0]).tobytes() == load_image(by_id[item.id].images[0]).tobytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "24 of the 40 in the split `train`" in card and summary["questions_sha256"] in card
    assert "| C\\|T | 30 | 14 |" in card and "- &lt;b>: 10 of 12" in card and "modality, then answer" in card

    write_subset(items, [source], tmp_path / "twin", drawing, base_dir=tmp_path)
    assert content_hash(tmp_path / "out") == content_hash(tmp_path / "twin")
    with pytest.raises(MedbridgeError, match="not empty"):
        write_subset(items, [source], tmp_path / "out", drawing, base_dir=tmp_path)


def test_the_card_has_the_licence_of_each_source(source: SourceSettings, tmp_path: Path) -> None:
    (tmp_path / "mapping.yaml").write_text(
        "path: in/t.csv\nquestion: q\nimages: i\nanswer: a\nlicence: Of a ward's own.\nsplit_default: train\n"
    )
    (tmp_path / "in" / "t.csv").write_text("q,i,a\nWhich?,0.png,heart\n")
    sources = [source, SourceSettings(kind="table", mapping="mapping.yaml")]
    items = open_items(DataSettings(sources=sources), base_dir=tmp_path, cache_dir=tmp_path).items
    write_subset(items, sources, tmp_path / "out", Drawing(4), base_dir=tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The licence is that of the data it was made from. Of a ward's own." in card


def test_nothing_is_written_where_it_can_not_be_drawn(source: SourceSettings, tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match="asked for"):
        write_subset(opened(source), [source], tmp_path / "out", Drawing(41), base_dir=tmp_path)
    assert not (tmp_path / "out").exists()
