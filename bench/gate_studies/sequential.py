"""Studies: the sequential plan against the fixed one, for one stratum and for eight judged together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from gate_studies.gate import ACCURACY_TARGET, ALPHA, TAU, at_threshold, bootstrap, chosen, p_values
from gate_studies.running import Plan, Row, mean, option_name, spread, table
from gate_studies.truths import Counts, Floats, Mask, Sample, Truth, Unskilled, draw_items
from medbridge.support.sequential import log_e_values
from medbridge.support.strata import reject, reject_e

LOOK = 16
"""Items between two looks."""

FINAL_REPLICATES = 2000
"""The last look tests at alpha / 2, shared over strata: 300 replicates could reject nothing there."""

CLAIMS = ("below", "above", "at_target", "short_of_target")


@dataclass(frozen=True)
class Stopped:
    """Where the sequential plan stands at the end, [runs, strata] each.

    Attributes:
        below, above: proven by e-values.
        items: items used.
        exhausted: whether all were.
    """

    below: Mask
    above: Mask
    items: Counts
    exhausted: Mask


def log_evidence(truth: Truth, counts: Counts, greedy: Mask) -> tuple[Floats, Counts]:
    """Log e-values of the four claims after each look, [4, runs, looks], and the items used by then, [looks]."""
    scores = chosen(truth)
    bounds = (scores.low - TAU * scores.unseen).item(), (scores.high - TAU * scores.unseen).item()
    support = (scores.top - TAU * scores.bottom)[:, 0][counts].mean(axis=2)
    accuracy = (greedy - ACCURACY_TARGET).mean(axis=2)
    above, below = log_e_values(support, *bounds, 0.0)
    at_target, short = log_e_values(accuracy, -ACCURACY_TARGET, 1 - ACCURACY_TARGET, 0.0)
    clusters = support.shape[1]
    step = math.ceil(LOOK / truth.size)
    looks = np.unique(np.minimum(np.arange(step, clusters + step, step), clusters)) - 1
    claims = np.stack([below, above, np.minimum(at_target, above), np.minimum(short, above)])
    return claims[..., looks], (looks + 1) * truth.size


def stop(log_e: Floats, items: Counts, *, support_only: bool = False) -> Stopped:
    """Look by look: strata whose verdict is proven stop, at alpha / 2 over the strata by e-BH; what is proven stays.

    Args:
        log_e: [4, runs, strata, looks], claims in the order of CLAIMS.
        items: used by each look, [looks].
        support_only: stop at support below or above, without waiting for what Acc@1 makes of the latter.
    """
    _, runs, strata, looks = log_e.shape
    proven = np.zeros((4, runs, strata), dtype=bool)
    now = log_e[..., 0].copy()
    open_ = np.ones((runs, strata), dtype=bool)
    used = np.zeros((runs, strata), dtype=np.int64)
    for look in range(looks):
        used[open_] = items[look]
        now = np.where(open_ & ~proven, log_e[..., look], now)
        # An e-value past exp(50) proves anything; the cut keeps exp from overflowing.
        values = np.exp(np.minimum(now, 50.0))
        for claim, run in zip(*np.nonzero((values >= 1 / ALPHA).any(axis=2)), strict=True):
            proven[claim, run] |= reject_e(values[claim, run], ALPHA / 2, "fdr")
        last = (1,) if support_only else (2, 3)
        open_ &= ~(proven[0] | proven[list(last)].any(axis=0))
    return Stopped(proven[0], proven[1] | proven[2] | proven[3], used, open_)


def final_look(stopped: Stopped | None, p_below: Floats, p_above: Floats) -> tuple[Mask, Mask]:
    """Bridge and sharpen side, [runs, strata]: the one look at exhausted strata joined to what e-values proved; without
    `stopped`, the fixed plan, one look at alpha.
    """
    level, wide = (ALPHA, np.zeros_like(p_below, dtype=bool)) if stopped is None else (ALPHA / 2, ~stopped.exhausted)
    p_below, p_above = np.where(wide, 1.0, p_below), np.where(wide, 1.0, p_above)
    if stopped is not None:
        p_below, p_above = np.where(stopped.below, 0.0, p_below), np.where(stopped.above, 0.0, p_above)
    below, above = (np.stack([reject(row, level, "fdr") for row in p]) for p in (p_below, p_above))
    return below & ~above, above & ~below


def _strata_rates(runs: int, strata: tuple[Truth, ...], generator: np.random.Generator) -> list[Row]:
    """Both plans on the same data; one row per stratum."""
    log_e, p_below, p_above = [], [], []
    items = np.empty(0, dtype=np.int64)
    for truth in strata:
        counts, greedy = draw_items(truth, runs, generator)
        found, items = log_evidence(truth, counts, greedy)
        log_e.append(found)
        below, above = bootstrap(Sample(None, counts), chosen(truth), generator, FINAL_REPLICATES, p_values)
        p_below.append(below)
        p_above.append(above)
    evidence, below, above = np.stack(log_e, axis=2), np.hstack(p_below), np.hstack(p_above)
    stopped, sooner = stop(evidence, items), stop(evidence, items, support_only=True)
    # When only Acc@1 is open, an item gets one greedy answer in place of n samples.
    further = np.maximum(stopped.items - sooner.items, 0)
    plans = {"fixed": final_look(None, below, above), "sequential": final_look(stopped, below, above)}
    return [
        {
            "truth": truth,
            **{f"{plan}_bridge": bridge[:, i] for plan, (bridge, _) in plans.items()},
            **{f"{plan}_sharpen": sharpen[:, i] for plan, (_, sharpen) in plans.items()},
            "rollouts": (sooner.items * truth.n + further)[:, i].mean(),
            "rollouts_support": sooner.items[:, i].mean() * truth.n,
            "rollouts_sampled": stopped.items[:, i].mean() * truth.n,
        }
        for i, truth in enumerate(strata)
    ]


def _one_stratum(runs: int, truth: Truth, generator: np.random.Generator) -> Row:
    (row,) = _strata_rates(runs, (truth,), generator)
    greedy = truth.pi * truth.chances(truth.floors[0], True)[0][0]
    greedy += (1 - truth.pi) * sum(p * share for p, share in truth.chances(truth.floors[0], False))
    return {
        "options": option_name(truth.options),
        "size": truth.size,
        "correlation": truth.correlation,
        "pi": round(truth.pi, 3),
        "skill": truth.skill,
        "support": round(float(chosen(truth).truth(truth)[0]), 3),
        "accuracy": round(greedy, 2),
        **{key: mean([float(value.mean())]) for key, value in row.items() if key.startswith(("fixed", "sequential"))},
        "rollouts": round(row["rollouts"]),
        "rollouts_support": round(row["rollouts_support"]),
        "rollouts_sampled": round(row["rollouts_sampled"]),
    }


def run_sequential(plan: Plan) -> dict[str, Any]:
    """The sequential plan against the fixed one of 200 items x 16 samples: errors at the threshold, rollouts away."""
    runs, runs_at = plan.runs_or(400), plan.runs_or(2000)
    designs = ((2, 1, 0.0), (4, 1, 0.0), (0, 1, 0.0), (4, 4, 0.5))
    away, at = [], []
    for m, size, rho in designs:
        kind: Unskilled = "repeat" if m else "wrong"
        base = Truth(0.5, 0.6, (m,), kind, size=size, correlation=rho)
        shares = (0.0, 0.8) if plan.quick else (0.0, 0.1, 0.2, 0.35, 0.65, 0.8, 0.9, 1.0)
        skills = (0.6, 0.9) if (m, size) == (4, 1) else (0.6,)
        away += [replace(base, pi=pi, skill=s) for s in skills for pi in shares if pi or s < 0.9]
        at += [found for s in (0.3, 0.6, 0.9) if (found := at_threshold(replace(base, skill=s), chosen(base)))]
    return {
        "runs": runs,
        "runs_of": {"sequential-errors": runs_at},
        "plan": 3200,
        "away": spread(partial(_one_stratum, runs), away[:: 3 if plan.quick else 1], plan, "sequential, away"),
        "at": spread(partial(_one_stratum, runs_at), at[:: 4 if plan.quick else 1], plan, "sequential, at threshold"),
    }


_PLANS = ("fixed_bridge", "sequential_bridge", "fixed_sharpen", "sequential_sharpen")
_PLAN_NAMES = ("bridge, fixed", "bridge, sequential", "sharpen side, fixed", "sharpen side, sequential")


def _design_name(row: Row) -> str:
    return row["options"] if row["size"] == 1 else f"{row['options']}, {row['size']} items per image"


def render_sequential(figures: dict[str, Any]) -> dict[str, str]:
    """Tables `sequential-errors` and `sequential-rollouts`."""
    whole = figures["plan"]
    return {
        "sequential-errors": table(
            ["options", "s", "pi at the threshold", *_PLAN_NAMES],
            [[_design_name(r), f"{r['skill']:g}", r["pi"], *(r[key] for key in _PLANS)] for r in figures["at"]],
        ),
        "sequential-rollouts": table(
            [
                "options", "s", "pi", "Acc@1", "right verdict, fixed", "sequential", "rollouts", "share of 3,200",
                "until support is settled", "with samples to the end",
            ],
            [
                [
                    _design_name(r), f"{r['skill']:g}", f"{r['pi']:g}", r["accuracy"],
                    *(r[f"{plan}_{'bridge' if r['support'] < TAU else 'sharpen'}"] for plan in ("fixed", "sequential")),
                    r["rollouts"], *(r[key] / whole for key in ("rollouts", "rollouts_support", "rollouts_sampled")),
                ]
                for r in figures["away"]
            ],
        ),
    }  # fmt: skip


def _scenarios() -> dict[str, tuple[Truth, ...]]:
    base = Truth(0.5, 0.6)
    edge = at_threshold(base, chosen(base))
    assert edge is not None
    low, high = replace(base, pi=0.1), replace(base, pi=0.9)
    return {
        "8 at the threshold": (edge,) * 8,
        "4 at the threshold, 4 far below": (edge,) * 4 + (low,) * 4,
        "4 at the threshold, 4 far above": (edge,) * 4 + (high,) * 4,
        "1 at the threshold, 7 far below": (edge,) + (low,) * 7,
        "4 far below, 4 far above": (low,) * 4 + (high,) * 4,
        "8 at pi = 0.35": (replace(base, pi=0.35),) * 8,
        "8 at pi = 0.65": (replace(base, pi=0.65),) * 8,
        "1 at pi = 0.35, 7 far above": (replace(base, pi=0.35),) + (high,) * 7,
    }


def _family(runs: int, scenario: tuple[str, tuple[Truth, ...]], generator: np.random.Generator) -> Row:
    name, strata = scenario
    rows = _strata_rates(runs, strata, generator)
    found: Row = {"scenario": name}
    for plan in ("fixed", "sequential"):
        given, wrong, right = np.zeros(runs), np.zeros(runs), np.zeros(runs)
        for row in rows:
            value = float(chosen(row["truth"]).truth(row["truth"])[0])
            bridge, sharpen = row[f"{plan}_bridge"], row[f"{plan}_sharpen"]
            given += bridge | sharpen
            # At the threshold itself every verdict is wrong.
            wrong += (bridge & (value > TAU - 1e-9)) | (sharpen & (value < TAU + 1e-9))
            right += (bridge & (value < TAU - 1e-9)) | (sharpen & (value > TAU + 1e-9))
        away = sum(abs(float(chosen(t).truth(t)[0]) - TAU) > 1e-9 for t in strata)
        found |= {
            f"{plan}_fdr": mean(wrong / np.maximum(given, 1)),
            f"{plan}_any": mean(wrong > 0),
            f"{plan}_power": round(float(right.mean()) / away, 4) if away else None,
        }
    whole = sum(truth.items * truth.n for truth in strata)
    parts = {"share": "rollouts", "share_support": "rollouts_support", "share_sampled": "rollouts_sampled"}
    return found | {key: round(sum(row[part] for row in rows) / whole, 4) for key, part in parts.items()}


def run_strata(plan: Plan) -> dict[str, Any]:
    """Eight strata judged together: Benjamini-Hochberg on the fixed plan, e-BH on the sequential one."""
    runs = plan.runs_or(500)
    scenarios = list(_scenarios().items())[:: 4 if plan.quick else 1]
    return {"runs": runs, "scenarios": spread(partial(_family, runs), scenarios, plan, "strata")}


def render_strata(figures: dict[str, Any]) -> dict[str, str]:
    """Table `strata`."""
    keys = (
        "fixed_fdr",
        "sequential_fdr",
        "fixed_any",
        "sequential_any",
        "fixed_power",
        "sequential_power",
        "share",
        "share_sampled",
    )
    return {
        "strata": table(
            [
                "strata", "false discovery rate, fixed", "sequential", "any wrong verdict, fixed", "sequential",
                "right verdicts, fixed", "sequential", "rollouts of the sequential plan", "with samples to the end",
            ],
            [[row["scenario"], *(row[key] for key in keys)] for row in figures["scenarios"]],
        )
    }  # fmt: skip
