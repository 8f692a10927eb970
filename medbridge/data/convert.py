"""Any source turned into a data folder: JSON lines for each split, images, a card. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medbridge.data.folder import write_folder
from medbridge.data.images import ImageCheck
from medbridge.data.importers.jsonl import item_to_row
from medbridge.data.items import SPLITS, Item, ItemSet, Skip
from medbridge.data.settings import DataSettings, SourceSettings
from medbridge.data.sources import open_items, open_table
from medbridge.errors import MedbridgeError

_LICENCES = {
    "brain": "Made from the ICBM 152 volumes in nilearn: one average brain, not a clinical benchmark.",
    "slake": "SLAKE 1.0 is published under CC BY 4.0: name its authors wherever you pass it on.",
    "medmnist": "MedMNIST is published under CC BY 4.0, DermaMNIST under CC BY-NC 4.0: name its authors.",
    "images": "The licence is that of the images.",
    "dicom": "The licence is that of the images. Pixels only were taken; burnt-in text may still name a patient.",
    "nifti": "The licence is that of the volumes.",
    "jsonl": "The licence is that of the data it was made from.",
}


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What an import wrote: items by split, distinct images, and the rows left out."""

    folder: Path
    items: Mapping[str, int]
    images: int
    skipped: tuple[Skip, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "items": dict(self.items),
            "images": self.images,
            "skipped": [str(skip) for skip in self.skipped],
        }


def import_to_folder(
    source: SourceSettings,
    out_dir: Path,
    *,
    base_dir: Path,
    cache_dir: Path,
    on_bad: Literal["error", "skip"] = "error",
    check_images: ImageCheck = "header",
    progress: Callable[[int, int], None] | None = None,
) -> ImportSummary:
    """Write the questions of `source` as the folder `out_dir`, which `kind: jsonl` reads back as equal items.

    Image files are copied byte for byte, equal ones once. The folder appears only when it is complete.
    `progress(done, total)` is called for each item. Raises MedbridgeError if `out_dir` is there and not
    empty, and for bad rows as `on_bad` says.
    """
    require_empty(out_dir)
    settings = DataSettings(sources=[source], on_bad=on_bad, check_images=check_images)
    found = open_items(settings, base_dir=base_dir, cache_dir=cache_dir)
    images = 0

    def build(folder: Path) -> None:
        nonlocal images
        images = write_items(folder, found.items, progress)
        (folder / "README.md").write_text(_card(source, found, base_dir), encoding="utf-8")

    write_folder(out_dir, build)
    return ImportSummary(out_dir, count_splits(found.items), images, tuple(found.skipped))


def require_empty(folder: Path) -> None:
    """Raise MedbridgeError if a folder that is to be written holds anything already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MedbridgeError(f"{folder}: exists and is not empty. Name a new folder or empty this one.")


def write_items(folder: Path, items: Sequence[Item], progress: Callable[[int, int], None] | None = None) -> int:
    """Write the JSON lines of each split and the images into an existing folder; the number of distinct images."""
    names: dict[str, str] = {}
    done = 0
    for split in SPLITS:
        chosen = [item for item in items if item.split == split]
        if not chosen:
            continue
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for item in chosen:
                for image in item.images:
                    if image not in names:
                        names[image] = _copy(Path(image), folder)
                index = item.id.removeprefix(f"{item.dataset}/{item.split}/")
                row = item_to_row(item, index, [names[image] for image in item.images])
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                done += 1
                if progress is not None:
                    progress(done, len(items))
    return len(set(names.values()))


def _copy(image: Path, folder: Path) -> str:
    """Copy an image below `images/` under the hash of its bytes; its path relative to the folder."""
    try:
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        suffix = image.suffix.lower() if image.suffix[1:].isalnum() else ""
        name = f"images/{digest[:2]}/{digest[:32]}{suffix}"
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, folder / name)
    except OSError as error:
        raise MedbridgeError(f"{image}: the image can't be copied ({error}).") from error
    return name


def count_splits(items: Sequence[Item]) -> dict[str, int]:
    """Questions by split, in the order of the splits."""
    counts = Counter(item.split for item in items)
    return {split: counts[split] for split in SPLITS if counts[split]}


def licence_of(source: SourceSettings, base_dir: Path) -> str:
    """What a card says of a source's licence; a table's is its mapping's."""
    return open_table(source, base_dir)[0].licence if source.kind == "table" else _LICENCES[source.kind]


def _card(source: SourceSettings, found: ItemSet, base_dir: Path) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in count_splits(found.items).items())
    datasets = ", ".join(sorted({item.dataset for item in found.items}))
    traps = open_table(source, base_dir)[0].traps if source.kind == "table" else []
    # What differs from the published data is part of what a reader must know.
    traps = [*traps, *(str(skip) for skip in found.skipped if skip.known and skip.line is None)]
    tags = ", ".join(sorted({tag for item in found.items for tag in item.tags})) or "none"
    return (
        f"# {datasets}\n\n"
        f"Written by `medbridge data import` from a source of kind `{source.kind}`. "
        f"{licence_of(source, base_dir)}\n\n"
        f"- Questions: {counts}; {len(found.skipped)} rows left out.\n"
        f"- Tags: {tags}.\n"
        "- One JSON object a line: `dataset_name, dataset_index, image_paths, question, options,\n"
        "  answer_label, answer, split, tags, floor` and `trace` where there is one; image paths are\n"
        "  relative to this folder.\n" + "".join(f"- Mind: {trap}\n" for trap in traps)
    )
