"""How the probability of success is spread over the items of a stratum: the nonparametric maximum-likelihood
distribution behind their counts, and what follows from it for Pass@k beyond n, support and majority votes.

It describes one measurement. It draws no samples and reaches no verdict (see gate). The fits are the C++
extension's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.stats import binom, norm

from medbridge import _native
from medbridge.support.intervals import Intervals
from medbridge.support.tables import pass_at_k

Floats = NDArray[np.float64]

DEFAULT_MARGIN = 0.1
"""An item is above its floor when it is by this share of the room above the floor: at 4 options p >= 0.325, at
2 options p >= 0.55. A smaller margin can't be told from guessing with the usual 8 to 32 samples."""

GRID_POINTS = 201
"""Two neighbours differ by at most 0.008: with 10,000 samples of an item p is known to about 0.01."""

MAX_RELIABLE_K = 4096
"""Largest answer of :meth:`Spectrum.reliable_k`."""

TIE_WIDTH = 0.03
"""The right answer and its strongest rival count as tied where p is this near to the point where they are. Whether
guesses come out a hair above or below it can't be told from samples, but it would swing the predicted majority
accuracy of 200 guessed items at 2 options by 0.4 (root mean square, n = 8 or 16); with this width, by 0.1."""

_ROUNDING = 1e-12
"""Grid points and floors carry rounding: probabilities this near are equal."""

_REFIT_TOLERANCE = 1e-4
"""A bootstrap refit needs no more digits than this: a gap of 1e-4 with 200 items costs 0.02 in log-likelihood."""

_MAX_ITERATIONS = 100
"""Newton steps; fits take 10 to 15."""

_MOST_SAMPLES = 512
"""`reliable_k` reads at most this many samples per item, to stay fast; fewer samples never reach further."""

_MOST_KNOTS = 48
"""Free coefficients of the linear estimator behind `reliable_k`; between them it is interpolated."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The distribution G of the per-item success probability p.

    Attributes:
        grid: float64 [G], strictly increasing within [0, 1].
        weights: probability of each grid point, float64 [G], positive, sum 1.
        items: items behind it.
        n_min, n_max: smallest and largest number of samples of an item.
        gap: largest directional derivative of the mean log-likelihood, ``max_p mean_i f(c_i | p) / f_G(c_i) - 1``
            over the grid. It is 0 at the maximum, and G's mean log-likelihood per item is at most `gap` below the
            maximum (Lindsay 1983, "The geometry of mixture likelihoods: a general theory", theorem 4.1).
        converged: whether `gap` is within the tolerance that was asked for.
        log_likelihood: of the samples as drawn, in their order (no binomial coefficients).
    """

    grid: Floats
    weights: Floats
    items: int
    n_min: int
    n_max: int
    gap: float
    converged: bool
    log_likelihood: float

    def pass_at_k(self, ks: ArrayLike) -> Floats:
        """Predicted Pass@k at any k, also beyond n: ``sum_j G_j (1 - (1 - p_j)^k)``.

        How far it can be trusted is what :meth:`reliable_k` says.

        Args:
            ks: the values of k, any integer dtype, shape [K], each at least 1.

        Returns:
            float64 [K].

        Raises:
            ValueError: a k that isn't an integer of at least 1.
        """
        return reached_values(self.grid, ks) @ self.weights

    def reliable_k(self, tolerance: float = 0.05, confidence: float = 0.95) -> int:
        """Largest k at which these counts tell Pass@k of these items within `tolerance`, whatever the truth.

        The error at k is that of a linear estimator ``mean_i a(c_i)`` with ``c ~ Binomial(n, p)``::

            max_p |sum_j a_j Bin(j; n, p) - (1 - (1 - p)^k)|  +  z max_p sd(a(c) | p) / sqrt(items)

        the bias, and the chance in the samples of the items given their p (z: the two-sided normal quantile).
        Up to k = n, a is the unbiased estimator; beyond, that which minimises ``t + z s / sqrt(items)`` subject
        to a bias of at most t on a fine grid and ``|a_j - 1/2| <= s``, a linear program. No prior is assumed, so
        that the answer is honest for the worst truth, and for most others cautious: it may be below n, where
        few items leave even unbiased estimates less exact than `tolerance`.

        Which items were drawn isn't part of this error: it is the same at all k, and the bootstrap intervals
        carry it. The promise is the linear estimator's; that :meth:`pass_at_k` keeps it too is found by
        simulation, on truths made to deceive.

        Background: the best polynomial of degree n is within ``2 exp(-n^2 / k)`` of ``(1 - p)^k`` on [0, 1]
        (Sachdeva and Vishnoi 2014, theorem 3.3), and none is near where k is far above n^2 (Newman and Rivlin
        1976): n samples can't identify Pass@k there, however many items there are.

        Args:
            tolerance: largest error accepted, above 0.
            confidence: probability of staying within it, above 0 and below 1.

        Returns:
            k from 0 (not even k = 1) to :data:`MAX_RELIABLE_K`.

        Raises:
            ValueError: a tolerance or confidence out of range.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance = {tolerance}, must be above 0")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence = {confidence}, must be above 0 and below 1")
        error = _prediction_error(self.n_min, self.items, confidence)
        below, above = 0, 1
        while above <= MAX_RELIABLE_K and error(above) <= tolerance:
            below, above = above, 2 * above
        above = min(above, MAX_RELIABLE_K + 1)
        while above - below > 1:
            middle = (below + above) // 2
            if error(middle) <= tolerance:
                below = middle
            else:
                above = middle
        return below

    def posterior(self, n: ArrayLike, c: ArrayLike) -> Floats:
        """Distribution of each item's p given its counts: ``G_j p_j^c (1 - p_j)^(n - c)``, normalised.

        Args:
            n, c: samples and correct samples per item, any integer dtype, shape [items]. n = 0 gives G itself.

        Returns:
            float64 [items, G], rows with sum 1.

        Raises:
            ValueError: a wrong dtype, shape or value, or counts that G holds to be impossible.
        """
        return posterior_weights(n, c, self.grid, self.weights)

    def cover(self, n: ArrayLike, c: ArrayLike, floor: ArrayLike, margin: float = DEFAULT_MARGIN) -> float:
        """Share of the items whose p is above their guessing floor by a margin.

        ``mean_i P(p_i >= f_i + margin (1 - f_i) | c_i)``: the margin is a share of the room above the floor, so
        that items with different floors can be counted together. A relative of Cover@tau (arXiv 2510.08325),
        which counts the items with p >= tau without regard to guessing.

        Args:
            n, c: as for :meth:`posterior`.
            floor: guessing floor per item, float [items], or one for all.
            margin: above 0, up to 1.

        Returns:
            The share; NaN without items that count. Items with n = 0 and items without room (f = 1) don't.

        Raises:
            ValueError: as for :meth:`posterior`, and for a floor or margin out of range.
        """
        floors = _floors(floor, np.size(n))
        mean = (self.posterior(n, c) * above_floor_values(self.grid, floors, margin)).sum(axis=1)
        return _mean(mean[(np.asarray(n) > 0) & (floors < 1)])

    def majority(self, n: ArrayLike, c: ArrayLike, rival: ArrayLike) -> float:
        """Predicted majority-vote accuracy with infinitely many votes: mean probability that the right answer is
        the most frequent one.

        ``mean_i P(p_i > (1 - p_i) r_i | c_i)``, with r_i the share of the strongest wrong answer among the
        samples that aren't correct (abstentions count among these, but are nobody's votes). Where p_i is within
        :data:`TIE_WIDTH` of equality, the item counts p_i: what it is worth where all answers are tied.

        Args:
            n, c: as for :meth:`posterior`.
            rival: r per item in [0, 1], float [items], or [items, D] where it is uncertain: the mean over D draws.

        Returns:
            The accuracy; NaN without items with n > 0.

        Raises:
            ValueError: as for :meth:`posterior`, and for a bad rival.
        """
        mean = (self.posterior(n, c) * majority_values(self.grid, rival, np.size(n))).sum(axis=1)
        return _mean(mean[np.asarray(n) > 0])


def spectrum(
    n: ArrayLike,
    c: ArrayLike,
    floor: ArrayLike | None = None,
    grid: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = _MAX_ITERATIONS,
) -> Spectrum:
    """Nonparametric maximum-likelihood distribution of the per-item success probability.

    G maximises ``sum_i w_i log sum_j G_j p_j^c_i (1 - p_j)^(n_i - c_i)`` over all distributions on the grid
    (Kiefer and Wolfowitz 1956; Lindsay 1983; Lord 1969 for test items). It is the fixed point of EM, reached by
    safeguarded Newton steps along the central path (Koenker and Mizera 2014). Where several distributions are
    equally likely (n samples fix n moments of G, no more), it is one in their middle.

    Args:
        n: samples per item, any integer dtype, shape [items]; items may differ. Items with n = 0 don't count.
        c: correct samples per item, any integer dtype, shape [items].
        floor: guessing floor per item, float [items], or one for all; each becomes a grid point.
        grid: points of the distribution, strictly increasing within [0, 1]. Default: 201 points, denser near 0
            and 1 (evenly spaced in arcsin sqrt p), 0 and 1 among them, and the floors. A grid that is given is
            used as it is, `floor` or not.
        weights: weight per item, float [items], finite, at least 0.
        tolerance: the largest `gap` that counts as converged.
        max_iterations: Newton steps at most.

    Returns:
        The spectrum. Where `gap` is above `tolerance`, `converged` is False and a RuntimeWarning says so.

    Raises:
        ValueError: no items, or a wrong dtype, shape or value; the message names the first bad index.
    """
    rows_n, rows_c, row_of = _native.distinct_counts(n, c)
    if not tolerance > 0:
        raise ValueError(f"tolerance = {tolerance}, must be above 0")
    if max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations}, must be at least 1")
    items = row_of.size
    points = default_grid(None if floor is None else _floors(floor, items)) if grid is None else _reals(grid, "grid")
    per_item = np.ones(items) if weights is None else _weights(weights, items)
    counted = (rows_n[row_of] > 0) & (per_item > 0)
    if not counted.any():
        raise ValueError(f"no items: none of {items} has samples and a positive weight")
    mass, gap, log_likelihood = _native.fit_spectra(
        rows_n,
        rows_c,
        np.bincount(row_of, np.where(counted, per_item, 0.0), rows_n.size)[None],
        points,
        tolerance,
        max_iterations,
    )
    converged = bool(gap[0] <= tolerance)
    if not converged:
        warnings.warn(f"the spectrum's gap is {gap[0]:.2g}, above {tolerance:g}", RuntimeWarning, stacklevel=2)
    sampled = rows_n[row_of][counted]
    return Spectrum(
        grid=points,
        weights=mass[0],
        items=int(counted.sum()),
        n_min=int(sampled.min()),
        n_max=int(sampled.max()),
        gap=float(gap[0]),
        converged=converged,
        log_likelihood=float(log_likelihood[0]),
    )


def default_grid(floors: Floats | None = None) -> Floats:
    """The grid that :func:`spectrum` uses: evenly spaced in arcsin sqrt p, with 0, 1 and every floor exactly."""
    points = np.sin(np.linspace(0, math.pi / 2, GRID_POINTS)) ** 2
    return points if floors is None else np.union1d(points, floors)


def posterior_weights(n: ArrayLike, c: ArrayLike, grid: Floats, weights: Floats) -> Floats:
    """:meth:`Spectrum.posterior` for any distribution on a grid."""
    rows_n, rows_c, row_of = _native.distinct_counts(n, c)
    joint = _native.binomial_likelihood(rows_n, rows_c, grid) * weights
    density = joint.sum(axis=1, keepdims=True)
    if (density == 0).any():
        row = int(np.argmin(density))
        raise ValueError(f"{rows_c[row]} correct of {rows_n[row]} samples are impossible under this distribution")
    return (joint / density)[row_of]


def reached_values(grid: Floats, ks: ArrayLike) -> Floats:
    """Pass@k at each grid point, ``1 - (1 - p)^k``: float64 [K, G]."""
    chosen = np.atleast_1d(np.asarray(ks))
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise ValueError(f"ks must be integers in one dimension, got dtype {chosen.dtype} and shape {chosen.shape}")
    if (chosen < 1).any():
        bad = int(np.argmax(chosen < 1))
        raise ValueError(f"ks[{bad}] = {chosen[bad]} is below 1: at least one sample must be drawn")
    with np.errstate(divide="ignore"):  # the logarithm of 0 at p = 1 is right: minus infinity
        log_wrong = np.log1p(-grid)
    return -np.expm1(chosen[:, None].astype(np.float64) * log_wrong)


def above_floor_values(grid: Floats, floors: Floats, margin: float = DEFAULT_MARGIN) -> Floats:
    """1 where a grid point is above an item's floor by the margin, else 0: float64 [items, G]."""
    if not 0 < margin <= 1:
        raise ValueError(f"margin = {margin}, must be above 0 and at most 1")
    return (grid >= (floors + margin * (1 - floors))[:, None] - _ROUNDING).astype(np.float64)


def majority_values(grid: Floats, rival: ArrayLike, items: int) -> Floats:
    """Probability over the draws of `rival` that the right answer is the mode at each grid point, [items, G].

    See :meth:`Spectrum.majority`.
    """
    draws = np.asarray(rival, dtype=np.float64)
    draws = draws[:, None] if draws.ndim == 1 else draws
    if draws.ndim != 2 or draws.shape[0] != items or draws.shape[1] == 0:
        raise ValueError(f"rival has shape {np.shape(rival)} for {items} items: must be [items] or [items, draws]")
    bad = ~((draws >= 0) & (draws <= 1)).all(axis=1)
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"rival[{i}] = {draws[i]}: shares must be from 0 to 1")
    # p > (1 - p) r  <=>  p > r / (1 + r)
    threshold = draws / (1 + draws)
    beyond = _share_up_to(np.searchsorted(grid, threshold + TIE_WIDTH, side="right"), grid.size)
    reached = _share_up_to(np.searchsorted(grid, threshold - TIE_WIDTH, side="left"), grid.size)
    return beyond + (reached - beyond) * grid


def bootstrap_posterior(
    values: Sequence[ArrayLike],
    n: ArrayLike,
    c: ArrayLike,
    fit: Spectrum,
    *,
    clusters: Sequence[str],
    alpha: float,
    seed: int,
    replicates: int = 200,
) -> Intervals:
    """Estimate ``mean_i E[v_ji(p_i) | c_i]`` for functions v of an item's p, with a cluster-bootstrap interval.

    Each replicate weights the clusters exponentially (Rubin 1981) and fits the spectrum anew. As in
    :func:`~medbridge.support.intervals.bootstrap_ratio` a cluster that wasn't observed stands beside those that
    were, at 0 for the low end and at 1 for the high end, so that no interval has zero width.

    The ends are percentiles at half of `alpha`, since a spectrum of few items is biased, and its refits once
    more: at `alpha` itself, the end on the wrong side of the bias was missed up to three times as often as it
    should be, and bias-corrected percentiles did worse. In simulation (share of items above a floor of 1/4, seven
    truths, alpha 0.05) each end was then missed in at most 5.5 % of the cases with n = 16 (60 and 200 items); with
    60 items and n = 8 still in up to 15 %, where 9 of 10 items were skilled at p = 0.7.

    Args:
        values: v at each grid point, within [0, 1], one array for each function, float [items, G] or broadcastable
            to it.
        n, c: samples and correct samples per item; items with n = 0 don't count.
        fit: the spectrum of these items.
        clusters: cluster of each item.
        alpha: error probability of each end, above 0 and below 0.5.
        seed: the result is a function of the arguments and this.
        replicates: number of refits.

    Returns:
        Intervals with one entry for each function; the value is between the ends. The p-values are NaN.

    Raises:
        ValueError: no items, lengths that differ, or an argument out of range.
    """
    n_all = np.asarray(n)
    _check_clusters(clusters, n_all.size)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha = {alpha}, must be above 0 and below 0.5")
    if replicates < 1:
        raise ValueError(f"replicates = {replicates}, must be at least 1")
    counted = np.flatnonzero(n_all > 0)
    if not counted.size:
        raise ValueError("no items: a mean needs at least one with samples")
    rows_n, rows_c, row_of = _native.distinct_counts(n_all[counted], np.asarray(c)[counted])
    likelihood = _native.binomial_likelihood(rows_n, rows_c, fit.grid)
    labels, cluster_of = np.unique(np.asarray(clusters, dtype=np.str_)[counted], return_inverse=True)
    drawn = np.random.default_rng(seed).standard_exponential((replicates, labels.size + 1))
    weights = drawn[:, cluster_of]
    unseen = drawn[:, -1] * counted.size / labels.size
    by_row = np.argsort(row_of, kind="stable")
    row_weights = np.add.reduceat(weights[:, by_row], np.searchsorted(row_of[by_row], np.arange(rows_n.size)), axis=1)
    mass, gap, _ = _native.fit_spectra(rows_n, rows_c, row_weights, fit.grid, _REFIT_TOLERANCE, _MAX_ITERATIONS)
    if (gap > _REFIT_TOLERANCE).any():
        warnings.warn(
            f"{(gap > _REFIT_TOLERANCE).sum()} of {replicates} refits have a gap of up to {gap.max():.2g}",
            RuntimeWarning,
            stacklevel=2,
        )
    # sum_i w_i sum_j v_ij L_ij G_j / f_i for all replicates as one product of matrices
    scaled = weights / (mass @ likelihood.T)[:, row_of]
    posterior = fit.posterior(rows_n, rows_c)[row_of]
    total = weights.sum(axis=1)
    ends = []
    for value in values:
        own = np.broadcast_to(np.asarray(value, dtype=np.float64), (n_all.size, fit.grid.size))[counted]
        reached = ((scaled @ (likelihood[row_of] * own)) * mass).sum(axis=1)
        centre = (posterior * own).sum(axis=1).mean()
        low = np.quantile(reached / (total + unseen), alpha / 2)
        high = np.quantile((reached + unseen) / (total + unseen), 1 - alpha / 2)
        ends.append((centre, min(low, centre), max(high, centre)))
    value, low, high = np.array(ends, dtype=np.float64).reshape(-1, 3).T
    unknown = np.full(value.size, math.nan)
    return Intervals(value, low, high, p_below=unknown, p_above=unknown)


def cover_interval(
    n: ArrayLike,
    c: ArrayLike,
    floor: ArrayLike,
    fit: Spectrum,
    *,
    clusters: Sequence[str],
    alpha: float,
    seed: int,
    margin: float = DEFAULT_MARGIN,
    replicates: int = 200,
) -> Intervals:
    """:meth:`Spectrum.cover` with an interval, [1]; arguments as for :func:`bootstrap_posterior`."""
    floors = _floors(floor, np.size(n))
    _check_clusters(clusters, floors.size)
    room = np.flatnonzero(floors < 1)
    return bootstrap_posterior(
        [above_floor_values(fit.grid, floors[room], margin)],
        np.asarray(n)[room],
        np.asarray(c)[room],
        fit,
        clusters=[clusters[i] for i in room.tolist()],
        alpha=alpha,
        seed=seed,
        replicates=replicates,
    )


def _prediction_error(n: int, items: int, confidence: float) -> Callable[[int], float]:
    """The error of Pass@k at each k that :meth:`Spectrum.reliable_k` compares with its tolerance."""
    n = min(n, _MOST_SAMPLES)
    grid = np.sin(np.linspace(0, math.pi / 2, 401)) ** 2
    chance = binom.pmf(np.arange(n + 1), n, grid[:, None])
    noise = float(norm.ppf((1 + confidence) / 2)) / math.sqrt(items)

    def error(k: int) -> float:
        wanted = reached_values(grid, [k])[0]
        if k <= n:
            coefficients = pass_at_k(np.full(n + 1, n), np.arange(n + 1), [k])[:, 0]
        else:
            coefficients = _linear_estimator(chance[::3], wanted[::3], noise)
        mean = chance @ coefficients
        variance = chance @ coefficients**2 - mean**2
        return float(np.abs(mean - wanted).max() + noise * math.sqrt(max(variance.max(), 0.0)))

    return error


def _linear_estimator(chance: Floats, wanted: Floats, noise: float) -> Floats:
    """Coefficients a_0 .. a_n that minimise ``t + noise s``, |chance @ a - wanted| <= t and |a - 1/2| <= s."""
    n = chance.shape[1] - 1
    # A few values of j, denser near 0 and n, stand for all: any coefficients give a valid error.
    knots = np.unique(np.round(n * np.sin(np.linspace(0, math.pi / 2, _MOST_KNOTS)) ** 2))
    spread = np.array([np.interp(np.arange(n + 1), knots, row) for row in np.eye(knots.size)]).T
    mean = chance @ spread
    bias, size = np.ones((wanted.size, 1)), np.ones((knots.size, 1))
    bounds = np.block(
        [
            [mean, -bias, 0 * bias],
            [-mean, -bias, 0 * bias],
            [np.eye(knots.size), 0 * size, -size],
            [-np.eye(knots.size), 0 * size, -size],
        ]
    )
    limits = np.concatenate([wanted, -wanted, np.full(knots.size, 0.5), np.full(knots.size, -0.5)])
    cost = np.concatenate([np.zeros(knots.size), [1.0, noise]])
    free = [(None, None)] * knots.size + [(0, None)] * 2
    solved = linprog(cost, A_ub=bounds, b_ub=limits, bounds=free, method="highs")
    # a = 1/2, t = 1/2, s = 0 always satisfies the bounds, and stands in where the solver gives up.
    return spread @ solved.x[: knots.size] if solved.success else np.full(n + 1, 0.5)


def _share_up_to(place: NDArray[np.intp], points: int) -> Floats:
    """Share of each row of `place` that is at most j, for j = 0 .. points - 1."""
    items, draws = place.shape
    flat = place + np.arange(items)[:, None] * (points + 1)
    counts = np.bincount(flat.ravel(), minlength=items * (points + 1)).reshape(items, points + 1)
    return counts.cumsum(axis=1)[:, :points] / draws


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _reals(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.ndim != 1:
        raise ValueError(
            f"{name} must be real numbers in one dimension, got dtype {array.dtype} and shape {array.shape}"
        )
    return np.ascontiguousarray(array, dtype=np.float64)


def _floors(floor: ArrayLike, items: int) -> Floats:
    floors = np.full(items, floor, dtype=np.float64) if np.ndim(floor) == 0 else _reals(floor, "floor")
    if floors.size != items:
        raise ValueError(f"floor has {floors.size} values for {items} items")
    bad = ~((floors >= 0) & (floors <= 1))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"floor[{i}] = {floors[i]}, must be from 0 to 1")
    return floors


def _check_clusters(clusters: Sequence[str], items: int) -> None:
    if len(clusters) != items:
        raise ValueError(f"clusters has {len(clusters)} values for {items} items")


def _weights(weights: ArrayLike, items: int) -> Floats:
    array = _reals(weights, "weights")
    if array.size != items:
        raise ValueError(f"weights has {array.size} values for {items} items")
    bad = ~((array >= 0) & np.isfinite(array))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"weights[{i}] = {array[i]}: weights must be finite and at least 0")
    return array
