"""Study: wrong verdicts at truths where what is estimated equals the threshold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import binom

from gate_studies.candidates import ALL_OPTIONS
from gate_studies.gate import (
    ALPHA,
    CHOSEN,
    MARGINS,
    REPLICATES,
    TAU,
    at_threshold,
    candidates,
    chosen,
    cover_rates,
    verdict_rates,
)
from gate_studies.running import Plan, Row, kinds, mean, spread, table
from gate_studies.truths import Truth


@dataclass(frozen=True)
class Bound:
    """A truth at which the estimand of one statistic is exactly the threshold."""

    statistic: str
    truth: Truth
    replicates: int = REPLICATES


def _bound_rates(runs: int, bound: Bound, generator: np.random.Generator) -> tuple[float, float]:
    truth = bound.truth
    if bound.statistic.startswith("cover"):
        bridge, sharpen = cover_rates(truth, _runs(bound.statistic, runs), generator)
        j = [f"cover, margin {m:g}" for m in MARGINS].index(bound.statistic)
    else:
        scores = candidates(truth.floors, truth.n).of(bound.statistic)
        bridge, sharpen = verdict_rates(truth, scores, runs, generator, bound.replicates)
        j = 0
    return float(bridge[j]), float(sharpen[j])


def _runs(statistic: str, runs: int) -> int:
    """Cover takes an EM per replicate."""
    return max(20, runs // 4) if statistic.startswith("cover") else runs


def _cover_bounds(truth: Truth) -> list[Bound]:
    """Cover is the share of items whose p is above the margin: tau of them."""
    (floor,) = truth.floors
    bounds = []
    for margin in MARGINS:

        def share(skilled: bool, least: float = floor + margin * (1 - floor)) -> float:
            return sum(w for p, w in truth.chances(floor, skilled) if p > least)

        unskilled = share(False)
        if share(True) == 1 and unskilled < TAU:
            bounds.append(Bound(f"cover, margin {margin:g}", replace(truth, pi=(TAU - unskilled) / (1 - unskilled))))
    return bounds


FEW = ((2,), (4,), (0,), (2, 0))
SINGLE = [(20, 1, 0.0), (50, 1, 0.0), (200, 1, 0.0), (2000, 1, 0.0)]
CLUSTERED = [(items, 4, rho) for items in (48, 200) for rho in (0.0, 0.5, 1.0)]


def _bounds(plan: Plan) -> list[Bound]:
    skills = (0.9,) if plan.quick else (0.3, 0.6, 0.9)
    bounds = []
    for m, s, items in itertools.product(FEW, skills, (20, 200)):
        for kind in kinds(m):
            truth = Truth(0.5, s, m, kind, items)
            for name in candidates(truth.floors, truth.n).names:
                if name != CHOSEN and (found := at_threshold(truth, candidates(truth.floors, truth.n).of(name))):
                    bounds.append(Bound(name, found))
            if len(m) == 1 and items == 200:
                bounds += _cover_bounds(truth)
    for m, s, (items, size, rho) in itertools.product(ALL_OPTIONS, skills, SINGLE + CLUSTERED):
        for kind in kinds(m):
            truth = Truth(0.5, s, m, kind, items, size=size, correlation=rho)
            if found := at_threshold(truth, chosen(truth)):
                bounds.append(Bound(CHOSEN, found))
    return bounds[:: 6 if plan.quick else 1]


def run_threshold(plan: Plan) -> dict[str, Any]:
    """Wrong verdicts at truths where the estimand is the threshold: each side may err in a share alpha of the runs."""
    runs = plan.runs_or(1000)
    bounds = _bounds(plan)
    found = list(zip(bounds, spread(partial(_bound_rates, runs), bounds, plan, "threshold"), strict=True))
    edge = at_threshold(Truth(0.5, 0.9, items=100), chosen(Truth(0.5, 0.9)))
    assert edge is not None
    checks = [Bound(CHOSEN, edge, replicates) for replicates in (REPLICATES, 2000)]
    checked = spread(partial(_bound_rates, 5 * runs), checks, plan, "threshold, replicates")

    def design(bound: Bound) -> tuple[int, int, float]:
        return bound.truth.items, bound.truth.size, bound.truth.correlation

    # All statistics at the same designs.
    compared = [(b, r) for b, r in found if b.truth.options in FEW and design(b) in ((20, 1, 0.0), (200, 1, 0.0))]
    order = [*candidates((0.25,), 16).names, *(f"cover, margin {margin:g}" for margin in MARGINS)]
    names = [name for name in order if any(bound.statistic == name for bound, _ in compared)]
    by_design = {d: [r for b, r in found if b.statistic == CHOSEN and design(b) == d] for d in SINGLE + CLUSTERED}
    return {
        "runs": runs,
        "runs_of": {"threshold-replicates": 5 * runs},
        "by_candidate": [
            {"candidate": name, **_errors([r for b, r in compared if b.statistic == name], _runs(name, runs))}
            for name in names
        ],
        "by_design": [
            {"items": items, "size": size, "correlation": rho, **_errors(rates, runs)}
            for (items, size, rho), rates in by_design.items()
            if rates
        ],
        "by_replicates": [
            {"replicates": bound.replicates, **_errors([rates], 5 * runs)}
            for bound, rates in zip(checks, checked, strict=True)
        ],
    }


def _errors(rates: Sequence[tuple[float, float]], runs: int) -> Row:
    bridge, sharpen = [b for b, _ in rates], [s for _, s in rates]
    # What the largest of so many rates stays below with probability 0.95 when each true rate is alpha.
    chance = binom.ppf(0.95 ** (1 / len(rates)), runs, ALPHA) / runs
    return {
        "truths": len(rates),
        "wrong_bridge": mean(bridge),
        "worst_bridge": round(max(bridge), 4),
        "wrong_sharpen": mean(sharpen),
        "worst_sharpen": round(max(sharpen), 4),
        "chance": round(float(chance), 4),
    }


_ERROR_KEYS = ("truths", "wrong_bridge", "worst_bridge", "wrong_sharpen", "worst_sharpen", "chance")
_ERRORS = ("truths", "bridge, mean", "bridge, worst", "sharpen, mean", "sharpen, worst", "worst by chance")


def render_threshold(figures: dict[str, Any]) -> dict[str, str]:
    """Tables `threshold-candidates`, `threshold-designs` and `threshold-replicates`."""
    return {
        "threshold-candidates": table(
            ["statistic", *_ERRORS],
            [[row["candidate"], *(row[key] for key in _ERROR_KEYS)] for row in figures["by_candidate"]],
        ),
        "threshold-designs": table(
            ["items, items per image, correlation", *_ERRORS],
            [
                [
                    f"{row['items']:,}, {row['size']}, {row['correlation']:g}"
                    if row["size"] > 1
                    else f"{row['items']:,}, 1",
                    *(row[key] for key in _ERROR_KEYS),
                ]
                for row in figures["by_design"]
            ],
        ),
        "threshold-replicates": table(
            ["replicates", *_ERRORS],
            [[f"{row['replicates']:,}", *(row[key] for key in _ERROR_KEYS)] for row in figures["by_replicates"]],
        ),
    }
