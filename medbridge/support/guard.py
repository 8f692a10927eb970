"""Whether a measurement can be trusted at all. A stratum that fails here gets no verdict, whatever its numbers say.

It looks at facts that the caller counts from stored rollouts; it doesn't look at support. Each check can be passed by
every model: what is refused is how it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

Floats = NDArray[np.float64]

Kind = Literal["samples", "images", "length", "truncated", "abstained", "option_order", "repeats"]

BETS = (0.001, 0.01, 0.1, 0.5, 0.9, 1.0)
"""Shares of the wealth staked on a repeat, each in a game of its own: large ones find a sampler that always repeats,
small ones one that repeats now and then."""

_ROUNDING = 1e-5
"""Added to each log-probability: float32 with a softmax over a large vocabulary is off by about a tenth of this."""


class GuardSettings(BaseModel):
    """From when on a measurement isn't trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_abstained: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Largest share of the samples without a readable answer. Above it, support tells more about the "
        "form of the answers than about knowledge.",
    )
    max_truncated: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Largest share of the samples cut off at `max_new_tokens`. A cut sample rarely counts as right, so "
        "this is also about the most by which the cut may have lowered the accuracy.",
    )
    false_alarm: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="Probability, at most, with which chance alone makes a sound measurement fail the check for "
        "repeated samples, and the one for option orders.",
    )


@dataclass(frozen=True, slots=True)
class Invalid:
    """Why a measurement isn't trusted: a kind, and one sentence with the numbers and the cure."""

    kind: Kind
    reason: str


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often the samples of items repeat each other.

    Attributes:
        items: items with at least two samples.
        identical: those of them whose samples are all the same, token for token.
        samples, distinct: samples of these items, and different completions among them, each item's counted alone.
        known: items whose log-probabilities are known.
        log_wealth: what each of the `BETS` has grown to over these items, as a logarithm.
    """

    items: int = 0
    identical: int = 0
    samples: int = 0
    distinct: int = 0
    known: int = 0
    log_wealth: tuple[float, ...] = (0.0,) * len(BETS)

    @property
    def log_evidence(self) -> float:
        """Logarithm of the mean wealth: above ``-log(p)`` with probability at most p if the samples are as recorded."""
        return float(np.logaddexp.reduce(self.log_wealth)) - math.log(len(BETS))


@dataclass(frozen=True, slots=True)
class Facts:
    """What was counted of one stratum, greedy completions left out.

    Attributes:
        items: items measured.
        samples: samples asked of each.
        miscounted: items with another number of samples.
        images_asked, images_fed: images of all samples' items, and those that the engine gave to the model; None where
            it doesn't tell.
        longest: tokens of the longest completion.
        max_new_tokens: the most that were asked for; 0 where that isn't known, and `longest` is 0.
        truncated, abstained, correct: shares of the samples, 0 to 1.
        misordered: samples whose options stood in another order than asked.
        one_order: items with options and at least two samples that all show one order.
        one_order_expected: how many of those independent orders give on average (the sum of `one_order_chance`).
        repeats: of all items together (`total_repeats`).
    """

    items: int
    samples: int
    miscounted: int
    images_asked: int
    images_fed: int | None
    longest: int
    max_new_tokens: int
    truncated: float
    abstained: float
    correct: float
    misordered: int
    one_order: int
    one_order_expected: float
    repeats: Repeats


def check(facts: Facts, settings: GuardSettings) -> list[Invalid]:
    """Everything that is wrong with a measurement, causes before their effects. None: it can be judged."""
    found: list[Invalid] = []

    def refuse(kind: Kind, reason: str) -> None:
        found.append(Invalid(kind, reason))

    if facts.miscounted:
        refuse(
            "samples",
            f"{facts.miscounted} of {facts.items} items don't have the {facts.samples} samples that were asked for: "
            "complete the sampling.",
        )
    if facts.images_fed is not None and facts.images_fed != facts.images_asked:
        refuse(
            "images",
            f"The model was given {facts.images_fed} images where the questions show {facts.images_asked}: check that "
            "the engine and the model's processor take images, and how many in one prompt.",
        )
    if facts.longest > facts.max_new_tokens:
        refuse(
            "length",
            f"A completion has {facts.longest} tokens, more than the {facts.max_new_tokens} asked for: the engine "
            "doesn't follow the sampling settings.",
        )
    if facts.misordered:
        refuse(
            "option_order",
            f"{facts.misordered} samples show their options in another order than was asked for, which moves the "
            "guessing floor: sample again with the orders that the request gives.",
        )
    elif _tail_bound(facts.one_order, facts.one_order_expected) <= settings.false_alarm:
        refuse(
            "option_order",
            f"{facts.one_order} items show one option order in all samples, where independent orders give "
            f"{facts.one_order_expected:.2g}: a model that prefers a position is then no longer held down by the "
            "guessing floor; draw an order for each sample.",
        )
    if facts.truncated > settings.max_truncated:
        at = f" at {facts.max_new_tokens} tokens" if facts.max_new_tokens else ""
        refuse(
            "truncated",
            f"{facts.truncated:.0%} of the samples are cut off{at}, more than {settings.max_truncated:.0%}: raise "
            "`max_new_tokens`.",
        )
    if facts.abstained > settings.max_abstained:
        refuse(
            "abstained",
            f"{facts.abstained:.0%} of the samples give no readable answer, more than {settings.max_abstained:.0%}: "
            "look at the completions, then change the prompt or teach the form of the answer first.",
        )
    if reason := _repeated(facts, settings):
        refuse("repeats", reason)
    return found


def one_order_chance(options: int, samples: int) -> float:
    """Probability that independent orders of `options` options are all the same in `samples` samples:
    ``(1 / options!)^(samples - 1)``, and 0 where that says nothing (one option, or one sample).
    """
    if options < 2 or samples < 2:
        return 0.0
    return math.exp(-(samples - 1) * math.lgamma(options + 1))


def item_repeats(
    token_ids: Sequence[ArrayLike],
    logprobs: Sequence[ArrayLike] | None,
    prompts: Sequence[Hashable] | None = None,
) -> Repeats:
    """How the samples of one item repeat each other, held against their own log-probabilities.

    A sampler that ignores its temperature repeats itself, and so does a confident model, honestly. They differ in the
    log-probabilities: sample j is the completion y with probability ``q_j(y)``, the product of the probabilities
    recorded for its tokens.

    The test is a bet against the sampler. Before each sample, the share `bet` of the wealth is laid on "it repeats an
    earlier one", over the earlier completions by their frequency w (those of the same prompt alone, where there are
    any). A repeat of y pays ``w(y) / q_j(y)``, anything else nothing:

        wealth *= 1 - bet + bet * w(y_j) / q_j(y_j).

    The mean of this factor is ``1 - bet + bet * sum over possible y of w(y) <= 1`` for every model, so the
    wealth is a supermartingale, over all samples and items, and so is the mean over `BETS`. By Ville's inequality it
    ever exceeds 1 / alpha with probability at most alpha. (Multiplying the probabilities of the items that came out
    identical, and of those only, wouldn't do: items are picked by their outcome, and over many items honest samples
    fall below any level.)

    Args:
        token_ids: integers [tokens] of each sample, in the order of sampling.
        logprobs: of each token in the distribution that it was drawn from, at the sampling temperature and
            renormalised over the nucleus; None where they aren't known. A value that isn't finite counts as unknown,
            and its probability as 1.
        prompts: what tells the samples' prompts apart (the option orders); None: all have the same.

    Raises:
        ValueError: lengths that differ.
    """
    for name, given in (("logprobs", logprobs), ("prompts", prompts)):
        if given is not None and len(given) != len(token_ids):
            raise ValueError(f"{name} has {len(given)} entries for {len(token_ids)} samples")
    if len(token_ids) < 2:
        return Repeats()
    if logprobs is not None and not any(np.isfinite(given).any() for given in logprobs):
        logprobs = None
    tokens = [np.asarray(ids).astype(np.int64) for ids in token_ids]
    texts: list[Hashable] = [ids.tobytes() for ids in tokens]
    wealth: Floats = np.zeros(len(BETS))
    if logprobs is not None:
        shares = _earlier_shares(texts, prompts if prompts is not None else [None] * len(texts))
        with np.errstate(divide="ignore"):
            payoffs = np.log(shares) - _log_probabilities(tokens, logprobs)
            bets = np.log(BETS)[:, None], np.log1p(-np.array(BETS))[:, None]
        wealth = np.logaddexp(bets[1], bets[0] + payoffs[1:]).sum(axis=1)
    distinct = len(set(texts))
    return Repeats(
        items=1,
        identical=int(distinct == 1),
        samples=len(texts),
        distinct=distinct,
        known=int(logprobs is not None),
        log_wealth=tuple(wealth.tolist()),
    )


def total_repeats(items: Iterable[Repeats]) -> Repeats:
    """The repeats of many items together."""
    each = list(items)
    return Repeats(
        items=sum(one.items for one in each),
        identical=sum(one.identical for one in each),
        samples=sum(one.samples for one in each),
        distinct=sum(one.distinct for one in each),
        known=sum(one.known for one in each),
        log_wealth=tuple(sum(logs) for logs in zip(*(one.log_wealth for one in [Repeats(), *each]), strict=True)),
    )


def _repeated(facts: Facts, settings: GuardSettings) -> str | None:
    repeats = facts.repeats
    cure = (
        "the sampler doesn't draw as it says; set temperature, top_p and top_k where the engine reads them, and "
        "a seed for each sample."
    )
    counted = (
        f"{repeats.identical} of {repeats.items} items have {facts.samples} identical samples "
        f"({repeats.distinct} different completions among {repeats.samples})"
    )
    if repeats.log_evidence >= -math.log(settings.false_alarm):
        power = math.ceil(-repeats.log_evidence / math.log(10))
        return f"{counted}, which their own log-probabilities allow with probability at most 1e{power}: {cure}"
    if repeats.items and not repeats.known and repeats.identical == repeats.items and facts.correct < 1:
        return f"{counted}, not all are right, and no log-probabilities tell whether the model is that sure: {cure}"
    return None


def _earlier_shares(texts: Sequence[Hashable], prompts: Sequence[Hashable]) -> Floats:
    """For each sample, how frequent its completion is among the earlier ones, of its own prompt where it has any."""
    shares = np.zeros(len(texts))
    counts: dict[Hashable, int] = {}  # of a prompt, of a text, and of both together
    for j, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        keys = ("prompt", prompt), ("text", text), ("both", prompt, text)
        of_prompt, of_text, of_both = (counts.get(key, 0) for key in keys)
        if of_prompt:
            shares[j] = of_both / of_prompt
        elif j:
            shares[j] = of_text / j
        counts |= {key: counts.get(key, 0) + 1 for key in keys}
    return shares


def _log_probabilities(tokens: Sequence[NDArray[np.int64]], logprobs: Sequence[ArrayLike]) -> Floats:
    """log q of each sample: the sum over its tokens, none of which can be above 0."""
    values = [np.asarray(given, dtype=np.float64) for given in logprobs]
    for j, (ids, given) in enumerate(zip(tokens, values, strict=True)):
        if ids.shape != given.shape or ids.ndim != 1:
            raise ValueError(f"sample {j}: {given.shape} log-probabilities for {ids.shape} tokens")
    flat = np.concatenate(values)
    terms = np.where(np.isfinite(flat), np.minimum(0.0, flat + _ROUNDING), 0.0)
    ends = np.cumsum([len(given) for given in values])
    sums = np.r_[0.0, np.cumsum(terms)]
    found: Floats = sums[ends] - sums[np.r_[0, ends[:-1]]]
    return found


def _tail_bound(count: int, mean: float) -> float:
    """Chernoff's bound on P(at least `count`) of independent events that number `mean` on average."""
    if count <= mean:
        return 1.0
    if mean == 0:
        return 0.0
    return math.exp(count - mean - count * math.log(count / mean))
