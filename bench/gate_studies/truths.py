"""What is simulated: populations of items, and the counts that a plan of so many items and samples sees of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


Unskilled = Literal["fresh", "repeat", "wrong", "faint"]


@dataclass(frozen=True)
class Truth:
    """A population of items, and the plan that samples it.

    Attributes:
        pi: share of items with skill.
        skill: strength s; a skilled item is answered correctly with probability ``f + (1 - f) s``.
        options: number of options of each type of item, 0 for open answers; types alternate over the items.
        unskilled: what a model does without skill. "fresh": guesses anew in each sample (p = f). "repeat": always
            gives the same random answer (p = 1 on a share f of the items, else 0). "wrong": always wrong (p = 0).
            "faint": right in 1 of 100 samples (for open answers).
        items, n: items measured and samples of each.
        size: items per cluster (image).
        correlation: of skill between two items of a cluster.
    """

    pi: float
    skill: float
    options: tuple[int, ...] = (4,)
    unskilled: Unskilled = "repeat"
    items: int = 200
    n: int = 16
    size: int = 1
    correlation: float = 0.0

    @property
    def floors(self) -> tuple[float, ...]:
        """The guessing floor of each type of item."""
        return tuple(1 / m if m else 0.0 for m in self.options)

    def chances(self, floor: float, skilled: bool) -> list[tuple[float, float]]:
        """(probability of a correct sample, share of such items) for items of one floor."""
        if skilled:
            return [(floor + (1 - floor) * self.skill, 1.0)]
        return {
            "fresh": [(floor, 1.0)],
            "repeat": [(1.0, floor), (0.0, 1 - floor)],
            "wrong": [(0.0, 1.0)],
            "faint": [(0.01, 1.0)],
        }[self.unskilled]

    def correct(self, skilled: bool) -> Floats:
        """Distribution of the number of correct samples, [types, n + 1]."""
        counts = np.arange(self.n + 1)
        return np.stack(
            [sum(w * binom.pmf(counts, self.n, p) for p, w in self.chances(f, skilled)) for f in self.floors]
        )


@dataclass(frozen=True)
class Sample:
    """Many simulated data sets. A category is (type of item, number correct), numbered type * (n + 1) + c.

    Independent items of one category are interchangeable: the sum of their exponential weights is one Gamma(count)
    weight, so that a data set is its histogram [runs, categories]. Clusters are kept: [runs, clusters, size].
    """

    histogram: Counts | None
    categories: Counts | None


def draw(truth: Truth, runs: int, generator: np.random.Generator) -> Sample:
    """Simulate data sets of one truth."""
    types = len(truth.options)
    skilled, unskilled = truth.correct(True), truth.correct(False)
    if truth.size == 1:
        mixture = truth.pi * skilled + (1 - truth.pi) * unskilled
        of_type = [len(range(i, truth.items, types)) for i in range(types)]
        parts = [generator.multinomial(m, law, size=runs) for m, law in zip(of_type, mixture, strict=True)]
        return Sample(np.concatenate(parts, axis=1), None)
    counts, _ = draw_items(truth, runs, generator)
    return Sample(None, counts + (truth.n + 1) * (np.arange(truth.size) % types))


def draw_items(truth: Truth, runs: int, generator: np.random.Generator) -> tuple[Counts, Mask]:
    """Correct samples of each item, and whether its greedy answer is correct (with the same probability as a sample);
    [runs, clusters, size] each.
    """
    shape = (runs, truth.items // truth.size, truth.size)
    # An item takes the draw of its cluster with probability sqrt(correlation): two do so together with `correlation`.
    own = generator.random(shape) < truth.pi
    shared = generator.random((*shape[:2], 1)) < truth.pi
    has_skill = np.where(generator.random(shape) < math.sqrt(truth.correlation), shared, own)
    p = np.empty(shape)
    for place in range(truth.size):
        floor = truth.floors[place % len(truth.floors)]
        (skilled, _), *_ = truth.chances(floor, True)
        kinds_of, shares = zip(*truth.chances(floor, False), strict=True)
        unskilled = generator.choice(kinds_of, p=shares, size=shape[:2])
        p[..., place] = np.where(has_skill[..., place], skilled, unskilled)
    return generator.binomial(truth.n, p), generator.random(shape) < p
