"""Stamped folders: whole or absent, never someone else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from medbridge.data.folder import STAMP, ensure_folder, is_valid, write_folder
from medbridge.errors import MedbridgeError


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("a")


def test_built_once_for_a_key(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    for key in ("one", "one", "two"):
        assert ensure_folder(tmp_path / "deep" / "f", key, build) == tmp_path / "deep" / "f"
    assert len(calls) == 2 and is_valid(tmp_path / "deep" / "f", "two")


@pytest.mark.parametrize("damage", ["changed", "lost", "added", "stamp"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    folder = ensure_folder(tmp_path / "f", "k", fill)
    match damage:
        case "changed":
            (folder / "sub" / "a").write_text("b")
        case "lost":
            (folder / "sub" / "a").unlink()
        case "added":
            (folder / "b").touch()
        case "stamp":
            (folder / STAMP).write_text("[")
    assert not is_valid(folder, "k")
    assert is_valid(ensure_folder(folder, "k", fill), "k")


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    ensure_folder(tmp_path / "f", "old", fill)

    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        ensure_folder(tmp_path / "f", "new", fail)
    assert is_valid(tmp_path / "f", "old") and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").touch()
    with pytest.raises(MedbridgeError, match="did not make it"):
        ensure_folder(tmp_path / "f", "k", fill)


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MedbridgeError, match="cannot be written"):
        write_folder(tmp_path / "file" / "f", fill)


def test_a_folder_that_appears_meanwhile_is_replaced(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        fill(folder)
        (tmp_path / "f" / "other").mkdir(parents=True)

    write_folder(tmp_path / "f", build)
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["sub"]
