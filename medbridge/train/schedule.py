"""The learning rate over the steps of a stage, as a share of its peak. Which rates there are is not decided here."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "cosine", "linear"]

FLOOR = 0.1
"""Share of the peak that cosine and linear end at: the last steps still move."""


def rate_factor(schedule: ScheduleName, step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (counted from 1) of `steps`.

    It rises linearly over the warm-up and then stays (constant), or falls to `FLOOR` at the last step along half a
    cosine or a line.
    """
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return FLOOR + (1 - FLOOR) * left
