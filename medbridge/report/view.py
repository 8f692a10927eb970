"""What the report shows of a run, as plain values: no HTML, no drawing, no database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medbridge.evaluation import Evaluation

MEASURING = ("diagnose", "evaluate")
"""Kinds of stage that give verdicts."""

TRAINING = ("format", "bridge", "sharpen", "mixed")
"""Kinds of stage that train."""

_LONGEST_NAME = 160
"""Characters of a stratum's name, a model's or a data set's that are shown."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the two ends of its interval; an end is None where it isn't known."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """As a sentence says it: "0.42 [0.30, 0.51]"."""
        ends = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{ends}"


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over k; None where undefined."""

    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclass(frozen=True, slots=True)
class CheckView:
    """The same questions judged otherwise: another reading of the answers ("strict", "lenient"), or other images
    ("blank", "shuffled").

    `same`: not one number differs from what was measured. `changed`: so does the verdict. `visual` is the support of
    the real images less that of these; None for a reading.
    """

    name: str
    kind: str | None
    items: int
    support: Estimate | None
    acc_at_1: Estimate | None
    visual: Estimate | None
    same: bool
    changed: bool

    @property
    def reads(self) -> bool:
        """Whether it is another reading of the same completions, not another measurement."""
        return self.name in ("strict", "lenient")


@dataclass(frozen=True, slots=True)
class More:
    """What would decide an undecided stratum: further items, or further samples of each; None where it isn't known."""

    items: int | None
    samples: int | None
    capped: bool
    bottleneck: str | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a measurement lets one expect: `predicted` Pass@k beyond the samples, as far as `reliable_k`, and the
    `forecast` of Acc@1 after sharpening.
    """

    cover: Estimate | None
    efficiency: float | None
    gap: Estimate | None
    k90: int | None
    reliable_k: int
    predicted: list[tuple[int, float]]
    forecast: Estimate | None


@dataclass(frozen=True, slots=True)
class ChangeView:
    """One stratum's change from one diagnosis to the next, on the same items. `alarm`: its support surely fell."""

    stratum: str
    items: int
    support: Estimate | None
    pass_at_k: Estimate | None
    k: int | None
    acc_at_1: Estimate | None
    gained: int
    lost: int
    alarm: bool
    forecast: Estimate | None
    came_out: Estimate | None


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
    statistic: str
    reached: Curve
    more: More | None
    pooled: bool
    checks: list[CheckView]
    outlook: Outlook | None
    taken_back: bool

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
        """Acc@1 of guessing, and the share of the questions that it reaches."""
        return self.floor[0] if self.floor else None

    @property
    def reached_share(self) -> Curve | None:
        """Share of the questions reached at each k, by the statistic "reached"; None where the gate reads another."""
        chance = self.chance
        if self.statistic != "reached" or chance is None:
            return None
        # The stored curve is (S - f) / (1 - f).
        value, low, high = (
            [None if above is None else chance + (1 - chance) * above for above in end]
            for end in (self.reached.value, self.reached.low, self.reached.high)
        )
        return Curve(value, low, high) if any(share is not None for share in value) else None

    @property
    def visual_support(self) -> bool | None:
        """Whether the real images surely add support to each control's; None without controls."""
        lows = [check.visual.low for check in self.checks if check.visual is not None]
        return all(low is not None and low > 0 for low in lows) if lows else None


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
    """All that is known of one stratum. `path`: the kinds of the stages it was trained in; `undone`: of those that were
    taken back.
    """

    name: str
    measured: list[Measurement] = field(default_factory=list)
    held_out: list[Measurement] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
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
        """The last diagnosis of a model that was not taken back."""
        return next((m for m in reversed(self.measured) if not m.taken_back), None)


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage. What isn't known is None, and a stage of one kind has no numbers of another.

    `ways`: what each stratum of a mixed stage was trained by. `kept_step`: the step whose weights are its result.
    `changes` are a diagnosis's against the one titled `since`; `lost` says which support fell so that the training
    before it was taken back. `undone`: a training stage that was.
    """

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
    changes: list[ChangeView]
    since: str | None
    lost: list[str]
    undone: bool
    ways: dict[str, str]
    kept_step: int | None
    held_out: float | None

    @property
    def sharpens(self) -> bool:
        """Whether it is trained by rewards, so that its loss says nothing about progress."""
        return self.kind in ("sharpen", "mixed")

    def way(self, stratum: str) -> str:
        """How a stratum was trained in it: "bridge" or "sharpen"."""
        return self.ways.get(stratum, self.kind)

    def trained_by(self, way: str) -> list[str]:
        """The strata that were trained in this way."""
        return [name for name in self.strata if self.way(name) == way]

    @property
    def trains(self) -> bool:
        return self.kind in TRAINING


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
    evaluation: Evaluation | None
    config: Any
    study: bool
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
