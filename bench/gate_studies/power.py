"""Study: how often the verdict is right, by items and samples."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np

from gate_studies.candidates import FEW_OPTIONS
from gate_studies.gate import TAU, chosen, verdict_rates
from gate_studies.running import Plan, option_name, spread, table
from gate_studies.truths import Truth


def _chosen_rates(runs: int, truth: Truth, generator: np.random.Generator) -> tuple[float, float]:
    bridge, sharpen = verdict_rates(truth, chosen(truth), runs, generator)
    return float(bridge[0]), float(sharpen[0])


def run_power(plan: Plan) -> dict[str, Any]:
    """P(right verdict) of the chosen statistic by items, samples and share of skilled items."""
    runs = plan.runs_or(400)
    items = (50, 200) if plan.quick else (20, 50, 100, 200, 500, 1000, 2000)
    samples = (16,) if plan.quick else (8, 16, 64)
    shares, skills = (0.2, 0.35, 0.65, 0.8), (0.3, 0.6, 0.9)
    truths = [
        Truth(pi, s, m, "wrong" if m == (0,) else "repeat", count, n)
        for m, s, count, n, pi in itertools.product(FEW_OPTIONS, skills, items, samples, shares)
    ]
    rates = dict(zip(truths, spread(partial(_chosen_rates, runs), truths, plan, "power"), strict=True))

    def right(truth: Truth) -> float:
        bridge, sharpen = rates[truth]
        return sharpen if truth.pi > TAU else bridge

    def opposite(truth: Truth) -> float:
        bridge, sharpen = rates[truth]
        return bridge if truth.pi > TAU else sharpen

    return {
        "runs": runs,
        "by_items": [
            {
                "options": option_name(m),
                "skill": s,
                "items": count,
                "n": n,
                "rollouts": count * n,
                "right": [right(t) for t in part],
                "wrong": [opposite(t) for t in part],
            }
            for m, s, count, n in itertools.product(FEW_OPTIONS, skills, items, samples)
            if (part := [t for t in truths if (t.options, t.skill, t.items, t.n) == (m, s, count, n)])
        ],
        "shares": shares,
    }


def render_power(figures: dict[str, Any]) -> dict[str, str]:
    """Tables `power` (16 samples) and `power-samples` (200 items)."""
    shares = [f"pi = {pi:g}" for pi in figures["shares"]]
    rows = figures["by_items"]
    return {
        "power": table(
            ["options", "items", "rollouts", *shares],
            [
                [row["options"], row["items"], row["rollouts"], *row["right"]]
                for row in rows
                if row["n"] == 16 and row["skill"] == 0.6
            ],
        ),
        "power-samples": table(
            ["options", "skill s", "samples", "rollouts", *shares],
            [
                [row["options"], f"{row['skill']:g}", row["n"], row["rollouts"], *row["right"]]
                for row in sorted(rows, key=lambda row: (row["options"], row["skill"]))
                if row["items"] == 200
            ],
        ),
    }
