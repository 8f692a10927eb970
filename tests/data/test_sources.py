"""From settings to items: several sources, errors or skips, duplicates, limits, and paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from medbridge.data import DataSettings, ItemSet, SourceSettings, open_items
from medbridge.errors import MedbridgeError

MakeRow = Callable[..., dict[str, Any]]
WriteRows = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, make_png: Callable[..., Path]) -> Path:
    make_png(tmp_path / "a.png", 1)
    return tmp_path


def opened(root: Path, *sources: dict[str, Any], **settings: Any) -> ItemSet:
    data = DataSettings(sources=[SourceSettings(**source) for source in sources], **settings)
    return open_items(data, base_dir=root, cache_dir=root / "cache")


def test_one_file_a_split(root: Path, make_row: MakeRow, write_rows: WriteRows) -> None:
    for number, name in enumerate(("one", "two")):
        write_rows(root / "q" / f"{name}.jsonl", [make_row(dataset_index=number)])
    splits = {"train": "q/one.jsonl", "validation": "q/two.jsonl"}
    found = opened(root, {"kind": "jsonl", "splits": splits, "image_root": "."})
    # The rows say "test"; the configuration, which names the files, has the last word.
    assert [item.id for item in found.items] == ["demo/train/0", "demo/validation/1"]


def test_a_folder_of_splits(root: Path, make_row: MakeRow, write_rows: WriteRows) -> None:
    write_rows(root / "validation.jsonl", [make_row(split=None)])
    assert [i.split for i in opened(root, {"kind": "jsonl", "path": "."}).items] == ["validation"]


def test_an_empty_folder_is_an_error(root: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"a data folder needs train\.jsonl"):
        opened(root, {"kind": "jsonl", "path": "."})


def test_error_or_skip(root: Path, make_row: MakeRow, write_rows: WriteRows) -> None:
    bad = make_row(dataset_index=1, answer_label="D")
    write_rows(root / "q.jsonl", [make_row(), bad, "{"])
    source = {"kind": "jsonl", "path": "q.jsonl"}
    with pytest.raises(MedbridgeError, match=r"q\.jsonl:2: item 'demo/test/1': .*'D'.*on_bad: skip"):
        opened(root, source)
    found = opened(root, source, on_bad="skip")
    assert len(found.items) == 1 and [skip.line for skip in found.skipped] == [2, 3]


def test_duplicate_ids(root: Path, make_row: MakeRow, write_rows: WriteRows) -> None:
    write_rows(root / "q.jsonl", [make_row(), make_row()])
    write_rows(root / "p.jsonl", [make_row()])
    with pytest.raises(MedbridgeError, match=r"/q\.jsonl:2: .*'demo/test/0' is already there \(from .*q\.jsonl"):
        opened(root, {"kind": "jsonl", "path": "q.jsonl"})
    found = opened(root, {"kind": "jsonl", "path": "q.jsonl"}, on_bad="skip")
    assert len(found.items) == 1 and len(found.skipped) == 1
    sources = [{"kind": "jsonl", "path": name} for name in ("p.jsonl", "r.jsonl")]
    write_rows(root / "r.jsonl", [make_row(dataset_index=5), make_row()])
    found = opened(root, *sources, on_bad="skip")
    assert [item.id for item in found.items] == ["demo/test/0", "demo/test/5"]
    assert "from jsonl p.jsonl" in str(found.skipped[0]) and found.skipped[0].line == 2


def test_a_source_whose_questions_are_all_there_already(root: Path, make_row: MakeRow, write_rows: WriteRows) -> None:
    write_rows(root / "q.jsonl", ["{", make_row(), make_row(dataset_index=1)])
    write_rows(root / "part.jsonl", [make_row()])
    with pytest.raises(
        MedbridgeError, match=r"part\.jsonl: .* \(all 1 have the ids of questions in jsonl q\.jsonl: leave"
    ):
        opened(root, *({"kind": "jsonl", "path": name} for name in ("q.jsonl", "part.jsonl")), on_bad="skip")


def test_nothing_readable_is_an_error(root: Path, write_rows: WriteRows) -> None:
    write_rows(root / "q.jsonl", ["{"])
    with pytest.raises(MedbridgeError, match=r"no question could be read \(.*q\.jsonl:1"):
        opened(root, {"kind": "jsonl", "path": "q.jsonl"}, on_bad="skip")
    write_rows(root / "empty.jsonl", [])
    with pytest.raises(MedbridgeError, match="it is empty"):
        opened(root, {"kind": "jsonl", "path": "empty.jsonl"})


def test_strata_need_their_tags(root: Path, make_row: MakeRow, write_rows: WriteRows) -> None:
    write_rows(root / "q.jsonl", [make_row(modality="CT"), make_row(dataset_index=1)])
    source = {"kind": "jsonl", "path": "q.jsonl"}
    with pytest.raises(MedbridgeError, match="'demo/test/1' has no tag 'modality'"):
        opened(root, source, strata=["modality"])
    found = opened(root, source, strata=["modality"], on_bad="skip")
    assert len(found.items) == 1 and found.skipped[0].item == "demo/test/1"


@pytest.mark.parametrize(("limit", "kept"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))])
def test_limit_is_even_and_per_split(
    root: Path, make_row: MakeRow, write_rows: WriteRows, limit: int, kept: list[int]
) -> None:
    rows = [make_row(dataset_index=n, split=split) for n in range(10) for split in ("train", "test")]
    write_rows(root / "q.jsonl", rows)
    found = opened(root, {"kind": "jsonl", "path": "q.jsonl", "limit": limit})
    for split in ("train", "test"):
        assert [int(item.id.rsplit("/")[-1]) for item in found.split(split)] == kept


@pytest.mark.parametrize("how", ["exists", "header", "decode"])
def test_how_far_images_are_checked(root: Path, make_row: MakeRow, write_rows: WriteRows, how: str) -> None:
    (root / "bad.png").write_bytes((root / "a.png").read_bytes()[:45])
    (root / "worse.png").write_bytes(b"no image")
    rows = [make_row(dataset_index=n, image_paths=[name]) for n, name in enumerate(("a.png", "bad.png", "worse.png"))]
    write_rows(root / "q.jsonl", rows)
    found = opened(root, {"kind": "jsonl", "path": "q.jsonl"}, on_bad="skip", check_images=how)
    assert len(found.items) == {"exists": 3, "header": 2, "decode": 1}[how]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "csv"}, "'brain', 'slake', 'medmnist', 'jsonl', 'table', 'images', 'dicom' or 'nifti'"),
        ({"kind": "jsonl"}, "needs either `path` or `splits`"),
        ({"kind": "jsonl", "path": "a", "splits": {"train": "b"}}, "needs either `path` or `splits`"),
        ({"kind": "jsonl", "splits": {"train": "b"}, "split": "test"}, "leave `split` out"),
        ({"kind": "jsonl", "splits": {"dev": "b"}}, "'train', 'validation' or 'test'"),
        ({"kind": "slake"}, "needs `path`"),
        ({"kind": "medmnist", "path": "a", "image_root": "b"}, "takes no `image_root`"),
        ({"kind": "medmnist", "path": "a", "split": "test"}, "brings its own splits"),
        ({"kind": "medmnist", "path": "a", "medmnist": {"findings": "two"}}, "'one' or 'all'"),
        ({"kind": "slake", "path": "a", "medmnist": {"findings": "all"}}, "`medmnist` is for kind medmnist"),
        ({"kind": "brain", "path": "a"}, "built in"),
        ({"kind": "brain", "limit": 0}, "greater than or equal to 1"),
        ({"kind": "brain", "limt": 3}, "Extra inputs"),
    ],
)
def test_settings_refuse(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceSettings.model_validate(source)


def test_every_setting_is_documented() -> None:
    for model in (DataSettings, SourceSettings, type(DataSettings().prompt)):
        assert all(field.description for field in model.model_fields.values())


def test_the_default_is_the_brain(brain: Path) -> None:
    found = open_items(
        DataSettings(sources=[SourceSettings(kind="brain", limit=50)], strata=["task"]),
        base_dir=brain,
        cache_dir=brain.parent,
    )
    assert [len(found.split(split)) for split in ("train", "validation", "test")] == [50, 50, 50]
    assert len({item.tags["task"] for item in found.split("test")}) == 5


def test_tags_of_a_source_are_given_to_questions_that_lack_them(
    root: Path, make_row: MakeRow, write_rows: WriteRows
) -> None:
    rows = [make_row(dataset_index=index, tags=tags) for index, tags in enumerate([{}, {"answer_type": "own"}])]
    write_rows(root / "q.jsonl", rows)
    source = {"kind": "jsonl", "path": "q.jsonl", "tags": {"answer_type": "given"}}
    found = opened(root, source, strata=["answer_type"])
    assert [item.tags["answer_type"] for item in found.items] == ["given", "own"]
