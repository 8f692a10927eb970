"""Slices of NIfTI volumes (.nii, .nii.gz) as images, upright in the patient's axes."""

from __future__ import annotations

import gzip
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medbridge.data.images import resolve_image
from medbridge.data.importers.files import FolderSettings, NiftiSettings, labelled_folder
from medbridge.data.importers.pixels import keep_png, stretched
from medbridge.data.items import Item, Skip
from medbridge.errors import MedbridgeError

MAX_VOXELS = 2**28
"""Largest volume that is read, 1 GiB as float32: the header of a small file can claim any size."""

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


def read_nifti(
    root: Path, folder: FolderSettings, settings: NiftiSettings, *, cache_dir: Path
) -> Iterator[Item | Skip]:
    """Questions about the volumes below `root`; a Skip for a volume that can't be read.

    Of a series the first volume is taken. One volume's slices are always in one split.
    """
    found = labelled_folder(root, folder, lambda name: name.lower().endswith((".nii", ".nii.gz")))
    yield from found.skipped
    for file in found.files:
        tags = {"class": file.label, "plane": settings.axis}
        try:
            images = _slices(resolve_image(root, file.name), settings)
            paths = {position: keep_png(image, cache_dir / "nifti") for position, image in images.items()}
            if settings.sequence:
                yield found.item(file, file.name, list(paths.values()), file.name, tags)
            else:
                for position, path in paths.items():
                    yield found.item(file, f"{file.name}/{position}", [path], file.name, tags)
        except MedbridgeError as error:
            yield Skip(str(root / file.name), None, None, str(error))


def _check_sum(path: str) -> None:
    """Read a packed file to its end: only then is its checksum compared, which nibabel leaves out."""
    left = 16 * MAX_VOXELS
    with gzip.open(path) as stream:
        while block := stream.read(2**20):
            left -= len(block)
            if left < 0:
                raise MedbridgeError(f"it unpacks to more than {16 * MAX_VOXELS} bytes.")


def _slices(path: str, settings: NiftiSettings) -> dict[int, np.ndarray]:
    """Position along the axis -> slice, uint8 [height, width], front or top up, the patient's left on the left."""
    import nibabel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume: Any = nibabel.load(path)
            shape: tuple[int, ...] = tuple(int(size) for size in volume.shape)
            if len(shape) < 3 or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
                raise MedbridgeError(f"its shape is {shape}; three axes and at most {MAX_VOXELS} voxels are read.")
            if volume.get_data_dtype().kind not in "iuf":
                raise MedbridgeError(f"its values are {volume.get_data_dtype()}; plain numbers are needed.")
            if len(shape) > 3:
                volume = volume.slicer[(slice(None),) * 3 + (slice(0, 1),) * (len(shape) - 3)]
            values: Any = np.asarray(nibabel.as_closest_canonical(volume).dataobj, dtype=np.float32)
            values = values.reshape(values.shape[:3])
            if path.lower().endswith(".gz"):
                _check_sum(path)
    except MedbridgeError:
        raise
    except Exception as error:  # gzip, zlib, struct and nibabel each raise their own on a broken file
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise MedbridgeError(f"not a whole NIfTI volume ({reason}). Get the file again.") from error
    finite = values[np.isfinite(values)]
    low, high = (float(np.percentile(finite, share)) if finite.size else 0.0 for share in settings.percentiles)
    axis = _AXES[settings.axis]
    size = values.shape[axis]
    count = min(settings.slices, size)
    positions = [int((number + 0.5) * size / count) for number in range(count)]
    # In canonical axes the first coordinate grows to the right, and the one that is drawn upwards grows upwards.
    return {p: np.ascontiguousarray(stretched(values.take(p, axis).T[::-1], low, high)) for p in positions}
