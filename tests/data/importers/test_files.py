"""Folders of images, DICOM files and NIfTI volumes: labels, splits, pixels, and nothing of a patient."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from data.importers.malformed import dicom
from PIL import Image
from pydantic import ValidationError
from pydicom.data import get_testdata_file
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from medbridge.data import DataSettings, ItemSet, SourceSettings, check_items, open_items
from medbridge.data.importers.files import DicomSettings, drawn_split
from medbridge.errors import MedbridgeError


def opened(root: Path, **source: Any) -> ItemSet:
    data = DataSettings(sources=[SourceSettings(path=".", **source)])
    return open_items(data, base_dir=root, cache_dir=root.parent / "cache")


def test_class_folders(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    root = tmp_path / "scans"
    for number in range(60):
        make_png(root / ("benign", "malignant")[number % 2] / f"{number}.png", number)
    found = opened(root, kind="images", folder={"question": "Which?", "group": r"(\d)\.png$"})
    assert len(found.items) == 60 and found.items[0].options == ("benign", "malignant")
    assert all(item.answer in item.images[0] for item in found.items)
    splits = {digit: {item.split for item in found.items if item.id.endswith(f"{digit}.png")} for digit in range(10)}
    assert all(len(held) == 1 for held in splits.values()) and len({*map(min, splits.values())}) > 1


def test_split_folders_and_a_table_of_labels(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    for split in ("train", "val", "test"):
        for label in ("a", "b"):
            make_png(tmp_path / "x" / split / label / "0.png")
    assert {item.split for item in opened(tmp_path / "x", kind="images").items} == {"train", "validation", "test"}
    make_png(tmp_path / "y" / "1.png", 1)
    make_png(tmp_path / "y" / "2.png", 2)
    (tmp_path / "y" / "l.csv").write_text("file,label,split\n1.png,a,test\n2.png,b,dev\n")
    found = opened(tmp_path / "y", kind="images", folder={"labels": "l.csv"})
    assert [(item.answer, item.split) for item in found.items] == [("a", "test"), ("b", "validation")]


def test_drawn_splits_have_their_shares() -> None:
    drawn = [drawn_split(str(number)) for number in range(5000)]
    assert [round(drawn.count(name) / 5000, 1) for name in ("train", "validation", "test")] == [0.7, 0.1, 0.2]


def dicoms(root: Path, *contents: bytes) -> Path:
    for number, content in enumerate(contents):
        path = root / "ab"[number % 2] / f"Doe_Jane_{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def pixels(found: ItemSet, label: str) -> np.ndarray:
    (item,) = (item for item in found.items if item.answer == label)
    return np.asarray(Image.open(item.images[0]))


def test_windows_and_monochrome1(tmp_path: Path) -> None:
    def windowed(data: Any) -> None:
        data.WindowCenter, data.WindowWidth = 20.5, 11
        data.RescaleSlope, data.RescaleIntercept = 2, -10

    def inverted(data: Any) -> None:
        windowed(data)
        data.PhotometricInterpretation = "MONOCHROME1"

    found = opened(dicoms(tmp_path / "d", dicom(windowed), dicom(inverted)), kind="dicom")
    values = np.arange(48).reshape(6, 8) * 2.0 - 10
    expected = np.round(np.clip((values - 15) / 10, 0, 1) * 255)
    np.testing.assert_array_equal(pixels(found, "a"), expected)
    np.testing.assert_array_equal(pixels(found, "b"), 255 - expected)


def as_shown(content: bytes) -> np.ndarray:
    """The grey levels 0 to 255 that pydicom's own window makes of a file, turned round for MONOCHROME1."""
    data = pydicom.dcmread(io.BytesIO(content))
    values = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data).astype(np.float64)
    # pydicom spreads a window over all values that the file's pixels could have.
    ends = np.array([-(2**15), 2**15 - 1] if data.PixelRepresentation else [0, 2**16 - 1])
    low, high = ends * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    levels = np.round((values - low) / (high - low) * 255)
    return 255 - levels if data.PhotometricInterpretation == "MONOCHROME1" else levels


@pytest.mark.parametrize(
    "window",
    [
        (function, centre, width)
        for function in (None, "LINEAR", "LINEAR_EXACT", "SIGMOID")
        for centre, width in ((20.5, 11), (24, 1), (10, 0.5), (-40, 400), ([30, 5], [20, 7]), (300, 3), (-300, 3))
        if np.min(width) >= 1 or function in ("LINEAR_EXACT", "SIGMOID")
    ],
    ids=str,
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_windows_as_pydicom_applies_them(tmp_path: Path, window: tuple[Any, ...], photometric: str) -> None:
    def windowed(data: Any) -> None:
        function, data.WindowCenter, data.WindowWidth = window
        data.PhotometricInterpretation = photometric
        if function is not None:
            data.VOILUTFunction = function

    def signed(data: Any) -> None:
        windowed(data)
        data.RescaleSlope, data.RescaleIntercept, data.PixelRepresentation = 2, -10, 1
        data.PixelData = (np.arange(48, dtype=np.int16) - 20).tobytes()

    def other(data: Any) -> None:
        data.Rows, data.Columns = 8, 6

    for name, change in (("unsigned", windowed), ("signed", signed)):
        content = dicom(change)
        found = opened(dicoms(tmp_path / name, content, dicom(other)), kind="dicom")
        difference = np.abs(pixels(found, "a") - as_shown(content))
        # The two round at other places, so that a level on the edge of two may differ.
        assert difference.max() <= 1 and (difference == 0).mean() > 0.9


def test_the_functions_differ(tmp_path: Path) -> None:
    def windowed(function: str) -> bytes:
        def change(data: Any) -> None:
            data.WindowCenter, data.WindowWidth, data.VOILUTFunction = 20, 16, function

        return dicom(change)

    shown = [as_shown(windowed(function)) for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID")]
    assert not np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[1], shown[2])
    root = dicoms(tmp_path / "d", windowed("SIGMOID"), windowed("CUBIC"))
    with pytest.raises(MedbridgeError, match=r"none of LINEAR, LINEAR_EXACT, SIGMOID\. Choose `window: full`"):
        opened(root, kind="dicom")
    # A window of one's own is a linear one, whatever the file says, so that both show the same.
    found = open_items(
        DataSettings(sources=[SourceSettings(kind="dicom", path=".", dicom={"window": [20, 16]})], on_bad="skip"),
        base_dir=root,
        cache_dir=tmp_path / "cache",
    )
    assert len(found.items) == 1 and "the same as a file before it" in str(found.skipped[0])
    np.testing.assert_array_equal(pixels(found, "a"), shown[0])


@pytest.mark.parametrize("width", [0, -3, 0.5, float("nan"), float("inf")])
def test_a_window_without_a_width_is_refused(width: float) -> None:
    with pytest.raises(ValidationError, match=r"greater than or equal to 1|finite number"):
        DicomSettings(window=(40, width))


def test_frames_by_choice(tmp_path: Path) -> None:
    def frames(scale: int) -> bytes:
        def change(data: Any) -> None:
            data.NumberOfFrames = 3
            data.PixelData = (np.arange(144, dtype=np.uint16) ** scale).tobytes()

        return dicom(change)

    root = dicoms(tmp_path / "d", frames(1), frames(2))
    assert {len(item.images) for item in opened(root, kind="dicom").items} == {1}
    assert {len(item.images) for item in opened(root, kind="dicom", dicom={"frame": "all"}).items} == {3}
    with pytest.raises(MedbridgeError, match="3 frames, so there is none of the number 5"):
        opened(root, kind="dicom", dicom={"frame": 5})


def group(slope: float | None = None, window: tuple[float, float] | None = None, function: str = "") -> Any:
    """A functional group of an enhanced file, which says for frames what other files say for all pixels."""
    made, part = pydicom.Dataset(), pydicom.Dataset()
    if slope is not None:
        part.RescaleSlope, part.RescaleIntercept, part.RescaleType = slope, -10, "HU"
        made.PixelValueTransformationSequence = [part]
    if window is not None:
        shown = pydicom.Dataset()
        shown.WindowCenter, shown.WindowWidth = window
        if function:
            shown.VOILUTFunction = function
        made.FrameVOILUTSequence = [shown]
    return made


def test_enhanced_files_say_for_each_frame_how_it_is_shown(tmp_path: Path) -> None:
    own = [group(3, (50, 40)), group(window=(20.5, 11), function="SIGMOID"), pydicom.Dataset()]

    def enhanced(data: Any) -> None:
        data.NumberOfFrames = 4  # one more than there are groups
        data.PixelData = np.tile(np.arange(48, dtype=np.uint16), 4).tobytes()
        data.SharedFunctionalGroupsSequence = [group(2, (30, 20))]
        data.PerFrameFunctionalGroupsSequence = own

    def alone(*said: Any) -> bytes:
        def change(data: Any) -> None:
            for part in said:
                for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                    data.update(part.get(sequence, [{}])[0])

        return dicom(change)

    shared = group(2, (30, 20))
    expected = [as_shown(alone(shared, part)) for part in (*own, shared)]
    assert len({level.tobytes() for level in expected}) == 3
    root = dicoms(tmp_path / "d", dicom(enhanced), dicom())
    (item,) = (one for one in opened(root, kind="dicom", dicom={"frame": "all"}).items if len(one.images) == 4)
    for path, levels in zip(item.images, expected, strict=True):
        assert np.abs(np.asarray(Image.open(path), float) - levels).max() <= 1
    # A window of one's own is in the units that the groups rescale to.
    (item,) = (
        one for one in opened(root, kind="dicom", dicom={"frame": "all", "window": [40, 21]}).items if one.images[1:]
    )
    values = [np.arange(48).reshape(6, 8) * slope - 10 for slope in (3, 2)]
    for path, value in zip(item.images[:2], values, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.round(np.clip((value - 29.5) / 20, 0, 1) * 255))


def test_copies_of_a_file(tmp_path: Path) -> None:
    """In one split with one label they are one question; elsewhere the data are at fault, and that is said."""
    scan, other = dicom(), dicom(lambda data: setattr(data, "WindowCenter", 3))
    for name, content in (("train/a/1", scan), ("train/a/2", scan), ("test/a/1", scan), ("test/b/1", other)):
        path = tmp_path / "d" / f"{name}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    settings = {"kind": "dicom", "path": "d", "dicom": {"window": [20, 16]}, "folder": {}}

    def read() -> Any:
        data = DataSettings(sources=[SourceSettings(**settings)], on_bad="skip")
        return open_items(data, base_dir=tmp_path, cache_dir=tmp_path / "cache")

    found = read()
    assert sorted(item.id.rsplit("/", 1)[0] for item in found.items) == ["d/test", "d/train"]
    copy, mislabelled = sorted(found.skipped, key=lambda skip: not skip.known)
    assert copy.known and "shows the same as a file before it." in copy.reason
    assert not mislabelled.known and "labelled 'a' and not 'b'" in mislabelled.reason
    report = check_items(found)
    assert any("the same image is in train and test" in line for line in report.problems)
    assert any("labelled 'a' and not 'b'" in line for line in report.problems)


def test_nothing_of_a_patient(tmp_path: Path) -> None:
    root = dicoms(tmp_path / "d", dicom(), dicom(lambda data: setattr(data, "WindowCenter", 3)), b"broken")
    settings = {"kind": "dicom", "path": ".", "dicom": {"tags": ["Modality"], "window": "full"}}
    found = open_items(
        DataSettings(sources=[SourceSettings(**settings)], on_bad="skip"), base_dir=root, cache_dir=tmp_path / "cache"
    )
    # Both files show the same in the full window, so that the second is left out.
    assert len(found.items) == 1 and found.items[0].tags["Modality"] == "CT" and len(found.skipped) == 2
    said = " ".join([*map(str, found.skipped), found.items[0].to_json()])
    assert "Doe" not in said and "P-77" not in said
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*.png"))
    assert b"Doe" not in kept and b"P-77" not in kept


@pytest.mark.parametrize("name", ["DOE^JANE.dcm", "../DOE^JANE.dcm", "/DOE^JANE.dcm"])
def test_a_row_whose_file_is_missing_names_no_patient(tmp_path: Path, name: str) -> None:
    root = dicoms(tmp_path / "d", dicom(), dicom())
    first, second = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.dcm"))
    (root / "l.csv").write_text(f"file,label\n{first},a\n{second},b\n{name},a\n")
    source = SourceSettings(kind="dicom", path=".", folder={"labels": "l.csv"})
    found = open_items(DataSettings(sources=[source], on_bad="skip"), base_dir=root, cache_dir=tmp_path / "cache")
    skip = next(skip for skip in found.skipped if skip.source.endswith("l.csv"))
    assert "DOE" not in str(skip) and skip.line == 4 and "no file below the folder" in skip.reason


def test_real_dicom_files(tmp_path: Path) -> None:
    contents = [Path(str(get_testdata_file(name))).read_bytes() for name in ("CT_small.dcm", "MR_small.dcm")]
    found = opened(dicoms(tmp_path / "d", *contents), kind="dicom")
    assert len(found.items) == 2 and all(Image.open(item.images[0]).size[0] >= 64 for item in found.items)


def test_nifti_slices(tmp_path: Path) -> None:
    for label, value in (("a", 1), ("b", 2)):
        values = np.zeros((6, 7, 8), np.int16)
        values[0, 6, :] = value  # the patient's right in this affine, in front
        (tmp_path / "n" / label).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, 1, 1, 1])), tmp_path / "n" / label / "v.nii.gz")
    root, settings = tmp_path / "n", {"slices": 4, "percentiles": (0, 100)}
    found = opened(root, kind="nifti", nifti=settings)
    assert [item.id.rsplit("/")[-1] for item in found.items[:4]] == ["1", "3", "5", "7"]
    image = np.asarray(Image.open(found.items[0].images[0]))
    assert image.shape == (7, 6) and image[0, 5] == 255 and image.sum() == 255
    found = opened(root, kind="nifti", nifti={**settings, "sequence": True})
    assert [len(item.images) for item in found.items] == [4, 4]
