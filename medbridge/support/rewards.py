"""The best of k real-valued rewards, and the weights that train for it: documented faces of the C++ extension.

Rewards come as [items, n], or flat with ``offsets`` where items differ in n: item i's are
``rewards[offsets[i]:offsets[i + 1]]``. With rewards of 0 and 1 the maximum over k is Pass@k. Nothing here trains.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge import _native


def max_at_k(rewards: ArrayLike, ks: ArrayLike, offsets: ArrayLike | None = None) -> NDArray[np.float64]:
    """Expected maximum of k rewards drawn without replacement from an item's n.

    ``sum_i C(i-1, k-1) / C(n, k) g_i`` over the rewards sorted ascending, ``g_1 <= .. <= g_n`` (arXiv 2505.15201,
    equation 12).

    Args:
        rewards: float or integer dtype, [items, n], or flat [total] with offsets; finite, of magnitude at most 1e300.
        ks: the values of k, any integer dtype, shape [K], each at least 1, in any order.
        offsets: where each item's rewards start, any integer dtype, [items + 1], from 0 to total; None for [items, n].

    Returns:
        float64 [items, K], NaN where k > n. The error is below 1e-13 of the largest magnitude among the item's rewards;
        as for all functions of this file the bits don't depend on the number of threads.

    Raises:
        ValueError: a wrong dtype, shape or value; the message names the first bad index and what it holds.
    """
    return _native.max_at_k(rewards, ks, offsets)


def pass_at_k_weights(
    rewards: ArrayLike,
    k: int,
    baseline: Literal["none", "loo", "loo_minus_one"] = "none",
    offsets: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """PKPO's weight of each sample (arXiv 2505.15201): ``sum_i s_i grad log p(sample i)`` is unbiased for the gradient
    of the expected maximum of k samples, under each baseline.

    With J a uniformly random set of k - 1 of the item's other samples:

    - ``none``: ``s_i = (k/n) E[max({g_i} u J)]`` (equation 19);
    - ``loo``: ``(k/n) (E[max({g_i} u J)] - E[max over k of the others])``. The paper's equation 29 scales the second
      term by k/(n-1) instead, which is unbiased too but gives equal rewards weights other than 0;
    - ``loo_minus_one``: ``(k/n) E[max({g_i} u J) - max J]`` (equation 33), never negative; of least variance in
      the paper's experiments.

    Samples with equal rewards get the same bits; all-equal rewards get exactly 0 under both baselines.
    O(n log n) per item.

    Args:
        rewards, offsets: as for :func:`max_at_k`.
        k: samples of which the best counts, at least 1, and at least 2 under ``loo_minus_one``.
        baseline: what is subtracted.

    Returns:
        float64 of the shape of rewards; NaN for items with n < k, and under ``loo`` for n = k, where it is undefined.

    Raises:
        ValueError: as for :func:`max_at_k`, and for a bad k or baseline.
    """
    return _native.pass_at_k_weights(rewards, k, baseline, offsets)


def pass_at_k_advantages(rewards: ArrayLike, k: int, offsets: ArrayLike | None = None) -> NDArray[np.float64]:
    """Analytical advantage of Pass@k training (arXiv 2508.10751, section 2.4), for real rewards.

    ``A_i = (E[max({g_i} u J)] - mean) / sd``, with J a uniformly random set of k - 1 of the item's other samples, and
    mean and standard deviation of the maximum over all k-subsets of the item's samples. With rewards of 0 and 1 it is
    the paper's form; with k = 1 it is GRPO's advantage, by the population's standard deviation.
    ``|A_i| <= sqrt((n-k)/k)``, and an item's advantages add up to 0.

    Args:
        rewards, offsets: as for :func:`max_at_k`.
        k: samples of which the best counts, at least 1.

    Returns:
        float64 of the shape of rewards; exactly 0 where sd is 0 (equal rewards, n = k), NaN for items with n < k.

    Raises:
        ValueError: as for :func:`max_at_k`, and for a bad k.
    """
    return _native.pass_at_k_advantages(rewards, k, offsets)
