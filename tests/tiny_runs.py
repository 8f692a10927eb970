"""What tests do with a whole tiny run: diagnoses whose answers are known beforehand, training that is broken off.

The run itself is `conftest.open_run`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medbridge.data import Item, grade
from medbridge.ledger import Stage
from medbridge.measurement import measurement_request
from medbridge.pipeline import Run
from medbridge.rollout import Graded, Rollout


def pretend(run: Run, round: int, model: str, right: Callable[[Item, int], bool]) -> Stage:
    """A diagnosis whose completions are stored beforehand: sample `number` of an item says the right option or not."""
    stage = run._begin(round, "diagnose", model, ())
    for item in run.items.split("validation"):
        request = measurement_request(item, run.settings.diagnosis.samples, run.settings.seed)
        rows = []
        for number, order in zip(request.samples, request.permutations, strict=True):
            others = [option for option in item.options or () if option != item.answer]
            text = f"<answer>{item.answer if right(item, number) else others[0]}</answer>"
            ids, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
            rollout = Rollout(item.id, number, order, text, ids, logprobs, "stop", 1, 1)
            rows.append(Graded(rollout, grade(item, order, text, run.settings.data.prompt)))
        run.ledger.save_rollouts(stage.stage_id, 0, rows)
    return stage


def interrupted(run: Run, step: int, train: Callable[[], Any]) -> None:
    """Have `train` broken off as by Ctrl-C when it is about to record a step."""
    log_step = run.ledger.log_step

    def dies(stage: int, now: int, metrics: Any, ids: Any) -> None:
        if now == step:
            raise KeyboardInterrupt
        log_step(stage, now, metrics, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.ledger, "log_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train()
