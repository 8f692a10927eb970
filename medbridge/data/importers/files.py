"""Folders of files, one class a folder or a table of labels, as multiple choice; and plain image files read so.

Splits are folders of their names, a column of the table, or shares drawn by a hash of each file's group.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from medbridge.data.images import ImageCheck, check_image, resolve_image
from medbridge.data.importers.jsonl import SPLIT_NAMES
from medbridge.data.importers.lines import plain_text
from medbridge.data.importers.rows import read_rows
from medbridge.data.items import MAX_OPTIONS, Item, Skip
from medbridge.errors import MedbridgeError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2")
MAX_FILES = 5_000_000
TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1


class FolderSettings(BaseModel):
    """What is asked about the files of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field("What does this image show?", min_length=1, description="The question about each file.")
    dataset: str | None = Field(None, description="The data set's name; else the folder's.")
    labels: str | None = Field(
        None,
        description="Table (CSV, JSON lines, Parquet) below the folder with the columns `file` and `label`, and if "
        "wanted `split` and `group`; else the folder that a file lies in is its label.",
    )
    group: str | None = Field(
        None,
        description="Regular expression; what its first group matches in a file's path names what must not be parted "
        "between splits, such as a patient. Else equal files stay together, and DICOM files of one patient.",
    )


class DicomSettings(BaseModel):
    """How the pixels of a DICOM file become an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: Literal["file", "full"] | tuple[FiniteFloat, Annotated[FiniteFloat, Field(ge=1)]] = Field(
        "file",
        description="`file`: its own window and function, `full`: from least to greatest value, or [centre, width] of "
        "a linear window, its width at least 1.",
    )
    frame: Literal["middle", "all"] | int = Field(
        "middle", description="Which frame of several: `middle`, a number from 0, or `all` as a sequence of images."
    )
    tags: list[Literal["Modality", "BodyPartExamined", "ViewPosition", "PhotometricInterpretation"]] = Field(
        default_factory=list, description="Header fields to keep as tags; nothing else of the header is kept."
    )


class NiftiSettings(BaseModel):
    """Which slices of a NIfTI volume become images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    axis: Literal["sagittal", "coronal", "axial"] = Field("axial", description="Plane of the slices.")
    slices: int = Field(1, ge=1, le=64, description="Slices at even distances; one is the middle.")
    sequence: bool = Field(False, description="All slices of a volume as one question, instead of one question each.")
    percentiles: tuple[float, float] = Field(
        (0.5, 99.5), description="Percentiles of the volume's values that become black and white."
    )


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """A file of a folder: its number in the order of paths (from 1), path relative to the root, label, split, group."""

    number: int
    name: str
    label: str
    split: str | None
    group: str | None


@dataclass(frozen=True, slots=True)
class LabelledFolder:
    """The files of a folder and the classes that they have among them."""

    root: Path
    dataset: str
    question: str
    classes: tuple[str, ...]
    files: list[LabelledFile]
    skipped: list[Skip]

    def item(self, file: LabelledFile, index: str, images: list[str], group: str, tags: dict[str, str]) -> Item:
        """The question about one file. `group` decides the split where the folder doesn't."""
        split = file.split or drawn_split(file.group or group)
        return Item(
            id=f"{self.dataset}/{split}/{index}",
            dataset=self.dataset,
            split=split,
            question=self.question,
            answer=file.label,
            options=self.classes,
            images=tuple(images),
            tags=tags,
            floor=1 / len(self.classes),
        )


def drawn_split(group: str) -> str:
    """The split of a group: seven tenths train, one validation, two test, by the hash of its name."""
    share = int.from_bytes(hashlib.sha256(group.encode("utf-8", "replace")).digest()[:8]) / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


def read_images(root: Path, settings: FolderSettings, *, check: ImageCheck = "header") -> Iterator[Item | Skip]:
    """One question for each image file below `root`; a Skip for a file that is no image."""
    folder = labelled_folder(root, settings, lambda name: name.lower().endswith(IMAGE_SUFFIXES))
    yield from folder.skipped
    for file in folder.files:
        try:
            path = resolve_image(root, file.name)
            check_image(path, check)
            with open(path, "rb") as stream:
                group = file.group or file.split or hashlib.file_digest(stream, "sha256").hexdigest()
            yield folder.item(file, file.name, [path], group, {"class": file.label})
        except (MedbridgeError, OSError) as error:
            yield Skip(str(root / file.name), None, None, str(error))


def labelled_folder(root: Path, settings: FolderSettings, wanted: Callable[[str], bool]) -> LabelledFolder:
    """The files below `root` whose names are `wanted`, with label, split and group.

    Raises MedbridgeError if there are none, or fewer than two or more than 26 classes.
    """
    if not root.is_dir():
        raise MedbridgeError(f"{root}: no such folder.")
    try:
        pattern = None if settings.group is None else re.compile(settings.group)
    except re.error as error:
        raise MedbridgeError(f"`group` is no regular expression ({error}).") from error
    if pattern is not None and pattern.groups < 1:
        raise MedbridgeError(f"`group` {settings.group!r} has no group in brackets to take a name from.")
    skipped: list[Skip] = []
    files: list[LabelledFile] = []
    labelled = _by_table(root, settings.labels, skipped) if settings.labels else _by_folder(root, wanted, skipped)
    for number, (name, label, split, group) in enumerate(labelled, start=1):
        if pattern is not None and group is None:
            match = pattern.search(name)
            if match is None or not match.group(1):
                skipped.append(Skip(str(root), number, None, "`group` matches nothing in this file's path."))
                continue
            group = match.group(1)
        files.append(LabelledFile(number, name, label, split, group))
    classes = tuple(sorted({file.label for file in files}))
    if not 2 <= len(classes) <= MAX_OPTIONS:
        raise MedbridgeError(
            f"{root}: {len(files)} files of {len(classes)} classes; a choice needs 2 to {MAX_OPTIONS} of them. Sort "
            "the files into CLASS/ or SPLIT/CLASS/ folders, or name a table of `labels`."
        )
    name = settings.dataset or root.name
    return LabelledFolder(root, name, settings.question, classes, files, skipped)


Labelled = tuple[str, str, str | None, str | None]
"""File name below the root, label, split, group."""


def _by_folder(root: Path, wanted: Callable[[str], bool], skipped: list[Skip]) -> list[Labelled]:
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(folder).relative_to(root)
        names.extend((base / name).as_posix() for name in files if not name.startswith(".") and wanted(name))
        if len(names) > MAX_FILES:
            raise MedbridgeError(f"{root}: more than {MAX_FILES} files. Name a smaller folder.")
    found: list[Labelled] = []
    for number, name in enumerate(sorted(names), start=1):
        parts = Path(name).parts
        split = SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 2 else None
        place = parts[1:-1] if split else parts[:-1]
        if not place or not all(part.isprintable() for part in place):
            skipped.append(Skip(str(root), number, None, "the file lies in no folder that could name its class."))
            continue
        found.append((name, place[0], split, None))
    return found


def _by_table(root: Path, table: str, skipped: list[Skip]) -> list[Labelled]:
    path = Path(resolve_image(root, table))
    found: list[Labelled] = []
    for number, row in read_rows(path):
        try:
            if isinstance(row, MedbridgeError):
                raise row
            name, label = plain_text(row.get("file")), plain_text(row.get("label"))
            if not name or not label:
                raise MedbridgeError("the columns 'file' and 'label' must both hold a text.")
            given = plain_text(row.get("split"))
            split = SPLIT_NAMES.get(given.lower()) if given else None
            if given and split is None:
                raise MedbridgeError(f"'split' is {given!r}; the splits are train, validation and test.")
            _check_place(root, name)
            found.append((name, label, split, plain_text(row.get("group")) or None))
        except MedbridgeError as error:
            skipped.append(Skip(str(path), number, None, str(error)))
    return found


def _check_place(root: Path, name: str) -> None:
    """Refuse a file that is missing or lies elsewhere, without its name: that may be a patient's."""
    try:
        resolve_image(root, name)
    except MedbridgeError:
        raise MedbridgeError("its 'file' is no file below the folder.") from None
