"""Bootstrap intervals for means and ratios of per-item values between known bounds. It knows nothing of
verdicts.

Clusters are reweighted as in the Bayesian bootstrap (Rubin 1981): each gets an exponential weight. Beside the
observed clusters stands one that was *not* observed, at the worst value for the end that is computed: the
lowest possible one for the low end, the highest possible one for the high end. Without it, eight items that
are all wrong would have an interval of no width. For independent items this is the bound of Learned-Miller
and Thomas (arXiv 1905.06208), and for plain proportions the Clopper-Pearson interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Intervals:
    """Estimates with the two ends of their intervals, float64 [J] each."""

    value: Floats
    low: Floats
    high: Floats


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    bounds: tuple[ArrayLike, ArrayLike],
    clusters: Sequence[str],
    alpha: float,
    replicates: int,
    seed: int,
) -> Intervals:
    """Estimate ``sum_i numerator_ij / sum_i denominator_ij`` for each column j, with an interval.

    Each end is missed with probability at most about `alpha`: the interval is two-sided at ``1 - 2 alpha``.

    Args:
        numerator: float [items, J].
        denominator: float [items, J] or broadcastable to it, at least 0 and with a positive sum per column.
        bounds: lowest and highest possible numerator of an item with the mean denominator, scalars or [J].
        clusters: cluster of each item; the items of a cluster are reweighted together.
        alpha: error probability of each end, above 0 and below 0.5.
        replicates: number of bootstrap replicates.
        seed: the result is a function of the arguments and this.

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
    labels, cluster_of = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
    top_sums = _sum_by(cluster_of, labels.size, top)
    bottom_sums = _sum_by(cluster_of, labels.size, bottom)
    # The unobserved cluster has as many items as an observed one has on average, with the mean denominator.
    mean_size = items / labels.size
    unseen_bottom = mean_size * bottom.mean(axis=0)
    unseen_low, unseen_high = (mean_size * np.broadcast_to(np.asarray(b, dtype=np.float64), columns) for b in bounds)

    generator = np.random.default_rng(seed)
    low = np.empty((replicates, columns))
    high = np.empty((replicates, columns))
    chunk = max(1, _CHUNK_BYTES // (8 * (labels.size + 1)))
    for start in range(0, replicates, chunk):
        rows = slice(start, min(start + chunk, replicates))
        # One stream of rows, so that the size of the chunks doesn't change what is drawn.
        weights = generator.standard_exponential((rows.stop - rows.start, labels.size + 1))
        observed, unseen = weights[:, :-1], weights[:, -1:]
        total = observed @ bottom_sums + unseen * unseen_bottom
        reached = observed @ top_sums
        low[rows] = (reached + unseen * unseen_low) / total
        high[rows] = (reached + unseen * unseen_high) / total
    return Intervals(
        value=top.sum(axis=0) / bottom.sum(axis=0),
        low=np.quantile(low, alpha, axis=0),
        high=np.quantile(high, 1 - alpha, axis=0),
    )


def _sum_by(cluster_of: NDArray[np.intp], n_clusters: int, values: Floats) -> Floats:
    sums = np.zeros((n_clusters, values.shape[1]))
    np.add.at(sums, cluster_of, values)
    return sums
