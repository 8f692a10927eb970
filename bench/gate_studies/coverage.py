"""Study: how often each end of every interval of the project misses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gate_studies.candidates import FEW_OPTIONS
from gate_studies.gate import ALPHA, REPLICATES, SETTINGS, Scores, bootstrap, candidates, chosen, ends, point, raw_pass
from gate_studies.running import Plan, mean, spread, table
from gate_studies.truths import Counts, Floats, Truth, Unskilled, draw, draw_items
from medbridge.support import Tally, item_scores
from medbridge.support.bootstrap import bootstrap_curve
from medbridge.support.change import compare
from medbridge.support.forecast import forecast_accuracy
from medbridge.support.sequential import log_e_values
from medbridge.support.spectra import DEFAULT_MARGIN, cover_interval, spectrum
from medbridge.support.strata import pool

Misses = tuple[float, float, float]
"""How often the truth is below the low end, how often above the high end, and the mean width of the interval."""


def _misses(low: Floats, high: Floats, value: ArrayLike) -> Misses:
    return float((low > value).mean()), float((high < value).mean()), float((high - low).mean())


def _column(scores: Scores, truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    low, high = bootstrap(draw(truth, runs, generator), scores, generator, REPLICATES, ends)
    return _misses(low[:, 0], high[:, 0], scores.truth(truth)[0])


def _reached(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    return _column(chosen(truth), truth, runs, generator)


def _pass(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    return _column(candidates(truth.floors, truth.n).of("pass, room 0.25"), truth, runs, generator)


def _pass_at(k: int, truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    return _column(raw_pass(truth).of(f"Pass@{k}"), truth, runs, generator)


def _acc_at_1(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    # The greedy answer is one draw per item.
    return _pass_at(1, replace(truth, n=1), runs, generator)


def _sequence(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    """An end of the confidence sequence ever passes the mean exactly when the test at the mean ever rejects."""
    scores, (counts, _) = chosen(truth), draw_items(truth, runs, generator)
    values = scores.top[:, 0][counts].mean(axis=2)
    above, below = log_e_values(values, scores.low.item(), scores.high.item(), (scores.truth(truth) * scores.unseen)[0])
    enough = -math.log(ALPHA)
    return float((above >= enough).any(axis=1).mean()), float((below >= enough).any(axis=1).mean()), math.nan


def _sequence_finite(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    """The same for the mean of a finite pool, all of which is drawn in the end."""
    scores, (counts, _) = chosen(truth), draw_items(truth, runs, generator)
    values = scores.top[:, 0][counts].mean(axis=2)
    above, below = log_e_values(
        values, scores.low.item(), scores.high.item(), values.mean(axis=1), population=values.shape[1]
    )
    enough = -math.log(ALPHA)
    return float((above >= enough).any(axis=1).mean()), float((below >= enough).any(axis=1).mean()), math.nan


POOLED_STRATA = 8


def _pooled(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    """Eight strata whose shares of skilled items spread evenly by 0.15 around pi; misses are means over the strata."""
    shares = np.clip(truth.pi + np.linspace(-0.15, 0.15, POOLED_STRATA), 0, 1)
    scores, z = chosen(truth), -NormalDist().inv_cdf(ALPHA)
    values, errors = np.empty((2, runs, POOLED_STRATA))
    truths = [replace(truth, pi=float(pi)) for pi in shares]
    for j, own in enumerate(truths):
        sample = draw(own, runs, generator)
        low, high = bootstrap(sample, scores, generator, REPLICATES, ends)
        # The gate's standard error: that of the normal interval as wide as the one given.
        errors[:, j] = ((high - low) / (2 * z))[:, 0]
        values[:, j] = point(sample, scores)[:, 0]
    pooled = [pool(value, error, ALPHA) for value, error in zip(values, errors, strict=True)]
    target = np.array([scores.truth(own)[0] for own in truths])
    return _misses(np.array([p.low for p in pooled]), np.array([p.high for p in pooled]), target)


def _cover(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    (floor,) = truth.floors
    low, high = np.empty((2, runs))
    for run in range(runs):
        counts, _ = draw_items(truth, 1, generator)
        c, n = counts.ravel(), np.full(truth.items, truth.n)
        found = cover_interval(
            n, c, np.full(truth.items, floor), spectrum(n, c, np.full(truth.items, floor)), clusters=_clusters(truth),
            alpha=ALPHA, seed=run,
        )  # fmt: skip
        low[run], high[run] = found.low[0], found.high[0]
    least = floor + DEFAULT_MARGIN * (1 - floor)
    share = sum(
        weight * chance
        for weight, skilled in ((truth.pi, True), (1 - truth.pi, False))
        for p, chance in truth.chances(floor, skilled)
        if p >= least - 1e-9
    )
    return _misses(low, high, share)


def _clusters(truth: Truth) -> list[str]:
    return [str(i // truth.size) for i in range(truth.items)]


LOST, GAINED = 0.1, 0.25
"""Between two measurements, each skilled item loses its skill and each other item finds it with these chances."""


def _change(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    """Change of support between two measurements of the same items."""
    (floor,) = truth.floors
    skilled_p = floor + (1 - floor) * truth.skill
    guesses, shares = zip(*truth.chances(floor, False), strict=True)
    low, high = np.empty((2, runs))

    def scores(tallies: Sequence[Tally]) -> tuple[ArrayLike, ArrayLike]:
        found = item_scores(tallies, SETTINGS, truth.n)
        return found.top, found.bottom

    for run in range(runs):
        luck = generator.choice(guesses, p=shares, size=truth.items)
        was = generator.random(truth.items) < truth.pi
        now = np.where(was, generator.random(truth.items) >= LOST, generator.random(truth.items) < GAINED)
        before, after = (
            [
                Tally(str(i), cluster, floor, truth.n, int(c))
                for i, (cluster, c) in enumerate(
                    zip(_clusters(truth), generator.binomial(truth.n, np.where(has, skilled_p, luck)), strict=True)
                )
            ]
            for has in (was, now)
        )
        found = compare(before, after, scores=scores, ks=[1], alpha=ALPHA, replicates=REPLICATES, seed=run).support
        low[run], high[run] = found.low, found.high
    later = truth.pi * (1 - LOST) + (1 - truth.pi) * GAINED
    of = chosen(truth)
    return _misses(low, high, float((of.truth(replace(truth, pi=later)) - of.truth(truth))[0]))


def _curve(method: str, truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    """Pass@4 from the bootstrap of the whole curve."""
    low, high = np.empty((2, runs))
    for run in range(runs):
        counts, _ = draw_items(truth, 1, generator)
        found = bootstrap_curve(
            np.full(truth.items, truth.n), counts.ravel(), [4], groups=np.arange(truth.items) // truth.size,
            replicates=1000, seed=run, confidence=1 - 2 * ALPHA,
        )  # fmt: skip
        low[run], high[run] = getattr(found, f"{method}_low")[0], getattr(found, f"{method}_high")[0]
    return _misses(low, high, raw_pass(truth).of("Pass@4").truth(truth)[0])


def _forecast(truth: Truth, runs: int, generator: np.random.Generator) -> Misses:
    """Acc@1 after sharpening, when RL does what the forecast assumes: it makes each item's majority answer certain."""
    (floor,) = truth.floors
    low, high = np.empty((2, runs))
    for run in range(runs):
        tallies = [
            Tally(str(i), cluster, floor, truth.n, int(votes[0]), votes={str(j): int(v) for j, v in enumerate(votes)})
            for i, (cluster, votes) in enumerate(zip(_clusters(truth), _votes(truth, generator), strict=True))
        ]
        found = forecast_accuracy(tallies, alpha=ALPHA, seed=run)
        low[run], high[run] = found.low, found.high
    # The right answer of a skilled item is its most frequent; without skill it is with the chance of a guess.
    lucky = 0.0 if truth.unskilled in ("wrong", "faint") else floor
    return _misses(low, high, truth.pi + (1 - truth.pi) * lucky)


OPEN_WRONG = 4
"""Wrong answers that the skilled items of open questions scatter over."""


def _votes(truth: Truth, generator: np.random.Generator) -> Counts:
    """Votes of each answer, the right one first, [items, answers]: skilled items and fresh guesses scatter their wrong
    answers evenly, the others give one answer always.
    """
    (floor,), wrong = truth.floors, (truth.options[0] or OPEN_WRONG + 1) - 1
    skilled = generator.random(truth.items) < truth.pi
    p = floor + (1 - floor) * np.where(skilled, truth.skill, 0.0)
    scattered = np.column_stack([p, np.repeat(((1 - p) / wrong)[:, None], wrong, axis=1)])
    if truth.unskilled == "fresh":
        law = scattered
    else:
        answer = np.where(generator.random(truth.items) < (floor if truth.unskilled == "repeat" else 0.0), 0, 1)
        law = np.where(skilled[:, None], scattered, np.eye(wrong + 1)[answer])
    return generator.multinomial(truth.n, law)


@dataclass(frozen=True)
class Interval:
    """An interval of the project under test.

    Attributes:
        name: as the table says it.
        misses: simulates it.
        price: runs are divided by this; above 1 for what can't be simulated many data sets at a time.
        clusters: whether it is tried on clusters of 4, too.
    """

    name: str
    misses: Callable[[Truth, int, np.random.Generator], Misses]
    price: int = 1
    clusters: bool = True


INTERVALS = (
    Interval("support, reached at k = n", _reached),
    Interval("support, pass at room 0.25", _pass),
    Interval("Pass@1", partial(_pass_at, 1)),
    Interval("Pass@4", partial(_pass_at, 4)),
    Interval("Pass@16", partial(_pass_at, 16)),
    Interval("Acc@1", _acc_at_1),
    Interval("confidence sequence, ever", _sequence),
    Interval("confidence sequence of a finite pool, ever", _sequence_finite),
    Interval("pooled strata, mean over strata", _pooled, price=2),
    Interval("change of support, paired", _change, price=4, clusters=False),
    Interval("cover, margin 0.1", _cover, price=16),
    Interval("forecast of Acc@1", _forecast, price=16, clusters=False),
    Interval("Pass@4, bootstrap_curve, percentile", partial(_curve, "percentile"), price=2),
    Interval("Pass@4, bootstrap_curve, BCa", partial(_curve, "bca"), price=2),
)


def _coverage_cell(runs: int, cell: tuple[int, Truth], generator: np.random.Generator) -> Misses:
    which, truth = cell
    interval = INTERVALS[which]
    return interval.misses(truth, max(10, runs // interval.price), generator)


def run_coverage(plan: Plan) -> dict[str, Any]:
    """How often each end of every interval misses; nominal is alpha at each end."""
    runs = plan.runs_or(800)
    cells = []
    for which, interval in enumerate(INTERVALS):
        dear = interval.price > 1
        for m, s, pi, (items, size) in itertools.product(
            FEW_OPTIONS, (0.6,) if dear else (0.3, 0.9), (0.1, 0.5, 0.9), ((20, 1), (200, 1), (200, 4))
        ):
            if (size == 1 or interval.clusters) and not (dear and pi == 0.9 and size == 4):
                kind: Unskilled = "repeat" if m[0] else "wrong"
                cells += [(which, Truth(pi, s, m, kind, items, size=size, correlation=0.5 * (size > 1)))]
                if m[0] and not dear:
                    cells += [(which, replace(cells[-1][1], unskilled="fresh"))]
    if plan.quick:
        cells = cells[::12]
    misses = spread(partial(_coverage_cell, runs), cells, plan, "coverage")
    found = [(INTERVALS[which], truth, miss) for (which, truth), miss in zip(cells, misses, strict=True)]
    return {
        "runs": runs,
        "intervals": [
            {
                "interval": interval.name,
                "runs": max(10, runs // interval.price),
                "items": items,
                "size": size,
                "truths": len(part),
                "low_mean": mean(low for low, _, _ in part),
                "low_worst": round(max(low for low, _, _ in part), 4),
                "high_mean": mean(high for _, high, _ in part),
                "high_worst": round(max(high for _, high, _ in part), 4),
                "width": mean(width for _, _, width in part),
            }
            for interval in INTERVALS
            for items, size in ((20, 1), (200, 1), (200, 4))
            if (part := [m for i, t, m in found if i == interval and (t.items, t.size) == (items, size)])
        ],
    }


def render_coverage(figures: dict[str, Any]) -> dict[str, str]:
    """Table `coverage`."""
    keys = ("truths", "runs", "low_mean", "low_worst", "high_mean", "high_worst", "width")
    return {
        "coverage": table(
            [
                "interval", "items, items per image", "truths", "runs each", "low end misses, mean", "worst",
                "high end misses, mean", "worst", "mean width",
            ],
            [
                [row["interval"], f"{row['items']}, {row['size']}", *(row[key] for key in keys)]
                for row in figures["intervals"]
            ],
        )
    }  # fmt: skip
