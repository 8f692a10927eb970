"""Majority voting from votes per option: the documented face of the C++ extension, which checks its own input.

It says what voting over the samples would reach; it neither reads answers (see data.answers) nor counts them (see
tallies).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medbridge import _native


def majority_at_k(
    votes: ArrayLike, correct: ArrayLike, ks: ArrayLike, abstained: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Exact expected accuracy of a majority vote over k of an item's n samples, drawn without replacement.

    Of the draws of k samples, the share in which the right option has the most votes; a tie of m options counts
    1/m. A sample that abstained may be drawn but doesn't vote; a draw without any vote counts 0. With
    ``n = votes.sum() + abstained``, r votes for the right option and v for a wrong one, it is the coefficient of
    ``z^k`` over ``C(n, k)`` of

        sum_{x=1..r} C(r,x) z^x prod_v (sum_{y<x} C(v,y) z^y + u C(v,x) z^x) (1+z)^abstained,  u^t -> 1/(t+1)

    Args:
        votes: samples that chose each option, any integer dtype, shape [items, options]; 0 for options that an
            item doesn't have.
        correct: column of the right option, any integer dtype, shape [items]; -1 where the right answer isn't a
            column, since no sample gave it (accuracy 0).
        ks: the values of k, any integer dtype, shape [K], each at least 1, in any order.
        abstained: samples without a readable answer, any integer dtype, shape [items]; None: none. They are part
            of n, which may be at most 1,024.

    Returns:
        float64 [items, K], NaN where k > n. The relative error is below 1e-13, and the bits don't depend on the
        number of threads.

    Raises:
        ValueError: a wrong dtype, shape or value; the message names the first bad index and what it holds.
    """
    return _native.majority_at_k(votes, correct, ks, abstained)
