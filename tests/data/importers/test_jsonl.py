"""Published JSON lines: what loads, and what every malformed line is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medbridge.data import Item, Skip
from medbridge.data.importers.jsonl import item_to_row, read_jsonl, row_to_item
from medbridge.data.importers.lines import MAX_LINE_BYTES
from medbridge.errors import MedbridgeError

MakeRow = Callable[..., dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path, make_png: Callable[..., Path]) -> Path:
    make_png(tmp_path / "a.png", 1)
    make_png(tmp_path / "b.png", 2)
    return tmp_path


def test_published_row(root: Path, make_row: MakeRow) -> None:
    item = row_to_item(make_row(image_paths=["b.png", "a.png"], source="PubMed", misc="x" * 65), root)
    assert item == Item(
        id="demo/test/0",
        dataset="demo",
        split="test",
        question="What is seen?",
        answer="Effusion",
        options=("Edema", "Effusion"),
        images=(str(root / "b.png"), str(root / "a.png")),
        tags={"source": "PubMed"},
        floor=0.5,
    )


@pytest.mark.parametrize(
    ("changes", "options", "answer"),
    [
        ({"options": ["Edema", "Effusion"]}, ("Edema", "Effusion"), "Effusion"),
        ({"options": '{"A": "Edema", "B": "Effusion"}'}, ("Edema", "Effusion"), "Effusion"),
        ({"options": '["Edema", "Effusion"]'}, ("Edema", "Effusion"), "Effusion"),
        ({"options": "A. Edema\nB. Effusion"}, ("Edema", "Effusion"), "Effusion"),
        ({"options": {"A": "Edema", "B": "Effusion", "C": None}}, ("Edema", "Effusion"), "Effusion"),
        ({"options": [1, 2.5], "answer": 2.5}, ("1", "2.5"), "2.5"),
        ({"answer": None}, ("Edema", "Effusion"), "Effusion"),
        ({"answer_label": None, "answer": " effusion "}, ("Edema", "Effusion"), "Effusion"),
        ({"answer_label": "b"}, ("Edema", "Effusion"), "Effusion"),
        ({"answer": "B"}, ("Edema", "Effusion"), "Effusion"),
        ({"options": None, "answer_label": None, "answer": "Left  lung "}, None, "Left  lung"),
    ],
)
def test_forms_of_options(
    root: Path, make_row: MakeRow, changes: dict[str, Any], options: tuple[str, ...] | None, answer: str
) -> None:
    item = row_to_item(make_row(**changes), root)
    assert (item.options, item.answer) == (options, answer)
    assert item.floor == (0.0 if options is None else 0.5)


@pytest.mark.parametrize(
    ("changes", "split"),
    [({"split": "val"}, "validation"), ({"split": None}, "train"), ({"split": "TEST"}, "test")],
)
def test_splits(root: Path, make_row: MakeRow, changes: dict[str, Any], split: str) -> None:
    assert row_to_item(make_row(**changes), root, split="train").split == split


@pytest.mark.parametrize("key", ["image_paths", "image_path", "images"])
def test_image_keys(root: Path, make_row: MakeRow, key: str) -> None:
    row = make_row(image_paths=None, **{}) | {key: "a.png"}
    assert row_to_item(row, root).images == (str(root / "a.png"),)


@pytest.mark.parametrize("trace", ["Fluid.", "<think>Fluid.</think>", " <think>\nFluid.\n</think> "])
def test_trace(root: Path, make_row: MakeRow, trace: str) -> None:
    assert row_to_item(make_row(reasoning=trace), root).trace == "Fluid."
    assert row_to_item(make_row(trace=trace), root).trace == "Fluid."
    assert row_to_item(make_row(trace=" "), root).trace is None


BAD: list[tuple[Any, str]] = [
    (b"{", "not valid JSON"),
    (b"[1]", "a JSON object is needed"),
    (b"null", "a JSON object is needed"),
    (b'{"a": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"dataset_index": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ({"dataset_name": None}, "'dataset_name' is missing"),
    ({"dataset_index": None}, "'dataset_index' is missing"),
    ({"dataset_index": [1]}, "'dataset_index' must be a text"),
    ({"dataset_index": True}, "'dataset_index' must be a text"),
    ({"question": None}, "'question' is missing"),
    ({"question": "  "}, "'question' is empty"),
    ({"question": "x <|vision_start|>"}, "reserved"),
    ({"split": None}, "names no split"),
    ({"split": "dev2"}, "'split' is 'dev2'"),
    ({"split": 3}, "'split' is 3"),
    ({"image_paths": None}, "'image_paths' is missing"),
    ({"image_paths": []}, "must be a list of one or more"),
    ({"image_paths": [3]}, "must be a list of one or more"),
    ({"image_paths": {"bytes": "x"}}, "must be a list of one or more"),
    ({"image_paths": ["../a.png"]}, "leaves the data folder"),
    ({"image_paths": ["/etc/passwd"]}, "is absolute"),
    ({"image_paths": ["c.png"]}, "is missing"),
    ({"image_paths": ["bad.png"]}, "not a readable image"),
    ({"options": {}}, "'options' is empty"),
    ({"options": []}, "'options' is empty"),
    ({"options": "Edema or effusion"}, "neither JSON nor lettered"),
    ({"options": 3}, "'options' must be"),
    ({"options": ["Edema", ""]}, "option 'B'"),
    ({"options": ["Edema", ["x"]]}, "option 'B'"),
    ({"options": ["Effusion"]}, "label 'B' is not among"),
    ({"options": ["Effusion"], "answer_label": "A"}, "a choice needs 2 to 26"),
    ({"options": ["Effusion", "Effusion"]}, "stands there twice"),
    ({"options": [f"o{n}" for n in range(27)]}, "27 options"),
    ({"answer_label": "C"}, "label 'C' is not among"),
    ({"answer_label": "A"}, "disagree"),
    ({"answer_label": None, "answer": "Cyst"}, "'Cyst' is not among the options"),
    ({"answer_label": None, "answer": None}, "neither 'answer_label' nor 'answer'"),
    ({"options": None, "answer": None}, "'answer' is missing"),
    ({"tags": ["CT"]}, "'tags' must be"),
    ({"tags": {"modality": 3}}, "'tags' must be"),
    ({"floor": 1}, "'floor' must be"),
    ({"floor": "high"}, "'floor' must be"),
    ({"floor": 10**400}, "'floor' must be"),
    ({"trace": 3}, "'trace' must be"),
    ({"trace": "I say <answer>B</answer>"}, "reserved"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{n}-{m[:20]}" for n, (_, m) in enumerate(BAD)])
def test_bad_line_is_a_skip_with_its_place(
    root: Path, make_row: MakeRow, write_rows: Callable[..., Path], change: Any, message: str
) -> None:
    (root / "bad.png").write_bytes(b"no image")
    bad = make_row(**change) if isinstance(change, dict) else change
    file = write_rows(root / "q.jsonl", [make_row(), "", bad, make_row(dataset_index=1)])
    first, skip, last = read_jsonl(file, image_root=root)
    assert isinstance(first, Item) and isinstance(last, Item)
    assert isinstance(skip, Skip) and skip.line == 3
    assert message in str(skip) and str(skip).startswith(f"{file}:3: ")


def test_what_rows_have_in_common_is_kept_once(root: Path, make_row: MakeRow, write_rows: Callable[..., Path]) -> None:
    rows = [make_row(dataset_index=number, tags={"modality": "CT"}) for number in range(2)]
    other = make_row(dataset_index=2, options=["Edema", "Mass"], answer="Mass", answer_label="B", tags={})
    found = list(read_jsonl(write_rows(root / "q.jsonl", [*rows, other]), image_root=root))
    one, same, last = (item for item in found if isinstance(item, Item))
    for name in ("dataset", "question", "answer", "options", "images", "tags", "floor"):
        assert getattr(one, name) is getattr(same, name)
    assert last.question is one.question and last.options == ("Edema", "Mass") and last.tags == {}


def test_byte_order_mark_and_blank_lines(root: Path, make_row: MakeRow) -> None:
    (root / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(make_row()).encode() + b"\r\n\n  \n")
    (item,) = read_jsonl(root / "q.jsonl", image_root=root)
    assert isinstance(item, Item)


def test_missing_file_and_endless_line(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"none\.jsonl: can't be read"):
        list(read_jsonl(tmp_path / "none.jsonl", image_root=tmp_path))
    (tmp_path / "long.jsonl").write_bytes(b"x" * (MAX_LINE_BYTES + 2))
    with pytest.raises(MedbridgeError, match=r"long\.jsonl:1: a line of more than"):
        list(read_jsonl(tmp_path / "long.jsonl", image_root=tmp_path))


def test_lines_are_streamed(root: Path, make_row: MakeRow, write_rows: Callable[..., Path]) -> None:
    """The first item is there before a later line is looked at."""
    file = write_rows(root / "q.jsonl", [make_row(), b"x" * (MAX_LINE_BYTES + 2)])
    stream = read_jsonl(file, image_root=root)
    assert isinstance(next(stream), Item)
    with pytest.raises(MedbridgeError, match=":2: a line of more"):
        next(stream)


@pytest.mark.parametrize("floor", [0.5, 0.0, 1 / 3])
def test_row_round_trip(root: Path, make_row: MakeRow, floor: float) -> None:
    item = row_to_item(make_row(floor=floor, tags={"modality": "CT"}, trace="x"), root)
    row = json.loads(json.dumps(item_to_row(item, "0", ["a.png"])))
    assert row_to_item(row, root) == item


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    *("dataset_name", "dataset_index", "image_paths", "image_path", "images", "question", "options"),
    *("answer_label", "answer", "split", "tags", "trace", "reasoning", "floor", "other"),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4))
def test_any_json_gives_an_item_or_a_skip(
    root: Path, make_row: MakeRow, write_rows: Callable[..., Path], changes: dict[str, Any]
) -> None:
    file = write_rows(root / "q.jsonl", [json.dumps({**make_row(), **changes})])
    (found,) = read_jsonl(file, image_root=root)
    if isinstance(found, Item):
        assert Item.from_json(found.to_json()) == found
    else:
        str(found).encode()  # can be printed
