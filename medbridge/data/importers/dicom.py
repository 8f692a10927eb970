"""DICOM files as images: rescaled, windowed, MONOCHROME1 turned round, one frame or all.

Nothing of a patient is kept or said: ids and image files are named by a hash of the pixels, messages name a file by
its number in the order of paths, and no value of the header but the settings' few is read into a question.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medbridge.data.images import MAX_PIXELS, resolve_image
from medbridge.data.importers.files import DicomSettings, FolderSettings, LabelledFile, labelled_folder
from medbridge.data.importers.pixels import keep_png, pixel_hash, stretched
from medbridge.data.items import Item, Skip
from medbridge.errors import MedbridgeError

MAX_BYTES = 2 * 2**30
MAX_HEADER_ELEMENTS = 20_000
MAX_FRAMES = 64
"""Most frames of a sequence: a question with more images fits no model."""

_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
"""How a window's values become grey levels, as a header may say."""

_OF_A_FRAME = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
"""What a multi-frame file of the enhanced kinds may say for each frame, where others say it for the file."""

_NOT_DICOM = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".md")


def read_dicom(
    root: Path, folder: FolderSettings, settings: DicomSettings, *, cache_dir: Path
) -> Iterator[Item | Skip]:
    """One question for each DICOM file below `root`; a Skip for one that can't be read or shows what another shows."""
    try:
        import pydicom
    except ImportError as error:
        raise MedbridgeError("DICOM files need `pip install medbridge[dicom]`.") from error
    # Its remarks quote header values, and those may name a patient.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    found = labelled_folder(root, folder, lambda name: not name.lower().endswith(_NOT_DICOM) and name != "DICOMDIR")
    yield from found.skipped
    seen: dict[str, str] = {}  # label of each question
    for file in found.files:
        try:
            images, group, tags = _read(pydicom, resolve_image(root, file.name), settings)
            index = pixel_hash(np.stack(images))
            paths = [keep_png(image, cache_dir / "dicom") for image in images]
            item = found.item(file, index, paths, group or index, {"class": file.label, **tags})
            # A copy in another split is a question of its own, whose leak `data check` names.
            if item.id in seen:
                yield _copy(root, file, seen[item.id])
                continue
            seen[item.id] = item.answer
            yield item
        except MedbridgeError as error:
            reason = str(error).replace(file.name, "the file").replace(str(root), "")
            yield Skip(str(root), file.number, None, f"{reason} (The number counts the files in the order of paths.)")


def _copy(root: Path, file: LabelledFile, label: str) -> Skip:
    if label == file.label:
        return Skip(str(root), file.number, None, "shows the same as a file before it.", known=True)
    reason = f"shows the same as a file before it, which is labelled {label!r} and not {file.label!r}."
    return Skip(str(root), file.number, None, reason)


def _read(pydicom: Any, path: str, settings: DicomSettings) -> tuple[list[np.ndarray], str | None, dict[str, str]]:
    """Images (uint8), the patient as a hash, and the tags asked for. What pydicom says is never passed on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if os.path.getsize(path) > MAX_BYTES:
                raise MedbridgeError(f"larger than {MAX_BYTES} bytes.")
            header = pydicom.dcmread(path, defer_size=2**16)
            _check(header)
            chosen = _frames(header, settings)
            images = [_pixels(header, frame, settings) for frame in chosen]
            # A study is the patient's where the patient's number has been taken out.
            patient = str(header.get("PatientID") or header.get("StudyInstanceUID") or "")
            tags: dict[str, str] = {key: str(header.get(key)).strip() for key in settings.tags if header.get(key)}
        except MedbridgeError:
            raise
        except Exception as error:  # whatever its readers raise on a broken file, with header values in the text
            raise MedbridgeError(_reason(error)) from None
    return images, hashlib.sha256(patient.encode("utf-8", "replace")).hexdigest() if patient else None, tags


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "InvalidDicomError":
        return "not a DICOM file: the preamble is missing."
    if name in ("NotImplementedError", "RuntimeError"):
        return (
            "its compressed pixels can't be decoded; install a decoder (`pip install pylibjpeg pylibjpeg-libjpeg "
            "pylibjpeg-openjpeg`) or write the file without compression."
        )
    return f"not a whole DICOM image ({name})."


def _check(header: Any) -> None:
    if len(header) > MAX_HEADER_ELEMENTS:
        raise MedbridgeError(f"a header of {len(header)} elements; {MAX_HEADER_ELEMENTS} are read.")
    if not any(key in header for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise MedbridgeError("it holds no pixels.")
    sizes = [int(header.get(key) or 0) for key in ("Rows", "Columns")]
    frames = int(header.get("NumberOfFrames") or 1)
    if min(sizes) < 1 or sizes[0] * sizes[1] > MAX_PIXELS or frames < 1:
        raise MedbridgeError(f"{sizes[1]} x {sizes[0]} pixels, {frames} frames; 1 to {MAX_PIXELS} pixels are read.")


def _frames(header: Any, settings: DicomSettings) -> list[int]:
    count = int(header.get("NumberOfFrames") or 1)
    if settings.frame == "middle":
        return [count // 2]
    if settings.frame == "all":
        if count > MAX_FRAMES:
            raise MedbridgeError(f"{count} frames; a question takes at most {MAX_FRAMES}. Choose one by `frame`.")
        return list(range(count))
    if not 0 <= settings.frame < count:
        raise MedbridgeError(f"it has {count} frames, so there is none of the number {settings.frame}.")
    return [settings.frame]


def _shown(header: Any, frame: int) -> Any:
    """What says how one frame is shown: its own functional groups before those of all frames (PS3.3 C.7.6.16)."""
    names = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    shared, own = (header.get(name) or [] for name in names)
    groups = [*shared[:1], *own[frame : frame + 1]]
    said = {
        name: part[0][name]
        for group in groups
        for sequence, names in _OF_A_FRAME.items()
        if (part := group.get(sequence))
        for name in names
        if name in part[0]
    }
    if not said:
        return header
    chosen = header.group_dataset(0x0028)  # all that tells how pixels are shown
    for element in said.values():
        chosen[element.tag] = element
    return chosen


def _pixels(header: Any, frame: int, settings: DicomSettings) -> np.ndarray:
    """One frame, uint8 [height, width] or [height, width, 3]."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
    from pydicom.pixels.utils import pixel_array

    # One frame at a time, and already in RGB where the file has YBR.
    values = pixel_array(header, index=frame)
    photometric = str(header.get("PhotometricInterpretation", ""))
    if photometric == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        return stretched(values[..., :3], 0, np.iinfo(values.dtype).max)
    if values.ndim == 3:
        return stretched(values[..., :3], 0, 2 ** int(header.BitsStored) - 1)
    header = _shown(header, frame)
    values = apply_modality_lut(values, header)
    if settings.window == "file" and header.get("VOILUTSequence"):
        values = apply_voi(values, header)
        image = stretched(values, float(values.min()), float(values.max()))
    else:
        image = _windowed(header, values, settings)
    return 255 - image if photometric == "MONOCHROME1" else image


def _windowed(header: Any, values: np.ndarray, settings: DicomSettings) -> np.ndarray:
    """Values as grey levels, uint8, by a window's centre c and width w (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    LINEAR is a ramp about c - 0.5 of the width w - 1, LINEAR_EXACT one about c of the width w, SIGMOID
    1 / (1 + exp(-4 (x - c) / w)). A window that the settings name is LINEAR. Without a window, or with one whose
    width its function does not allow, least and greatest value become black and white.
    """
    chosen, function = settings.window, "LINEAR"
    if chosen == "file" and header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        chosen = (float(_first(header.WindowCenter)), float(_first(header.WindowWidth)))
        function = str(_first(header.get("VOILUTFunction")) or "LINEAR").strip().upper()
    if function not in _FUNCTIONS:
        raise MedbridgeError(
            f"its VOI LUT Function is none of {', '.join(_FUNCTIONS)}. Choose `window: full` or [centre, width]."
        )
    if isinstance(chosen, str) or not _allowed(*chosen, function):
        finite = values[np.isfinite(values)]
        return stretched(values, float(finite.min()), float(finite.max())) if finite.size else stretched(values, 0, 1)
    centre, width = chosen
    if function == "SIGMOID":
        # The same curve as a tangent, which can't overflow.
        return stretched(np.tanh(2 / width * (values.astype(np.float64) - centre)), -1, 1)
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return stretched(values, centre - width / 2, centre + width / 2)


def _allowed(centre: float, width: float, function: str) -> bool:
    positive = width >= 1 if function == "LINEAR" else width > 0
    return positive and bool(np.isfinite([centre, width]).all())


def _first(value: Any) -> Any:
    """Of several windows the first is meant to be shown."""
    return value if isinstance(value, str) or not hasattr(value, "__len__") else value[0]
