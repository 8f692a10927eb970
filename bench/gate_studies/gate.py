"""What the gate could read, the interval around it, and the verdicts that follow, over many data sets at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.stats import binom

from gate_studies.truths import Floats, Sample, Truth, draw
from medbridge.support import GateSettings, guessing_floor, largest_informative_k, pass_at_k
from medbridge.support.passk import reached_at_k

SETTINGS = GateSettings()
TAU, ALPHA, ACCURACY_TARGET = SETTINGS.support_threshold, SETTINGS.alpha, SETTINGS.accuracy_target

REPLICATES = 300
"""Bootstrap replicates per interval. The gate takes 2,000; fewer make its ends noisier, and move no error rate by more
than the Monte Carlo error (table `threshold-replicates`)."""

_CHUNK_BYTES = 48 << 20


@dataclass(frozen=True)
class Scores:
    """Statistics of the form sum(numerator) / sum(denominator), one per column, per category of item.

    `low` and `high` are the bounds of the numerator of the unobserved item, `unseen` its denominator
    (medbridge.support.intervals).
    """

    names: tuple[str, ...]
    top: Floats
    bottom: Floats
    low: Floats
    high: Floats
    unseen: Floats

    def of(self, name: str) -> Scores:
        """One column alone."""
        j = self.names.index(name)
        at = slice(j, j + 1)
        return Scores((name,), self.top[:, at], self.bottom[:, at], self.low[at], self.high[at], self.unseen[at])

    def truth(self, truth: Truth) -> Floats:
        """The value of each column in the population, its estimand."""
        return truth.pi * self.part(truth, True) + (1 - truth.pi) * self.part(truth, False)

    def part(self, truth: Truth, skilled: bool) -> Floats:
        """The estimand when all items are skilled, or none."""
        law = truth.correct(skilled).ravel()
        return (law @ self.top) / (law @ self.bottom)


def _above(values: Sequence[Floats], guesses: Sequence[Floats], names: Iterable[str]) -> Scores:
    """Columns (value - guess) / (1 - guess); values [types, n + 1] and guesses [types] per column."""
    per_type = values[0].shape[1]
    top = np.stack([(v - g[:, None]).ravel() for v, g in zip(values, guesses, strict=True)], axis=1)
    bottom = np.stack([np.repeat(1 - g, per_type) for g in guesses], axis=1)
    floor = np.array([g.mean() for g in guesses])
    return Scores(tuple(names), top, bottom, -floor, 1 - floor, 1 - floor)


ROOMS = (0.05, 0.1, 0.25, 0.5)


@lru_cache(maxsize=256)
def candidates(floors: tuple[float, ...], n: int) -> Scores:
    """The candidates that are sums over items: Pass@k above the floor at k by room, accuracy, and `reached` at k."""
    f = np.array(floors)
    counts, all_n = np.arange(n + 1), np.full(n + 1, n)
    names, values, guesses = [], [], []
    for room in ROOMS:
        k = largest_informative_k(f, range(1, n + 1), room) or 1
        names.append(f"pass, room {room:g}")
        values.append(np.tile(pass_at_k(all_n, counts, np.array([k]))[:, 0], (f.size, 1)))
        guesses.append(guessing_floor(f, [k])[:, 0])
    for k in [k for k in (1, 2, 4, 8) if k < n] + [n]:
        names.append("accuracy (k = 1)" if k == 1 else f"reached, k = {'n' if k == n else k}")
        values.append(np.stack([reached_at_k(all_n, counts, np.array([k]), np.full(n + 1, g))[:, 0] for g in floors]))
        guesses.append(f)
    return _above(values, guesses, names)


CHOSEN = "reached, k = n"


def chosen(truth: Truth) -> Scores:
    """The statistic that the gate reads."""
    return candidates(truth.floors, truth.n).of(CHOSEN)


def raw_pass(truth: Truth) -> Scores:
    """Pass@k itself at k = 1, 4 and n, without a floor."""
    ks = sorted({1, min(4, truth.n), truth.n})
    counts = np.arange(truth.n + 1)
    top = np.tile(pass_at_k(np.full(truth.n + 1, truth.n), counts, np.array(ks)), (len(truth.options), 1))
    one = np.ones(len(ks))
    return Scores(tuple(f"Pass@{k}" for k in ks), top, np.ones_like(top), 0 * one, one, one)


def bootstrap(
    sample: Sample,
    scores: Scores,
    generator: np.random.Generator,
    replicates: int,
    reduce: Callable[[Floats, Floats], tuple[Floats, Floats]],
) -> tuple[Floats, Floats]:
    """medbridge.support.intervals over many data sets at once. `reduce` gets the replicates with the unobserved
    cluster at its lowest and at its highest, [runs, replicates, J] each, and returns two arrays [runs, J].
    """
    counts = sample.histogram if sample.histogram is not None else sample.categories
    assert counts is not None
    chunk = max(1, _CHUNK_BYTES // (8 * replicates * (counts.shape[1] + 3 * len(scores.names))))
    parts = []
    for start in range(0, len(counts), chunk):
        part = counts[start : start + chunk]
        if sample.histogram is not None:
            size, top, bottom = 1, scores.top, scores.bottom
            shape = np.broadcast_to(part[:, None, :].astype(np.float64), (len(part), replicates, part.shape[1]))
            weights = generator.standard_gamma(shape)
        else:
            size = part.shape[2]
            top, bottom = scores.top[part].sum(axis=2), scores.bottom[part].sum(axis=2)
            weights = generator.standard_exponential((len(part), replicates, part.shape[1]))
        unseen = size * generator.standard_exponential((len(part), replicates, 1))
        reached, total = weights @ top, weights @ bottom + unseen * scores.unseen
        parts.append(reduce((reached + unseen * scores.low) / total, (reached + unseen * scores.high) / total))
    return np.concatenate([first for first, _ in parts]), np.concatenate([second for _, second in parts])


def ends(low: Floats, high: Floats, alpha: float = ALPHA) -> tuple[Floats, Floats]:
    """The interval: the order statistics of the replicates (axis 1) at which the p-value passes alpha."""
    rank = math.floor(alpha * (low.shape[1] + 1) + 1e-9)
    return np.partition(low, rank - 1, axis=1)[:, rank - 1], np.partition(high, -rank, axis=1)[:, -rank]


def p_values(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Of the truth being at or above TAU, and at or below."""
    most = low.shape[1] + 1
    return (1 + (high >= TAU).sum(axis=1)) / most, (1 + (low <= TAU).sum(axis=1)) / most


def point(sample: Sample, scores: Scores) -> Floats:
    """The estimates, [runs, J]."""
    if sample.histogram is not None:
        return (sample.histogram @ scores.top) / (sample.histogram @ scores.bottom)
    assert sample.categories is not None
    return scores.top[sample.categories].sum(axis=(1, 2)) / scores.bottom[sample.categories].sum(axis=(1, 2))


def verdict_rates(
    truth: Truth, scores: Scores, runs: int, generator: np.random.Generator, replicates: int = REPLICATES
) -> tuple[Floats, Floats]:
    """P(bridge) and P(sharpen side) per column."""
    low, high = bootstrap(draw(truth, runs, generator), scores, generator, replicates, ends)
    return (high < TAU).mean(axis=0), (low > TAU).mean(axis=0)


def at_threshold(truth: Truth, scores: Scores) -> Truth | None:
    """The truth with the share of skilled items at which the one column of `scores` is exactly TAU; None without."""
    skilled, unskilled = float(scores.part(truth, True)[0]), float(scores.part(truth, False)[0])
    if not unskilled <= TAU <= skilled or skilled - unskilled < 1e-9:
        return None
    return replace(truth, pi=(TAU - unskilled) / (skilled - unskilled))


MARGINS = (0.1, 0.2)
COVER_GRID = np.linspace(0, 1, 41)
EM_STEPS = 200
COVER_REPLICATES = 100


def em_cover(histogram: Floats, n: int, floor: float) -> Floats:
    """Cover at each margin, [..., margins], from the nonparametric maximum-likelihood distribution of p.

    Plain EM on a grid, cut after EM_STEPS from a uniform start. An item counts when ``p > f + margin (1 - f)``.
    """
    likelihood = binom.pmf(np.arange(n + 1)[:, None], n, COVER_GRID)
    shares = np.full((*histogram.shape[:-1], COVER_GRID.size), 1 / COVER_GRID.size)
    total = histogram.sum(axis=-1, keepdims=True)
    for _ in range(EM_STEPS):
        shares *= (histogram / np.maximum(shares @ likelihood.T, 1e-300)) @ likelihood / total
    return np.stack([shares @ (floor + margin * (1 - floor) + 1e-9 < COVER_GRID) for margin in MARGINS], axis=-1)


def cover_rates(truth: Truth, runs: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """P(bridge) and P(sharpen side) per margin, by the same bootstrap: the unobserved item is never or always right."""
    histogram = draw(truth, runs, generator).histogram
    assert histogram is not None
    shape = np.broadcast_to(histogram[:, None, :].astype(np.float64), (runs, COVER_REPLICATES, truth.n + 1))
    weights = generator.standard_gamma(shape)
    unseen = generator.standard_exponential((runs, COVER_REPLICATES))
    never, always = weights.copy(), weights
    never[..., 0] += unseen
    always[..., -1] += unseen
    (floor,) = truth.floors
    low, high = ends(em_cover(never, truth.n, floor), em_cover(always, truth.n, floor))
    return (high < TAU).mean(axis=0), (low > TAU).mean(axis=0)
