"""MedMNIST: archives in the published form of all twelve sets, broken ones, and the real files."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medbridge.data import DataSettings, Item, ItemSet, Skip, SourceSettings, import_to_folder, load_image, open_items
from medbridge.data.importers.medmnist import chosen_findings, read_medmnist
from medbridge.data.importers.medmnist_sets import SETS
from medbridge.errors import MedbridgeError

COLOUR = {"pathmnist", "dermamnist", "retinamnist", "bloodmnist"}


def arrays(name: str, counts: tuple[int, int, int] = (7, 3, 4), side: int = 8) -> dict[str, np.ndarray]:
    """Random images and labels in the published form of a set."""
    rng = np.random.default_rng(0)
    kind = SETS[name]
    found = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        shape = (count, side, side, 3) if name in COLOUR else (count, side, side)
        found[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        if kind.multi_label:
            found[f"{split}_labels"] = rng.integers(0, 2, (count, len(kind.classes)), dtype=np.uint8)
        else:
            found[f"{split}_labels"] = rng.integers(0, len(kind.classes), (count, 1), dtype=np.uint8)
    return found


def save(path: Path, content: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path, **content)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", SETS)
def test_every_set(tmp_path: Path, name: str) -> None:
    content = arrays(name)
    found = list(read_medmnist(save(tmp_path / f"{name}.npz", content), tmp_path / "cache"))
    items = [item for item in found if isinstance(item, Item)]
    assert len(items) == len(found) == 14
    assert Counter(item.split for item in items) == {"train": 7, "validation": 3, "test": 4}
    kind = SETS[name]
    for item in items:
        split, position = item.split.replace("validation", "val"), int(item.id.rsplit("/", 1)[1])
        image = np.asarray(load_image(item.images[0]))
        expected = content[f"{split}_images"][position]
        assert (image == (expected if expected.ndim == 3 else expected[..., None])).all()
        label = content[f"{split}_labels"][position]
        if kind.multi_label:
            assert item.options == ("Yes", "No") and item.floor == 0.5
            assert (item.answer == "Yes") == bool(label[kind.classes.index(item.tags["finding"])])
        else:
            assert item.options == kind.classes and item.answer == kind.classes[label[0]]
            assert item.floor == 1 / len(kind.classes)
        assert "{" not in item.question and item.tags["modality"] == kind.modality


def test_published_class_names() -> None:
    info = pytest.importorskip("medmnist.info", reason="medmnist is not installed").INFO
    assert set(SETS) == {name for name in info if "3d" not in name}
    for name, kind in SETS.items():
        assert dict(enumerate(kind.classes)) == {int(key): text for key, text in info[name]["label"].items()}
        assert kind.task_type == info[name]["task"]


def test_limit_writes_only_what_is_wanted(tmp_path: Path) -> None:
    file = save(tmp_path / "breastmnist_224.npz", arrays("breastmnist", (100, 10, 3), 4))
    items = list(read_medmnist(file, tmp_path / "cache", limit=5))
    assert [item.id for item in items[:6] if isinstance(item, Item)] == [
        *(f"breastmnist/train/{n}" for n in (0, 20, 40, 60, 80)),
        "breastmnist/validation/0",
    ]
    assert len(items) == 13 == len(list((tmp_path / "cache").rglob("*.png")))


def test_images_are_written_once_and_mended(tmp_path: Path) -> None:
    file = save(tmp_path / "breastmnist.npz", arrays("breastmnist"))
    cache = tmp_path / "cache"
    (first, *_) = read_medmnist(file, cache)
    assert isinstance(first, Item)
    image = Path(first.images[0])
    written = image.stat().st_mtime_ns
    list(read_medmnist(file, cache))
    assert image.stat().st_mtime_ns == written
    image.unlink()
    list(read_medmnist(file, cache))
    assert image.is_file()
    save(file, {**arrays("breastmnist"), "train_images": np.zeros((7, 8, 8), np.uint8)})
    (other, *_) = read_medmnist(file, cache)
    assert isinstance(other, Item) and other.images != first.images


def test_labels_out_of_range_are_skips(tmp_path: Path) -> None:
    content = arrays("breastmnist")
    content["val_labels"][1] = 2
    found = list(read_medmnist(save(tmp_path / "breastmnist.npz", content), tmp_path))
    (skip,) = (entry for entry in found if isinstance(entry, Skip))
    assert str(skip).endswith("val image 1 has the label 2; breastmnist has the labels 0 to 1.")
    content = arrays("chestmnist")
    content["train_labels"][0, 3] = 7
    found = list(read_medmnist(save(tmp_path / "chestmnist.npz", content), tmp_path))
    (skip,) = (entry for entry in found if isinstance(entry, Skip))
    assert "7 among its labels" in str(skip)


@pytest.mark.parametrize("name", ["mnist.npz", "breastmnist.zip", "organmnist3d.npz", "breast.npz"])
def test_unknown_names_list_the_sets(tmp_path: Path, name: str) -> None:
    with pytest.raises(MedbridgeError, match=r"pathmnist, chestmnist, .*organsmnist"):
        list(read_medmnist(tmp_path / name, tmp_path))


def replaced(**changes: Any) -> dict[str, np.ndarray]:
    content = {**arrays("breastmnist"), **changes}
    return {key: value for key, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (replaced(test_labels=None), "no array 'test_labels.npy'"),
        (replaced(train_images=np.zeros((7, 8, 8), np.float32)), "uint8 of shape"),
        (replaced(train_images=np.zeros((7, 8, 9), np.uint8)), "uint8 of shape"),
        (replaced(train_images=np.zeros((7, 8, 8, 4), np.uint8)), "uint8 of shape"),
        (replaced(train_images=np.zeros((7, 8), np.uint8)), "uint8 of shape"),
        (replaced(train_images=np.zeros((), np.uint8)), "no MedMNIST array has"),
        (replaced(train_images=np.zeros((6, 8, 8), np.uint8)), "6 train_images but 7 train_labels"),
        (replaced(train_images=np.asfortranarray(np.zeros((7, 8, 8), np.uint8))), "not a plain C-ordered"),
        (replaced(train_labels=np.zeros((7, 2), np.uint8)), "whole numbers of shape"),
        (replaced(train_labels=np.zeros((7, 1))), "whole numbers of shape"),
        (replaced(train_labels=np.array([[object()]] * 7, dtype=object)), "not a plain C-ordered"),
    ],
)
def test_wrong_contents(tmp_path: Path, content: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(MedbridgeError, match=message) as caught:
        list(read_medmnist(save(tmp_path / "breastmnist.npz", content), tmp_path))
    assert "breastmnist.npz" in str(caught.value)


def npy(shape: str, body: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    "member",
    [
        npy("(100000000000, 28, 28)", b"\0" * 10),
        npy("(9000000, 1000, 1000)", b"\0" * 10),
        npy("(-7, 8, 8)", b"\0" * 448),
        npy("(7, 8, 8)", b"\0" * 447),
        npy("(7, 8, 8)", b"\0" * 449),
        npy("__import__('os').getcwd()", b""),
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
        b"",
        b"text",
    ],
)
def test_malicious_members(tmp_path: Path, member: bytes) -> None:
    content = arrays("breastmnist")
    with zipfile.ZipFile(tmp_path / "breastmnist.npz", "w") as archive:
        for key, value in content.items():
            stream = io.BytesIO()
            np.save(stream, value)
            archive.writestr(f"{key}.npy", member if key == "train_images" else stream.getvalue())
    with pytest.raises(MedbridgeError, match=r"breastmnist\.npz"):
        list(read_medmnist(tmp_path / "breastmnist.npz", tmp_path))
    assert not list(tmp_path.rglob("*.png"))


def test_every_truncation_and_many_flips_end_in_a_message(tmp_path: Path) -> None:
    file = save(tmp_path / "breastmnist.npz", arrays("breastmnist"))
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(MedbridgeError, match=r"breastmnist\.npz"):
            list(read_medmnist(file, tmp_path / "cache"))
    for position in rng.integers(0, len(whole), 150):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            list(read_medmnist(file, tmp_path / f"cache{position}"))
        except MedbridgeError as error:
            assert "breastmnist" in str(error)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"breastmnist\.npz: no such file"):
        list(read_medmnist(tmp_path / "breastmnist.npz", tmp_path))


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.0])
def test_findings_are_asked_evenly(factor: float) -> None:
    rng = np.random.default_rng(1)
    rates = np.array([0.1, 0.025, 0.12, 0.18, 0.05, 0.06, 0.01, 0.05, 0.04, 0.02, 0.02, 0.02, 0.03, 0.002])
    labels = (rng.random((10_000, 14)) < rates * factor).astype(np.int64)
    chosen = np.array(chosen_findings(labels))
    answers = labels[np.arange(len(labels)), chosen]
    # As many yes as there can be, up to half; and the same share for each label.
    share = min(0.5, (labels.sum(axis=1) > 0).mean())
    assert answers.mean() == share
    for label in range(14):
        asked = answers[chosen == label]
        assert asked.sum() > 0 and abs(asked.mean() - share) < 0.06


def chest(root: Path, labels: dict[str, Any], **source: Any) -> ItemSet:
    """ChestMNIST with these labels, asked about all of them."""
    content: dict[str, np.ndarray] = {}
    for number, (split, values) in enumerate(labels.items()):
        rows = np.asarray(values, np.uint8).reshape(-1, 14)
        content[f"{split}_labels"] = rows
        content[f"{split}_images"] = np.random.default_rng(number).integers(0, 256, (len(rows), 8, 8), np.uint8)
    save(root / "chestmnist.npz", content)
    source = {"kind": "medmnist", "path": "chestmnist.npz", "medmnist": {"findings": "all"}, **source}
    data = DataSettings(sources=[SourceSettings(**source)], strata=["finding"], on_bad="skip")
    return open_items(data, base_dir=root, cache_dir=root / "cache")


def test_every_finding_of_every_image(tmp_path: Path) -> None:
    findings = SETS["chestmnist"].classes
    mixed = np.arange(14) % 3 == 0
    found = chest(tmp_path, {"train": [mixed, np.ones(14), np.zeros(14)], "val": np.zeros(14), "test": np.ones(14)})
    assert Counter(item.split for item in found.items) == {"train": 42, "validation": 14, "test": 14}
    assert len({item.id for item in found.items}) == 70 == len(found.items)
    first = found.items[:14]
    assert [item.id for item in first] == [f"chestmnist/train/0-{finding}" for finding in findings]
    assert [item.stratum(["finding"]) for item in first] == list(findings)
    assert [item.answer == "Yes" for item in first] == mixed.tolist()
    assert {item.images for item in first} == {found.items[0].images} != {found.items[14].images}
    assert {item.answer for item in found.items[14:28]} == {item.answer for item in found.split("test")} == {"Yes"}
    assert {item.answer for item in found.items[28:56]} == {"No"}
    assert all(item.options == ("Yes", "No") and item.floor == 0.5 for item in found.items)
    assert found.items[12].question == "Does this chest X-ray show pleural thickening?"
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 5


def test_one_finding_is_the_default_and_its_ids_stay(tmp_path: Path) -> None:
    labels = {"train": np.eye(14)[:3], "val": np.zeros(14), "test": np.ones(14)}
    one = chest(tmp_path, labels, medmnist={})
    ids = [*(f"chestmnist/train/{n}" for n in range(3)), "chestmnist/validation/0", "chestmnist/test/0"]
    assert [item.id for item in one.items] == ids
    # Each of its questions is one of the full set, about the same file.
    asked = {(item.question, item.answer, item.images) for item in chest(tmp_path, labels).items}
    assert {(item.question, item.answer, item.images) for item in one.items} <= asked


@pytest.mark.parametrize(("limit", "images"), [(1, 1), (14, 1), (15, 2), (42, 3), (999, 3)])
def test_a_limit_counts_questions_and_spreads_them_over_the_findings(tmp_path: Path, limit: int, images: int) -> None:
    found = chest(tmp_path, {"train": np.eye(14)[:3], "val": np.eye(14)[:3], "test": np.eye(14)[:3]}, limit=limit)
    train = found.split("train")
    assert len(train) == min(limit, 42) and len({item.images for item in train}) == images
    assert len({item.tags["finding"] for item in train}) == min(limit, 14)
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 3 * images


def test_a_wrong_label_leaves_out_all_questions_of_its_image(tmp_path: Path) -> None:
    found = chest(tmp_path, {"train": [np.full(14, 2), np.ones(14)], "val": np.ones(14), "test": np.ones(14)})
    (skip,) = found.skipped
    assert skip.item == "chestmnist/train/0" and "2 among its labels" in str(skip) and len(found.split("train")) == 14


def test_every_finding_is_read_back_from_a_folder(tmp_path: Path) -> None:
    found = chest(tmp_path, {"train": np.eye(14)[:2], "val": np.ones(14), "test": np.zeros(14)})
    source = SourceSettings(kind="medmnist", path="chestmnist.npz", medmnist={"findings": "all"})
    summary = import_to_folder(source, tmp_path / "out", base_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert summary.images == 4
    data = DataSettings(sources=[SourceSettings(kind="jsonl", path="out")])
    again = open_items(data, base_dir=tmp_path, cache_dir=tmp_path)
    assert [(item.id, item.answer, item.tags) for item in again.items] == [
        (item.id, item.answer, item.tags) for item in found.items
    ]


def test_every_finding_is_for_sets_of_several_labels(tmp_path: Path) -> None:
    save(tmp_path / "breastmnist.npz", arrays("breastmnist"))
    with pytest.raises(MedbridgeError, match=r"findings: all.* is for chestmnist .*; breastmnist has one"):
        list(read_medmnist(tmp_path / "breastmnist.npz", tmp_path, every_finding=True))


@pytest.mark.parametrize(
    ("name", "counts", "first"),
    [("breastmnist", (546, 78, 156), "normal, benign"), ("retinamnist", (1080, 120, 400), "0")],
)
def test_the_real_files(real_data: Path, tmp_path: Path, name: str, counts: tuple[int, ...], first: str) -> None:
    file = real_data / "medmnist" / f"{name}.npz"
    items = [item for item in read_medmnist(file, tmp_path) if isinstance(item, Item)]
    found = Counter(item.split for item in items)
    assert (found["train"], found["validation"], found["test"]) == counts
    assert Counter(item.answer for item in items).most_common(1)[0][0] == first
    with np.load(file, allow_pickle=False) as archive:
        image = archive["test_images"][-1]
    shown = np.asarray(load_image(items[-1].images[0]))
    assert (shown == (image if image.ndim == 3 else image[..., None])).all()
