"""Pass@K of many items at once: the documented face of the C++ extension, which checks its own input.

It estimates from counts; it knows nothing of guessing (see floors) but for :func:`reached_at_k`, and nothing of
intervals (see intervals). In all functions X is the number of correct samples among k drawn without replacement from
an item's n, of which c are correct. Each distinct pair of n and c is computed once; no result depends on the number of
threads or on the other items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge import _native


def pass_at_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike) -> NDArray[np.float64]:
    """Unbiased Pass@k of each item at each k: ``P(X >= 1) = 1 - C(n - c, k) / C(n, k)``.

    The probability that at least one of k samples drawn without replacement from the item's n is correct,
    c of the n being correct (Chen et al., arXiv 2107.03374, equation 1).

    Args:
        n: samples per item, any integer dtype, shape [items]; items may differ. At most 2^31 - 1.
        c: correct samples per item, any integer dtype, shape [items], ``0 <= c <= n``.
        ks: the values of k, any integer dtype, shape [K], each at least 1, in any order.

    Returns:
        float64 [items, K], NaN where k > n (also for n = 0): the samples can't tell. Exact where the value is 0 or 1;
        otherwise the relative error is below 1e-15.

    Raises:
        ValueError: a wrong dtype, shape or value; the message names the first bad index and what it holds.
    """
    return _native.pass_at_k(n, c, ks)


def pass_hat_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike) -> NDArray[np.float64]:
    """Unbiased pass^k of each item at each k: ``P(X = k) = C(c, k) / C(n, k)``, the probability that all k are correct.

    (tau-bench, arXiv 2406.12045.)

    Args, returns and raises: as :func:`pass_at_k`. Below 2.2e-308 digits are lost as doubles have fewer there.
    """
    return _native.pass_hat_k(n, c, ks)


def g_pass_at_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike, tau: float) -> NDArray[np.float64]:
    """G-Pass@k of each item at each k: ``P(X >= max(1, ceil(tau k)))``, at least a share tau of k samples correct.

    (arXiv 2412.13147.) ``tau = 1`` is :func:`pass_hat_k`, and a tau of at most 1/k :func:`pass_at_k`.
    ``ceil(tau k)`` is read as the least integer m with ``m / k >= tau``, the quotient rounded to double as tau itself
    is: so tau = 0.07 asks for 7 of 100, although ``0.07 * 100 > 7`` in floating point.

    The hypergeometric terms follow from each other outwards from the largest and are divided by their own total, so
    that at most about ``15 sqrt(n)`` of them are needed for a value, less than 700,000 at any n.

    Args:
        n, c, ks: as for :func:`pass_at_k`.
        tau: the share that must be correct, above 0 and at most 1.

    Returns:
        float64 [items, K], NaN where k > n; accuracy as :func:`pass_hat_k`.

    Raises:
        ValueError: as for :func:`pass_at_k`, and for a bad tau.
    """
    return _native.g_pass_at_k(n, c, ks, tau)


def reached_at_k(n: ArrayLike, c: ArrayLike, ks: ArrayLike, floor: ArrayLike) -> NDArray[np.float64]:
    """Unbiased probability that k samples are right more often than guessing makes them: ``P(X > t) + g P(X = t)``.

    t and g make a guesser reach exactly its guessing floor f at every k. With B the binomial number of right guesses
    among k: ``P(B > t) + g P(B = t) = f``, ``0 <= g < 1``, t the least integer with ``P(B > t) <= f``. So whoever
    guesses afresh in each sample and whoever repeats one guess have the same mean, f, and unlike that of Pass@k the
    floor doesn't rise with k. ``f = 0`` gives :func:`pass_at_k`, k = 1 gives c / n and f = 1 gives 1.

    t and g are computed in double-double arithmetic from f as the double that it is; where ``P(B > t)`` equals f to
    2^-80, as at f = 1/2 and odd k, g is 0.

    Args:
        n, c, ks: as for :func:`pass_at_k`.
        floor: guessing floor f per item, real, shape [items], from 0 to 1.

    Returns:
        float64 [items, K], NaN where k > n. The relative error is below 1e-15 up to n = 10^5, unless the value is
        ``g P(X = t)`` alone (c = t or k = t) with g below 1e-5: then g's absolute error of at most 1e-20 counts.

    Raises:
        ValueError: as for :func:`pass_at_k`, and for a bad floor.
    """
    return _native.reached_at_k(n, c, ks, floor)


def mean_curve(n: ArrayLike, c: ArrayLike, ks: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """Mean of :func:`pass_at_k` over the items, without storing the table.

    Args:
        n, c, ks: as for :func:`pass_at_k`.
        weights: weight per item, real, shape [items], finite and at least 0, not all 0, with a finite sum;
            None weighs items equally. Items of weight 0 don't count.

    Returns:
        float64 [K], NaN where an item that counts has k > n, and everywhere when there are no items. The relative
        error is below 1e-15; the bits don't depend on the number of threads.

    Raises:
        ValueError: as for :func:`pass_at_k`, and for bad weights.
    """
    return _native.mean_curve(n, c, ks, weights)
