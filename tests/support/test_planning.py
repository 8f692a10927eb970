"""The forecast of what would decide: about right when drawn anew, and honest about what never would."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from medbridge.support import (
    GateSettings,
    Measured,
    SupportEstimate,
    Tally,
    decide,
    item_scores,
    measure,
    what_would_decide,
)

FAST = GateSettings(replicates=400)


def tallies_of(correct: np.ndarray, samples: int, floor: float, name: str = "item") -> list[Tally]:
    return [
        Tally(f"{name} {i}", f"{name} {i}", floor, samples, int(c), greedy_correct=True) for i, c in enumerate(correct)
    ]


def draw(generator: np.random.Generator, items: int, samples: int, floor: float, share: float) -> list[Tally]:
    chance = np.where(generator.random(items) < share, 1.0, floor)
    return tallies_of(generator.binomial(samples, chance), samples, floor)


def undecided(
    value: float, low: float, high: float, between: float = math.nan, items: int = 100, samples: int = 1600
) -> SupportEstimate:
    base = measure(draw(np.random.default_rng(0), 40, 4, 0.25, 0.5), FAST, seed=0)
    return replace(
        base,
        items=items,
        samples=samples,
        greedy_items=items,
        support=Measured(value, low, high),
        between_share=between,
    )


@pytest.mark.parametrize(("floor", "share"), [(0.0, 0.62), (0.25, 0.6), (0.5, 0.66)])
def test_the_items_it_names_decide_about_half_of_the_time(floor: float, share: float) -> None:
    """The truth is what was measured, drawn anew: the empirical distribution of a typical undecided stratum."""
    generator = np.random.default_rng(1)
    decided, cases = 0, 60
    known = round(50 * share)
    guessed = generator.binomial(8, floor, 50 - known)
    pool = tallies_of(np.r_[np.full(known, 8), guessed], 8, floor)
    estimate = measure(pool, FAST, seed=0)
    verdict = decide(estimate, FAST)
    assert verdict.kind == "undecided"
    assert verdict.more is not None and not verdict.more["capped"]
    size = len(pool) + verdict.more["items"]
    for case in range(cases):
        drawn = [
            replace(pool[i], item_id=str(j), cluster=str(j)) for j, i in enumerate(generator.integers(0, 50, size))
        ]
        decided += decide(measure(drawn, FAST, seed=case), FAST).kind != "undecided"
    assert 0.4 * cases <= decided <= 0.9 * cases
    assert f"about {verdict.more['items']} more items would decide" in verdict.reason


def test_the_samples_it_names_bring_the_variance_down() -> None:
    """All items alike, so that only sampling blurs support: with so many more samples the variance is as wanted."""
    generator = np.random.default_rng(2)
    chosen = GateSettings(replicates=1000, k=2)
    estimate = measure(tallies_of(generator.binomial(4, np.full(100, 0.25)), 4, 0.0), chosen, seed=0)
    assert estimate.support is not None
    plan = what_would_decide(estimate, chosen, 0.05)
    assert plan["samples"] is not None
    wanted = (abs(estimate.support.value - 0.5) / 1.645) ** 2
    more = tallies_of(generator.binomial(4 + plan["samples"], np.full(20_000, 0.25)), 4 + plan["samples"], 0.0)
    reached = np.var(item_scores(more, chosen, 2).top) / 100
    assert reached <= 1.1 * wanted


def test_the_formulas() -> None:
    near = undecided(0.6, 0.4, 0.8)  # twice as wide as the distance: four times the items
    assert what_would_decide(near, FAST, 0.05) == {
        "items": 300, "samples": None, "capped": False, "bottleneck": "items",
    }  # fmt: skip
    # A quarter of the variance may stay; 0.1 of it is between items: 0.9 * 16 / n' = 0.15.
    spread = undecided(0.6, 0.4, 0.8, between=0.1)
    assert what_would_decide(spread, FAST, 0.05) == {
        "items": 300, "samples": 96 - 16, "capped": False, "bottleneck": "items",
    }  # fmt: skip
    # Nothing is between items: four times the samples, one greedy completion an item less.
    alike = what_would_decide(undecided(0.6, 0.4, 0.8, between=0.0), FAST, 0.05)
    assert (alike["samples"], alike["bottleneck"]) == (48, "samples")
    # More between items than may stay: no number of samples would do.
    assert what_would_decide(undecided(0.6, 0.4, 0.8, between=0.3), FAST, 0.05)["samples"] is None


def test_the_side_that_counts_is_the_one_towards_the_threshold() -> None:
    low = what_would_decide(undecided(0.6, 0.4, 0.99), FAST, 0.05)
    high = what_would_decide(undecided(0.4, 0.01, 0.6), FAST, 0.05)
    assert low["items"] == high["items"] == 300


def test_many_strata_need_more() -> None:
    near = undecided(0.6, 0.4, 0.8)
    assert what_would_decide(near, FAST, 0.005)["items"] > 2 * what_would_decide(near, FAST, 0.05)["items"]
    sure_alone = undecided(0.6, 0.51, 0.69)
    assert what_would_decide(sure_alone, FAST, 0.05)["items"] == 1


def test_a_truth_at_the_threshold_is_not_forecast_for_ever() -> None:
    verdict = decide(measure(tallies_of(np.array([16] * 10 + [0] * 10), 16, 0.0), FAST, seed=0), FAST)
    assert verdict.more == {"items": 380, "samples": None, "capped": True, "bottleneck": "items"}
    assert "too near" in verdict.reason


def test_reasons_name_what_is_cheaper() -> None:
    chosen = GateSettings(replicates=1000, k=1, error_control="none")
    generator = np.random.default_rng(3)
    estimate = measure(tallies_of(generator.binomial(4, np.full(60, 0.47)), 4, 0.0), chosen, seed=0)
    verdict = decide(replace(estimate, between_share=0.0), chosen)
    assert verdict.kind == "undecided" and verdict.more is not None
    assert verdict.more["bottleneck"] == "samples"
    assert f"about {verdict.more['samples']} more samples per item would decide" in verdict.reason


def test_without_support_there_is_nothing_to_plan() -> None:
    with pytest.raises(ValueError, match="no support"):
        what_would_decide(measure([], FAST, seed=0), FAST, 0.05)
