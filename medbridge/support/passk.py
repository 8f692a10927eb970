"""Pass@K of many items at once: the documented face of the C++ extension, which checks its own input.

It estimates from counts; it knows nothing of guessing (see floors) or of intervals (see intervals).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge import _native


def pass_at_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike) -> NDArray[np.float64]:
    """Unbiased Pass@k of each item at each k: ``1 - C(n - c, k) / C(n, k)``.

    The probability that at least one of k samples drawn without replacement from the item's n is correct,
    c of the n being correct (Chen et al., arXiv 2107.03374, equation 1).

    Args:
        n: samples per item, any integer dtype, shape [items]; items may differ. At most 2^31 - 1.
        c: correct samples per item, any integer dtype, shape [items], ``0 <= c <= n``.
        ks: the values of k, any integer dtype, shape [K], each at least 1, in any order.

    Returns:
        float64 [items, K], NaN where k > n (also for n = 0): the samples can't tell. The relative error is
        below 1e-15.

    Raises:
        ValueError: a wrong dtype, shape or value; the message names the first bad index and what it holds.
    """
    return _native.pass_at_k(n, c, ks)


def mean_curve(n: ArrayLike, c: ArrayLike, ks: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """Mean of :func:`pass_at_k` over the items, without storing the table.

    Args:
        n, c, ks: as for :func:`pass_at_k`.
        weights: weight per item, real, shape [items], finite and at least 0, not all 0; None weighs items
            equally. Items of weight 0 don't count.

    Returns:
        float64 [K], NaN where an item that counts has k > n, and everywhere when there are no items.
        The bits don't depend on the number of threads.

    Raises:
        ValueError: as for :func:`pass_at_k`, and for bad weights.
    """
    return _native.mean_curve(n, c, ks, weights)


def reached_at_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike, floor: ArrayLike) -> NDArray[np.float64]:
    """Prototype until the extension has it."""
    from scipy.stats import binom, hypergeom

    n, c, ks, floor = (np.asarray(x) for x in (n, c, ks, floor))
    out = np.full((len(n), len(ks)), np.nan)
    cells = {}
    for i, (a, b, f) in enumerate(zip(n.tolist(), c.tolist(), floor.tolist(), strict=True)):
        for j, k in enumerate(ks.tolist()):
            if k > a:
                continue
            if (a, b, f, k) not in cells:
                tail = binom.sf(np.arange(k + 1), k, f)
                t = int(np.argmax(tail <= f + 1e-12))
                mass = binom.pmf(t, k, f)
                g = max(0.0, (f - tail[t]) / mass) if mass > 0 else 0.0
                cells[a, b, f, k] = hypergeom.sf(t, a, b, k) + g * hypergeom.pmf(t, a, b, k)
            out[i, j] = cells[a, b, f, k]
    return out
