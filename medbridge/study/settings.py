"""The YAML file of a study: a run's keys, and a section `study` that names the models."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medbridge.config import RunSettings


class SightSettings(BaseModel):
    """How it is measured whether the vision tower sees what the questions ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Literal["before", "after"] = Field(
        "after", description="Features of the tower: before or after the merger (projector) to the language model."
    )
    pool: Literal["mean", "max"] = Field("mean", description="How an image's token features become one.")
    min_images: int = Field(
        20, ge=2, description="Training images that a question needs, at least, to be probed; others are left out."
    )
    beside: str | None = Field(
        None,
        description="A vision-only encoder probed beside the models, such as efficientnet-lite0, timm:NAME or "
        "torchvision:NAME: what the images show to someone else.",
    )
    threshold: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of what always giving a question's commonest answer gets wrong, that the probe must get "
        "right for the answers to count as seen. Surely below it: vision-limited.",
    )


class StudyModel(BaseModel):
    """One model of a study that is already there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="Hugging Face folder or id.")
    parent: str | None = Field(
        None, description="Name of the model that it was trained from: changes are told against it."
    )
    trained_on: list[str] = Field(
        default_factory=list,
        description="Strata that it was trained on, from its parent: a row of the transfer matrix.",
    )


class StudySettings(BaseModel):
    """The models of a study, and what is asked of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, StudyModel] = Field(
        default_factory=dict,
        description="Models by name, in the order in which they are shown; none: the study trains its own, from the "
        "model that `model` names.",
    )
    train: tuple[Literal["bridge", "sharpen"], ...] = Field(
        ("bridge", "sharpen"),
        description="Stages that a study without `models` trains in turn, each on all strata and from the one before.",
    )
    transfer: list[Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=list,
        description="Groups of strata; for each, a study without `models` bridges the base model on these alone: a row "
        "of the transfer matrix.",
    )
    sight: SightSettings | None = Field(
        default_factory=SightSettings, description="Probes of the vision tower; null leaves them out."
    )

    @model_validator(mode="after")
    def _parents_are_there(self) -> Self:
        for name, model in self.models.items():
            if model.parent is not None and (model.parent not in self.models or model.parent == name):
                raise ValueError(f"the parent {model.parent!r} of {name!r} is not another of the models")
            if model.trained_on and model.parent is None:
                raise ValueError(f"{name!r} has trained_on and no parent; name the model that it was trained from")
        for name in self.models:
            line = [name]
            while (parent := self.models[line[-1]].parent) is not None:
                if parent in line:
                    raise ValueError(f"{' comes from '.join([*line, parent])}: no model comes from itself")
                line.append(parent)
        if self.models and self.transfer:
            raise ValueError("transfer is for a study that trains its own models; give trained_on with each of yours")
        return self


class StudyConfig(RunSettings):
    """A whole study, as its YAML file states it."""

    study: StudySettings = Field(default_factory=StudySettings, description="The models and what is asked of them.")

    @model_validator(mode="after")
    def _probes_are_not_fitted_on_what_is_measured(self) -> Self:
        if self.diagnosis.split == "train" and self.study.sight is not None:
            raise ValueError(
                "diagnosis.split is train, on which the probes are fitted; measure another split, or set study.sight "
                "to null"
            )
        return self

    def run_settings(self) -> RunSettings:
        """The settings of the run in which the models are trained and measured: every item of each stratum, one look.

        Cells are read beside each other, so that none may have stopped early.
        """
        content = self.model_dump(exclude={"study"})
        content["diagnosis"]["sequential"] = False
        return RunSettings.model_validate(content)
