"""Import into a data folder: what comes back is what went in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import DataSettings, Item, SourceSettings, import_to_folder, load_image, open_items
from medbridge.errors import MedbridgeError


@pytest.fixture
def root(
    tmp_path: Path, make_png: Callable[..., Path], make_row: Callable[..., Any], write_rows: Callable[..., Path]
) -> Path:
    make_png(tmp_path / "in" / "a.png", 1)
    make_png(tmp_path / "in" / "deep" / "b.PNG", 2)
    make_png(tmp_path / "in" / "same.png", 1)
    rows = [
        make_row(image_paths=["deep/b.PNG", "a.png"], modality="CT", trace="Fluid."),
        make_row(dataset_index="x 1/\u00e9", image_paths=["same.png"], split="train"),
        make_row(dataset_index=2, options=None, answer_label=None, floor=0.5),
        make_row(dataset_index=3, options=["A", "B"], answer_label="A", answer="A", split="train"),
    ]
    write_rows(tmp_path / "in" / "q.jsonl", rows)
    return tmp_path


def opened(root: Path, path: str) -> list[Item]:
    data = DataSettings(sources=[SourceSettings(kind="jsonl", path=path)])
    found = open_items(data, base_dir=root, cache_dir=root)
    return sorted(found.items, key=lambda item: item.id)


def test_round_trip(root: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = import_to_folder(
        SourceSettings(kind="jsonl", path="in/q.jsonl"),
        root / "out",
        base_dir=root,
        cache_dir=root / "cache",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert summary.to_dict() == {
        "folder": str(root / "out"),
        "items": {"train": 2, "test": 2},
        "images": 2,  # a.png and same.png hold the same bytes
        "skipped": [],
    }
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before, after = opened(root, "in/q.jsonl"), opened(root, "out")
    assert [replace(item, images=(), linked=None) for item in before] == [
        replace(item, images=(), linked=None) for item in after
    ]
    for one, two in zip(before, after, strict=True):
        assert [load_image(a).tobytes() for a in one.images] == [load_image(b).tobytes() for b in two.images]
        assert all(str(root / "out") in image for image in two.images)
    assert "2 train, 2 test" in (root / "out" / "README.md").read_text()
    rows = [json.loads(line) for line in (root / "out" / "test.jsonl").read_text().splitlines()]
    assert rows[0]["options"] == {"A": "Edema", "B": "Effusion"} and rows[1]["options"] is None


def test_an_existing_folder_is_never_overwritten(root: Path) -> None:
    (root / "out").mkdir()
    (root / "out" / "mine").touch()
    with pytest.raises(MedbridgeError, match="exists and is not empty"):
        import_to_folder(SourceSettings(kind="jsonl", path="in/q.jsonl"), root / "out", base_dir=root, cache_dir=root)
    assert [path.name for path in (root / "out").iterdir()] == ["mine"]


def test_bad_rows_leave_no_folder_or_are_listed(root: Path) -> None:
    with (root / "in" / "q.jsonl").open("a") as stream:
        stream.write("{\n")
    source = SourceSettings(kind="jsonl", path="in/q.jsonl")
    with pytest.raises(MedbridgeError, match=r"q\.jsonl:5"):
        import_to_folder(source, root / "out", base_dir=root, cache_dir=root)
    assert not (root / "out").exists()
    summary = import_to_folder(source, root / "out", base_dir=root, cache_dir=root, on_bad="skip")
    assert len(summary.skipped) == 1 and (root / "out" / "test.jsonl").is_file()


def test_the_brain_comes_back_equal(brain: Path, tmp_path: Path) -> None:
    source = SourceSettings(kind="brain", limit=20)
    import_to_folder(source, tmp_path / "out", base_dir=tmp_path, cache_dir=brain.parent)
    direct = open_items(DataSettings(sources=[source]), base_dir=tmp_path, cache_dir=brain.parent).items
    assert [replace(item, images=(), linked=None) for item in sorted(direct, key=lambda item: item.id)] == [
        replace(item, images=(), linked=None) for item in opened(tmp_path, "out")
    ]
