"""Study: which statistic agrees with the share of items that have skill?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gate_studies.gate import CHOSEN, MARGINS, candidates, cover_rates, verdict_rates
from gate_studies.running import Plan, Row, kinds, mean, option_name, spread, table
from gate_studies.truths import Truth

ALL_OPTIONS: tuple[tuple[int, ...], ...] = ((2,), (3,), (4,), (5,), (8,), (11,), (0,), (2, 0))
FEW_OPTIONS: tuple[tuple[int, ...], ...] = ((2,), (4,), (0,))


def _candidate_rates(runs: int, truth: Truth, generator: np.random.Generator) -> dict[str, tuple[float, float]]:
    scores = candidates(truth.floors, truth.n)
    bridge, sharpen = verdict_rates(truth, scores, runs, generator)
    rates = {name: (float(bridge[j]), float(sharpen[j])) for j, name in enumerate(scores.names)}
    if truth.size == 1 and len(truth.options) == 1 and truth.items == 200 and truth.pi in (0.35, 0.65):
        bridge, sharpen = cover_rates(truth, max(20, runs // 4), generator)
        rates |= {f"cover, margin {m:g}": (float(bridge[j]), float(sharpen[j])) for j, m in enumerate(MARGINS)}
    return rates


def run_candidates(plan: Plan) -> dict[str, Any]:
    """Every candidate at every truth: does the verdict agree with the share of items that have skill?"""
    runs = plan.runs_or(300)
    options = FEW_OPTIONS if plan.quick else ALL_OPTIONS
    skills = (0.3, 0.9) if plan.quick else (0.1, 0.3, 0.6, 0.9)
    items = (200,) if plan.quick else (20, 50, 100, 200, 500, 2000)
    shares = (0.35, 0.65) if plan.quick else (0.2, 0.35, 0.65, 0.8)
    truths = [
        Truth(pi, s, m, kind, count)
        for m, s, pi, count in itertools.product(options, skills, shares, items)
        for kind in kinds(m)
    ]
    clustered = [
        Truth(pi, s, m, kind, 200, size=4, correlation=rho)
        for m, s, pi, rho in itertools.product(FEW_OPTIONS, (0.3, 0.9), (0.35, 0.65), (0.0, 0.5, 1.0))
        for kind in kinds(m)
    ]
    truths += clustered[:: 6 if plan.quick else 1]
    rates = spread(partial(_candidate_rates, runs), truths, plan, "candidates")
    found = list(zip(truths, rates, strict=True))
    plain = [(t, r) for t, r in found if t.items == 200 and t.size == 1]
    return {
        "runs": runs,
        "truths": len(truths),
        "by_candidate": _by_candidate([(t, r) for t, r in plain if t.skill > 0.1]),
        "by_skill": _by_skill(plain),
        "by_options": _by_options([(t, r) for t, r in plain if t.skill > 0.1]),
        "clustered": _by_cluster([(t, r) for t, r in found if t.items == 200 and t.skill > 0.1]),
    }


Rates = list[tuple[Truth, dict[str, tuple[float, float]]]]


def _summary(found: Rates, name: str) -> Row:
    """Mean P(bridge) at pi = 0.35 and P(sharpen) at 0.65, and how often the verdict is the opposite."""
    weak = [r[name] for t, r in found if t.pi == 0.35 and name in r]
    strong = [r[name] for t, r in found if t.pi == 0.65 and name in r]
    return {
        "bridge_at_weak": mean(bridge for bridge, _ in weak),
        "sharpen_at_strong": mean(sharpen for _, sharpen in strong),
        "wrong_sharpen": mean(sharpen for _, sharpen in weak),
        "wrong_bridge": mean(bridge for bridge, _ in strong),
    }


def _by_candidate(found: Rates) -> list[Row]:
    names = max((r for _, r in found), key=len)
    groups: dict[str, Callable[[Truth], bool]] = {
        "guesses afresh": lambda t: t.unskilled == "fresh" and 0 not in t.options,
        "repeats one guess": lambda t: t.unskilled == "repeat" and 0 not in t.options,
        "always wrong, 3 or more options": lambda t: t.unskilled == "wrong" and min(t.options) > 2,
        "always wrong, 2 options": lambda t: t.unskilled == "wrong" and t.options == (2,),
        "open answers": lambda t: t.options == (0,),
    }
    return [
        {"candidate": name, "unskilled": group, **_summary([(t, r) for t, r in found if holds(t)], name)}
        for group, holds in groups.items()
        for name in names
    ]


def _by_skill(found: Rates) -> list[Row]:
    names = max((r for _, r in found), key=len)
    return [
        {"candidate": name, "skill": s, **_summary([(t, r) for t, r in found if t.skill == s and _neutral(t)], name)}
        for name in names
        for s in sorted({t.skill for t, _ in found})
    ]


def _neutral(truth: Truth) -> bool:
    """Truths whose unskilled items are guessed: where support above the floor should read pi."""
    return truth.unskilled in ("fresh", "repeat") or truth.options == (0,)


def _by_options(found: Rates) -> list[Row]:
    return [
        {"options": option_name(m), "unskilled": kind, **_summary(part, CHOSEN)}
        for m in ALL_OPTIONS
        for kind in ("fresh", "repeat", "wrong", "faint")
        if (part := [(t, r) for t, r in found if t.options == m and t.unskilled == kind])
    ]


def _by_cluster(found: Rates) -> list[Row]:
    few = [(t, r) for t, r in found if t.options in FEW_OPTIONS and t.skill in (0.3, 0.9) and _neutral(t)]
    return [
        {"size": size, "correlation": rho, **_summary(part, CHOSEN)}
        for size, rho in ((1, 0.0), (4, 0.0), (4, 0.5), (4, 1.0))
        if (part := [(t, r) for t, r in few if t.size == size and t.correlation == rho])
    ]


_SIDES = ("bridge at 0.35", "sharpen at 0.65", "wrong sharpen", "wrong bridge")


def _sides(row: Row) -> list[float]:
    return [row[key] for key in ("bridge_at_weak", "sharpen_at_strong", "wrong_sharpen", "wrong_bridge")]


def render_candidates(figures: dict[str, Any]) -> dict[str, str]:
    """Tables `candidates`, `candidates-skill`, `reached-options` and `reached-clusters`."""
    by_candidate = figures["by_candidate"]
    groups = list(dict.fromkeys(row["unskilled"] for row in by_candidate))
    names = list(dict.fromkeys(row["candidate"] for row in by_candidate))
    of = {(row["candidate"], row["unskilled"]): row for row in by_candidate}
    skills = sorted({row["skill"] for row in figures["by_skill"]})
    by_skill = {(row["candidate"], row["skill"]): row for row in figures["by_skill"]}

    def right_and_wrong(row: Row) -> str:
        right = np.nanmean([row["bridge_at_weak"], row["sharpen_at_strong"]])
        wrong = np.nanmean([row["wrong_sharpen"], row["wrong_bridge"]])
        return f"{right:.2f} / {wrong:.2f}"

    return {
        "candidates": table(
            ["candidate", *groups], [[name, *(right_and_wrong(of[name, g]) for g in groups)] for name in names]
        ),
        "candidates-skill": table(
            ["candidate", *(f"s = {s:g}" for s in skills)],
            [[name, *(right_and_wrong(by_skill[name, s]) for s in skills)] for name in names],
        ),
        "reached-options": table(
            ["options", "unskilled", *_SIDES],
            [[row["options"], row["unskilled"], *_sides(row)] for row in figures["by_options"]],
        ),
        "reached-clusters": table(
            ["items per image", "correlation", *_SIDES],
            [[str(row["size"]), f"{row['correlation']:g}", *_sides(row)] for row in figures["clustered"]],
        ),
    }
