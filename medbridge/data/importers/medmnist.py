"""The twelve two-dimensional MedMNIST sets, read from their published `.npz` files as multiple choice.

The arrays are streamed out of the archive: a set of several gigabytes needs a few megabytes of memory.
Downloading is left to the user's own `medmnist`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from medbridge.data.folder import ensure_folder, rebuild_folder
from medbridge.data.importers.medmnist_sets import SETS, MedMnistSet
from medbridge.data.items import Item, Skip
from medbridge.data.sampling import even_positions
from medbridge.errors import MedbridgeError

BUILD_VERSION = 1
"""Part of the stamp of the written images: raise it whenever their bytes or names change."""

_MEMBERS = {"train": "train", "validation": "val", "test": "test"}
_MAX_SIDE = 1024
_MAX_ROWS = 10_000_000
_CHUNK_BYTES = 8 * 2**20


class MedMnistSettings(BaseModel):
    """What the images of a MedMNIST set that has several labels an image are asked about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    findings: Literal["one", "all"] = Field(
        "one",
        description="ChestMNIST: each image is asked about `one` of its 14 labels, so that yes is right about as often "
        "as no, or about `all` of them, a question for each.",
    )


def read_medmnist(
    file: Path, cache_dir: Path, *, limit: int | None = None, every_finding: bool = False
) -> Iterator[Item | Skip]:
    """The questions about a set's images, split by split; a Skip for a label that is none of the set's.

    The images are written once as PNG files below `cache_dir`. With `limit`, only as many of each split as that
    many questions need, at even distances. An image gets one question; ChestMNIST has fourteen labels an image
    and asks about one of them, see `chosen_findings`, or with `every_finding` about each, the label in the id.
    Raises MedbridgeError if the name is no set's, `every_finding` is wanted of a set with one label an image, or
    the archive is broken or not of that set.
    """
    name, kind = recognise(file)
    if every_finding and not kind.multi_label:
        raise MedbridgeError(
            f"{file}: `medmnist: {{findings: all}}` is for chestmnist and its several labels an image; {name} has one."
        )
    questions = _questions(kind)
    if limit is not None and every_finding:
        limit = -(-limit // len(questions))
    with _archive(file) as archive:
        labels = {split: _labels(file, archive, member, kind) for split, member in _MEMBERS.items()}
        wanted = {}
        for split, member in _MEMBERS.items():
            shape = _image_shape(file, archive, f"{member}_images.npy")
            if shape[0] != len(labels[split]):
                raise MedbridgeError(
                    f"{file}: {shape[0]} {member}_images but {len(labels[split])} {member}_labels. Get the file again."
                )
            count = shape[0]
            wanted[split] = even_positions(count, count if limit is None else limit)
        folder = _written_images(file, archive, name, wanted, cache_dir)
    for split, positions in wanted.items():
        one = chosen_findings(labels[split]) if kind.multi_label and not every_finding else None
        for position in positions:
            item_id = f"{name}/{split}/{position}"
            row = labels[split][position]
            if problem := _label_problem(name, kind, row):
                yield Skip(str(file), None, item_id, f"{_MEMBERS[split]} image {position} has {problem}.")
                continue
            images = (str(folder / _image_name(split, position)),)
            for column in range(len(questions)) if one is None else [one[position]]:
                question, options, tags = questions[column]
                answer = ("No", "Yes")[row[column]] if kind.multi_label else kind.classes[row[0]]
                yield Item(
                    id=f"{item_id}-{kind.classes[column]}" if every_finding else item_id,
                    dataset=name,
                    split=split,
                    question=question,
                    answer=answer,
                    options=options,
                    images=images,
                    tags=tags,
                    floor=1 / len(options),
                )


def _questions(kind: MedMnistSet) -> list[tuple[str, tuple[str, ...], dict[str, str]]]:
    """Question, options and tags: of a multi-label set for each of its labels, else the only ones."""
    tags = {"task_type": kind.task_type, "modality": kind.modality}
    if not kind.multi_label:
        return [(kind.question, kind.classes, tags)]
    return [(kind.question_about(finding), ("Yes", "No"), {**tags, "finding": finding}) for finding in kind.classes]


def _label_problem(name: str, kind: MedMnistSet, row: np.ndarray) -> str | None:
    """What is wrong with an image's labels, int64 [1] or [classes]."""
    if kind.multi_label:
        wrong = sorted(set(row.tolist()) - {0, 1})
        return f"{wrong[0]} among its labels, which must be 0 or 1" if wrong else None
    if 0 <= row[0] < len(kind.classes):
        return None
    return f"the label {row[0]}; {name} has the labels 0 to {len(kind.classes) - 1}"


def recognise(file: Path) -> tuple[str, MedMnistSet]:
    """The set that a file's name says it holds: `breastmnist.npz`, `breastmnist_224.npz`, ..."""
    match = re.fullmatch(r"([a-z]+)(?:_\d{2,3})?\.npz", file.name.lower())
    if match is None or match.group(1) not in SETS:
        raise MedbridgeError(
            f"{file}: the name must be that of a MedMNIST set, like breastmnist.npz or breastmnist_224.npz. "
            f"The sets are {', '.join(SETS)}."
        )
    return match.group(1), SETS[match.group(1)]


def chosen_findings(labels: np.ndarray) -> list[int]:
    """For each image of ChestMNIST, the label it is asked about. `labels`: integers [images, 14], 0 or 1.

    Half of the images, or as many as have a finding, are asked about one that they have (answer yes), the one
    asked least so far; the others about one that they lack (answer no), so that every label has no-answers in
    proportion to its yes-answers. The question alone then gives as little away as the data allows.
    """
    count, width = labels.shape
    positive = np.flatnonzero((labels == 1).any(axis=1))
    asked_yes = positive[even_positions(len(positive), count // 2)]
    yes, no = np.zeros(width), np.zeros(width)
    chosen = np.full(count, -1)
    for image in asked_yes:
        present = np.flatnonzero(labels[image] == 1)
        chosen[image] = present[np.argmin(yes[present])]
        yes[chosen[image]] += 1
    for image in np.flatnonzero(chosen < 0):
        absent = np.flatnonzero(labels[image] != 1)
        if len(absent) == 0:
            absent = np.arange(width)
        chosen[image] = absent[np.argmin((no[absent] + 1) / (yes[absent] + 1e-9))]
        no[chosen[image]] += 1
    return [int(label) for label in chosen]


# -- the archive ---------------------------------------------------------------------------------------------


@contextmanager
def _archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """The opened archive; whatever a broken one makes its readers raise becomes a MedbridgeError."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError as error:
        raise MedbridgeError(f"{file}: no such file. The user's own `medmnist` package downloads it.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise MedbridgeError(f"{file}: not a whole MedMNIST archive ({error}). Get the file again.") from error
    except OSError as error:
        raise MedbridgeError(f"{file}: can't be read ({error}).") from error


@contextmanager
def _member(
    file: Path, archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """A member array as a stream placed at its first element, with shape and dtype. Nothing is unpickled."""
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        known = ", ".join(sorted(archive.namelist())[:12]) or "nothing"
        raise MedbridgeError(f"{file}: no array {name!r} in it; it holds {known}.") from error
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise MedbridgeError(f"{file}: {name} is of the unknown .npy version {version}.")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise MedbridgeError(f"{file}: {name} is not a plain C-ordered array of numbers.")
        if not shape or any(size < 0 for size in shape) or shape[0] > _MAX_ROWS:
            raise MedbridgeError(f"{file}: {name} has the shape {shape}, which no MedMNIST array has.")
        body = info.file_size - stream.tell()
        if int(np.prod([int(size) for size in shape], dtype=object)) * dtype.itemsize != body:
            raise MedbridgeError(f"{file}: {name} says shape {shape} of {dtype}, but holds {body} bytes.")
        yield stream, shape, dtype


def _labels(file: Path, archive: zipfile.ZipFile, member: str, kind: MedMnistSet) -> np.ndarray:
    """The labels of a split: int64 [images, 1], for a multi-label set [images, classes]."""
    name = f"{member}_labels.npy"
    columns = len(kind.classes) if kind.multi_label else 1
    with _member(file, archive, name) as (stream, shape, dtype):
        if dtype.kind not in "iu" or (shape[1:] not in ((columns,), ()) or (columns > 1 and len(shape) == 1)):
            raise MedbridgeError(
                f"{file}: {name} is {dtype} of shape {shape}; whole numbers of shape (images, {columns}) are needed."
            )
        raw = stream.read()
    return np.frombuffer(raw, dtype=dtype).astype(np.int64).reshape(shape[0], columns)


def _image_shape(file: Path, archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with _member(file, archive, name) as (_, shape, dtype):
        good = len(shape) in (3, 4) and shape[1] == shape[2] and 1 <= shape[1] <= _MAX_SIDE
        if not good or shape[3:] not in ((), (1,), (3,)) or dtype != np.uint8:
            raise MedbridgeError(
                f"{file}: {name} is {dtype} of shape {shape}; uint8 of shape (images, side, side) or "
                "(images, side, side, 3) is needed."
            )
    return shape


def _images(file: Path, archive: zipfile.ZipFile, name: str, positions: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The images at the ascending `positions`, uint8 [side, side] or [side, side, 3], read in chunks."""
    with _member(file, archive, name) as (stream, shape, _):
        row_bytes = int(np.prod(shape[1:]))
        rows = max(1, _CHUNK_BYTES // row_bytes)
        pending = iter(positions)
        position = next(pending, None)
        for first in range(0, shape[0], rows):
            # Read to the end even if no position is left: only then is the member's checksum compared.
            count = min(rows, shape[0] - first)
            chunk = stream.read(count * row_bytes)
            if len(chunk) != count * row_bytes:
                raise MedbridgeError(f"{file}: {name} is cut short. Get the file again.")
            images = np.frombuffer(chunk, dtype=np.uint8).reshape(count, *shape[1:])
            while position is not None and position < first + count:
                image = images[position - first]
                yield position, image[..., 0] if image.shape[2:] == (1,) else image
                position = next(pending, None)


# -- the written images --------------------------------------------------------------------------------------


def _image_name(split: str, position: int) -> str:
    # A thousand files a folder: some file systems are slow with a hundred thousand in one.
    return f"{split}/{position // 1000:04d}/{position:07d}.png"


def _written_images(
    file: Path, archive: zipfile.ZipFile, name: str, wanted: dict[str, list[int]], cache_dir: Path
) -> Path:
    """The folder with the wanted images as PNG files, written unless it is there already."""
    # The archive's own checksums stand for its contents, so that several gigabytes need not be read again.
    sums = {info.filename: [info.CRC, info.file_size] for info in archive.infolist()}
    identity = json.dumps([BUILD_VERSION, name, sums, wanted], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()
    folder = cache_dir / "medmnist" / f"{file.stem.lower()}-{key[:12]}"

    def build(target: Path) -> None:
        for split, positions in wanted.items():
            made: set[Path] = set()
            for position, image in _images(file, archive, f"{_MEMBERS[split]}_images.npy", positions):
                path = target / _image_name(split, position)
                if path.parent not in made:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    made.add(path.parent)
                Image.fromarray(image).save(path, format="PNG", compress_level=1)

    ensure_folder(folder, key, build, verify=False)
    if not all(os.path.isfile(folder / _image_name(split, p)) for split in wanted for p in wanted[split]):
        rebuild_folder(folder, key, build, verify=False)
    return folder
