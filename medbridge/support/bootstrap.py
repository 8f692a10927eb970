"""Bootstrap of the mean Pass@k curve over items or clusters: the documented face of the C++ extension.

It resamples what was measured and knows nothing of guessing. The gate's own interval, which also allows for
clusters that were not observed, stands in intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge import _native

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CurveIntervals:
    """A mean Pass@k curve with its bootstrap intervals, float64 [K] each.

    Attributes:
        value: the curve, as of :func:`~medbridge.support.tables.mean_curve` up to rounding.
        standard_error: standard deviation of the replicates (divisor replicates - 1); NaN for one replicate.
        percentile_low, percentile_high: quantiles of the replicates, interpolated as by `numpy.quantile`.
        bca_low, bca_high: the same at the probabilities corrected for bias and acceleration.
        replicates: the replicates of the curve, float64 [replicates, K]; None unless they were asked for.
    """

    value: Floats
    standard_error: Floats
    percentile_low: Floats
    percentile_high: Floats
    bca_low: Floats
    bca_high: Floats
    replicates: Floats | None


def bootstrap_curve(
    n: ArrayLike,
    c: ArrayLike,
    ks: ArrayLike,
    groups: ArrayLike | None = None,
    replicates: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    keep_replicates: bool = False,
) -> CurveIntervals:
    """Bootstrap the curve ``sum_i Pass@k(n_i, c_i) / items`` over items, or over clusters of items.

    Each replicate draws as many clusters as there are, with replacement, and takes the ratio of the sum of
    its items' Pass@k to the number of its items. The percentile interval is of Efron 1979; BCa is of Efron,
    "Better bootstrap confidence intervals" (JASA 1987): with z0 the normal quantile of the share of replicates
    below the value (ties counted half) and a the acceleration from the leave-one-cluster-out jackknife, an end
    at the normal quantile z is read at the probability ``Phi(z0 + (z0 + z) / (1 - a (z0 + z)))``.

    Where BCa is undefined, its ends are the percentile ends: all replicates on one side of the value (z0 is
    infinite; so it is with one replicate off the value), or ``1 - a (z0 + z) <= 0``. Where the jackknife has no
    spread, a is 0. With one cluster, or with items that are all alike, every replicate is the value, and both
    intervals have no width: a bootstrap can't see what was not sampled.

    Args:
        n, c, ks: as for :func:`~medbridge.support.tables.pass_at_k`.
        groups: cluster of each item (its image, its patient), integers or strings, shape [items]; None makes
            each item a cluster of its own.
        replicates: number of replicates, at least 1.
        seed: from 0 to 2^64 - 1. Replicate r is drawn from stream r of the counter-based generator
            Philox4x32-10 under this key, so that the bits don't depend on the number of threads. The draws
            depend on neither the order of the items nor the names of the clusters. Processors with and without
            AVX2 may differ in the last digit.
        confidence: of the two-sided intervals, above 0 and below 1.
        keep_replicates: return the replicates too.

    Returns:
        CurveIntervals; columns where some item has k > n are NaN, and so is everything when there are no items.

    Raises:
        ValueError: as for :func:`~medbridge.support.tables.pass_at_k`, and for groups of another length or of a
            dtype that is neither integer nor string, or a number out of its range.
    """
    labels = None if groups is None else _labels(groups)
    found = _native.bootstrap_curve(n, c, ks, labels, replicates, seed, confidence)
    return CurveIntervals(*found[:-1], replicates=found[-1] if keep_replicates else None)


def _labels(groups: ArrayLike) -> NDArray:
    """The groups as the extension reads them: strings as integers that stand for them."""
    labels = np.asarray(groups)
    if labels.dtype.kind not in "iuSUT" and labels.size:
        raise ValueError(
            f"groups must hold integers or strings, got dtype {labels.dtype} with groups[0] = {labels.flat[0]}"
        )
    if labels.ndim == 1 and (labels.dtype.kind in "SUT" or labels.dtype == np.uint64):
        return np.unique(labels, return_inverse=True)[1]
    return labels
