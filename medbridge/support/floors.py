"""What guessing alone reaches: the floor under Pass@k on multiple choice, and support above it.

The floor is exact for a model that takes any position or any random option, provided that every sample shows
its options in an order drawn *independently* of the others. A design that balances the orders over the
samples of an item deals out the lucky guesses more evenly than chance does, and lifts a guesser above this
floor: a model that always answers "A" on 4 options is then right in exactly 4 of 16 samples, and reads 0.85
above the floor at k = 10.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MIN_INFORMATIVE = 0.05
"""Where guessing misses fewer questions than this, support above it is noise divided by almost nothing."""


def guessing_floor(f: ArrayLike, ks: ArrayLike) -> Floats:
    """Pass@k of pure guessing, ``1 - (1 - f)^k``.

    Args:
        f: probability that one guess is right, shape [items], each from 0 (open answer) to 1.
        ks: the values of k, integers of at least 1, shape [K].

    Returns:
        float64 [items, K].

    Raises:
        ValueError: a value of f outside 0 to 1 (or NaN), or a k below 1, named by its index.
    """
    floors = np.atleast_1d(np.asarray(f, dtype=np.float64))
    draws = np.atleast_1d(np.asarray(ks))
    for bad in np.flatnonzero(~((floors >= 0) & (floors <= 1)))[:1]:
        raise ValueError(f"f[{bad}] = {floors[bad]}: the probability of a right guess must be from 0 to 1")
    for bad in np.flatnonzero(draws < 1)[:1]:
        raise ValueError(f"ks[{bad}] = {draws[bad]} is below 1: at least one sample must be drawn")
    with np.errstate(divide="ignore"):  # f = 1: log1p(-1) = -inf, and the floor is 1
        return -np.expm1(draws[None, :] * np.log1p(-floors)[:, None])


def support_above_floor(support: ArrayLike, floor: ArrayLike, min_informative: float = 0.0) -> Floats:
    """Support above the floor, ``(S - F) / (1 - F)``: 0 is what guessing reaches, 1 is every question
    reached.

    It is negative where the model does worse than guessing, as a model does that always gives the same wrong
    answer.

    Args:
        support: mean Pass@k, S, any shape.
        floor: mean guessing floor at the same k, F, of the same shape.
        min_informative: the value is refused (NaN) where ``1 - F`` is below this.

    Returns:
        float64 of that shape; NaN where refused, where F is 1, and where an input is NaN.
    """
    reached = np.asarray(support, dtype=np.float64)
    floors = np.asarray(floor, dtype=np.float64)
    room = 1.0 - floors
    informative = (room > 0) & _enough(room, min_informative)
    return np.where(informative, (reached - floors) / np.where(informative, room, 1.0), np.nan)


def largest_informative_k(f: ArrayLike, ks: Sequence[int], limit: float = MIN_INFORMATIVE) -> int | None:
    """The largest k of `ks` at which guessing still misses enough questions, ``1 - mean_i F_k,i >= limit``.

    With the default limit: 4 for 2 options, 10 for 4 options, the largest of `ks` for open answers.

    Args:
        f: probability that one guess is right, shape [items].
        ks: the values to choose from.
        limit: least share of questions that guessing must miss.

    Returns:
        That k; None where not even the smallest of `ks` is informative, or where there are no items or no ks.
    """
    candidates = sorted(ks)
    floors = np.atleast_1d(np.asarray(f, dtype=np.float64))
    if not candidates or floors.size == 0:
        return None
    room = 1.0 - guessing_floor(floors, candidates).mean(axis=0)
    informative = int(_enough(room, limit).sum())  # room only shrinks with k
    return candidates[informative - 1] if informative else None


def _enough(room: Floats, limit: float) -> NDArray[np.bool_]:
    # The margin keeps a limit that is met exactly (0.25 at 2 options and k = 2) from failing by rounding.
    return room >= limit - 1e-12
