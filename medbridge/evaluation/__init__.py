"""Evaluation of completions that were sampled elsewhere: read from the logs of other tools, graded, judged."""

from __future__ import annotations

from medbridge.evaluation.evaluate import Evaluation, StratumResult, evaluate_logs
from medbridge.evaluation.logs import FORMATS, Logged, read_logs

__all__ = ["FORMATS", "Evaluation", "Logged", "StratumResult", "evaluate_logs", "read_logs"]
