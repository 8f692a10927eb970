"""From the `data` settings to the items of a run. What a source's files mean is its importer's business."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from medbridge.data.importers.brain import brain_folder
from medbridge.data.importers.dicom import read_dicom
from medbridge.data.importers.files import read_images
from medbridge.data.importers.jsonl import read_jsonl
from medbridge.data.importers.mapping import TableMapping, read_mapping, ready_made
from medbridge.data.importers.medmnist import read_medmnist
from medbridge.data.importers.nifti import read_nifti
from medbridge.data.importers.slake import read_slake
from medbridge.data.importers.table import read_table
from medbridge.data.items import SPLITS, Item, ItemSet, Place, Skip
from medbridge.data.linked import with_links
from medbridge.data.sampling import evenly_spaced
from medbridge.data.settings import DataSettings, SourceSettings
from medbridge.errors import MedbridgeError


def open_items(settings: DataSettings, *, base_dir: Path, cache_dir: Path) -> ItemSet:
    """All questions of the configured sources, in their order, with what was skipped on the way.

    Relative paths of the settings start at `base_dir`; images that have to be written (brain, MedMNIST) go
    below `cache_dir`. With `on_bad: error` the first bad row raises MedbridgeError, with `skip` it is listed.
    Sources without a single good question, and two questions of one id, raise MedbridgeError or are skipped
    in the same way.
    """
    items: list[Item] = []
    skipped: list[Skip] = []
    origin: dict[str, str] = {}
    for source in settings.sources:
        found: list[Item] = []
        left_out: list[Skip] = []
        copied: list[str] = []  # the source of each question that another source had before
        name = _name(source)
        place = Place()
        for entry in read_source(settings, source, base_dir=base_dir, cache_dir=cache_dir, place=place):
            if isinstance(entry, Item) and entry.id in origin:
                copied.append(origin[entry.id])
                entry = Skip(
                    place.source or name,
                    place.line,
                    entry.id,
                    f"a question of the id {entry.id!r} is already there (from {origin[entry.id]}). "
                    "Give every row its own dataset_index, and name no source twice.",
                )
            elif isinstance(entry, Item):
                entry = _with_stratum(_with_tags(entry, source), settings, source)
            if isinstance(entry, Skip):
                if settings.on_bad == "error" and not entry.known:
                    raise MedbridgeError(
                        f"{entry} (Set `data.on_bad: skip`, of `data import` --on-bad skip, to leave bad rows out.)"
                    )
                left_out.append(entry)
                continue
            origin[entry.id] = name
            found.append(entry)
        if not found:
            raise MedbridgeError(f"{name}: no question could be read ({_reasons(left_out, copied)}).")
        skipped.extend(left_out)
        items.extend(found if source.limit is None else evenly_spaced(found, source.limit))
    return ItemSet(with_links(items), skipped)


def read_source(
    settings: DataSettings, source: SourceSettings, *, base_dir: Path, cache_dir: Path, place: Place
) -> Iterator[Item | Skip]:
    """The questions of one source as they are read. Only the MedMNIST importer applies the limit itself.

    `place` is kept where they are read, by the importers of lines and rows.
    """
    root = None if source.image_root is None else _below(base_dir, source.image_root)
    if source.kind == "brain":
        folder = brain_folder(cache_dir)
        # The folder's stamp has just vouched for every byte.
        yield from _read_folder(folder, folder, None, settings.model_copy(update={"check_images": "exists"}), place)
        return
    if source.kind == "jsonl" and source.splits is not None:
        for split, name in source.splits.items():
            file = _below(base_dir, name)
            yield from read_jsonl(
                file,
                image_root=root or file.parent,
                split=split,
                override=True,
                check=settings.check_images,
                place=place,
            )
        return
    if source.kind == "table":
        mapping, path_of_table = open_table(source, base_dir)
        yield from read_table(
            mapping,
            path_of_table,
            cache_dir=cache_dir,
            image_root=root,
            split=source.split,
            check=settings.check_images,
            place=place,
        )
        return
    assert source.path is not None
    path = _below(base_dir, source.path)
    if source.kind == "slake":
        yield from read_slake(path, image_root=root, check=settings.check_images)
    elif source.kind == "medmnist":
        yield from read_medmnist(path, cache_dir, limit=source.limit, every_finding=source.medmnist.findings == "all")
    elif source.kind == "images":
        yield from read_images(path, source.folder, check=settings.check_images)
    elif source.kind == "dicom":
        yield from read_dicom(path, source.folder, source.dicom, cache_dir=cache_dir)
    elif source.kind == "nifti":
        yield from read_nifti(path, source.folder, source.nifti, cache_dir=cache_dir)
    elif path.is_dir():
        yield from _read_folder(path, root or path, source.split, settings, place)
    else:
        yield from read_jsonl(
            path, image_root=root or path.parent, split=source.split, check=settings.check_images, place=place
        )


def open_table(source: SourceSettings, base_dir: Path) -> tuple[TableMapping, Path | None]:
    """The mapping of a table's source and where its data lie; None for a data set on the hub."""
    name, path = source.mapping, source.path
    if name is None:
        assert path is not None
        if Path(path).suffix.lower() not in (".yaml", ".yml"):
            raise MedbridgeError(
                f"{path}: a table needs a `mapping`: the name of a ready-made one ({', '.join(ready_made())}) or a "
                "YAML file that says which column is what. On the command line, write table:FILE.yaml."
            )
        name, path = path, None
    mapping, folder = read_mapping(name, base_dir)
    if path is not None:
        return mapping, _below(base_dir, path)
    return mapping, None if mapping.path is None else _below(folder, mapping.path)


def _read_folder(
    folder: Path, image_root: Path, split: str | None, settings: DataSettings, place: Place
) -> Iterator[Item | Skip]:
    files = [(name, folder / f"{name}.jsonl") for name in SPLITS if (folder / f"{name}.jsonl").is_file()]
    if not files:
        raise MedbridgeError(f"{folder}: a data folder needs train.jsonl, validation.jsonl or test.jsonl.")
    for name, file in files:
        yield from read_jsonl(
            file, image_root=image_root, split=split or name, check=settings.check_images, place=place
        )


def _with_tags(item: Item, source: SourceSettings) -> Item:
    return replace(item, tags={**source.tags, **item.tags}) if source.tags else item


def _with_stratum(item: Item, settings: DataSettings, source: SourceSettings) -> Item | Skip:
    try:
        item.stratum(settings.strata)
    except MedbridgeError as error:
        return Skip(_name(source), None, item.id, str(error))
    return item


def _below(base_dir: Path, name: str) -> Path:
    return Path(base_dir, Path(name).expanduser()).resolve()


def _name(source: SourceSettings) -> str:
    return source.kind if source.path is None else f"{source.kind} {source.path}"


def _reasons(skipped: list[Skip], copied: list[str]) -> str:
    if skipped and len(copied) == len(skipped):
        return (
            f"all {len(copied)} have the ids of questions in {' and '.join(sorted(set(copied)))}: leave one source out"
        )
    return str(skipped[0]) if skipped else "it is empty"
