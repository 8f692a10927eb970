"""Items: what they refuse, their strata, and their JSON form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbridge.data import Item, ItemSet, Skip
from medbridge.errors import MedbridgeError

MakeItem = Callable[..., Item]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "Cyst"}, "not among the options"),
        ({"options": ("Effusion", "Effusion")}, "stands there twice"),
        ({"options": ("Effusion", " Effusion")}, "stands there twice"),
        ({"options": ("Effusion",)}, "a choice needs 2 to 26"),
        ({"options": tuple(str(n) for n in range(27)), "answer": "3"}, "27 option"),
        ({"options": ("Effusion", " ")}, "option is empty"),
        ({"answer": "", "options": None}, "answer is empty"),
        ({"question": " "}, "question is empty"),
        ({"split": "dev"}, "'dev' is none of"),
        ({"floor": 1.0}, "floor"),
        ({"floor": float("nan")}, "floor"),
        ({"question": "see <|image_pad|>"}, "reserved"),
        ({"trace": "so <ANSWER>B</ANSWER>"}, "reserved"),
        ({"id": ""}, "must not be empty"),
    ],
)
def test_a_contradictory_item_is_refused(make_item: MakeItem, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MedbridgeError, match=message):
        make_item(**changes)


def test_stratum_joins_tags(make_item: MakeItem) -> None:
    item = make_item()
    assert item.stratum([]) == "demo"
    assert item.stratum(["modality", "location"]) == "CT / Lung"
    with pytest.raises(MedbridgeError, match=r"demo/train/0.*'organ'.*location, modality"):
        item.stratum(["organ"])


def test_answer_index(make_item: MakeItem) -> None:
    assert make_item().answer_index == 1
    assert make_item(options=None, floor=0.0).answer_index is None


def test_items_can_be_members_of_sets(make_item: MakeItem) -> None:
    assert len({make_item(), make_item()}) == 1


def test_item_set_splits(make_item: MakeItem) -> None:
    found = ItemSet([make_item(), make_item(id="demo/test/0", split="test")], [])
    assert [item.id for item in found.split("test")] == ["demo/test/0"]
    with pytest.raises(MedbridgeError, match="no split 'dev'"):
        found.split("dev")


def test_skip_says_where() -> None:
    assert str(Skip("a.jsonl", 3, None, "not valid JSON.")) == "a.jsonl:3: not valid JSON."
    assert str(Skip("a.npz", None, "x/test/1", "bad label.")) == "a.npz: item 'x/test/1': bad label."
    assert str(Skip("a.jsonl", 3, "x", "item 'x': bad.")) == "a.jsonl:3: item 'x': bad."


texts = st.text(min_size=1).filter(lambda text: text.strip() and "<" not in text)


@given(
    question=texts,
    options=st.none() | st.lists(texts, min_size=2, max_size=6, unique_by=str.strip),
    images=st.lists(st.text()),
    tags=st.dictionaries(st.text(), st.text()),
    floor=st.floats(0, 1, exclude_max=True),
    trace=st.none() | texts,
)
def test_json_round_trip(
    question: str,
    options: list[str] | None,
    images: list[str],
    tags: dict[str, str],
    floor: float,
    trace: str | None,
) -> None:
    item = Item(
        id="d/test/1",
        dataset="d",
        split="test",
        question=question,
        answer="x" if options is None else options[-1],
        options=None if options is None else tuple(options),
        images=tuple(images),
        tags=tags,
        floor=floor,
        trace=trace,
    )
    assert Item.from_json(item.to_json()) == item


@pytest.mark.parametrize("text", ["[1]", "{", '{"id": "x"}', "null"])
def test_other_json_is_no_item(text: str) -> None:
    with pytest.raises(MedbridgeError, match="not a stored item"):
        Item.from_json(text)
