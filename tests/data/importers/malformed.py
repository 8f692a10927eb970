"""A corpus of malformed data sets: every format of the importers with every defect that fits it, made on the spot."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import yaml
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, SecondaryCaptureImageStorage


@dataclass(frozen=True)
class Case:
    """A defect: what it is called, and what writes it into an empty folder and returns the source's settings."""

    name: str
    write: Callable[[Path], dict[str, Any]]


def png(size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint32).reshape(size[1], size[0], 3) % 251
    Image.fromarray(pixels.astype(np.uint8)).save(stream, format=kind)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes don't hold."""
    import zlib

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no image",
    "html": b"<html><body>404 Not Found</body></html>",
    "png signature only": png()[:8],
    "png cut in its header": png()[:20],
    "png cut in half": png()[: len(png()) // 2],
    "png without its end": png()[:-25],
    "png with a bad checksum": png()[:40] + b"\xff\xff" + png()[42:],
    "png bomb of 100,000 squared": bomb(100_000, 100_000),
    "png bomb of 2^31": bomb(2**31 - 1, 2**31 - 1),
    "png of no width": bomb(0, 5),
    "png of an absurd height": bomb(1, 2**31 - 1),
    "jpeg cut in half": png(kind="JPEG")[: len(png(kind="JPEG")) // 2],
    "jpeg marker only": b"\xff\xd8\xff",
    "gif cut": png(kind="GIF")[:9],
    "bmp cut": png(kind="BMP")[:30],
    "tiff cut": png(kind="TIFF")[:40],
    "webp cut": png(kind="WEBP")[:20],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "zeros": bytes(4096),
}
"""Bytes in the place of an image."""

PATHS = {
    "parent": "../secret.png",
    "deep parent": "a/../../secret.png",
    "backslash parent": "..\\secret.png",
    "absolute": "/etc/passwd",
    "drive": "C:\\secret.png",
    "network": "\\\\host\\share\\a.png",
    "address": "https://example.org/a.png",
    "file address": "file:///etc/passwd",
    "nul": "a\x00.png",
    "missing": "nowhere.png",
    "empty": "",
    "blank": "   ",
    "folder": ".",
    "very long": "a" * 900 + ".png",
}
"""Paths that name no image of the folder."""

ROWS: dict[str, dict[str, Any]] = {
    "no question": {"question": None},
    "empty question": {"question": "  "},
    "question a list": {"question": ["a"]},
    "control tokens": {"question": "<|im_start|>system"},
    "answer tags": {"answer": "<answer>A</answer>", "label": None},
    "no answer": {"answer": None, "label": None},
    "label outside": {"label": "Z"},
    "label a number": {"label": 7},
    "label and answer disagree": {"answer": "Edema", "label": "B"},
    "answer not an option": {"answer": "Nothing", "label": None},
    "one option": {"options": ["Edema"], "label": "A", "answer": None},
    "empty option": {"options": ["Edema", ""]},
    "equal options": {"options": ["Edema", "Edema"], "label": "A", "answer": None},
    "thirty options": {"options": [str(number) for number in range(30)]},
    "options a number": {"options": 5},
    "options of lists": {"options": [[], []]},
    "options broken JSON": {"options": '["a", '},
    "options deep": {"options": "[" * 20_000},
    "options code": {"options": "[__import__('os')]"},
    "no image": {"image": None},
    "image a number": {"image": 3},
    "unknown split": {"split": "holdout"},
    "split a list": {"split": ["test"]},
}
"""Changes to a good row."""

MAPPING = {
    "dataset": "demo", "question": "question", "images": "image", "options": "options", "answer": "answer",
    "answer_label": "label", "split": "split",
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    good = {
        "question": "What?", "image": "a.png", "options": ["Edema", "Mass"], "answer": "Mass", "label": "B",
        "split": "test",
    }  # fmt: skip
    return {**good, **changes}


def table(folder: Path, name: str, content: bytes, mapping: dict[str, Any] | None = None) -> dict[str, Any]:
    (folder / "a.png").write_bytes(png())
    (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping or MAPPING))
    (folder / name).write_bytes(content)
    return {"kind": "table", "path": name, "mapping": "mapping.yaml"}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def dicom(change: Callable[[pydicom.Dataset], None] | None = None) -> bytes:
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    data.PatientName, data.PatientID, data.Modality = "Doe^Jane", "P-77", "CT"
    data.Rows, data.Columns, data.SamplesPerPixel = 6, 8, 1
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation, data.PhotometricInterpretation = 15, 0, "MONOCHROME2"
    data.PixelData = np.arange(48, dtype=np.uint16).tobytes()
    if change is not None:
        change(data)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, data, enforce_file_format=True)
    return stream.getvalue()


def _set(**values: Any) -> Callable[[pydicom.Dataset], None]:
    def change(data: pydicom.Dataset) -> None:
        for key, value in values.items():
            if value is None:
                delattr(data, key)
            else:
                setattr(data, key, value)

    return change


def _compressed(data: pydicom.Dataset) -> None:
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    data.PixelData = pydicom.encaps.encapsulate([b"no codestream"])
    data["PixelData"].is_undefined_length = True


DICOMS: dict[str, bytes] = {
    "empty": b"",
    "text": b"no file of that kind",
    "preamble only": bytes(128) + b"DICM",
    "cut in the header": dicom()[:300],
    "cut in the pixels": dicom()[:-40],
    "no pixels": dicom(_set(PixelData=None)),
    "too few pixels": dicom(_set(PixelData=bytes(10))),
    "no rows": dicom(_set(Rows=0)),
    "rows missing": dicom(_set(Rows=None)),
    "absurd rows": dicom(_set(Rows=65535, Columns=65535)),
    "many frames": dicom(_set(NumberOfFrames=2_000_000_000)),
    "frames below none": dicom(_set(NumberOfFrames=-5)),
    "unknown photometric": dicom(_set(PhotometricInterpretation="GREEN")),
    "no photometric": dicom(_set(PhotometricInterpretation=None)),
    "seventeen bits": dicom(_set(BitsAllocated=17)),
    "no bits": dicom(_set(BitsStored=None)),
    "five samples": dicom(_set(SamplesPerPixel=5)),
    "palette without a table": dicom(_set(PhotometricInterpretation="PALETTE COLOR")),
    "broken compression": dicom(_compressed),
    "huge header": bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0x10, b"OB", 0, 0xFFFFFFF0) + bytes(64),
    "many elements": dicom(
        lambda d: [d.add_new((0x0011 + 2 * (n // 200), 0x1000 + n % 200), "LO", "x") for n in range(20_100)] and None
    ),
}
"""Bytes in the place of a DICOM file."""


def nifti(shape: tuple[int, ...] = (6, 7, 8), dtype: Any = np.int16) -> bytes:
    values = (np.arange(int(np.prod(shape))).reshape(shape) % 100).astype(dtype)
    return nibabel.Nifti1Image(values, np.eye(4)).to_bytes()


def _dims(*sizes: int) -> bytes:
    raw = bytearray(nifti())
    raw[40:56] = struct.pack("<8h", len(sizes), *sizes, *([1] * (7 - len(sizes))))
    return bytes(raw)


NIFTIS: dict[str, tuple[str, bytes]] = {
    "empty": (".nii", b""),
    "text": (".nii", b"no volume"),
    "header only": (".nii", nifti()[:352]),
    "half a header": (".nii", nifti()[:150]),
    "cut": (".nii", nifti()[:-100]),
    "absurd size": (".nii", _dims(32767, 32767, 32767)),
    "size below none": (".nii", _dims(-5, 7, 8)),
    "no size": (".nii", _dims(0, 7, 8)),
    "two axes": (".nii", nifti((6, 7))),
    "colours": (".nii", nifti()[:70] + struct.pack("<h", 128) + nifti()[72:]),
    "complex": (".nii", nifti(dtype=np.complex64)),
    "unknown type": (".nii", nifti()[:70] + struct.pack("<h", 999) + nifti()[72:]),
    "no magic": (".nii", nifti()[:344] + b"abcd" + nifti()[348:]),
    "gz not packed": (".nii.gz", nifti()),
    "gz cut": (".nii.gz", gzip.compress(nifti())[:-30]),
    "gz bad checksum": (".nii.gz", gzip.compress(nifti())[:-8] + bytes(8)),
    "gz of a bomb": (".nii.gz", gzip.compress(_dims(30000, 30000, 30000))),
    "gz of text": (".nii.gz", gzip.compress(b"no volume")),
}
"""Ending and bytes in the place of a volume."""

TABLES: dict[str, tuple[str, bytes]] = {
    **{f"{suffix} empty": (f"t{suffix}", b"") for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet")},
    **{f"{suffix} zeros": (f"t{suffix}", bytes(999)) for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet")},
    **{
        f"{suffix} noise": (f"t{suffix}", random.Random(1).randbytes(3000))
        for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet")
    },
    "unknown ending": ("t.xlsx", b"PK"),
    "csv header only": ("t.csv", b"question,image,options,answer,label,split\n"),
    "csv of other columns": ("t.csv", b"a,b\n1,2\n"),
    "csv too few fields": ("t.csv", b"question,image,options,answer,label,split\nx,y\n"),
    "csv too many fields": ("t.csv", b"question,image\nx,y,z\n"),
    "csv equal columns": ("t.csv", b"question,question\nx,y\n"),
    "csv open quote": ("t.csv", b'question,image\n"x,y\n'),
    "csv latin-1": ("t.csv", "question,image\n\xe9t\xe9,a.png\n".encode("latin-1")),
    "csv utf-16": ("t.csv", "question,image\nx,a.png\n".encode("utf-16")),
    "csv mixed encodings": ("t.csv", "question,image\n\u00e9,a.png\n".encode() + b"\xe9,a.png\n"),
    "csv long field": ("t.csv", b"question,image\n" + b"x" * (17 * 2**20) + b",a.png\n"),
    "json an object": ("t.json", b'{"a": 1}'),
    "json a number": ("t.json", b"3"),
    "json rows of numbers": ("t.json", b"[1, 2]"),
    "json deep": ("t.json", b"[" * 100_000),
    "json cut": ("t.json", b'[{"question": "a'),
    "json latin-1": ("t.json", '[{"question": "\xe9"}]'.encode("latin-1")),
    "json digits": ("t.json", b"[" + b"9" * 5000 + b"]"),
    "jsonl a list": ("t.jsonl", b"[]\n"),
    "jsonl cut": ("t.jsonl", lines(row())[:-20]),
    "jsonl long line": ("t.jsonl", b'"' + b"x" * (17 * 2**20)),
    "jsonl utf-16": ("t.jsonl", lines(row()).decode().encode("utf-16")),
    "jsonl nan floor": ("t.jsonl", b'{"question": NaN}\n'),
    "parquet cut": ("t.parquet", parquet([row()])[:-30]),
    "parquet no footer": ("t.parquet", parquet([row()])[:100]),
    "parquet bad footer length": ("t.parquet", parquet([row()])[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "parquet other columns": ("t.parquet", parquet([{"a": 1}])),
    "parquet no rows": ("t.parquet", parquet([])),
    "parquet changed": ("t.parquet", parquet([row()])[:30] + b"\xff" * 20 + parquet([row()])[50:]),
}
"""Whole tables."""

MAPPINGS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- a\n",
    "not YAML": b"a: [",
    "python object": b"!!python/object/apply:os.system ['true']\n",
    "unknown field": b"question: q\nimages: i\nanswer: a\nquestoin: q\n",
    "no answer": b"question: q\nimages: i\n",
    "no question": b"images: i\nanswer: a\n",
    "floor of one": b"question: q\nimages: i\nanswer: a\nfloor: 1\n",
    "unknown split": b"question: q\nimages: i\nanswer: a\nsplit_default: holdout\n",
    "base of nobody": b"base: nobody\n",
    "base of itself": b"base: m.yaml\n",
    "a pattern without sense": b"question: q\nimages: i\nanswer: a\nfiles: {'a**.csv': test}\npath: .\n",
    "files that leave": b"question: q\nimages: i\nanswer: a\nfiles: {'../*.csv': test}\npath: .\n",
    "not UTF-8": b"question: \xff\n",
    "huge": b"#" * (2**20 + 1),
}
"""Mapping files."""


def _in_table(content: bytes) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: table(folder, "t.parquet", parquet([row(image={"bytes": content, "path": None})]))


def _base64(content: bytes) -> Callable[[Path], dict[str, Any]]:
    text = "data:image/png;base64," + base64.b64encode(content).decode()
    return lambda folder: table(folder, "t.jsonl", lines(row(image=text)))


def _file(content: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "bad.png").write_bytes(content)
        return table(folder, "t.jsonl", lines(row(image="bad.png")))

    return write


def _classes(kind: str, name: str, content: bytes, good: tuple[str, bytes] | None) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for label in ("one", "two"):
            (folder / label).mkdir()
        (folder / "one" / name).write_bytes(content)
        (folder / "two" / name).write_bytes(content)
        if good is not None:
            (folder / "two" / good[0]).write_bytes(good[1])
        return {"kind": kind, "path": "."}

    return write


def _mapping(content: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "m.yaml").write_bytes(content)
        return {"kind": "table", "path": "m.yaml"}

    return write


def _slake(content: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "imgs").mkdir()
        for name in ("train", "validate", "test"):
            (folder / f"{name}.json").write_bytes(content)
        return {"kind": "slake", "path": "."}

    return write


def npz(**changes: Any) -> bytes:
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((3, 4, 4), np.uint8)
        arrays[f"{split}_labels"] = np.zeros((3, 1), np.uint8)
    arrays.update(changes)
    stream = io.BytesIO()
    np.savez(stream, **{key: value for key, value in arrays.items() if value is not None})
    return stream.getvalue()


def _npy(header: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    return stream.getvalue()


MEDMNISTS: dict[str, bytes] = {
    "empty": b"",
    "cut": npz()[:-50],
    "no images": npz(test_images=None),
    "objects": npz(train_labels=np.array([{}, {}, {}], dtype=object)),
    "floats": npz(train_images=np.zeros((3, 4, 4))),
    "too few labels": npz(train_labels=np.zeros((2, 1), np.uint8)),
    "labels outside": npz(**{f"{s}_labels": np.full((3, 1), 9, np.uint8) for s in ("train", "val", "test")}),
    "not square": npz(train_images=np.zeros((3, 4, 5), np.uint8)),
    "absurd header": _npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10**12, 9)}\n"),
    "code in the header": _npy(b"__import__('os')\n"),
}


def _medmnist(content: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "breastmnist.npz").write_bytes(content)
        return {"kind": "medmnist", "path": "breastmnist.npz"}

    return write


def cases() -> Iterator[Case]:
    """All of them, each under a name of its own."""
    for name, content in IMAGES.items():
        yield Case(f"image file: {name}", _file(content))
        yield Case(f"image in parquet: {name}", _in_table(content))
        yield Case(f"image in base64: {name}", _base64(content))
        yield Case(f"image folder: {name}", _classes("images", "x.png", content, None))
    for name, path in PATHS.items():
        yield Case(f"path in jsonl: {name}", lambda f, p=path: table(f, "t.jsonl", lines(row(image=p))))
        yield Case(f"path in parquet: {name}", lambda f, p=path: table(f, "t.parquet", parquet([row(image=p)])))
    for name, change in ROWS.items():
        yield Case(f"row of json: {name}", lambda f, c=change: table(f, "t.json", json.dumps([row(**c)]).encode()))
        yield Case(f"row of jsonl: {name}", lambda f, c=change: table(f, "t.jsonl", lines(row(**c))))
    for name, (file, content) in TABLES.items():
        yield Case(f"table: {name}", lambda f, n=file, c=content: table(f, n, c))
    for name, content in MAPPINGS.items():
        yield Case(f"mapping: {name}", _mapping(content))
    for name, content in DICOMS.items():
        yield Case(f"dicom: {name}", _classes("dicom", "x.dcm", content, None))
    for name, (suffix, content) in NIFTIS.items():
        yield Case(f"nifti: {name}", _classes("nifti", f"x{suffix}", content, None))
    for name, content in MEDMNISTS.items():
        yield Case(f"medmnist: {name}", _medmnist(content))
    slake = {
        "empty": b"", "an object": b"{}", "numbers": b"[1, null]", "cut": b'[{"qid": 1', "latin-1": b'["\xe9"]',
        "deep": b"[" * 100_000, "missing fields": b'[{"qid": 1, "q_lang": "en"}]',
    }  # fmt: skip
    for name, content in slake.items():
        yield Case(f"slake: {name}", _slake(content))
