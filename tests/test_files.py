"""`medbridge.files`: a file is there whole or not at all, and a refusal says what to do."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO

import pytest
from typer.testing import CliRunner

from medbridge.cli import app
from medbridge.errors import MedbridgeError
from medbridge.files import replace_file, replace_text


def test_a_file_is_replaced_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.txt"
    replace_text(path, "first")
    replace_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["text.txt"]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    replace_text(path, "first")

    def half(stream: IO[bytes]) -> None:
        stream.write(b"second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, half)
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("name", ["folder", "file/below", "x" * 300])
def test_where_it_cannot_be_written_the_message_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / "file").touch()
    with pytest.raises(MedbridgeError, match=r"can't be written .* Name a file in a folder"):
        replace_text(tmp_path / name, "text")
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "file"}


def test_commands_that_write_json_refuse_a_folder(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"question": "Which?", "options": ["Heart", "Lung"], "answer": "Lung", "outputs": ["B", "A"]}\n')
    refused = CliRunner().invoke(app, ["evaluate", str(log), "--out", str(tmp_path)])
    assert isinstance(refused.exception, MedbridgeError) and "can't be written" in str(refused.exception)
