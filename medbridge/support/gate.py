"""The gate: from the estimates of all strata of one measurement to their verdicts.

It doesn't sample, and it doesn't choose what is trained. What is estimated, and at which k, is in estimate.

Which errors `alpha` limits, by `error_control`:

- none: a stratum at or above the threshold is bridged wrongly with probability at most alpha, and one at or below
  it is sharpened or called done wrongly with probability at most alpha.
- fdr: the expected share of wrong verdicts among those given is at most alpha. Bridges, verdicts above the
  threshold (sharpen or done) and dones are three families, each controlled by Benjamini and Hochberg (1995) at
  alpha. A stratum can only be bridged wrongly if it isn't below, and be above wrongly only if it isn't above, so that
  the shares of such strata, which scale the two errors, add up to 1: the bound holds for the two sides together,
  up to strata exactly at the threshold. Beside it, at most alpha of the dones are expected not to be at the target.
- fwer: the probability of any wrong verdict in a family is at most alpha (Holm 1979).

With sequential evidence, half of alpha goes to it at all looks together, and half to the one look at strata whose
items were exhausted. What the evidence proved counts as a rejection in that look's step-up (p = 0), since the share of
wrong verdicts is over all that are given: V1 / (R1 + R2) <= V1 / R1, and V2 / (R1 + R2) is held by the step-up. So
the errors of both add up to at most alpha; for Holm's procedure likewise, by the union bound.

A small stratum that is undecided by itself may get a verdict by partial pooling. The interval behind that is right on
average over the strata, not for each, and its error comes beside the above. Over the small strata its level is set as
the control says: as in Benjamini-Hochberg, Bonferroni, or alpha for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medbridge.support.estimate import Curve, Measured, SupportEstimate, measure, plain
from medbridge.support.evidence import SEQUENTIAL_SHARE, Claim, Evidence, proven
from medbridge.support.planning import what_would_decide
from medbridge.support.settings import GateSettings, Statistic
from medbridge.support.strata import pool, reject

__all__ = [
    "Curve",
    "GateSettings",
    "Measured",
    "SupportEstimate",
    "Verdict",
    "VerdictKind",
    "decide",
    "judge",
    "measure",
]

Floats = NDArray[np.float64]

VerdictKind = Literal["bridge", "sharpen", "done", "undecided"]

_Outcome = tuple[VerdictKind, str, dict[str, Any] | None]
"""A verdict's kind, its reason, and what more would decide."""

_FEWEST_TO_POOL = 3
"""Strata from which the spread between strata can be estimated."""

_NOTABLE_ABSTENTION = 0.2
"""A verdict mentions samples without a readable answer from this share on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a stratum.

    Attributes:
        kind: "bridge" (support is weak: supervised fine-tuning), "sharpen" (support is there, Acc@1 lags:
            RL), "done" (both are there) or "undecided".
        reason: why, in plain words with the numbers.
        evidence: the numbers that the verdict rests on.
        more: for "undecided", what would decide, as in :func:`what_would_decide`: "items", "samples" (per item),
            "capped" and "bottleneck"; None where neither would help, and for every other verdict.
        pooled: whether it rests on the other strata too.
        statistic: what support counts, "reached" or "pass".
    """

    kind: VerdictKind
    reason: str
    evidence: dict[str, float]
    more: dict[str, Any] | None = None
    pooled: bool = False
    statistic: Statistic = "reached"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values under the same names."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "evidence": {name: plain(value) for name, value in self.evidence.items()},
            "more": self.more,
            "pooled": self.pooled,
            "statistic": self.statistic,
        }


@dataclass(frozen=True, slots=True)
class _Finding:
    """What is sure of one stratum.

    Attributes:
        claims: what is sure, in one way or another.
        stopped: whether sampling stopped early, since sequential evidence had shown it.
        pooled: the interval pooled with the other strata, where the claims rest on it.
        level: error probability left for one more verdict on its side of the threshold.
        strata: judged together.
    """

    claims: frozenset[Claim]
    stopped: bool
    level: float
    strata: int
    pooled: Measured | None = None


def decide(estimate: SupportEstimate, settings: GateSettings) -> Verdict:
    """The verdict on one stratum by itself: :func:`judge` of that one."""
    return judge({"": estimate}, settings)[""]


def judge(
    estimates: Mapping[str, SupportEstimate],
    settings: GateSettings,
    sequential: Mapping[str, Evidence] | None = None,
) -> dict[str, Verdict]:
    """The verdicts on all strata of one measurement, with the error rate controlled over them.

    bridge where support above the floor is surely below the threshold; where it is surely above, done if Acc@1
    is surely at its target and sharpen otherwise; undecided in every other case. The head of this file says what
    "surely" limits.

    Args:
        estimates: of each stratum.
        settings: with which they were measured.
        sequential: evidence of the strata that were sampled sequentially. Without it each stratum is looked at
            once. Strata that it leaves out count as exhausted.

    Returns:
        A verdict for each stratum, in the same order.
    """
    readable = {
        name: estimate
        for name, estimate in estimates.items()
        if estimate.items >= settings.min_items and estimate.support is not None
    }
    level = settings.alpha if sequential is None else (1 - SEQUENTIAL_SHARE) * settings.alpha
    findings = _pooled(readable, _findings(readable, settings, sequential or {}, level), settings, level)
    verdicts = {}
    for name, estimate in estimates.items():
        finding = findings.get(name)
        kind, reason, more = (
            _unreadable(estimate, settings) if finding is None else _outcome(estimate, finding, settings)
        )
        verdicts[name] = Verdict(
            kind,
            reason,
            _evidence(estimate, settings, (sequential or {}).get(name)),
            more,
            pooled=finding is not None and finding.pooled is not None,
            statistic=estimate.statistic,
        )
    return verdicts


def _findings(
    estimates: Mapping[str, SupportEstimate], settings: GateSettings, evidence: Mapping[str, Evidence], level: float
) -> dict[str, _Finding]:
    """What sequential evidence and the last look, with error probability `level`, show of each stratum."""
    shown = proven(evidence, SEQUENTIAL_SHARE * settings.alpha, settings.error_control)
    sides: tuple[Claim, ...] = ("below", "above", "at_target")
    p_values = []
    for name, estimate in estimates.items():
        # A stratum that was stopped early had its chance. What is proven is a verdict given: it counts in the step-up.
        stopped = name in evidence and not evidence[name].exhausted
        own = (1.0, 1.0, 1.0) if stopped else _p_values(estimate)
        proved = shown.get(name, frozenset())
        p_values.append([0.0 if side in proved else p for side, p in zip(sides, own, strict=True)])
    columns = np.array(p_values).reshape(-1, 3).T
    masks = {side: reject(p, level, settings.error_control) for side, p in zip(sides, columns, strict=True)}
    found = {}
    for index, (name, estimate) in enumerate(estimates.items()):
        looked = {side for side in sides if masks[side][index]}
        claims = looked | shown.get(name, frozenset())
        if {"below", "above"} <= claims:
            claims = set()
        nearer: Claim = "above" if _value(estimate) > settings.support_threshold else "below"
        found[name] = _Finding(
            claims=frozenset(claims),
            # On strata that were exhausted the e-values are but another look.
            stopped=bool(claims) and name in evidence and not evidence[name].exhausted,
            level=_level(masks[nearer], level, settings),
            strata=len(estimates),
        )
    return found


def _p_values(estimate: SupportEstimate) -> tuple[float, float, float]:
    """Of support being not below, of its being not above, and of the stratum not being done."""
    done = 1.0 if math.isnan(estimate.p_done) else max(estimate.p_above, estimate.p_done)
    return estimate.p_below, estimate.p_above, done


def _level(rejected: NDArray[np.bool_], alpha: float, settings: GateSettings) -> float:
    """The p-value with which one more stratum would join those rejected."""
    strata, already = rejected.size, int(rejected.sum())
    shares = {"none": 1.0, "fdr": min(strata, already + 1) / strata, "fwer": 1 / max(1, strata - already)}
    return alpha * shares[settings.error_control]


def _pooled(
    estimates: Mapping[str, SupportEstimate], findings: dict[str, _Finding], settings: GateSettings, alpha: float
) -> dict[str, _Finding]:
    """Judge small strata that are undecided by themselves once more, by their value shrunk towards the others.

    A pooled interval is right on average over all strata, and those judged here are the ones shrunk most: many large
    strata could pull a small one across the threshold. So its own p-value must be at most `alpha` too. What pooling
    relaxes is the correction for the number of strata.
    """
    small = {
        name: index
        for index, (name, estimate) in enumerate(estimates.items())
        if estimate.items < settings.pool_below and not findings[name].claims
    }
    if len(estimates) < _FEWEST_TO_POOL or not small:
        return findings
    values = np.array([_value(estimate) for estimate in estimates.values()])
    errors = np.array([estimate.standard_error for estimate in estimates.values()])
    # As Benjamini and Hochberg do for fdr: the largest number of verdicts of which each holds at its share of alpha.
    # No number between those decided and `count` can be it, since fewer have a smaller share.
    count = 1 if settings.error_control == "fwer" else len(small)
    while True:
        level = settings.alpha * count / len(small)
        intervals = _shrunk(values, errors, level)
        sides = {name: _side(intervals[index], settings.support_threshold) for name, index in small.items()}
        decided = {
            name: side
            for name, side in sides.items()
            if side is not None and getattr(estimates[name], f"p_{side}") <= alpha
        }
        if not decided:
            return findings
        if settings.error_control != "fdr" or len(decided) >= count:
            break
        count = len(decided)
    found = dict(findings)
    for name, side in decided.items():
        at_target = side == "above" and estimates[name].p_done <= level
        claims: set[Claim] = {side, "at_target"} if at_target else {side}
        found[name] = replace(findings[name], claims=frozenset(claims), pooled=intervals[small[name]])
    return found


def _shrunk(values: Floats, errors: Floats, alpha: float) -> list[Measured]:
    pooled = pool(values, errors, alpha)
    ends = zip(pooled.value.tolist(), pooled.low.tolist(), pooled.high.tolist(), strict=True)
    return [Measured(*each) for each in ends]


def _side(interval: Measured, threshold: float) -> Claim | None:
    """Where the whole interval lies."""
    if interval.high < threshold:
        return "below"
    return "above" if interval.low > threshold else None


def _outcome(estimate: SupportEstimate, finding: _Finding, settings: GateSettings) -> _Outcome:
    threshold, target = settings.support_threshold, settings.accuracy_target
    read = _reading(estimate, finding)
    remarks = _remarks(estimate, finding)
    if "below" in finding.claims:
        return (
            "bridge",
            f"{read}, below the threshold {threshold:g}: the answers aren't within the model's reach, and RL "
            f"has nothing to sharpen.{remarks}",
            None,
        )
    if "above" not in finding.claims:
        if finding.level * (settings.replicates + 1) < 1:
            # no p-value can be that small, whatever the items say
            enough = math.ceil(1 / finding.level)
            cure = (
                f"{settings.replicates} bootstrap replicates can't tell more; set gate.replicates to {enough} or more"
            )
            return "undecided", f"{read}, {_doubt(estimate, finding, settings)}: {cure}.{remarks}", None
        more = what_would_decide(estimate, settings, finding.level)
        return "undecided", f"{read}, {_doubt(estimate, finding, settings)}: {_ask(more)}.{remarks}", more
    accuracy = estimate.acc_at_1
    if accuracy is None:
        return (
            "undecided",
            f"{read}, above the threshold {threshold:g}, but there are no greedy completions: Acc@1 is "
            f"needed to tell sharpen from done.{remarks}",
            None,
        )
    acc_read = f"Acc@1 is {accuracy.value:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})"
    if "at_target" in finding.claims:
        reason = f"{read}, above the threshold {threshold:g}, and {acc_read}, at the target {target:g}.{remarks}"
        return "done", reason, None
    lag = "below" if accuracy.high < target else "not surely at"
    return (
        "sharpen",
        f"{read}, above the threshold {threshold:g}, while {acc_read}, {lag} the target {target:g}: the "
        f"answers are within the model's reach, and RL can bring them up.{remarks}",
        None,
    )


def _unreadable(estimate: SupportEstimate, settings: GateSettings) -> _Outcome:
    if estimate.items >= settings.min_items:
        return "undecided", f"Support above the guessing floor can't be read: {estimate.k_note}.", None
    short = settings.min_items - estimate.items
    return (
        "undecided",
        f"{_count(estimate.items, 'item')} measured, fewer than the {settings.min_items} that a verdict "
        f"needs: measure at least {short} more.",
        {"items": short, "samples": None, "capped": False, "bottleneck": "items"},
    )


def _reading(estimate: SupportEstimate, finding: _Finding) -> str:
    assert estimate.support is not None and estimate.k is not None
    support, k = estimate.support, estimate.k
    floor = estimate.floor[k - 1 if estimate.statistic == "pass" else 0]
    if estimate.statistic == "pass":
        raw = f"Pass@{k} {estimate.pass_at_k.value[k - 1]:.2f} where guessing gives {floor:.2f}"
    else:
        raw = f"{floor + support.value * (1 - floor):z.2f} of the items are reached where guessing reaches {floor:.2f}"
    read = (
        f"Support above the guessing floor at k = {k} is {support.value:.2f} ({_interval(estimate, support)}; "
        f"{raw}; {_count(estimate.items, 'item')})"
    )
    if finding.pooled is None:
        return read
    return (
        f"{read}, which leaves it undecided by itself. Pooled with the other {finding.strata - 1} strata, right on "
        f"average over strata, it is {finding.pooled.value:.2f} ({finding.pooled.low:.2f} to {finding.pooled.high:.2f})"
    )


def _interval(estimate: SupportEstimate, measured: Measured) -> str:
    return f"{100 * estimate.confidence:.0f} % interval {measured.low:.2f} to {measured.high:.2f}"


def _doubt(estimate: SupportEstimate, finding: _Finding, settings: GateSettings) -> str:
    assert estimate.support is not None
    threshold = settings.support_threshold
    side = _side(estimate.support, threshold)
    if side is None:
        return f"and the interval holds the threshold {threshold:g}"
    if finding.strata > 1 and settings.error_control != "none":
        held = {"fdr": "the share of wrong verdicts", "fwer": "the probability of any wrong verdict"}
        why = f"with {held[settings.error_control]} over {finding.strata} strata held at {settings.alpha:g}"
    else:
        why = f"with the error of all looks held at {settings.alpha:g}"
    return f"{side} the threshold {threshold:g} by itself, but not surely {why}"


def _ask(more: dict[str, Any]) -> str:
    items = f"about {_count(more['items'], 'more item')}"
    if more["bottleneck"] == "samples":
        samples = f"about {_count(more['samples'], 'more sample')} per item would decide"
        return samples if more["capped"] else f"{samples}, fewer rollouts than {items}"
    if more["capped"]:
        return f"the estimate is too near to the threshold for even {more['items']} more items to decide"
    return f"{items} would decide"


def _evidence(estimate: SupportEstimate, settings: GateSettings, sequential: Evidence | None) -> dict[str, float]:
    evidence = {
        "items": float(estimate.items),
        "threshold": settings.support_threshold,
        "accuracy_target": settings.accuracy_target,
        "abstain_rate": estimate.abstain_rate,
    }
    if estimate.k is not None:
        evidence["k"] = float(estimate.k)
        evidence["pass_at_k"] = float(estimate.pass_at_k.value[estimate.k - 1])
        evidence["floor"] = float(estimate.floor[estimate.k - 1])
    measured = {"support": estimate.support, "acc_at_1": estimate.acc_at_1, "gap": estimate.gap}
    for name, quantity in measured.items():
        if quantity is not None:
            evidence |= {name: quantity.value, f"{name}_low": quantity.low, f"{name}_high": quantity.high}
    evidence |= {name: getattr(estimate, name) for name in ("p_below", "p_above", "p_done", "p_not_done")}
    if sequential is not None:
        evidence |= {f"e_{name}": float(value) for name, value in sequential.to_dict().items() if name != "exhausted"}
    return evidence


def _remarks(estimate: SupportEstimate, finding: _Finding) -> str:
    remarks = ""
    if finding.stopped:
        remarks += " The items stopped coming once the evidence was sure, however often it is looked at."
    if estimate.abstain_rate >= _NOTABLE_ABSTENTION:
        remarks += f" {100 * estimate.abstain_rate:.0f} % of the samples gave no readable answer."
    return remarks


def _value(estimate: SupportEstimate) -> float:
    return math.nan if estimate.support is None else estimate.support.value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
