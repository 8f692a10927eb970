"""From the tallies of one stratum to its support, accuracy and the gap between them, with intervals.

It doesn't sample, and it gives no verdict (see gate).

A raw threshold on Pass@k always says "RL" on multiple choice, where guessing alone reaches it. Support is read
*above the guessing floor* at one k that is fixed before any outcome is seen. Per item it is a numerator (the
item's score less that of guessing) and a denominator (1 less that of guessing); support is the ratio of their
sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge.support.floors import guessing_floor, largest_informative_k, support_above_floor
from medbridge.support.intervals import Intervals, bootstrap_ratio
from medbridge.support.settings import GateSettings, Statistic
from medbridge.support.spectra import spectrum
from medbridge.support.tables import pass_at_k, reached_at_k
from medbridge.support.tallies import Tally

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_MOST_OF_SUPPORT = 0.9
"""k90 is the least k that reaches this share of Pass@n_min."""

_LARGEST_HALF = 64
"""Samples per half when halves of the samples are compared; more would change the correlation little."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A number with the two ends of its interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """As plain floats; null where not a number."""
        return {"value": plain(self.value), "low": plain(self.low), "high": plain(self.high)}


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
        return {name: [plain(value) for value in getattr(self, name).tolist()] for name in ("value", "low", "high")}


@dataclass(frozen=True, slots=True)
class Scores:
    """What each item adds to support, ``sum(top) / sum(bottom)``; float64 [items], or [items, K] for
    several k.

    Attributes:
        top: score less the score of guessing.
        bottom: 1 less the score of guessing.
        low, high: lowest and highest possible top: the item is never, or always, answered correctly.
    """

    top: Floats
    bottom: Floats
    low: Floats
    high: Floats


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
        above_floor: Pass@k above the floor; NaN where guessing leaves too little room.
        informative_k: the largest k at which `above_floor` has enough room; None where not even k = 1 has.
        k: the k that the gate reads; None where there is none.
        k_note: how k was chosen, in words.
        support: support above the floor at k, by `statistic`.
        acc_at_1: greedy accuracy over `greedy_items` items; None without greedy completions.
        accuracy: mean accuracy of the samples (Pass@1).
        abstain_rate: share of the samples without a readable answer; NaN without samples.
        gap: Pass@k at the gate's k minus Acc@1, over the items that have both.
        gap_above_floor: the same with both counted above guessing: support at k minus (Acc@1 - f) / (1 - f).
        statistic: what support counts, "reached" or "pass".
        reached: support by "reached" at each k; NaN throughout where guessing leaves too little room.
        p_below: one-sided p-value of support being at or above the threshold; small where it is surely below.
        p_above: of support being at or below the threshold.
        p_done: of Acc@1 being at or below its target.
        p_not_done: of Acc@1 being at or above its target. All four are NaN where there is nothing to test.
        efficiency: Acc@1 / Pass@n_min over the items that have both; NaN where nothing is reached.
        k90: least k whose Pass@k reaches 90 % of Pass@n_min; None where nothing is reached.
        between_share: share of the variance of the items' scores at k that is between items; the rest would
            vanish with more samples per item. NaN below two samples or items, and where all are equal.
        standard_error: of support; that of the normal interval as wide as the one given.
        cover: share of the items whose probability of success is above their floor by a margin, from the spectrum;
            NaN where there is none with room.
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
    statistic: Statistic
    reached: Curve
    p_below: float
    p_above: float
    p_done: float
    p_not_done: float
    efficiency: float
    k90: int | None
    between_share: float
    standard_error: float
    cover: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values under the same names: lists for arrays, null for NaN and None."""
        return {field.name: _jsonable(getattr(self, field.name)) for field in fields(self)}


def item_scores(tallies: Sequence[Tally], settings: GateSettings, k: int) -> Scores:
    """Score each item at k by the statistic of the settings.

    reached: the score is :func:`reached_at_k`, and guessing scores f. pass: the score is :func:`pass_at_k`, and
    guessing scores ``1 - (1 - f)^k``. Where f = 1 no answer can be wrong, and the item counts 0 of 0.

    Args:
        tallies: one per item.
        settings: of the gate.
        k: at least 1.

    Returns:
        Scores of shape [items].

    Raises:
        ValueError: an item has fewer than k samples, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k = {k} is below 1: at least one sample must be drawn")
    for tally in tallies:
        if tally.n < k:
            raise ValueError(f"item {tally.item_id!r}: n = {tally.n} samples, k = {k} needs as many")
    scores = _scores(*_columns(tallies), (k,), settings.statistic)
    return Scores(scores.top[:, 0], scores.bottom[:, 0], scores.low[:, 0], scores.high[:, 0])


def measure(tallies: Sequence[Tally], settings: GateSettings, *, seed: int) -> SupportEstimate:
    """Estimate support, accuracy and the gap between them from the tallies of one stratum.

    Items without samples (n = 0) are left out, but for Acc@1, where a greedy completion is enough. Items may differ
    in n, in their floor (multiple choice beside open answers) and in whether they have a greedy completion.

    Args:
        tallies: one per item.
        settings: of the gate.
        seed: of the bootstrap.

    Returns:
        The estimate; with no items left, one whose curves are empty and whose numbers are None or NaN.
    """
    sampled = [tally for tally in tallies if tally.n > 0]
    clusters = [tally.cluster for tally in sampled]
    n, c, floors = _columns(sampled)
    n_min = int(n.min()) if sampled else 0
    ks = tuple(range(1, n_min + 1))
    k, k_note, informative_k = gate_k(floors, n_min, settings)

    passed = pass_at_k(n, c, ks)
    scores: dict[Statistic, Scores] = {
        "pass": _scores(n, c, floors, ks, "pass"),
        "reached": _scores(n, c, floors, ks, "reached"),
    }
    found = _bootstrap_curves(passed, scores, clusters, settings, seed)
    columns = {name: slice(i * n_min, (i + 1) * n_min) for i, name in enumerate(("raw", "pass", "reached"))}
    curves = {name: Curve(found.value[own], found.low[own], found.high[own]) for name, own in columns.items()}
    support, p_below, p_above, error, between = None, math.nan, math.nan, math.nan, math.nan
    if k is not None:
        column = columns[settings.statistic].start + k - 1
        support = curves[settings.statistic].at(k - 1)
        p_below, p_above = float(found.p_below[column]), float(found.p_above[column])
        error = (support.high - support.low) / (2 * NormalDist().inv_cdf(1 - settings.alpha))
        between = _between_share(n, c, floors, k, settings.statistic)

    greedy = [i for i, tally in enumerate(sampled) if tally.greedy_correct is not None]
    hits = np.array([bool(sampled[i].greedy_correct) for i in greedy], dtype=np.float64)
    answered = [tally for tally in tallies if tally.greedy_correct is not None]
    acc_at_1 = gap = gap_above_floor = None
    p_done = p_not_done = efficiency = math.nan
    if answered:
        right = np.array([bool(tally.greedy_correct) for tally in answered], dtype=np.float64)
        own = [tally.cluster for tally in answered]
        acc_at_1, p_not_done, p_done = _mean(right, (0.0, 1.0), own, settings, seed)
    if greedy:
        greedy_clusters = [clusters[i] for i in greedy]
        reachable = passed[greedy, n_min - 1].mean()
        efficiency = float(hits.mean() / reachable) if reachable > 0 else math.nan
        if k is not None:
            gap, *_ = _mean(passed[greedy, k - 1] - hits, (-1.0, 1.0), greedy_clusters, settings, seed)
            gap_above_floor = _gap_above_floor(scores[settings.statistic], hits, floors, greedy, k)

    return SupportEstimate(
        items=len(sampled),
        clusters=len(set(clusters)),
        samples=int(n.sum()),
        n_min=n_min,
        n_max=int(n.max()) if sampled else 0,
        confidence=1 - 2 * settings.alpha,
        ks=ks,
        pass_at_k=curves["raw"],
        floor=guessing_floor(floors, ks).mean(axis=0) if ks else np.empty(0),
        above_floor=curves["pass"],
        informative_k=informative_k,
        k=k,
        k_note=k_note,
        support=support,
        acc_at_1=acc_at_1,
        greedy_items=len(answered),
        accuracy=curves["raw"].at(0) if ks else None,
        abstain_rate=sum(tally.abstained for tally in sampled) / int(n.sum()) if sampled else math.nan,
        gap=gap,
        gap_above_floor=gap_above_floor,
        statistic=settings.statistic,
        reached=curves["reached"],
        p_below=p_below,
        p_above=p_above,
        p_done=p_done,
        p_not_done=p_not_done,
        efficiency=efficiency,
        k90=_least_k(curves["raw"].value, ks),
        between_share=between,
        standard_error=error,
        cover=spectrum(n, c, floors).cover(n, c, floors) if sampled else math.nan,
    )


def gate_k(floors: ArrayLike, samples: int, settings: GateSettings) -> tuple[int | None, str, int | None]:
    """The k that the gate reads. It depends on what is known before any outcome is seen.

    Args:
        floors: guessing floor of each item, [items].
        samples: that every item has.
        settings: of the gate.

    Returns:
        k, None where there is none; how it was chosen, in words; the largest k at which Pass@k above the floor is
        informative, None where there is none.
    """
    floors = np.asarray(floors, dtype=np.float64)
    ks = range(1, samples + 1)
    if not ks or not floors.size:
        return None, "no item has samples", None
    informative = largest_informative_k(floors, ks, settings.min_informative)
    if informative is None:
        room = float((1 - floors).mean())
        return (
            None,
            f"guessing alone answers all but {room:.3f} of the questions at k = 1, and less than "
            f"{settings.min_informative:g} leaves no room to see support",
            None,
        )
    usable = ks[-1] if settings.statistic == "reached" else informative
    if settings.k is None:
        return *_default_k(floors, ks, settings), informative
    if settings.k <= usable:
        return settings.k, f"k = {settings.k}, as configured", informative
    why = (
        f"items have only {ks[-1]} samples"
        if usable == ks[-1]
        else f"above it guessing misses fewer than {settings.min_informative:g} of the questions"
    )
    return usable, f"k = {usable} in place of the configured {settings.k}: {why}", informative


def _columns(tallies: Sequence[Tally]) -> tuple[Counts, Counts, Floats]:
    """Samples, correct samples and floors, [items] each."""
    return (
        np.array([tally.n for tally in tallies], dtype=np.int64),
        np.array([tally.c for tally in tallies], dtype=np.int64),
        np.array([tally.floor for tally in tallies], dtype=np.float64),
    )


def score_bounds(floors: Floats, ks: Sequence[int], statistic: Statistic) -> tuple[Floats, Floats]:
    """Lowest and highest possible top of an item at each k, float64 [items, K]; the highest is its bottom too."""
    guess = (
        guessing_floor(floors, ks) if statistic == "pass" else np.broadcast_to(floors[:, None], (len(floors), len(ks)))
    )
    # Where f = 1 no answer can be wrong, and none says anything.
    readable = floors[:, None] < 1
    return np.where(readable, -guess, 0.0), np.where(readable, 1 - guess, 0.0)


def _scores(n: Counts, c: Counts, floors: Floats, ks: Sequence[int], statistic: Statistic) -> Scores:
    """Scores at each k, float64 [items, K]."""
    if len(n) == 0 or len(ks) == 0:
        return Scores(*(np.empty((len(n), len(ks))) for _ in range(4)))
    raw = pass_at_k(n, c, ks) if statistic == "pass" else reached_at_k(n, c, ks, floors)
    low, room = score_bounds(floors, ks, statistic)
    return Scores(np.where(floors[:, None] < 1, raw + low, 0.0), room, low, room)


def _bootstrap_curves(
    passed: Floats, scores: dict[Statistic, Scores], clusters: Sequence[str], settings: GateSettings, seed: int
) -> Intervals:
    """Raw Pass@k, then support by "pass", then by "reached", from one bootstrap so that all rest on the same
    replicates; support is NaN where it is refused.
    """
    if passed.size == 0:
        return Intervals(*(np.empty(0) for _ in range(5)))
    # An item that can't be read against guessing (f = 1) leaves the ratio, but raw Pass@k keeps it.
    parts = [Scores(passed, np.ones_like(passed), np.zeros_like(passed), np.ones_like(passed)), *scores.values()]
    top, bottom, low, high = (np.hstack([getattr(part, name) for part in parts]) for name in Scores.__slots__)
    room = bottom.mean(axis=0)
    refused = np.isnan(support_above_floor(1 - room, 1 - room, settings.min_informative))
    found = bootstrap_ratio(
        top,
        np.where(refused, 1.0, bottom),
        bounds=(low.mean(axis=0), high.mean(axis=0)),
        clusters=clusters,
        alpha=settings.alpha,
        replicates=settings.replicates,
        seed=seed,
        against=settings.support_threshold,
    )
    return Intervals(*(np.where(refused, np.nan, getattr(found, name)) for name in Intervals.__slots__))


def _mean(
    values: Floats, bounds: tuple[float, float], clusters: Sequence[str], settings: GateSettings, seed: int
) -> tuple[Measured, float, float]:
    """A mean, with the p-values of its being below and above the accuracy target."""
    found = bootstrap_ratio(
        values[:, None],
        1.0,
        bounds=bounds,
        clusters=clusters,
        alpha=settings.alpha,
        replicates=settings.replicates,
        seed=seed,
        against=settings.accuracy_target,
    )
    value, low, high, p_below, p_above = (float(getattr(found, name)[0]) for name in Intervals.__slots__)
    return Measured(value, low, high), p_below, p_above


def _gap_above_floor(scores: Scores, hits: Floats, floors: Floats, greedy: Sequence[int], k: int) -> float:
    room = scores.bottom[greedy, k - 1].sum()
    support = scores.top[greedy, k - 1].sum() / room if room > 0 else math.nan
    return float(support - support_above_floor(hits.mean(), floors[greedy].mean()))


def _default_k(floors: Floats, ks: Sequence[int], settings: GateSettings) -> tuple[int, str]:
    if settings.statistic == "pass":
        roomy = largest_informative_k(floors, ks, max(settings.default_room, settings.min_informative))
        if roomy is None:
            return 1, f"k = 1, although guessing misses fewer than {settings.default_room:g} of the questions"
        if roomy < ks[-1]:
            return (
                roomy,
                f"k = {roomy}, the largest at which guessing misses {settings.default_room:g} of the questions",
            )
    return ks[-1], f"k = {ks[-1]}, all samples of an item"


def _least_k(passed: Floats, ks: Sequence[int]) -> int | None:
    if not ks or passed[-1] <= 0:
        return None
    return ks[int(np.argmax(passed >= _MOST_OF_SUPPORT * passed[-1]))]


def _between_share(n: Counts, c: Counts, floors: Floats, k: int, statistic: Statistic) -> float:
    """Share of the variance of the items' scores that is between items: their split-half reliability.

    The covariance of the scores of two disjoint halves of an item's samples estimates the variance between items
    without bias: given the item, the halves are independent. Taken exactly over all ways to split, the halves
    need no random numbers. A half is scored at k where it has as many samples, and the correlation of halves is
    carried over to all samples by the formula of Spearman and Brown (1910). Where it has fewer it is scored at
    its own size, which stands in for k: from n samples the square of an expected score at k > n / 2 has no
    unbiased estimate.
    """
    half = min(int(n.min()) // 2, _LARGEST_HALF)
    items = len(n)
    if half < 1 or items < 2:
        return math.nan
    cells, times = np.unique(np.stack([n.astype(np.float64), c.astype(np.float64), floors]), axis=1, return_counts=True)
    of_cell = np.repeat(np.arange(cells.shape[1]), half + 1)
    first = np.tile(np.arange(half + 1), cells.shape[1])  # correct samples in the first half
    all_n, all_c, f = cells[0, of_cell].astype(np.int64), cells[1, of_cell].astype(np.int64), cells[2, of_cell]
    possible = (first <= all_c) & (half - first <= all_n - all_c)
    of_cell, first, all_n, all_c, f = (values[possible] for values in (of_cell, first, all_n, all_c, f))
    weight = times[of_cell] * _hypergeometric(all_n, all_c, half, first)
    at = (min(k, half),)
    one = _scores(np.full_like(first, half), first, f, at, statistic)
    two = _scores(all_n - half, all_c - first, f, at, statistic)
    support = float(weight @ one.top[:, 0]) / float(weight @ one.bottom[:, 0])
    residuals = (one.top[:, 0] - support * one.bottom[:, 0], two.top[:, 0] - support * two.bottom[:, 0])
    variance = float(weight @ residuals[0] ** 2)
    if variance <= 1e-12 * items:
        return math.nan
    reliability = min(1.0, max(0.0, float(weight @ (residuals[0] * residuals[1])) / variance))
    longer = float(n.mean()) / k / (half / at[0])
    return longer * reliability / (1 + (longer - 1) * reliability)


def _hypergeometric(n: Counts, c: Counts, drawn: int, correct: Counts) -> Floats:
    """Probability of `correct` correct ones among `drawn` of n samples, c of which are correct."""

    def log_choose(total: Counts, part: Counts) -> Floats:
        numbers, where = np.unique(np.stack([total, part, total - part]), return_inverse=True)
        log_factorial = np.array([math.lgamma(number + 1) for number in numbers.tolist()])[where.reshape(3, -1)]
        chosen: Floats = log_factorial[0] - log_factorial[1] - log_factorial[2]
        return chosen

    everything = log_choose(n, np.full_like(n, drawn))
    return np.exp(log_choose(c, correct) + log_choose(n - c, drawn - correct) - everything)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Measured | Curve):
        return value.to_dict()
    if isinstance(value, np.ndarray):
        return [plain(number) for number in value.tolist()]
    if isinstance(value, tuple):
        return list(value)
    return plain(value) if isinstance(value, float) else value


def plain(value: float) -> float | None:
    """The number as JSON holds it: null where it is none."""
    return float(value) if math.isfinite(value) else None
