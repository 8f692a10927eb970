"""Support of a model on a stratum: Pass@k, the guessing floor, intervals and the gate's verdict."""

from medbridge.support.estimate import Curve, Measured, Scores, SupportEstimate, gate_k, item_scores, measure
from medbridge.support.evidence import Evidence, StratumEvidence, settle
from medbridge.support.floors import guessing_floor, largest_informative_k, support_above_floor
from medbridge.support.gate import Verdict, VerdictKind, decide, judge
from medbridge.support.intervals import Intervals, bootstrap_ratio
from medbridge.support.passk import mean_curve, pass_at_k
from medbridge.support.planning import what_would_decide
from medbridge.support.settings import GateSettings
from medbridge.support.tallies import Tally

__all__ = [
    "Curve",
    "Evidence",
    "GateSettings",
    "Intervals",
    "Measured",
    "Scores",
    "StratumEvidence",
    "SupportEstimate",
    "Tally",
    "Verdict",
    "VerdictKind",
    "bootstrap_ratio",
    "decide",
    "gate_k",
    "guessing_floor",
    "item_scores",
    "judge",
    "largest_informative_k",
    "mean_curve",
    "measure",
    "pass_at_k",
    "settle",
    "support_above_floor",
    "what_would_decide",
]
