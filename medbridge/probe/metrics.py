"""Scores of a classifier with intervals: accuracy, balanced accuracy, and area under the ROC curve.

Intervals are those of the Bayesian bootstrap (Rubin 1981): every cluster of test units gets an exponential weight that
all its units share; a unit that depends on no other is a cluster of its own. Beside what was seen stands one more
cluster of each label, at its worst for the end that is computed; without it, units that are all right would have an
interval of no width (as in `medbridge.support.intervals`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medbridge.support.estimate import Measured

Floats = NDArray[np.float64]
Ends = tuple[Floats, Floats, Floats]
"""A score under weights of one: [1], and its lowest and highest under each row of drawn weights: [replicates] each."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one classifier.

    Attributes:
        accuracy: share of units that are right.
        balanced_accuracy: mean over the labels of the test units of the share that is right.
        auc: mean over labels, each against all others, of the area under the ROC curve; None where no label has test
            units on both sides.
    """

    accuracy: Measured
    balanced_accuracy: Measured
    auc: Measured | None


@dataclass(frozen=True, slots=True)
class Scored:
    """True and predicted labels [units], the classifier's labels, its probabilities [units, labels], and the cluster of
    each unit [units], numbered from 0; None: each is one of its own.
    """

    truth: NDArray[np.str_]
    predicted: NDArray[np.str_]
    classes: tuple[str, ...]
    probabilities: Floats
    clusters: NDArray[np.int64] | None = None


def score(found: Scored, *, alpha: float, replicates: int, seed: int) -> Scores:
    """The scores; each end of an interval is missed with probability about `alpha`."""
    generator = np.random.default_rng(seed)
    clusters = np.arange(len(found.truth)) if found.clusters is None else found.clusters
    drawn = generator.exponential(size=(replicates, clusters.max(initial=-1) + 1))
    weights = drawn[:, clusters]
    hits = (found.truth == found.predicted).astype(np.float64)
    labels = np.unique(found.truth)
    size = weights.shape[1] / max(1, drawn.shape[1])  # of a cluster, on average
    unseen = size * generator.exponential(size=(replicates, 2 * len(labels)))
    recalls = [
        _mean(hits[found.truth == label], weights[:, found.truth == label], unseen[:, index])
        for index, label in enumerate(labels)
    ]
    areas = [
        _area(found.probabilities[:, found.classes.index(label)], found.truth == label, weights, unseen[:, 2 * index :])
        for index, label in enumerate(labels)
        if label in found.classes and len(labels) > 1
    ]
    return Scores(
        accuracy=_interval([_mean(hits, weights, unseen[:, 0])], alpha),
        balanced_accuracy=_interval(recalls, alpha),
        auc=_interval(areas, alpha) if areas else None,
    )


def area(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Area under the ROC curve of scores [units] under each row of weights [rows, units]; ties count a half."""
    above, below = weights[:, positive].sum(1), weights[:, ~positive].sum(1)
    return _wins(scores, positive, weights) / (above * below)


def _wins(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Weight of the pairs in which the positive unit has the higher score."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    above = np.add.reduceat(np.where(positive[order], weights[:, order], 0.0), starts, axis=1)
    below = np.add.reduceat(np.where(positive[order], 0.0, weights[:, order]), starts, axis=1)
    before = np.cumsum(below, axis=1) - below
    found: Floats = (above * (before + 0.5 * below)).sum(1)
    return found


def _mean(values: Floats, weights: Floats, unseen: Floats) -> Ends:
    top, total = weights @ values, weights.sum(1) + unseen
    return np.array([values.mean()]), top / total, (top + unseen) / total


def _area(scores: Floats, positive: NDArray[np.bool_], weights: Floats, unseen: Floats) -> Ends:
    """With a positive and a negative unit unseen: both lose all pairs that they are in, or both win them."""
    one, other = unseen[:, 0], unseen[:, 1]
    wins = _wins(scores, positive, weights)
    above, below = weights[:, positive].sum(1), weights[:, ~positive].sum(1)
    total = (above + one) * (below + other)
    value = area(scores, positive, np.ones((1, len(scores))))
    return value, wins / total, (wins + total - above * below) / total


def _interval(parts: list[Ends], alpha: float) -> Measured:
    """Of the mean of scores."""
    value, low, high = (np.mean([part[end] for part in parts], axis=0) for end in range(3))
    return Measured(float(value[0]), float(np.quantile(low, alpha)), min(1.0, float(np.quantile(high, 1 - alpha))))


def words(interval: Measured | None) -> str:
    """As a table shows it."""
    return "-" if interval is None else f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
