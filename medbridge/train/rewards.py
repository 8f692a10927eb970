"""The reward of a completion: is its answer right, and is it in the form asked for."""

from __future__ import annotations

from medbridge.data.answers import Outcome


def reward(outcome: Outcome, format_weight: float) -> float:
    """1 for a correct answer, plus `format_weight` for the form; an abstention earns nothing for accuracy."""
    return float(outcome.status == "correct") + format_weight * float(outcome.well_formed)
