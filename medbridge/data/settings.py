"""The `data` part of a configuration: which sources, what makes a stratum, how questions are put."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medbridge.data.images import ImageCheck
from medbridge.data.importers.files import DicomSettings, FolderSettings, NiftiSettings
from medbridge.data.importers.medmnist import MedMnistSettings
from medbridge.data.prompts import PromptSettings

SplitName = Literal["train", "validation", "test"]

_ONLY = {"folder": ("images", "dicom", "nifti"), "dicom": ("dicom",), "nifti": ("nifti",), "medmnist": ("medmnist",)}


class SourceSettings(BaseModel):
    """One source of questions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["brain", "slake", "medmnist", "jsonl", "table", "images", "dicom", "nifti"] = Field(
        description="`brain`: the embedded slices of one average brain; `slake`: the folder of SLAKE 1.0 "
        "(English rows); `medmnist`: one MedMNIST 2D `.npz` file; `jsonl`: a file of questions in the "
        "MedBridgeRL / MedVLThinker-Eval form, or a folder of train.jsonl, validation.jsonl and test.jsonl; "
        "`table`: CSV, Parquet, JSON or a Hugging Face data set by a `mapping`; `images`, "
        "`dicom`, `nifti`: a folder of files, sorted into folders "
        "by class or with a table of `labels`.",
    )
    path: str | None = Field(
        None, description="File or folder, relative to the configuration file's folder. Not for `brain`."
    )
    image_root: str | None = Field(
        None,
        description="Folder that image paths are relative to (`jsonl`: the file's own folder unless set; "
        "`slake`: its `imgs`). Images outside it are refused.",
    )
    split: SplitName | None = Field(None, description="`jsonl` only: the split of rows that name none themselves.")
    splits: dict[SplitName, str] | None = Field(
        None, description="`jsonl` only, instead of `path`: one file for each split."
    )
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Tags that all its questions get, such as {answer_type: CLOSED}, where sources with different tags "
        "are to share `data.strata`. A tag that a question has of its own stays.",
    )
    mapping: str | None = Field(
        None,
        description="`table` only: which columns mean what, a ready-made mapping's name (such as `pmc_vqa`) or a YAML "
        "file; a `path` that is a YAML file is taken for it.",
    )
    folder: FolderSettings = Field(
        default_factory=FolderSettings, description="`images`, `dicom` and `nifti` only: what is asked about the files."
    )
    dicom: DicomSettings = Field(default_factory=DicomSettings, description="`dicom` only: how pixels become an image.")
    nifti: NiftiSettings = Field(default_factory=NiftiSettings, description="`nifti` only: which slices are taken.")
    medmnist: MedMnistSettings = Field(
        default_factory=MedMnistSettings, description="`medmnist` only: what images of several labels are asked."
    )
    limit: int | None = Field(
        None, ge=1, description="At most this many questions of each split, evenly spaced over it."
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if (self.split and self.kind not in ("jsonl", "table")) or (self.splits and self.kind != "jsonl"):
            raise ValueError(f"`split` and `splits` are for kind jsonl; {self.kind} brings its own splits")
        if self.kind == "brain" and (self.path or self.image_root):
            raise ValueError("kind brain is built in and takes neither `path` nor `image_root`")
        if self.kind == "medmnist" and self.image_root:
            raise ValueError("kind medmnist holds its images itself and takes no `image_root`")
        if self.kind == "jsonl" and bool(self.path) == bool(self.splits):
            raise ValueError("kind jsonl needs either `path` or `splits`")
        if self.splits and self.split:
            raise ValueError("`splits` already says which split each file is; leave `split` out")
        if self.kind != "table" and self.mapping:
            raise ValueError("`mapping` is for kind table")
        if self.kind in ("images", "dicom", "nifti") and self.image_root:
            raise ValueError(f"kind {self.kind} finds its files below `path` and takes no `image_root`")
        for name, kinds in _ONLY.items():
            if self.kind not in kinds and getattr(self, name) != type(getattr(self, name))():
                raise ValueError(f"`{name}` is for kind {' or '.join(kinds)}")
        if self.kind == "table" and not (self.path or self.mapping):
            raise ValueError("kind table needs `path`, `mapping` or both")
        if self.kind not in ("brain", "jsonl", "table") and not self.path:
            raise ValueError(f"kind {self.kind} needs `path`")
        return self


class DataSettings(BaseModel):
    """The questions of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceSettings] = Field(
        default_factory=lambda: [SourceSettings(kind="brain")],
        min_length=1,
        description="Where the questions come from; several sources are put together.",
    )
    strata: list[str] = Field(
        default_factory=list,
        description="Tags whose values make up a stratum, such as [modality] or [modality, answer_type]. "
        "None: each data set is one stratum.",
    )
    on_bad: Literal["error", "skip"] = Field(
        "error", description="What a bad row or image does: end with an `error`, or be counted and `skip`ped."
    )
    check_images: ImageCheck = Field(
        "header",
        description="How far each image is looked at when questions are opened: that the file `exists`, that "
        "its `header` is an image's, or that all of it can be `decode`d (slow on large data).",
    )
    prompt: PromptSettings = Field(
        default_factory=PromptSettings, description="How questions are asked and answers are given."
    )
    image_cache_mb: int = Field(
        512,
        ge=0,
        description="Memory in MiB for decoded images, so that each file is read once while they fit.",
    )
