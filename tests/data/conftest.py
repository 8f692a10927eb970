"""Fixtures for the data tests: small images and rows made on the spot, the real data where it is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medbridge.data import Item
from medbridge.data.importers.brain import brain_folder


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded brain slices, built once for all tests, also of parallel test processes."""
    base = tmp_path_factory.getbasetemp()
    return brain_folder((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "brain-cache")


@pytest.fixture
def make_png() -> Callable[..., Path]:
    """Write a small image whose pixels follow from `value`."""

    def make(path: Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (np.arange(size[0] * size[1]).reshape(size[1], size[0]) + value) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    return make


@pytest.fixture
def make_item() -> Callable[..., Item]:
    """An item of four options, with whatever is given replaced."""

    def make(**changes: Any) -> Item:
        values: dict[str, Any] = {
            "id": "demo/train/0",
            "dataset": "demo",
            "split": "train",
            "question": "What is seen?",
            "answer": "Effusion",
            "options": ("Edema", "Effusion", "Mass", "Nodule"),
            "images": ("/data/a.png",),
            "tags": {"modality": "CT", "location": "Lung"},
            "floor": 0.25,
        }
        return Item(**{**values, **changes})

    return make


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """A published row; `None` as a value removes the key."""

    def make(**changes: Any) -> dict[str, Any]:
        row: dict[str, Any] = {
            "dataset_name": "demo",
            "dataset_index": 0,
            "image_paths": ["a.png"],
            "question": "What is seen?",
            "options": {"A": "Edema", "B": "Effusion"},
            "answer_label": "B",
            "answer": "Effusion",
            "split": "test",
            **changes,
        }
        return {key: value for key, value in row.items() if value is not None}

    return make


@pytest.fixture
def write_rows() -> Callable[[Path, Iterable[Any]], Path]:
    """Write rows as JSON lines; a text or bytes is written as it stands."""

    def write(path: Path, rows: Iterable[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for row in rows:
                line = row if isinstance(row, str | bytes) else json.dumps(row)
                stream.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
        return path

    return write
