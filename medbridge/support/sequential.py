"""Anytime-valid tests and confidence sequences for the mean of bounded values that come one after another in random
order. It counts evidence and doesn't decide: when to stop, and over how many strata the error is shared, is the
caller's matter.

A test is a bet against its null hypothesis (Waudby-Smith and Ramdas, arXiv 2010.09686). With values scaled to 0..1 and
null mean m, a bettor who stakes the fraction theta of the wealth on large values multiplies it by
``1 + theta (x / m - 1)`` at each value x, which is at most 1 on average while the mean is at most m. The e-value is
the mean wealth of bettors with fixed fractions (method of mixtures), so it needs no tuning and no look ahead.
Without replacement (arXiv 2006.04347), m is what the null leaves for the values to come, and
theta grows as the room for small values under the null is used up: for values 0 and 1 each bettor's wealth is then
the exact likelihood ratio of two finite populations.
"""

from __future__ import annotations

import math
import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_SLACK = 1e-9
"""Share of the range by which a null hypothesis is widened, and by which values may stand outside the range. It
exceeds the rounding of sums over up to some 10^6 values (of a range that isn't tiny beside its ends), so that rounding
never makes a true null impossible."""

_STEPS = 1000
"""Steps from low to high at which the ends of a confidence sequence are looked for."""

_CHUNK_BYTES = 1 << 20
"""Memory of the bets of the runs that are computed together: small enough for a processor's cache."""


def _bets() -> tuple[Floats, Floats]:
    """Fractions and the logarithms of their weights.

    The weights follow the arcsine law (the Jeffreys prior of a proportion), whose regret against the best fraction
    in hindsight is lowest up to a constant, on a grid that is even in log(theta / (1 - theta)). Staking everything
    wins fastest when no value is near 0, so it has a weight of its own.
    """
    logits = np.linspace(-math.log(99), math.log(99), 16)
    fractions = 1 / (1 + np.exp(-logits))
    weights = np.sqrt(fractions * (1 - fractions))
    return np.append(fractions, 1.0), np.log(np.append(0.95 * weights / weights.sum(), 0.05))


_FRACTIONS, _LOG_WEIGHTS = _bets()


class MeanTest:
    """Evidence about the mean of values in ``[low, high]`` against a threshold, at any time and however often it
    is read.

    The values must come in random order: independent draws (`population` None), or draws without replacement from
    `population` values, about whose mean the test then is. Values that belong together (questions about one image)
    have to enter as one.

    Each of `above` and `below` is a nonnegative supermartingale from 1 under its null hypothesis. So the probability
    that it *ever* reaches 1 / alpha while its null holds is at most alpha (Ville's inequality), and its value at any
    stopping time is an e-value. It may fall again: stop, or keep what was reached.

    Args:
        low, high: the range of the values, ``low <= high``.
        threshold: any finite number.
        population: number of values that there are altogether, at least 1; None when they are independent draws.

    Raises:
        ValueError: a range, threshold or population that can't be.
    """

    def __init__(self, low: float, high: float, threshold: float, population: int | None = None) -> None:
        self._range = _checked_range(low, high)
        self._population = _checked_population(population)
        nulls = _scaled_nulls(np.array([threshold], dtype=np.float64), self._range)
        self._above, self._below = (_Wealth(null, self._population) for null in nulls)

    def update(self, values: ArrayLike) -> None:
        """Add values, float [n], in the order in which they came. How they are split over calls changes nothing.

        Raises:
            ValueError: a value that is NaN or outside the range, or more values than the population has. Nothing
                is added then.
        """
        checked = _checked_values(values, self._range)
        if checked.ndim != 1:
            raise ValueError(f"values has {checked.ndim} axes, must have one")
        _check_size(self.count + checked.size, self._population)
        large, small = _scaled(checked[None, :], self._range)
        self._above.update(large)
        self._below.update(small)

    @property
    def count(self) -> int:
        """Number of values seen."""
        return self._above.count

    @property
    def above(self) -> float:
        """E-value against "the mean is at most the threshold"; infinite when that has become impossible."""
        return _exp(float(self._above.log_e[0]))

    @property
    def below(self) -> float:
        """E-value against "the mean is at least the threshold"; infinite when that has become impossible."""
        return _exp(float(self._below.log_e[0]))


def log_e_values(
    values: ArrayLike, low: float, high: float, threshold: ArrayLike, population: int | None = None
) -> tuple[Floats, Floats]:
    """Logarithms of the e-values of `MeanTest` after each value, for many runs at once.

    Args:
        values: float [..., T], each run in the order in which its values came.
        low, high: the range of the values.
        threshold: one for all runs, or one per run, broadcast against ``[...]``.
        population: as in `MeanTest`, the same for all runs.

    Returns:
        ``(above, below)``, float64 [..., T]; infinite where a null hypothesis is impossible.

    Raises:
        ValueError: as in `MeanTest`.
    """
    limits = _checked_range(low, high)
    checked = np.atleast_1d(_checked_values(values, limits))
    size = checked.shape[-1]
    _check_size(size, _checked_population(population))
    thresholds = np.asarray(threshold, dtype=np.float64)
    shape = np.broadcast_shapes(checked.shape[:-1], thresholds.shape)
    rows = np.broadcast_to(checked, (*shape, size)).reshape(math.prod(shape), size)
    nulls = _scaled_nulls(np.broadcast_to(thresholds, shape).reshape(-1), limits)
    chunk = max(1, _CHUNK_BYTES // (8 * _FRACTIONS.size * (size + 1)))
    above, below = np.empty(rows.shape), np.empty(rows.shape)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        for scaled, null, result in zip(_scaled(rows[part], limits), nulls, (above, below), strict=True):
            result[part] = _Wealth(null[part], population).update(scaled)
    return above.reshape(*shape, size), below.reshape(*shape, size)


def confidence_sequence(
    values: ArrayLike, low: float, high: float, alpha: float, population: int | None = None
) -> tuple[Floats, Floats]:
    """Running interval of the mean: all thresholds that the two tests haven't rejected so far, each at `alpha`.

    The probability that the mean is *ever* below the low end is at most `alpha`, and the same holds of the high end.
    An end is rounded outward to a multiple of (high - low) / 1000, but for a finite population never reaches past
    what the values not yet seen can still make of the mean. In the rare case (its probability is at most 2 alpha)
    that every threshold is rejected, the low end is above the high one.

    Args:
        values: float [T], in the order in which they came.
        low, high, population: as in `MeanTest`.
        alpha: error probability of each end over all times, above 0 and below 1.

    Returns:
        ``(lows, highs)``, float64 [T]: the interval after each value.

    Raises:
        ValueError: as in `MeanTest`, or `alpha` out of range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha}, must be above 0 and below 1")
    limits = _checked_range(low, high)
    checked = _checked_values(values, limits)
    if checked.ndim != 1:
        raise ValueError(f"values has {checked.ndim} axes, must have one")
    steps = np.linspace(0, 1, _STEPS + 1)
    above, below = log_e_values(checked, low, high, low + (high - low) * steps, population)
    enough = -math.log(alpha)
    # Evidence falls along the thresholds, so that the one farthest out speaks for all nearer ones.
    starts = np.where(above >= enough, steps[:, None], 0.0).max(axis=0)
    stops = np.where(below >= enough, steps[:, None], 1.0).min(axis=0)
    if population is not None:
        large, small = _scaled(checked, limits)
        starts = np.maximum(starts, np.cumsum(large) / population - _SLACK)
        stops = np.minimum(stops, 1 + _SLACK - np.cumsum(small) / population)
    width = high - low
    return low + width * np.maximum.accumulate(starts), low + width * np.minimum.accumulate(stops)


class _Wealth:
    """The bettors against "the mean is at most `null`", for values and nulls scaled to 0..1, one row per run."""

    def __init__(self, null: Floats, population: int | None) -> None:
        self.count = 0
        self.log_e = np.where(null < 0, np.inf, 0.0)
        self._null = null[:, None]
        self._population = population
        self._total = np.zeros((null.size, 1))
        self._log_wealth = np.tile(_LOG_WEIGHTS[:, None], (null.size, 1, 1))

    def update(self, values: Floats) -> Floats:
        """Bet on values [rows, T], and return the running log e-value [rows, T]."""
        size = values.shape[1]
        # Sums run on from what was kept, one value after another, so that calls can be split anywhere.
        total = np.cumsum(np.concatenate([self._total, values], axis=1), axis=1)
        mean, growth, impossible = self._expected(total)
        ratio = np.divide(values, mean, out=np.ones_like(values), where=mean > 0)
        stakes = np.minimum(_FRACTIONS[:, None] * growth[:, None, :], 1.0)
        with np.errstate(divide="ignore"):
            gains = np.log1p(stakes * (ratio - 1)[:, None, :])
            wealth = np.cumsum(np.concatenate([self._log_wealth, gains], axis=2), axis=2)[..., 1:]
            running = np.where(impossible, np.inf, _log_sum_exp(wealth))
        if size:
            self.count += size
            self.log_e = running[:, -1]
            self._total = total[:, -1:]
            self._log_wealth = wealth[..., -1:]
        return running

    def _expected(self, total: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """The largest mean that the null leaves each next value (0: it leaves only zeros, and nothing is bet), the
        growth of the stakes, and whether the null is impossible after the value; [rows, T] each, from the sums before
        the first and after each value, [rows, T + 1].
        """
        rows, size = total.shape[0], total.shape[1] - 1
        if self._population is None:
            mean = np.broadcast_to(self._null, (rows, size))
            return mean, np.ones((1, size)), mean < 0
        seen = self.count + np.arange(size)
        before, after = total[:, :-1], total[:, 1:]
        room_above = self._population * self._null - before
        room_above[room_above <= 2 * _SLACK * self._population] = 0.0
        room_below = self._population * (1 - self._null) - (seen - before)
        # A bettor of fraction theta believes in the mean q = m + theta (1 - m). Given the values seen, the believed
        # and the null mean of the rest differ by N (q - m) / (N - t), which makes the fraction this much larger.
        growth = np.divide(
            self._population * (1 - self._null),
            room_below,
            out=np.full_like(before, np.inf),
            where=room_below > 0,
        )
        return room_above / (self._population - seen), growth, after > self._population * self._null


def _log_sum_exp(logs: Floats) -> Floats:
    """``log(sum(exp(logs)))`` over the middle axis of [rows, bettors, T]; -inf where all are."""
    peak = logs.max(axis=1)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    # Added one after another: the order in which sum() adds depends on T, which would show where calls are split.
    return peak + np.log(np.cumsum(np.exp(logs - peak[:, None, :]), axis=1)[:, -1])


def _exp(log: float) -> float:
    return math.exp(log) if log < 709 else math.inf


def _scaled(values: Floats, limits: tuple[float, float]) -> tuple[Floats, Floats]:
    """Distances from the low and from the high end, as shares of the range."""
    low, high = limits
    width = high - low or 1.0
    return np.clip((values - low) / width, 0, 1), np.clip((high - values) / width, 0, 1)


def _scaled_nulls(threshold: Floats, limits: tuple[float, float]) -> tuple[Floats, Floats]:
    """The null means of the two sides, widened by the slack."""
    if not np.isfinite(threshold).all():
        raise ValueError(f"threshold = {threshold[~np.isfinite(threshold)][0]}, must be finite")
    low, high = limits
    width = high - low or 1.0
    return (threshold - low) / width + _SLACK, (high - threshold) / width + _SLACK


def _checked_range(low: float, high: float) -> tuple[float, float]:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"low = {low} and high = {high}, must be finite with low <= high")
    return float(low), float(high)


def _checked_population(population: int | None) -> int | None:
    if population is not None and operator.index(population) < 1:
        raise ValueError(f"population = {population}, must be at least 1")
    return population


def _check_size(count: int, population: int | None) -> None:
    if population is not None and count > population:
        raise ValueError(f"{count} values from a population of {population}: each may be drawn once")


def _checked_values(values: ArrayLike, limits: tuple[float, float]) -> Floats:
    low, high = limits
    checked = np.asarray(values, dtype=np.float64)
    slack = _SLACK * max(high - low, abs(low), abs(high))
    good = (checked >= low - slack) & (checked <= high + slack)
    if not good.all():
        first = tuple(int(axis[0]) for axis in np.nonzero(~good))
        place = ", ".join(map(str, first))
        raise ValueError(f"values[{place}] = {checked[first]}, must be from {low:g} to {high:g}")
    return checked
