"""The gate: from the tallies of one stratum to support with intervals, and from those to a verdict.

It decides from one measurement of one stratum. It doesn't sample, and it doesn't choose what is trained.

A raw threshold on Pass@k always says "RL" on multiple choice, where guessing alone reaches it. The gate reads
support *above the guessing floor* at one k that is fixed by the floors alone, before any outcome is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medbridge.support.floors import (
    MIN_INFORMATIVE,
    guessing_floor,
    largest_informative_k,
    support_above_floor,
)
from medbridge.support.intervals import bootstrap_ratio
from medbridge.support.passk import pass_at_k
from medbridge.support.tallies import Tally

Floats = NDArray[np.float64]

VerdictKind = Literal["bridge", "sharpen", "done", "undecided"]

_MOST_ITEMS = 20
"""A forecast of the items needed is cut at this many times those measured: the truth is too near then."""

_NOTABLE_ABSTENTION = 0.2
"""A verdict mentions samples without a readable answer from this share on."""


class GateSettings(BaseModel):
    """When a stratum is bridged, sharpened or left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    support_threshold: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Support above the guessing floor (0: what guessing reaches, 1: every question reached) "
        "below which a stratum is bridged and above which it may be sharpened.",
    )
    accuracy_target: float = Field(
        0.8, gt=0, le=1, description="Greedy accuracy (Acc@1) from which a supported stratum counts as done."
    )
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Error probability on each side: a verdict needs the whole interval, two-sided at "
        "1 - 2 alpha, to be on one side of the threshold.",
    )
    k: int | None = Field(
        None,
        ge=1,
        description="The k at which the gate reads support. Left out: the largest k up to the samples per "
        "item at which guessing still misses `default_room` of the questions. Given, but above the samples "
        "or the largest informative k: the largest usable k takes its place and is named in the verdict.",
    )
    default_room: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="Share of the questions that guessing must still miss at the k chosen when `k` is left "
        "out. Smaller values give a larger k and a wider interval, and weigh a question that is always "
        "answered wrong more heavily.",
    )
    min_informative: float = Field(
        MIN_INFORMATIVE,
        gt=0,
        lt=1,
        description="Support above the floor is refused at every k where guessing misses fewer of the "
        "questions than this share.",
    )
    replicates: int = Field(2000, ge=100, le=1_000_000, description="Bootstrap replicates behind each interval.")
    min_items: int = Field(8, ge=1, description="With fewer items than this, a stratum is undecided whatever they say.")


@dataclass(frozen=True, slots=True)
class Measured:
    """A number with the two ends of its interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """As plain floats; null where not a number."""
        return {"value": _plain(self.value), "low": _plain(self.low), "high": _plain(self.high)}


@dataclass(frozen=True, slots=True)
class Curve:
    """A value with the two ends of its interval at each k, float64 [K] each; NaN where refused."""

    value: Floats
    low: Floats
    high: Floats

    def at(self, index: int) -> Measured:
        """The point at one place of the curve."""
        return Measured(float(self.value[index]), float(self.low[index]), float(self.high[index]))

    def to_dict(self) -> dict[str, list[float | None]]:
        """As lists of plain floats; null where not a number."""
        return {
            "value": _plain_list(self.value),
            "low": _plain_list(self.low),
            "high": _plain_list(self.high),
        }


@dataclass(frozen=True, slots=True)
class SupportEstimate:
    """What was measured of one stratum. Every interval is two-sided at `confidence`.

    Attributes:
        items: items with at least one sample.
        clusters: distinct clusters among them.
        samples: samples of all items together.
        n_min, n_max: smallest and largest number of samples of an item.
        confidence: ``1 - 2 alpha``.
        ks: 1 to n_min, the k of every curve.
        pass_at_k: raw Pass@k.
        floor: Pass@k of guessing, float64 [K].
        above_floor: support above the floor; NaN where guessing leaves too little room.
        informative_k: the largest k with enough room; None where not even k = 1 has.
        k: the k that the gate reads; None where there is none.
        k_note: how k was chosen, in words.
        support: support above the floor at k.
        acc_at_1: greedy accuracy over `greedy_items` items; None without greedy completions.
        accuracy: mean accuracy of the samples (Pass@1).
        abstain_rate: share of the samples without a readable answer; NaN without samples.
        gap: Pass@k at the gate's k minus Acc@1, over the items that have both.
        gap_above_floor: the same with both counted above guessing: support above the floor at k minus
            (Acc@1 - f) / (1 - f).
    """

    items: int
    clusters: int
    samples: int
    n_min: int
    n_max: int
    confidence: float
    ks: tuple[int, ...]
    pass_at_k: Curve
    floor: Floats
    above_floor: Curve
    informative_k: int | None
    k: int | None
    k_note: str
    support: Measured | None
    acc_at_1: Measured | None
    greedy_items: int
    accuracy: Measured | None
    abstain_rate: float
    gap: Measured | None
    gap_above_floor: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values under the same names: lists for arrays, null for NaN and None."""

        def measured(value: Measured | None) -> dict[str, float | None] | None:
            return None if value is None else value.to_dict()

        return {
            "items": self.items,
            "clusters": self.clusters,
            "samples": self.samples,
            "n_min": self.n_min,
            "n_max": self.n_max,
            "confidence": self.confidence,
            "ks": list(self.ks),
            "pass_at_k": self.pass_at_k.to_dict(),
            "floor": _plain_list(self.floor),
            "above_floor": self.above_floor.to_dict(),
            "informative_k": self.informative_k,
            "k": self.k,
            "k_note": self.k_note,
            "support": measured(self.support),
            "acc_at_1": measured(self.acc_at_1),
            "greedy_items": self.greedy_items,
            "accuracy": measured(self.accuracy),
            "abstain_rate": _plain(self.abstain_rate),
            "gap": measured(self.gap),
            "gap_above_floor": None if self.gap_above_floor is None else _plain(self.gap_above_floor),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a stratum.

    Attributes:
        kind: "bridge" (support is weak: supervised fine-tuning), "sharpen" (support is there, Acc@1 lags:
            RL), "done" (both are there) or "undecided".
        reason: why, in plain words with the numbers.
        evidence: the numbers that the verdict rests on.
        more: for "undecided", what would decide: "items" (further items, estimated) and "capped" (the
            estimate is a lower limit); None where more items wouldn't help, and for every other verdict.
    """

    kind: VerdictKind
    reason: str
    evidence: dict[str, float]
    more: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values under the same names."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "evidence": {name: _plain(value) for name, value in self.evidence.items()},
            "more": self.more,
        }


def measure(tallies: Sequence[Tally], settings: GateSettings, *, seed: int) -> SupportEstimate:
    """Estimate support, accuracy and the gap between them from the tallies of one stratum.

    Items without samples (n = 0) are left out. Items may differ in n, in their floor (multiple choice beside
    open answers) and in whether they have a greedy completion.

    Args:
        tallies: one per item.
        settings: of the gate.
        seed: of the bootstrap.

    Returns:
        The estimate; with no items left, one whose curves are empty and whose numbers are None or NaN.
    """
    sampled = [tally for tally in tallies if tally.n > 0]
    clusters = [tally.cluster for tally in sampled]
    n = np.array([tally.n for tally in sampled], dtype=np.int64)
    c = np.array([tally.c for tally in sampled], dtype=np.int64)
    floors = np.array([tally.floor for tally in sampled], dtype=np.float64)
    n_min = int(n.min()) if sampled else 0
    ks = tuple(range(1, n_min + 1))

    reached = pass_at_k(n, c, ks)
    guessed = guessing_floor(floors, ks) if ks else np.empty((len(sampled), 0))
    pass_curve, above_floor = _curves(reached, guessed, clusters, settings, seed)
    floor = guessed.mean(axis=0) if sampled else np.empty(0)
    k, k_note, informative_k = _gate_k(floors, ks, settings)

    greedy = [i for i, tally in enumerate(sampled) if tally.greedy_correct is not None]
    hits = np.array([bool(sampled[i].greedy_correct) for i in greedy], dtype=np.float64)
    acc_at_1 = gap = gap_above_floor = None
    if greedy:
        greedy_clusters = [clusters[i] for i in greedy]
        acc_at_1 = _mean(hits, (0.0, 1.0), greedy_clusters, settings, seed)
        if k is not None:
            gap = _mean(reached[greedy, k - 1] - hits, (-1.0, 1.0), greedy_clusters, settings, seed)
            support_there = support_above_floor(reached[greedy, k - 1].mean(), guessed[greedy, k - 1].mean())
            accuracy_there = support_above_floor(hits.mean(), floors[greedy].mean())
            gap_above_floor = float(support_there - accuracy_there)

    return SupportEstimate(
        items=len(sampled),
        clusters=len(set(clusters)),
        samples=int(n.sum()),
        n_min=n_min,
        n_max=int(n.max()) if sampled else 0,
        confidence=1 - 2 * settings.alpha,
        ks=ks,
        pass_at_k=pass_curve,
        floor=floor,
        above_floor=above_floor,
        informative_k=informative_k,
        k=k,
        k_note=k_note,
        support=None if k is None else above_floor.at(k - 1),
        acc_at_1=acc_at_1,
        greedy_items=len(greedy),
        accuracy=pass_curve.at(0) if ks else None,
        abstain_rate=sum(tally.abstained for tally in sampled) / int(n.sum()) if sampled else math.nan,
        gap=gap,
        gap_above_floor=gap_above_floor,
    )


def decide(estimate: SupportEstimate, settings: GateSettings) -> Verdict:
    """The verdict on one stratum.

    bridge where support above the floor is surely below the threshold (the high end of its interval is);
    where it is surely above, done if Acc@1 is surely at its target and sharpen otherwise; undecided in every
    other case.
    """
    evidence = _evidence(estimate, settings)
    threshold = settings.support_threshold
    if estimate.items < settings.min_items:
        short = settings.min_items - estimate.items
        return Verdict(
            "undecided",
            f"{_count(estimate.items, 'item')} measured, fewer than the {settings.min_items} that a verdict "
            f"needs: measure at least {short} more.",
            evidence,
            {"items": short, "capped": False},
        )
    support = estimate.support
    if support is None or estimate.k is None:
        return Verdict("undecided", f"Support above the guessing floor can't be read: {estimate.k_note}.", evidence)

    at = estimate.k - 1
    interval = f"{100 * estimate.confidence:.0f} % interval {support.low:.2f} to {support.high:.2f}"
    read = (
        f"Support above the guessing floor at k = {estimate.k} is {support.value:.2f} ({interval}; "
        f"Pass@{estimate.k} {estimate.pass_at_k.value[at]:.2f} where guessing gives "
        f"{estimate.floor[at]:.2f}; {_count(estimate.items, 'item')})"
    )
    remarks = _remarks(estimate)
    if support.high < threshold:
        return Verdict(
            "bridge",
            f"{read}, below the threshold {threshold:g}: the answers aren't within the model's reach, and RL "
            f"has nothing to sharpen.{remarks}",
            evidence,
        )
    if support.low <= threshold:
        more = _items_to_decide(estimate.items, support, threshold)
        return Verdict(
            "undecided",
            f"{read}, and the interval holds the threshold {threshold:g}: {_ask(more)}.{remarks}",
            evidence,
            more,
        )
    accuracy = estimate.acc_at_1
    if accuracy is None:
        return Verdict(
            "undecided",
            f"{read}, above the threshold {threshold:g}, but there are no greedy completions: Acc@1 is "
            f"needed to tell sharpen from done.{remarks}",
            evidence,
        )
    acc_read = f"Acc@1 is {accuracy.value:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})"
    target = settings.accuracy_target
    if accuracy.low >= target:
        return Verdict(
            "done",
            f"{read}, above the threshold {threshold:g}, and {acc_read}, at the target {target:g}.{remarks}",
            evidence,
        )
    lag = "below" if accuracy.high < target else "not surely at"
    return Verdict(
        "sharpen",
        f"{read}, above the threshold {threshold:g}, while {acc_read}, {lag} the target {target:g}: the "
        f"answers are within the model's reach, and RL can bring them up.{remarks}",
        evidence,
    )


def _curves(
    reached: Floats, guessed: Floats, clusters: Sequence[str], settings: GateSettings, seed: int
) -> tuple[Curve, Curve]:
    """Raw Pass@k and support above the floor, from one bootstrap so that both rest on the same replicates."""
    items, n_ks = reached.shape
    if items == 0 or n_ks == 0:
        empty = Curve(np.empty(0), np.empty(0), np.empty(0))
        return empty, empty
    floor = guessed.mean(axis=0)
    room = 1 - floor
    # Where everything is guessed the ratio has no denominator; 1 stands in, and the result is refused below.
    usable = room > 0
    result = bootstrap_ratio(
        np.hstack([reached, reached - guessed]),
        np.hstack([np.ones_like(reached), np.where(usable, 1 - guessed, 1.0)]),
        # An item that is never reached counts -F, one that is always reached 1 - F.
        bounds=(np.r_[np.zeros(n_ks), -floor], np.r_[np.ones(n_ks), room]),
        clusters=clusters,
        alpha=settings.alpha,
        replicates=settings.replicates,
        seed=seed,
    )
    refused = np.isnan(support_above_floor(floor, floor, settings.min_informative))
    raw, above = slice(None, n_ks), slice(n_ks, None)
    return (
        Curve(result.value[raw], result.low[raw], result.high[raw]),
        Curve(*(np.where(refused, np.nan, end[above]) for end in (result.value, result.low, result.high))),
    )


def _mean(
    values: Floats, bounds: tuple[float, float], clusters: Sequence[str], settings: GateSettings, seed: int
) -> Measured:
    result = bootstrap_ratio(
        values[:, None],
        1.0,
        bounds=bounds,
        clusters=clusters,
        alpha=settings.alpha,
        replicates=settings.replicates,
        seed=seed,
    )
    return Measured(float(result.value[0]), float(result.low[0]), float(result.high[0]))


def _gate_k(floors: Floats, ks: Sequence[int], settings: GateSettings) -> tuple[int | None, str, int | None]:
    """The k that the gate reads, how it was chosen in words, and the largest informative k."""
    if not ks:
        return None, "no item has samples", None
    informative = largest_informative_k(floors, ks, settings.min_informative)
    if informative is None:
        room = 1 - float(floors.mean())
        return (
            None,
            f"guessing alone answers all but {room:.3f} of the questions at k = 1, and less than "
            f"{settings.min_informative:g} leaves no room to see support",
            None,
        )
    if settings.k is None:
        roomy = largest_informative_k(floors, ks, max(settings.default_room, settings.min_informative))
        if roomy is None:
            return (
                1,
                f"k = 1, although guessing misses fewer than {settings.default_room:g} of the questions",
                informative,
            )
        if roomy == ks[-1]:
            return roomy, f"k = {roomy}, all samples of an item", informative
        return (
            roomy,
            f"k = {roomy}, the largest at which guessing misses {settings.default_room:g} of the questions",
            informative,
        )
    if settings.k <= informative:
        return settings.k, f"k = {settings.k}, as configured", informative
    why = (
        f"items have only {ks[-1]} samples"
        if informative == ks[-1]
        else f"above it guessing misses fewer than {settings.min_informative:g} of the questions"
    )
    return informative, f"k = {informative} in place of the configured {settings.k}: {why}", informative


def _evidence(estimate: SupportEstimate, settings: GateSettings) -> dict[str, float]:
    evidence = {
        "items": float(estimate.items),
        "threshold": settings.support_threshold,
        "accuracy_target": settings.accuracy_target,
        "abstain_rate": estimate.abstain_rate,
    }
    if estimate.k is not None:
        evidence["k"] = float(estimate.k)
        evidence["pass_at_k"] = float(estimate.pass_at_k.value[estimate.k - 1])
        evidence["floor"] = float(estimate.floor[estimate.k - 1])
    measured = {"support": estimate.support, "acc_at_1": estimate.acc_at_1, "gap": estimate.gap}
    for name, quantity in measured.items():
        if quantity is not None:
            evidence |= {name: quantity.value, f"{name}_low": quantity.low, f"{name}_high": quantity.high}
    return evidence


def _items_to_decide(items: int, support: Measured, threshold: float) -> dict[str, Any]:
    """How many further items would move the end nearest to the threshold past it, if the estimate stayed
    where it is.

    The distance from the value to an end shrinks as 1 / sqrt(items).
    """
    distance = abs(support.value - threshold)
    width = support.value - support.low if support.value > threshold else support.high - support.value
    most = (_MOST_ITEMS - 1) * items
    if distance == 0 or items * ((width / distance) ** 2 - 1) > most:
        return {"items": most, "capped": True}
    return {"items": max(1, math.ceil(items * ((width / distance) ** 2 - 1))), "capped": False}


def _ask(more: dict[str, Any]) -> str:
    if more["capped"]:
        return f"the estimate is too near to the threshold for even {more['items']} more items to decide"
    return f"about {_count(more['items'], 'more item')} would decide"


def _remarks(estimate: SupportEstimate) -> str:
    if estimate.abstain_rate < _NOTABLE_ABSTENTION:
        return ""
    return f" {100 * estimate.abstain_rate:.0f} % of the samples gave no readable answer."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain_list(values: Floats) -> list[float | None]:
    return [_plain(value) for value in values.tolist()]
