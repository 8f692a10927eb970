"""Evaluation of completions: of a run's measurements, or sampled elsewhere and read from the logs of other tools."""

from __future__ import annotations

from medbridge.evaluation.answered import Answered, answered_in_log, answered_in_stage
from medbridge.evaluation.evaluate import Evaluation, StratumResult, evaluate, evaluate_logs
from medbridge.evaluation.logged import Logged
from medbridge.evaluation.logs import FORMATS, read_logs

__all__ = [
    "FORMATS",
    "Answered",
    "Evaluation",
    "Logged",
    "StratumResult",
    "answered_in_log",
    "answered_in_stage",
    "evaluate",
    "evaluate_logs",
    "read_logs",
]
