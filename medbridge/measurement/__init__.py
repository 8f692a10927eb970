"""Measuring one model on one split: which items, their completions (resumed where they were cut off), the verdicts.

Statistics are in `support`, sampling in `rollout`; this package joins them through the ledger.
"""

from __future__ import annotations

from medbridge.measurement.baseline import frequent_answer_baseline
from medbridge.measurement.counting import tally_items
from medbridge.measurement.order import by_stratum, cluster_of
from medbridge.measurement.sampling import measurement_request, summarise_sampling
from medbridge.measurement_old import run_measurement

__all__ = [
    "by_stratum", "cluster_of", "frequent_answer_baseline", "measurement_request", "run_measurement",
    "summarise_sampling", "tally_items",
]  # fmt: skip
