"""What greedy accuracy (Acc@1) RL may reach on a stratum, forecast from one measurement before any training.

It is a forecast by stated assumptions, to be compared with what comes out. It reaches no verdict.

The assumption: RL on answers that are already reached raises each item's most frequent answer to certainty and
teaches no new one, so that Acc@1 after sharpening is the majority-vote accuracy of the model before it. RL that
does better lifts right answers that aren't yet the most frequent; at best, every item whose right answer comes
up more often than by guessing. That is the high end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from medbridge.support.spectra import (
    DEFAULT_MARGIN,
    Spectrum,
    above_floor_values,
    bootstrap_posterior,
    majority_values,
    spectrum,
)
from medbridge.support.tallies import Tally

Floats = NDArray[np.float64]

_DRAWS = 32
"""Draws of each item's rival; their spread adds less than 0.01 to the forecast of 20 items."""

_OPEN_ANSWERS = 32
"""Wrong answers that an open question is taken to have, at least; twice as many as were seen where that is more."""

_CONCENTRATIONS = np.geomspace(0.01, 1000, 11)
"""From "all wrong samples agree" to "all wrong answers are equally frequent"."""

_EM_STEPS = 200
"""The mixture of eleven concentrations only weights the draws: digits that EM would still change don't matter."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted Acc@1 after sharpening.

    Attributes:
        value: predicted majority-vote accuracy.
        low: low end of its bootstrap interval.
        high: high end of the bootstrap interval of `ceiling` (or of `value`, where that is higher).
        confidence: ``1 - 2 alpha``. The ends carry the sampling of items and of answers, not the assumption.
        ceiling: accuracy with every item that is above its floor answered right and the others at their floor.
        covered: share of the items that are above their floor by the margin.
        floor: mean guessing floor.
        accuracy: mean accuracy of the samples now.
        acc_at_1: greedy accuracy now, over the items that have a greedy completion; None without any.
        items: items with at least one sample, and behind all of the above but `acc_at_1`.
        basis: what the forecast rests on, in words.
    """

    value: float
    low: float
    high: float
    confidence: float
    ceiling: float
    covered: float
    floor: float
    accuracy: float
    acc_at_1: float | None
    items: int
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values under the same names."""
        return asdict(self)


def forecast_accuracy(
    tallies: Sequence[Tally],
    *,
    alpha: float,
    seed: int,
    replicates: int = 200,
    margin: float = DEFAULT_MARGIN,
) -> Forecast:
    """Predict Acc@1 after sharpening from the tallies of one stratum.

    Items may differ in n and in their floor; greedy completions and votes may be missing. Without votes nothing
    is known of the rivals of the right answer, and the strongest possible one is assumed: all wrong samples
    agree, and an item counts where more than half of its answers are right.

    Args:
        tallies: one per item; those without samples are left out.
        alpha: error probability of each end, above 0 and below 0.5.
        seed: the result is a function of the arguments and this.
        replicates: bootstrap refits of the spectrum.
        margin: share of the room above its floor by which an item must be above it to count as covered.

    Raises:
        ValueError: no item has samples.
    """
    sampled = [tally for tally in tallies if tally.n > 0]
    if not sampled:
        raise ValueError(f"no items: none of {len(tallies)} has samples")
    n = np.array([tally.n for tally in sampled])
    c = np.array([tally.c for tally in sampled])
    floors = np.array([tally.floor for tally in sampled])
    fit = spectrum(n, c, floors)
    above = above_floor_values(fit.grid, floors, margin)
    interval = bootstrap_posterior(
        [
            majority_values(fit.grid, rival_draws(sampled, seed=seed), n.size),
            above + (1 - above) * floors[:, None],
            above,
        ],
        n,
        c,
        fit,
        clusters=[tally.cluster for tally in sampled],
        alpha=alpha,
        seed=seed,
        replicates=replicates,
    )
    value, ceiling, covered = interval.value.tolist()
    greedy = [tally.greedy_correct for tally in sampled if tally.greedy_correct is not None]
    return Forecast(
        value=value,
        low=float(interval.low[0]),
        high=float(interval.high[:2].max()),
        confidence=1 - 2 * alpha,
        ceiling=ceiling,
        covered=covered,
        floor=float(floors.mean()),
        accuracy=float((c / n).mean()),
        acc_at_1=float(np.mean(greedy)) if greedy else None,
        items=len(sampled),
        basis=_basis(sampled, fit, margin),
    )


def rival_draws(tallies: Sequence[Tally], *, seed: int, draws: int = _DRAWS) -> Floats:
    """Draws of the share of the strongest wrong answer among the samples of each item that aren't correct.

    The largest share seen is biased upward: one wrong vote would make a rival of share 1, and eight votes spread
    evenly over three answers show a largest share of about 1/2. So the shares of the wrong answers are drawn
    from their posterior. The prior is a mixture of symmetric Dirichlet distributions, whose weights are fitted to
    all items of as many options by maximum likelihood: one concentration can't tell "half of the items have one
    attractive distractor, half are guessed" from "all are somewhere between", and would predict 0.05 to 0.1 too
    little there.

    Args:
        tallies: of items with at least one sample.
        seed: of the draws.
        draws: number of draws.

    Returns:
        float64 [items, draws] within [0, 1]. Where an item has wrong answers but no votes: 1 times the share of
        its wrong samples that are answers.
    """
    generator = np.random.default_rng(seed)
    # Answers among the samples that aren't correct; where there are few, those of all items weigh in.
    wrong = np.array([tally.n - tally.c for tally in tallies], dtype=np.float64)
    answered = wrong - np.array([tally.abstained for tally in tallies])
    pooled = answered.sum() / wrong.sum() if wrong.any() else 1.0
    share = (answered + pooled) / (wrong + 1)
    votes = [_wrong_votes(tally) for tally in tallies]
    result = np.ones((len(tallies), draws))
    for count in sorted({_wrong_answers(tally) for tally in tallies}):
        members = [
            i for i, tally in enumerate(tallies) if _wrong_answers(tally) == count and (votes[i] or not answered[i])
        ]
        most = max((len(votes[i]) for i in members), default=0)
        width = max(count, most) if count else max(_OPEN_ANSWERS, 2 * most)
        if members and width > 1:
            table = np.zeros((len(members), width))
            for row, i in enumerate(members):
                table[row, : len(votes[i])] = votes[i]
            result[members] = _largest_shares(table, draws, generator)
    return result * share[:, None]


def _wrong_answers(tally: Tally) -> int:
    """Wrong answers that an item has; 0 for an open one, where nobody knows."""
    return max(1, round(1 / tally.floor) - 1) if tally.floor > 0 else 0


def _wrong_votes(tally: Tally) -> list[int]:
    """Votes of each wrong answer, empty where they aren't known.

    A tally doesn't say which answer is right, but its count is c: any answer with c votes may be taken for it,
    since the counts of the others are the same. Where no answer has c votes (an open answer that is right in
    several spellings), right and wrong can't be told apart.
    """
    counts = sorted(tally.votes.values())
    if tally.c > 0:
        if tally.c not in counts:
            return []
        counts.remove(tally.c)
    return [count for count in counts if count > 0]


def _largest_shares(votes: Floats, draws: int, generator: np.random.Generator) -> Floats:
    """Draws [items, draws] of the largest share of an answer, given votes [items, answers]."""
    patterns, pattern_of = np.unique(np.sort(votes, axis=1), axis=0, return_inverse=True)
    size, answers = patterns.sum(axis=1), patterns.shape[1]
    log_likelihood = np.stack(
        [
            gammaln(answers * a) - gammaln(size + answers * a) + (gammaln(patterns + a) - gammaln(a)).sum(axis=1)
            for a in _CONCENTRATIONS
        ],
        axis=1,
    )
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    items = np.bincount(pattern_of.ravel())
    weights = np.full(_CONCENTRATIONS.size, 1 / _CONCENTRATIONS.size)
    for _ in range(_EM_STEPS):
        posterior = likelihood * weights
        posterior /= posterior.sum(axis=1, keepdims=True)
        weights = items @ posterior / items.sum()
    # Stratified: each item's draws take the concentrations in the proportions of its posterior.
    place = (generator.random((len(votes), 1)) + np.arange(draws)) / draws
    below = posterior.cumsum(axis=1)[:, :-1][pattern_of.ravel()]
    largest = np.empty((len(votes), draws))
    for d in range(draws):
        chosen = _CONCENTRATIONS[(place[:, d, None] > below).sum(axis=1)]
        drawn = generator.standard_gamma(votes + chosen[:, None])
        total = drawn.sum(axis=1)
        # All of them can underflow at the smallest concentration, where one answer has everything.
        largest[:, d] = np.where(total > 0, drawn.max(axis=1) / np.where(total > 0, total, 1), 1)
    return largest


def _basis(tallies: Sequence[Tally], fit: Spectrum, margin: float) -> str:
    unknown = sum(not _wrong_votes(tally) and tally.n > tally.c + tally.abstained for tally in tallies)
    samples = f"{fit.n_min}" if fit.n_min == fit.n_max else f"{fit.n_min} to {fit.n_max}"
    words = [
        f"Majority vote of infinitely many samples, predicted from {len(tallies)} items with {samples} samples each; "
        f"at most, every item that is above its guessing floor by {margin:g} of the room above it."
    ]
    if unknown == len(tallies):
        words.append("Without votes: an item counts where more than half of its answers are right.")
    elif unknown:
        words.append(f"{unknown} items without votes count where more than half of their answers are right.")
    if not fit.converged:
        words.append(f"The fit didn't converge (gap {fit.gap:.2g}).")
    return " ".join(words)
