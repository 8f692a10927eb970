"""What a study found, as plain values that go to JSON and to the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medbridge.report.view import Estimate

FindingKind = Literal["vision-limited", "support-limited", "sampling-limited", "solved", "undecided"]

FINDINGS: tuple[FindingKind, ...] = ("vision-limited", "support-limited", "sampling-limited", "solved", "undecided")


@dataclass(frozen=True, slots=True)
class Sight:
    """How far an encoder's features give the answers of a stratum.

    Attributes:
        items: measured items whose question has enough training images; `asked` is all.
        questions: different questions among them.
        accuracy: of a linear probe for each question.
        commonest: accuracy of always giving the question's commonest training answer.
        gain: share of what that gets wrong which the probe gets right: (accuracy - commonest) / (1 - commonest).
    """

    items: int
    asked: int
    questions: int
    accuracy: float
    commonest: float
    gain: Estimate | None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sight:
        """The inverse of `dataclasses.asdict`."""
        gain = record["gain"]
        return cls(**{**record, "gain": None if gain is None else Estimate(**gain)})


@dataclass(frozen=True, slots=True)
class Finding:
    """Where a cell's bottleneck is, and why, in words."""

    kind: FindingKind
    words: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one stratum. What was not measured is None.

    Attributes:
        clusters: of the items, which intervals resample: those that share images, or as `diagnosis.cluster` says.
        support: support above the guessing floor at `k` (the gate's statistic).
        ks, pass_at_k, floors: the raw Pass@k curve, with guessing's; [K] each.
        blank: support that the images add to grey ones; None without that control.
        spectrum: items by how many of their samples are right, from 0 to all.
    """

    model: str
    stratum: str
    verdict: str
    reason: str
    items: int
    clusters: int
    samples: int
    k: int | None
    support: Estimate | None
    acc_at_1: Estimate | None
    ks: tuple[int, ...]
    pass_at_k: tuple[float | None, ...]
    floors: tuple[float | None, ...]
    blank: Estimate | None
    sight: Sight | None
    spectrum: tuple[int, ...]
    finding: Finding


@dataclass(frozen=True, slots=True)
class ChangeCell:
    """What a model's training changed in one stratum, on the same items. `lost`: items surely right less often.
    `trusted`: both measurements were given a verdict.
    """

    model: str
    parent: str
    stratum: str
    trained: bool
    items: int
    support: Estimate | None
    acc_at_1: Estimate | None
    gained: int
    lost: int
    trusted: bool = True


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of the study. `trained_on` is empty for one that was not trained here."""

    name: str
    path: str
    parent: str | None = None
    trained_on: tuple[str, ...] = ()
    chain: bool = True


@dataclass(frozen=True, slots=True)
class StudyResult:
    """All of a study. `beside` is the sight of the vision-only encoder, by stratum."""

    name: str
    confidence: float
    threshold: float
    sight_threshold: float
    split: str
    models: tuple[ModelRow, ...]
    strata: tuple[str, ...]
    cells: tuple[Cell, ...]
    changes: tuple[ChangeCell, ...]
    beside: Mapping[str, Sight | None] = field(default_factory=dict)
    encoder: str | None = None

    def cell(self, model: str, stratum: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.model == model and cell.stratum == stratum), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)
