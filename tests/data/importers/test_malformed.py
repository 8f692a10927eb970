"""Malformed data ends in a clear message or a counted skip: the corpus of malformed.py, and changed bytes."""

from __future__ import annotations

import gzip
import os
import random
import tempfile
from pathlib import Path

import pytest
from data.importers.malformed import (
    Case,
    _classes,
    cases,
    dicom,
    lines,
    nifti,
    npz,
    parquet,
    png,
    row,
    table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medbridge.data import DataSettings, SourceSettings, open_items
from medbridge.errors import MedbridgeError

CASES = list(cases())
MORE = int(os.environ.get("MEDBRIDGE_FUZZ", "0"))


def outcome(case: Case, folder: Path) -> list[str]:
    """Messages of an import: of the error that ended it, or of the rows left out."""
    source = case.write(folder)
    data = DataSettings(sources=[SourceSettings(**source)], on_bad="skip", check_images="decode")
    try:
        found = open_items(data, base_dir=folder, cache_dir=folder / "cache")
    except MedbridgeError as error:
        return [str(error)]
    return [str(skip) for skip in found.skipped]


def test_there_are_two_hundred() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case: Case, tmp_path: Path) -> None:
    messages = outcome(case, tmp_path)
    assert messages, "taken without a word"
    assert all(10 < len(message) < 2000 for message in messages)
    assert not any("Doe" in message or "P-77" in message for message in messages)


GOOD = {
    "csv": lambda f, c: table(f, "t.csv", c),
    "jsonl": lambda f, c: table(f, "t.jsonl", c),
    "json": lambda f, c: table(f, "t.json", c),
    "parquet": lambda f, c: table(f, "t.parquet", c),
    "mapping": lambda f, c: [(f / "m.yaml").write_bytes(c), {"kind": "table", "path": "m.yaml"}][1],
    "images": lambda f, c: _classes("images", "x.png", c, ("y.png", png()))(f),
    "dicom": lambda f, c: _classes("dicom", "x.dcm", c, None)(f),
    "nifti": lambda f, c: _classes("nifti", "x.nii", c, None)(f),
    "nifti gz": lambda f, c: _classes("nifti", "x.nii.gz", c, None)(f),
    "medmnist": lambda f, c: [
        (f / "breastmnist.npz").write_bytes(c),
        {"kind": "medmnist", "path": "breastmnist.npz"},
    ][1],
}

SEEDS = {
    "csv": b'question,image,options,answer,label,split\nWhat?,a.png,"[""a"", ""b""]",b,B,test\n',
    "jsonl": lines(row()),
    "json": b"[" + lines(row()).strip() + b"]",
    "parquet": parquet([row()]),
    "mapping": b"question: q\nimages: i\nanswer: a\nfiles: {'*.csv': test}\npath: .\n",
    "images": png(),
    "dicom": dicom(),
    "nifti": nifti(),
    "nifti gz": gzip.compress(nifti()),
    "medmnist": npz(),
}


def changed(content: bytes, seed: int) -> bytes:
    """The bytes with a few of them replaced, cut out, doubled or put in."""
    draw = random.Random(seed)
    raw = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at, size = draw.randrange(len(raw) + 1), draw.choice((1, 1, 2, 4, 16, 64))
        how = draw.randrange(4)
        piece = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
        raw[at : at + (0 if how == 3 else size)] = (piece, b"", bytes(raw[at : at + size]) * 2, piece)[how]
    return bytes(raw)


def attempt(kind: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = changed(SEEDS[kind], seed)
        outcome(Case(f"{kind} {seed}", lambda place: GOOD[kind](place, content)), Path(folder))


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_changed_bytes(kind: str, seed: int) -> None:
    attempt(kind, seed)


@pytest.mark.skipif(not MORE, reason="MEDBRIDGE_FUZZ=N changes bytes N times more, anew each time")
@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=MORE or 1, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_many_changed_bytes(kind: str, seed: int) -> None:
    attempt(kind, seed)
