"""Support of a model on a stratum: Pass@k, the guessing floor, intervals and the gate's verdict."""

from medbridge.support.floors import guessing_floor, largest_informative_k, support_above_floor
from medbridge.support.gate import (
    Curve,
    GateSettings,
    Measured,
    SupportEstimate,
    Verdict,
    VerdictKind,
    decide,
    measure,
)
from medbridge.support.intervals import Intervals, bootstrap_ratio
from medbridge.support.passk import mean_curve, pass_at_k
from medbridge.support.tallies import Tally

__all__ = [
    "Curve",
    "GateSettings",
    "Intervals",
    "Measured",
    "SupportEstimate",
    "Tally",
    "Verdict",
    "VerdictKind",
    "bootstrap_ratio",
    "decide",
    "guessing_floor",
    "largest_informative_k",
    "mean_curve",
    "measure",
    "pass_at_k",
    "support_above_floor",
]
