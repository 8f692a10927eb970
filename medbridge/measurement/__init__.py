"""Measuring one model on one split: which items, their completions (resumed where they were cut off), the verdicts.

Statistics are in `support`, sampling in `rollout`; this package joins them through the ledger.
"""

from __future__ import annotations

from medbridge.measurement.baseline import frequent_answer_baseline
from medbridge.measurement.changes import compare_stages
from medbridge.measurement.checks import control_items, measured_items, read_otherwise, run_control
from medbridge.measurement.counting import tally_items
from medbridge.measurement.order import by_stratum, cluster_of
from medbridge.measurement.outlook import came_out
from medbridge.measurement.plan import run_measurement
from medbridge.measurement.sampling import Sampler, measurement_request, summarise_sampling
from medbridge.measurement.validity import NO_VERDICT, no_verdict

__all__ = [
    "NO_VERDICT", "Sampler", "by_stratum", "came_out", "cluster_of", "compare_stages", "control_items",
    "frequent_answer_baseline", "measured_items", "measurement_request", "no_verdict", "read_otherwise",
    "run_control", "run_measurement", "summarise_sampling", "tally_items",
]  # fmt: skip
