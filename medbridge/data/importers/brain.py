"""Questions on real brain MRI slices, made from the MNI152 volumes inside the `nilearn` package; no network.

It is one group-average head, and no clinical benchmark: it shows that the tool works, on labels that are
exact by construction, and says nothing about any patient.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medbridge.data.folder import ensure_folder
from medbridge.data.importers.jsonl import item_to_row
from medbridge.data.items import SPLITS, Item
from medbridge.errors import MedbridgeError

BUILD_VERSION = 1
"""Part of the stamp: raise it whenever the built bytes change."""

SIZE = 56
COUNTS = {"train": 600, "validation": 132, "test": 132}
"""Items of each task in each split: multiples of 2, 3 and 4, so that every answer is right equally often."""

# Runs of neighbouring slices with their split. Neighbours are near-duplicates, so the slices between two runs
# (None) belong to no split. Short runs, so that every region of the head occurs in every split.
_BLOCKS: tuple[tuple[str | None, int], ...] = (
    ("train", 8),
    (None, 3),
    ("validation", 6),
    (None, 3),
    ("test", 5),
    (None, 3),
)

_MAPS = {"t1": "T1", "gm": "grey matter", "wm": "white matter"}
_PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
_LEVELS = ("lower", "middle", "upper")
_TURNS = ("upright", "turned left", "upside down", "turned right")
_CONTRASTS = ("normal", "inverted")

QUESTIONS = {
    "plane": ("Which plane is this slice?", tuple(_PLANES)),
    "tissue": ("What does this map show?", tuple(_MAPS.values())),
    "level": ("Which third of the brain is this?", _LEVELS),
    "contrast": ("Which contrast does this image have?", _CONTRASTS),
    "rotation": ("How is this image turned?", _TURNS),
}
"""Task -> question and options. The tasks are the strata (tag `task`)."""

_CARD = """# Brain slices

Questions on brain MRI slices for trying out and testing medbridge. **One average brain, not a clinical
benchmark:** all slices come from the MNI152 (ICBM 2009a, symmetric) template that the `nilearn` package
ships, a group average of healthy adults. What a model scores here says nothing about any patient or any
disease.

- Tasks (tag `task`): {tasks}.
- Labels are exact by construction: they say how the image was made.
- Splits: {counts} items of each task, each answer right equally often. Runs of
  neighbouring slices belong to one split, with three unused slices (3 mm) between runs; no slice, of
  whatever map or task, is in two splits. The template is symmetric to the voxel, so sagittal slices come
  from one half only. Tag `slice` names the slice: items that share it are not independent.
- Images: {size} x {size} pixels, grey, the brain filling the frame, with small random shifts, zooms and
  grey-scale changes that do not depend on the answer.
"""


def brain_folder(cache_dir: Path) -> Path:
    """The data folder with the brain slices, built below `cache_dir` at first use (a few seconds).

    Raises MedbridgeError if `nilearn` or its volumes are missing, or the folder can't be written.
    """
    sources = _volume_files()
    digest = hashlib.sha256(json.dumps([BUILD_VERSION, SIZE, COUNTS, _BLOCKS, QUESTIONS, _CARD]).encode())
    for path in sources.values():
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return ensure_folder(cache_dir / "brain", digest.hexdigest(), lambda folder: _build(folder, sources))


def _volume_files() -> dict[str, Path]:
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise MedbridgeError("The brain slices are made from volumes inside the package nilearn: install nilearn.")
    files = {}
    for name in _MAPS:
        pattern = f"datasets/data/mni_icbm152_{name}_*_converted.nii.gz"
        found = sorted(Path(spec.origin).parent.glob(pattern))
        if not found:
            raise MedbridgeError(
                f"{Path(spec.origin).parent}: no file {pattern}; this nilearn release ships no such volume. "
                "Install nilearn 0.14."
            )
        files[name] = found[0]
    return files


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one image is made. `turns` counts quarter turns to the left."""

    map: str
    plane: str
    index: int
    turns: int = 0
    inverted: bool = False


class _Volumes:
    """The three maps (uint8, [x right, y front, z up], 1 mm), the slices worth showing, and their splits."""

    def __init__(self, files: dict[str, Path]) -> None:
        import nibabel

        self.maps: dict[str, np.ndarray] = {}
        for name, path in files.items():
            image = nibabel.as_closest_canonical(nibabel.load(path))
            self.maps[name] = np.asarray(image.dataobj, dtype=np.uint8)
        self.head = self.maps["t1"] > 25
        # The template is its own mirror image, so slices left of the middle would repeat the right half
        # exactly.
        self.start = {"sagittal": self.head.shape[0] // 2, "coronal": 0, "axial": 0}
        self.slices = {plane: self._slices(plane) for plane in _PLANES}
        self.shown = {(name, plane): self._shown(name, plane) for name in _MAPS for plane in _PLANES}

    def plane(self, name: str, plane: str, index: int) -> np.ndarray:
        """One slice as seen on a screen: up (or for axial slices the front) is the first row."""
        volume = self.head if name == "head" else self.maps[name]
        # A view; np.take would copy the whole volume into C order first.
        return np.rot90(np.moveaxis(volume, _PLANES[plane], 0)[index])

    def _slices(self, plane: str) -> dict[str, list[int]]:
        """Split -> slices of a plane that hold at least a fifth of the largest slice's area."""
        axis = _PLANES[plane]
        area = self.head.sum(axis=tuple(other for other in range(3) if other != axis))
        usable = np.flatnonzero(area >= 0.2 * area.max())
        usable = usable[usable >= self.start[plane]]
        pattern = [split for split, length in _BLOCKS for _ in range(length)]
        found: dict[str, list[int]] = {split: [] for split in SPLITS}
        for position, index in enumerate(range(int(usable[0]), int(usable[-1]) + 1)):
            split = pattern[position % len(pattern)]
            if split is not None:
                found[split].append(index)
        return found

    def _shown(self, name: str, plane: str) -> set[int]:
        """Slices where a map has something to see: it is bright on a twelfth of the head's area or more."""
        axes = tuple(other for other in range(3) if other != _PLANES[plane])
        bright, head = (self.maps[name] > 60).sum(axis=axes), self.head.sum(axis=axes)
        return set(np.flatnonzero(bright * 12 >= head).tolist())


def _build(folder: Path, files: dict[str, Path]) -> None:
    volumes = _Volumes(files)
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True)
        rows: list[tuple[str, str]] = []
        for task in QUESTIONS:
            for number, (answer, recipe) in enumerate(_recipes(volumes, task, split)):
                index = f"{task}-{number:04d}"
                item_id = f"brain/{split}/{index}"
                image = f"images/{split}/{index}.png"
                _draw(volumes, recipe, item_id).save(folder / image, format="PNG", compress_level=6)
                question, options = QUESTIONS[task]
                item = Item(
                    id=item_id,
                    dataset="brain",
                    split=split,
                    question=question,
                    answer=answer,
                    options=options,
                    images=(image,),
                    tags={"task": task, "slice": f"{recipe.plane} {recipe.index}"},
                    floor=1 / len(options),
                )
                row = json.dumps(item_to_row(item, index, [image]), ensure_ascii=False)
                rows.append((hashlib.sha256(item_id.encode()).hexdigest(), row))
        # Mixed, so that any evenly spaced subset holds all tasks and answers.
        lines = [row for _, row in sorted(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = "; ".join(f"`{task}`: {', '.join(options)}" for task, (_, options) in QUESTIONS.items())
    counts = " / ".join(f"{COUNTS[split]} {split}" for split in SPLITS)
    (folder / "README.md").write_text(_CARD.format(tasks=tasks, counts=counts, size=SIZE), encoding="utf-8")


def _recipes(volumes: _Volumes, task: str, split: str) -> Iterator[tuple[str, _Recipe]]:
    """The (answer, recipe) pairs of one task and split, all answers equally often."""
    _, options = QUESTIONS[task]
    for option in options:
        pool = _pool(volumes, task, option, split)
        turns = _TURNS.index(option) if task == "rotation" else 0
        for number in range(COUNTS[split] // len(options)):
            # Planes and maps take turns, so that none outweighs the others by its number of slices.
            group = pool[number % len(pool)]
            name, plane, index = group[number // len(pool) % len(group)]
            yield option, _Recipe(name, plane, index, turns, option == "inverted")


def _pool(volumes: _Volumes, task: str, option: str, split: str) -> list[list[tuple[str, str, int]]]:
    """What an option may show: for each plane and map, its (map, plane, slice) in a fixed mixed order."""
    planes = [option] if task == "plane" else ["axial"] if task == "level" else list(_PLANES)
    maps = [name for name in _MAPS if task != "tissue" or _MAPS[name] == option]
    if task in ("contrast", "rotation"):
        maps = ["t1"]
    groups = []
    for plane in planes:
        for name in maps:
            found = [
                (name, plane, index)
                for index in volumes.slices[plane][split]
                if index in volumes.shown[name, plane] and (task != "level" or _level(volumes, index) == option)
            ]
            groups.append(sorted(found, key=lambda entry: hashlib.sha256(repr(entry).encode()).digest()))
    return groups


def _level(volumes: _Volumes, index: int) -> str | None:
    """The third of the axial series that a slice lies in; None within 2 mm of a border between thirds."""
    every = [index for slices in volumes.slices["axial"].values() for index in slices]
    first, last = min(every), max(every)
    third = (last - first + 1) / 3
    if any(abs(index - (first + border * third)) < 2 for border in (1, 2)):
        return None
    return _LEVELS[int((index - first) / third)]


def _draw(volumes: _Volumes, recipe: _Recipe, item_id: str) -> Image.Image:
    """The image of a recipe, varied a little by the item's id: grey, SIZE x SIZE, filled by the brain."""
    noise = np.frombuffer(hashlib.blake2b(item_id.encode(), digest_size=32).digest(), dtype="<u4") / 2**32
    head = volumes.plane("head", recipe.plane, recipe.index)
    values = volumes.plane(recipe.map, recipe.plane, recipe.index)
    # Every grey value goes through one table: the slice's own 1 and 99 per cent points become black and
    # white.
    counts = np.bincount(values[head] if recipe.map == "t1" else values.ravel(), minlength=256)
    low, high = np.searchsorted(np.cumsum(counts), counts.sum() * np.array([0.01, 0.99]))
    table = np.clip((np.arange(256) - low) / max(high - low, 1), 0.0, 1.0)
    if recipe.inverted:
        table = 1.0 - table
    if recipe.map == "t1":
        # The head keeps some grey at its darkest, so that it stands out from the background either way.
        table = 0.15 + 0.85 * table
    table = table ** (0.8 + 0.45 * noise[0]) * (0.85 + 0.15 * noise[1])
    grey = np.round(table * 255).astype(np.uint8)[values]
    if recipe.map == "t1":
        grey[~head] = 0

    rows, columns = np.flatnonzero(head.any(axis=1)), np.flatnonzero(head.any(axis=0))
    # The frame is the head's own bounding square for every map, so that size tells neither map nor level.
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    frame = side * (1.02 + 0.14 * noise[2])
    top = (rows[0] + rows[-1] + 1 - frame) / 2 + (noise[3] - 0.5) * 0.08 * side
    left = (columns[0] + columns[-1] + 1 - frame) / 2 + (noise[4] - 0.5) * 0.08 * side
    canvas = np.pad(grey, side)  # room for a frame that reaches beyond the volume
    box = (left + side, top + side, left + side + frame, top + side + frame)
    image = Image.fromarray(canvas).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    return Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(image), recipe.turns)))
