"""What the report shows of a run, as plain values: no HTML, no drawing, no database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MEASURING = ("diagnose", "evaluate")
"""Kinds of stage that measure; all others train."""

_LONGEST_NAME = 160
"""Characters of a stratum's name, a model's or a data set's that are shown."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the two ends of its interval; an end is None where it isn't known."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over k; None where undefined."""

    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One stratum, measured by one stage. `label` says when, for a reader who sees this stratum only."""

    stage_id: int
    label: str
    kind: str
    reason: str
    items: int
    n_min: int
    n_max: int
    ks: list[int]
    pass_at_k: Curve
    floor: list[float | None]
    k: int | None
    k_note: str
    support: Estimate | None
    acc_at_1: Estimate | None
    greedy_items: int
    abstain_rate: float | None
    confidence: float
    threshold: float | None
    accuracy_target: float | None

    @property
    def raw_pass(self) -> float | None:
        """Raw Pass@K at the largest K, K = n_min."""
        return self.pass_at_k.value[-1] if self.pass_at_k.value else None

    @property
    def raw_floor(self) -> float | None:
        """Pass@K of guessing at the same K."""
        return self.floor[-1] if self.floor else None

    @property
    def chance(self) -> float | None:
        """Acc@1 of guessing."""
        return self.floor[0] if self.floor else None


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion: "text", "mark" (the span that was read) or "gap" (what was left out)."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as shown. `shown_order` are the options in the order in which the model saw them."""

    label: str
    status: str
    read: str | None
    chosen: str | None
    text: str
    span: tuple[int, int] | None
    well_formed: bool
    truncated: bool
    shown_order: list[str]
    tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One item with its images' paths, how its samples came out, and a few of its completions."""

    item_id: str
    question: str
    answer: str
    options: list[str] | None
    images: list[str]
    n: int
    correct: int
    abstained: int
    completions: list[Completion]

    @property
    def wrong(self) -> int:
        return max(0, self.n - self.correct - self.abstained)


@dataclass(frozen=True, slots=True)
class Contrast:
    """Whether one estimate is "above", "below" or "equal to" another, and whether the intervals are apart."""

    side: str
    apart: bool

    def words(self, other: str = "") -> str:
        """In words: "above the base model, intervals apart"."""
        return f"{self.side} {other}".strip() + (", intervals apart" if self.apart else ", intervals overlap")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Held-out accuracy of one stratum: the baseline, the base model and the final one.

    The contrasts are the final model's; where nothing was trained, `against_baseline` is the base model's.
    """

    stratum: str
    items: int
    baseline: Estimate | None
    base: Estimate | None
    final: Estimate | None
    chance: float | None
    against_baseline: Contrast | None
    against_base: Contrast | None


@dataclass(slots=True)
class StratumView:
    """All that is known of one stratum."""

    name: str
    measured: list[Measurement] = field(default_factory=list)
    held_out: list[Measurement] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    outcome: str | None = None
    story: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    option_counts: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def verdict(self) -> str | None:
        """Where the stratum stands: its final state, or else its latest verdict."""
        return self.outcome or (self.latest.kind if self.latest else None)

    @property
    def sentence(self) -> str:
        """The story with the verdict, in words."""
        kind = self.verdict
        if kind is None:
            return self.story
        return f"{self.story}; {'now' if self.path and kind in ('done', 'undecided') else 'verdict'} {kind}"

    @property
    def base(self) -> Measurement | None:
        return self.measured[0] if self.measured else None

    @property
    def latest(self) -> Measurement | None:
        return self.measured[-1] if self.measured else None


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage. What isn't known is None, and a stage of one kind has no numbers of another."""

    stage_id: int
    kind: str
    title: str
    done: bool
    model: str
    result_model: str | None
    strata: list[str]
    started: float
    seconds: float | None
    steps: int
    planned_steps: int | None
    items: int
    items_by_stratum: list[tuple[str, int]]
    replayed: int
    source: str | None
    loss: tuple[float, float] | None
    reward: tuple[float, float] | None
    rollouts: int
    tokens: int | None
    truncated_rate: float | None
    verdicts: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]

    @property
    def trains(self) -> bool:
        return self.kind not in MEASURING


@dataclass(slots=True)
class RunView:
    """A whole run as the report shows it."""

    name: str
    folder: str
    state: str  # "empty", "running", "stopped" or "finished"
    state_note: str
    base_model: str
    final_model: str | None
    taught_format: bool
    datasets: list[str]
    embedded: bool
    splits: list[str]
    begun: float | None
    ended: float | None
    generated: float
    seconds: float
    rollouts: int
    stages: list[StageView]
    strata: list[StratumView]
    comparisons: list[Comparison]
    test_split: str
    diagnosis_split: str
    confidence: float
    threshold: float | None
    accuracy_target: float | None
    letters: bool
    samples_from: str | None
    config: Any
    environment: dict[str, str]


def short(text: str, limit: int = _LONGEST_NAME) -> str:
    """The text, its middle replaced by an ellipsis where it is longer than `limit`."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}…{text[len(text) - limit // 2 + 1 :]}"


def duration(seconds: float) -> str:
    """A time span in words: "41 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
