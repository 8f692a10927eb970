"""Support of a model on a stratum: Pass@k and its kin, guessing floors, intervals, sequential evidence, verdicts."""

from medbridge.support.bootstrap import CurveIntervals, bootstrap_curve
from medbridge.support.change import Change, compare, losses, visual_support
from medbridge.support.estimate import Curve, Measured, Scores, SupportEstimate, gate_k, item_scores, measure
from medbridge.support.evidence import Evidence, StratumEvidence, settle
from medbridge.support.floors import guessing_floor, largest_informative_k, support_above_floor
from medbridge.support.forecast import Forecast, forecast_accuracy
from medbridge.support.gate import Verdict, VerdictKind, decide, judge
from medbridge.support.guard import GuardSettings
from medbridge.support.intervals import Intervals, bootstrap_ratio
from medbridge.support.planning import what_would_decide
from medbridge.support.rewards import max_at_k, pass_at_k_advantages, pass_at_k_weights
from medbridge.support.routing import Routes, RoutingSettings, route
from medbridge.support.sequential import MeanTest, confidence_sequence
from medbridge.support.settings import GateSettings
from medbridge.support.spectra import Spectrum, spectrum
from medbridge.support.strata import pool, reject, reject_e
from medbridge.support.tables import g_pass_at_k, mean_curve, pass_at_k, pass_hat_k, reached_at_k
from medbridge.support.tallies import Tally
from medbridge.support.votes import majority_at_k

__all__ = [
    "Change",
    "Curve",
    "CurveIntervals",
    "Evidence",
    "Forecast",
    "GateSettings",
    "GuardSettings",
    "Intervals",
    "MeanTest",
    "Measured",
    "Routes",
    "RoutingSettings",
    "Scores",
    "Spectrum",
    "StratumEvidence",
    "SupportEstimate",
    "Tally",
    "Verdict",
    "VerdictKind",
    "bootstrap_curve",
    "bootstrap_ratio",
    "compare",
    "confidence_sequence",
    "decide",
    "forecast_accuracy",
    "g_pass_at_k",
    "gate_k",
    "guessing_floor",
    "item_scores",
    "judge",
    "largest_informative_k",
    "losses",
    "majority_at_k",
    "max_at_k",
    "mean_curve",
    "measure",
    "pass_at_k",
    "pass_at_k_advantages",
    "pass_at_k_weights",
    "pass_hat_k",
    "pool",
    "reached_at_k",
    "reject",
    "reject_e",
    "route",
    "settle",
    "spectrum",
    "support_above_floor",
    "visual_support",
    "what_would_decide",
]
