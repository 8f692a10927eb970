"""Which columns of somebody else's table are the question, the images, the options and the answer; read from YAML."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medbridge.errors import MedbridgeError

_SplitName = Literal["train", "validation", "test"]


class TableMapping(BaseModel):
    """How the rows of a table become questions. Every field but `question` and `images` may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(None, description="File or folder of the data, relative to the mapping's own file.")
    hub: str | None = Field(None, description="Instead of `path`: a name on the Hugging Face hub, for `datasets`.")
    hub_config: str | None = Field(None, description="The hub data set's configuration.")
    files: dict[str, _SplitName | None] = Field(
        default_factory=dict,
        description="File names or patterns below `path`, and the split that each holds (null: its rows say). "
        "Empty: every table below `path`, the split by a column or by the file's name.",
    )
    dataset: str = Field("table", description="The data set's name, the first part of each question's id.")
    dataset_column: str | None = Field(None, description="Column that names each row's data set.")
    dataset_names: dict[str, str] = Field(default_factory=dict, description="Value of that column -> our name.")
    id: str | None = Field(None, description="Column that is unique within data set and split; else the row's number.")
    question: str = Field(description="Column of the question.")
    question_until: str | None = Field(
        None,
        description="Regular expression; a question with options ends before its first match, such as a list of the "
        "options that another order of them would contradict.",
    )
    images: str | list[str] = Field(
        description="Column, or columns in their order, of images: paths, {bytes, path} or base64; or lists of these."
    )
    image_prefix: str = Field("", description="Folder put before each image path, such as `images/`.")
    options: str | list[str] | None = Field(
        None, description="Column of a list, an object or a text of options, or one column an option."
    )
    answer: str | None = Field(None, description="Column of the answer's text.")
    answer_label: str | None = Field(
        None, description="Column of the right option's letter, and without `answer` of the answer to open questions."
    )
    answer_index: str | None = Field(None, description="Column of the right option's number, from 0.")
    yes_no: bool = Field(False, description="Answers yes and no become a choice of these two.")
    where: dict[str, str] = Field(
        default_factory=dict,
        description="Column -> regular expression that all of its value matches; other rows are passed over. What its "
        "named groups match become tags.",
    )
    split: str | None = Field(None, description="Column of the split.")
    split_names: dict[str, _SplitName] = Field(default_factory=dict, description="Value of that column -> our split.")
    split_default: _SplitName | None = Field(None, description="Split of all other values.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tag -> column.")
    floor: float | None = Field(None, ge=0, lt=1, description="Guessing floor of questions without options.")
    licence: str = Field("The licence is that of the data it was made from.", description="For the data card.")
    traps: list[str] = Field(default_factory=list, description="What to know before using it, for the data card.")
    counts: dict[str, int] = Field(
        default_factory=dict, description="`dataset` or `dataset/split` -> published number of questions."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not (self.answer or self.answer_label or self.answer_index):
            raise ValueError("name the column of the `answer`, the `answer_label` or the `answer_index`")
        if self.options is None and not self.answer:
            raise ValueError("a letter or number needs `options` to name one of")
        if self.path and self.hub:
            raise ValueError("the data are at `path` or on the `hub`, not both")
        patterns = {f"`where` of {column!r}": pattern for column, pattern in self.where.items()}
        if self.question_until is not None:
            patterns["`question_until`"] = self.question_until
        for place, pattern in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{place} is no regular expression ({error})") from error
        return self


def read_mapping(name: str, base_dir: Path) -> tuple[TableMapping, Path]:
    """The mapping of a ready-made name or a YAML file, and the folder that its `path` starts at.

    A file may start from another mapping (`base: pmc_vqa`) and replace single fields. Raises MedbridgeError.
    """
    raw, folder = _raw(name, base_dir, ())
    try:
        return TableMapping.model_validate(raw), folder
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the mapping"
        raise MedbridgeError(f"{name}: {place}: {first['msg']}. See docs/data.md for the fields.") from error


def ready_made() -> list[str]:
    """Names of the mappings that come with the package."""
    folder = files("medbridge") / "configs" / "mappings"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _raw(name: str, base_dir: Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    folder = base_dir
    try:
        if name in ready_made():
            text = (files("medbridge") / "configs" / "mappings" / f"{name}.yaml").read_text(encoding="utf-8")
        else:
            file = (base_dir / Path(name).expanduser()).resolve()
            folder = file.parent
            if file.stat().st_size > 2**20:
                raise MedbridgeError(f"{name}: more than a mebibyte; this is no mapping file.")
            text = file.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (OSError, ValueError) as error:
        raise MedbridgeError(
            f"{name}: the mapping can't be read ({error}). Name a YAML file or one of {', '.join(ready_made())}."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise MedbridgeError(f"{name}: not valid YAML ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise MedbridgeError(f"{name}: a mapping of field names is needed. See docs/data.md for the fields.")
    base = raw.pop("base", None)
    if base is None:
        return raw, folder
    if not isinstance(base, str) or base in seen:
        raise MedbridgeError(f"{name}: `base` must name another mapping, not {base!r}.")
    under, _ = _raw(base, folder, (*seen, name, base))
    if raw.get("path") or raw.get("hub"):  # the data are at one place
        under = {key: value for key, value in under.items() if key not in ("path", "hub", "hub_config")}
    return {**under, **raw}, folder
