"""What changed between two measurements of the same items: support, Acc@1, the gap, items gained and lost.

It compares tallies. What is measured, and what is done about a loss, is decided elsewhere.

Both measurements saw the same items, so everything is a mean of paired differences: the spread between easy and hard
items cancels, and what is left is the noise of sampling and the change itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge.support.intervals import bootstrap_ratio
from medbridge.support.tables import pass_at_k
from medbridge.support.tallies import Tally

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Counts = tuple[Integers, Integers]

Scores = Callable[[Sequence[Tally]], tuple[ArrayLike, ArrayLike]]
"""The gate's statistic of each item, ``(value - guess, 1 - guess)``, float [items] each; NaN where it has none."""


@dataclass(frozen=True, slots=True)
class Shift:
    """A mean paired difference, after minus before.

    Attributes:
        value, low, high: the difference and the two ends of its interval; NaN without items.
        p_loss: one-sided p-value of "not lower by more than is tolerated"; at most alpha exactly where `high` is
            below ``-tolerated``.
        p_gain: the same of "not higher by more than is tolerated".
        items: the items that it rests on.
    """

    value: float
    low: float
    high: float
    p_loss: float
    p_gain: float
    items: int


@dataclass(frozen=True, slots=True)
class Crossings:
    """Items between "never right in n samples" and "right at least once", with what noise alone makes of them.

    An item that is right one time in twenty does this at every second measurement. Had nothing changed, the right
    samples of an item would be dealt out over both measurements at random; `expected` is the mean number of such items
    then, given every item's total, and `p_value` the probability of at least `count` (exact).
    """

    count: int
    expected: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Change:
    """What changed in one stratum. Every interval is two-sided at `confidence`.

    Attributes:
        items: items in both measurements, with samples in each.
        unpaired: items left out, being in one measurement only or without samples in one.
        confidence: ``1 - 2 alpha``.
        tolerated: the loss (and gain) that the p-values forgive.
        ks: the k of `pass_at_k` and `gap`.
        support: the gate's statistic above the floor.
        pass_at_k: raw Pass@k.
        acc_at_1: greedy accuracy, over items with both greedy completions; None where there are none.
        gap: Pass@k - Acc@1 over the same items; None where there are none. A gap that falls is what sharpening is for.
        gained, lost: ids of items that are right more often (less often) than before, and more often than guessing
            after (before): per item Fisher's exact test and a binomial test against the floor, both one-sided, over
            the items the step-up of Benjamini and Hochberg, so that of the items named at most a share alpha is
            expected to be named wrongly.
        appeared, vanished: raw counts of items that went from never right to right, and back.
    """

    items: int
    unpaired: int
    confidence: float
    tolerated: float
    ks: tuple[int, ...]
    support: Shift
    pass_at_k: tuple[Shift, ...]
    acc_at_1: Shift | None
    gap: tuple[Shift, ...] | None
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    appeared: Crossings
    vanished: Crossings

    def to_dict(self) -> dict[str, Any]:
        """As JSON values under the same names: lists for tuples, null for NaN and None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


def compare(
    before: Sequence[Tally],
    after: Sequence[Tally],
    *,
    scores: Scores,
    ks: Sequence[int],
    alpha: float,
    replicates: int,
    seed: int,
    tolerated: float = 0.0,
) -> Change:
    """Compare two measurements of one stratum, item by item.

    Pass@k of a k above an item's samples, in either measurement, leaves the item out at that k. False alarms are at
    most alpha for a stratum that was chosen without looking at `before`; one that was chosen *because* `before` was
    high falls back by itself, the more so the fewer its samples.

    Args:
        before, after: one tally an item; the order doesn't matter.
        scores: the gate's statistic; its value must lie between 0 and 1 and its guess depend on the item alone.
        ks: the k at which Pass@k and the gap are compared, each at least 1.
        alpha: error probability of each end of an interval, and the false discovery rate of `gained` and of `lost`.
        replicates: of the bootstrap over clusters; no p-value is below ``1 / (replicates + 1)``.
        seed: of the bootstrap. Exchanging `before` and `after` changes every sign and nothing else.
        tolerated: the loss that `p_loss` forgives, at least 0.

    Raises:
        ValueError: no item in common; an item twice in one measurement, or with another floor or cluster in the other;
            a bad alpha, k or `tolerated`; scores of the wrong shape, or whose guess differs between the two.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha = {alpha}, must be above 0 and below 0.5")
    if not 0 <= tolerated < 1:
        raise ValueError(f"tolerated = {tolerated}, must be at least 0 and below 1")
    first, second, unpaired = _pair(before, after)
    tops, bottom = _score_difference(scores, first, second)
    old, new = _counts(first), _counts(second)
    reached = pass_at_k(*new, ks) - pass_at_k(*old, ks)
    greedy = _greedy(second) - _greedy(first)

    # Columns of differences between known bounds; NaN where an item has none.
    columns = [tops, *reached.T, greedy, *(reached - greedy[:, None]).T]
    bounds = np.array([1.0] * (2 + len(ks)) + [2.0] * len(ks))
    bottoms = [bottom] + [np.ones(len(first))] * (len(columns) - 1)
    shifts = _shifts(
        np.column_stack(columns), np.column_stack(bottoms), bounds, [tally.cluster for tally in first],
        alpha=alpha, replicates=replicates, seed=seed, tolerated=tolerated,
    )  # fmt: skip
    last = 1 + len(ks)
    has_greedy = shifts[last].items > 0
    floors = np.array([tally.floor for tally in first])
    ids = [tally.item_id for tally in first]
    return Change(
        items=len(first),
        unpaired=unpaired,
        confidence=1 - 2 * alpha,
        tolerated=tolerated,
        ks=tuple(int(k) for k in ks),
        support=shifts[0],
        pass_at_k=tuple(shifts[1:last]),
        acc_at_1=shifts[last] if has_greedy else None,
        gap=tuple(shifts[last + 1 :]) if has_greedy else None,
        gained=tuple(ids[i] for i in _risen(old, new, floors, alpha)),
        lost=tuple(ids[i] for i in _risen(new, old, floors, alpha)),
        appeared=_crossings(old, new),
        vanished=_crossings(new, old),
    )


def visual_support(
    real: Sequence[Tally],
    control: Sequence[Tally],
    *,
    scores: Scores,
    ks: Sequence[int],
    alpha: float,
    replicates: int,
    seed: int,
) -> Change:
    """What the images contribute: `real` minus a `control` on which they were blank or another item's.

    `support.p_gain` at most alpha: the model does use the images. `lost` are items that are right *without* theirs.
    The control's tallies must keep the clusters of the real images. Raises as `compare` does.
    """
    return compare(control, real, scores=scores, ks=ks, alpha=alpha, replicates=replicates, seed=seed)


def losses(changes: Mapping[str, Change], alpha: float) -> dict[str, Change]:
    """The strata with a significant loss of support, beyond what each change tolerates.

    The probability of naming any stratum without one is at most alpha (family-wise, Holm 1979), however the strata
    depend on each other. Strata whose support can't be compared don't count.

    Raises:
        ValueError: alpha not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha}, must be above 0 and below 1")
    tested = sorted(
        (change.support.p_loss, name) for name, change in changes.items() if not math.isnan(change.support.p_loss)
    )
    found = set()
    for rank, (p_loss, name) in enumerate(tested):
        if p_loss > alpha / (len(tested) - rank):
            break
        found.add(name)
    return {name: change for name, change in changes.items() if name in found}


_UNKNOWN = Shift(math.nan, math.nan, math.nan, math.nan, math.nan, 0)

# -- pairs ---------------------------------------------------------------------------------------------------


def _pair(before: Sequence[Tally], after: Sequence[Tally]) -> tuple[list[Tally], list[Tally], int]:
    """The tallies of the items that both have sampled, in the order of their ids, and how many are left out."""
    by_id: list[dict[str, Tally]] = []
    for name, tallies in (("before", before), ("after", after)):
        held: dict[str, Tally] = {}
        for tally in tallies:
            if tally.item_id in held:
                raise ValueError(f"{name}: item {tally.item_id!r} is there twice")
            held[tally.item_id] = tally
        by_id.append(held)
    old, new = by_id
    both = sorted(name for name in old.keys() & new.keys() if old[name].n and new[name].n)
    if not both:
        raise ValueError(
            f"no item in common: {len(before)} items before and {len(after)} after, and none has samples in both"
        )
    for name in both:
        for field in ("floor", "cluster"):
            one, other = getattr(old[name], field), getattr(new[name], field)
            if one != other:
                raise ValueError(
                    f"item {name!r}: {field} = {one!r} before and {other!r} after; tally both from the same items"
                )
    return [old[name] for name in both], [new[name] for name in both], len(old.keys() | new.keys()) - len(both)


def _counts(tallies: Sequence[Tally]) -> Counts:
    """n and c."""
    return (
        np.array([tally.n for tally in tallies], dtype=np.int64),
        np.array([tally.c for tally in tallies], dtype=np.int64),
    )


def _greedy(tallies: Sequence[Tally]) -> Floats:
    return np.array([math.nan if tally.greedy_correct is None else float(tally.greedy_correct) for tally in tallies])


def _score_difference(scores: Scores, first: Sequence[Tally], second: Sequence[Tally]) -> tuple[Floats, Floats]:
    tops, bottoms = [], []
    for tallies in (first, second):
        top, bottom = (np.asarray(part, dtype=np.float64) for part in scores(tallies))
        if top.shape != (len(tallies),) or bottom.shape != top.shape:
            raise ValueError(f"scores gave shapes {top.shape} and {bottom.shape} for {len(tallies)} items")
        tops.append(top)
        bottoms.append(bottom)
    for bad in np.flatnonzero(np.abs(bottoms[0] - bottoms[1]) > 1e-9)[:1]:
        raise ValueError(
            f"scores: item {first[bad].item_id!r} has 1 - guess = {bottoms[0][bad]} before and {bottoms[1][bad]} "
            "after; score both at the same k"
        )
    return tops[1] - tops[0], bottoms[0]


def _shifts(
    tops: Floats,
    bottoms: Floats,
    bounds: Floats,
    clusters: Sequence[str],
    *,
    alpha: float,
    replicates: int,
    seed: int,
    tolerated: float,
) -> list[Shift]:
    """``sum top / sum bottom`` of each column over the items that have it."""
    usable = np.isfinite(tops) & np.isfinite(bottoms) & (bottoms > 0)
    found = [_UNKNOWN] * tops.shape[1]
    patterns, pattern_of = np.unique(usable, axis=1, return_inverse=True)
    for number, has in enumerate(patterns.T):
        if not has.any():
            continue
        columns = np.flatnonzero(pattern_of.ravel() == number)
        # Each column twice: held against the tolerated loss, and against the tolerated gain.
        twice = np.tile(columns, 2)
        result = bootstrap_ratio(
            tops[np.ix_(has, twice)],
            bottoms[np.ix_(has, twice)],
            bounds=(-bounds[twice], bounds[twice]),
            clusters=[cluster for cluster, kept in zip(clusters, has, strict=True) if kept],
            alpha=alpha,
            replicates=replicates,
            seed=seed,
            against=np.repeat([-tolerated, tolerated], columns.size),
        )
        for at, column in enumerate(columns.tolist()):
            found[column] = Shift(
                value=float(result.value[at]),
                low=float(result.low[at]),
                high=float(result.high[at]),
                p_loss=float(result.p_below[at]),
                p_gain=float(result.p_above[columns.size + at]),
                items=int(has.sum()),
            )
    return found


# -- items ---------------------------------------------------------------------------------------------------


def _risen(before: Counts, after: Counts, floors: Floats, alpha: float) -> list[int]:
    """Items right more often after than before, and after more often than guessing, at false discovery rate alpha."""
    logs = _log_factorials(before, after)
    cases, which = np.unique(np.column_stack([*before, *after, floors]), axis=0, return_inverse=True)
    p_cases = [
        _p_rise(int(n), int(c), int(n_after), int(c_after), floor, logs)
        for n, c, n_after, c_after, floor in cases.tolist()
    ]
    p_values = np.array(p_cases)[which.ravel()]
    order = np.argsort(p_values, kind="stable")
    passing = np.flatnonzero(p_values[order] <= alpha * np.arange(1, len(order) + 1) / len(order))
    return sorted(order[: passing[-1] + 1].tolist()) if passing.size else []


def _p_rise(n: int, c: int, n_after: int, c_after: int, floor: float, logs: Floats) -> float:
    """p-value of "right no more often than before, or than guessing": the larger of both tests' (Berger 1982)."""
    # Fisher: given their total, the right samples are dealt out over the two measurements.
    dealt = np.arange(c_after, min(n_after, c + c_after) + 1)
    rest = c + c_after - dealt
    mass = _log_choose(n_after, dealt, logs) + _log_choose(n, rest, logs)
    risen = np.exp(mass - _log_choose(n + n_after, c + c_after, logs)).sum()
    return float(max(risen, _p_guessed(n_after, c_after, floor, logs)))


def _p_guessed(n: int, c: int, floor: float, logs: Floats) -> float:
    """P(at least c of n guesses are right)."""
    if c == 0 or floor == 1:
        return 1.0
    if floor == 0:
        return 0.0
    hits = np.arange(c, n + 1)
    return float(np.exp(_log_choose(n, hits, logs) + hits * math.log(floor) + (n - hits) * math.log1p(-floor)).sum())


def _crossings(before: Counts, after: Counts) -> Crossings:
    """Items never right before and right after."""
    logs = _log_factorials(before, after)
    (n, c), (n_after, c_after) = before, after
    total = c + c_after
    may = (total > 0) & (total <= n_after)
    chances = np.exp(_log_choose(n_after[may], total[may], logs) - _log_choose(n[may] + n_after[may], total[may], logs))
    count = int(((c == 0) & (c_after > 0)).sum())
    return Crossings(count, float(chances.sum()), _at_least(chances, count))


def _at_least(chances: Floats, count: int) -> float:
    """P(at least `count` of independent events) by adding one event after the other (Poisson binomial)."""
    if count == 0:
        return 1.0
    fewer = np.zeros(count)  # fewer[j]: exactly j so far
    fewer[0] = 1.0
    reached = 0.0
    for chance in chances.tolist():
        reached += fewer[-1] * chance
        fewer[1:] = fewer[1:] * (1 - chance) + fewer[:-1] * chance
        fewer[0] *= 1 - chance
    return min(1.0, reached)


def _log_factorials(before: Counts, after: Counts) -> Floats:
    return np.r_[0.0, np.cumsum(np.log(np.arange(1, int((before[0] + after[0]).max()) + 1)))]


def _log_choose(n: Integers | int, k: Integers | int, logs: Floats) -> Floats:
    chosen: Floats = logs[n] - logs[k] - logs[n - k]
    return chosen


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
