"""Bootstrap intervals for means and ratios of per-item values between known bounds. It knows nothing of
verdicts.

Clusters are reweighted as in the Bayesian bootstrap (Rubin 1981): each gets an exponential weight. Beside the
observed clusters stands one that was *not* observed, at the worst value for the end that is computed: the
lowest possible one for the low end, the highest possible one for the high end. Without it, eight items that
are all wrong would have an interval of no width. For independent items this is the bound of Learned-Miller
and Thomas (arXiv 1905.06208), and for plain proportions the Clopper-Pearson interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK_BYTES = 16 << 20

_GAMMA_PRICE = 4
"""Clusters are joined into kinds where there are this many times fewer: a gamma variate takes about 5 times as long
as an exponential one, which the smaller product with the sums outweighs."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Estimates with the two ends of their intervals, float64 [J] each.

    Attributes:
        value, low, high: the estimates and the two ends.
        p_below: one-sided p-value of the hypothesis that the truth is at or above what it is held `against`;
            NaN where it is held against nothing. It is at most alpha exactly where `high` is below.
        p_above: the same for at or below.
    """

    value: Floats
    low: Floats
    high: Floats
    p_below: Floats
    p_above: Floats


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    bounds: tuple[ArrayLike, ArrayLike],
    clusters: Sequence[str],
    alpha: float,
    replicates: int,
    seed: int,
    against: ArrayLike = math.nan,
) -> Intervals:
    """Estimate ``sum_i numerator_ij / sum_i denominator_ij`` for each column j, with an interval.

    Each end is missed with probability at most about `alpha`: the interval is two-sided at ``1 - 2 alpha``.
    The p-values invert the same ends: ``(1 + replicates on the wrong side) / (replicates + 1)``.

    Args:
        numerator: float [items, J].
        denominator: float [items, J] or broadcastable to it, at least 0 and with a positive sum per column.
        bounds: lowest and highest possible numerator of an item with the mean denominator, scalars or [J].
        clusters: cluster of each item; the items of a cluster are reweighted together.
        alpha: error probability of each end, above 0 and below 0.5.
        replicates: number of bootstrap replicates. Fewer than ``1 / alpha`` can exclude nothing: the ends are
            then the bounds.
        seed: the result is a function of the arguments and this.
        against: values to hold the estimates against, scalar or [J]; NaN for none.

    Returns:
        Intervals of shape [J].

    Raises:
        ValueError: no items, or lengths that differ.
    """
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.broadcast_to(np.asarray(denominator, dtype=np.float64), top.shape)
    items, columns = top.shape
    if items == 0:
        raise ValueError("no items: a mean needs at least one")
    if len(clusters) != items:
        raise ValueError(f"clusters has {len(clusters)} values for {items} items")
    sums, counts = _kinds(_cluster_sums(np.hstack([top, bottom]), clusters))
    n_clusters = int(counts.sum())
    # The unobserved cluster has as many items as an observed one has on average, with the mean denominator.
    mean_size = items / n_clusters
    unseen_bottom = mean_size * bottom.mean(axis=0)
    unseen_low, unseen_high = (mean_size * np.broadcast_to(np.asarray(b, dtype=np.float64), columns) for b in bounds)

    generator = np.random.default_rng(seed)
    shapes = np.r_[counts, 1.0]
    low = np.empty((replicates, columns))
    high = np.empty((replicates, columns))
    chunk = max(1, _CHUNK_BYTES // (8 * shapes.size))
    for start in range(0, replicates, chunk):
        rows = slice(start, min(start + chunk, replicates))
        # One stream of rows, so that the size of the chunks doesn't change what is drawn.
        size = (rows.stop - rows.start, shapes.size)
        # The weights of m equal clusters matter by their sum only, which is gamma distributed with shape m.
        weights = (
            generator.standard_exponential(size)
            if counts.size == n_clusters
            else generator.standard_gamma(shapes, size)
        )
        observed, unseen = weights[:, :-1] @ sums, weights[:, -1:]
        total = observed[:, columns:] + unseen * unseen_bottom
        low[rows] = (observed[:, :columns] + unseen * unseen_low) / total
        high[rows] = (observed[:, :columns] + unseen * unseen_high) / total

    target = np.broadcast_to(np.asarray(against, dtype=np.float64), columns)
    held = ~np.isnan(target)
    # An end is the order statistic at which the p-value passes alpha. Where even the outermost replicate is too
    # likely, nothing inside the bounds is excluded.
    rank = math.floor(alpha * (replicates + 1) + 1e-9)
    if rank:
        ends = np.partition(low, rank - 1, axis=0)[rank - 1], np.partition(high, -rank, axis=0)[-rank]
    else:
        ends = unseen_low / unseen_bottom, unseen_high / unseen_bottom
    return Intervals(
        value=top.sum(axis=0) / bottom.sum(axis=0),
        low=ends[0],
        high=ends[1],
        p_below=np.where(held, (1 + (high >= target).sum(axis=0)) / (replicates + 1), np.nan),
        p_above=np.where(held, (1 + (low <= target).sum(axis=0)) / (replicates + 1), np.nan),
    )


def _cluster_sums(values: Floats, clusters: Sequence[str]) -> Floats:
    """Sum of the rows of each cluster, float64 [clusters, columns], clusters in the order of their labels."""
    labels, cluster_of = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
    order = np.argsort(cluster_of, kind="stable")
    starts = np.searchsorted(cluster_of[order], np.arange(labels.size))
    sums: Floats = np.add.reduceat(values[order], starts, axis=0)
    return sums


def _kinds(sums: Floats) -> tuple[Floats, Floats]:
    """The different rows with how often each occurs; the rows as they are, once each, where joining doesn't pay."""
    exact = np.ascontiguousarray(sums + 0.0)  # + 0.0: one zero instead of two
    rows = exact.view(np.dtype((np.void, exact.dtype.itemsize * exact.shape[1]))).ravel()
    _, first, counts = np.unique(rows, return_index=True, return_counts=True)
    if _GAMMA_PRICE * first.size > len(sums):
        return sums, np.ones(len(sums))
    order = np.argsort(first)
    return sums[first[order]], counts[order].astype(np.float64)
