"""A ledger with completions of known outcomes, for the tests of what a study's page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from medbridge.data.answers import Outcome, Status
from medbridge.ledger import Ledger
from medbridge.rollout import Graded, Rollout

OPTIONS = ("Yes", "No")

Said = tuple[int, Status, str, str | None]
"""A completion: sample, status, text, and what was read, the first place of which in the text is the span."""


def graded(item_id: str, said: Said) -> Graded:
    sample, status, text, read = said
    tokens = np.zeros(3, dtype=np.int32)
    rollout = Rollout(
        item_id, sample, (), text, tokens, tokens.astype(np.float32), "length" if status == "abstain" else "stop", 5
    )
    if read is None:
        return Graded(rollout, Outcome(status, None, None, None, False))
    option = OPTIONS.index(read) if read in OPTIONS else None
    start = text.index(read)
    return Graded(rollout, Outcome(status, option, read, (start, start + len(read)), True))


@pytest.fixture
def answered(tmp_path: Path) -> Iterator[Callable[..., tuple[Ledger, list[int]]]]:
    """A ledger with one measurement for each mapping of item ids to completions; and these stages' numbers."""
    opened: list[Ledger] = []

    def make(*models: Mapping[str, Sequence[Said]]) -> tuple[Ledger, list[int]]:
        ledger = Ledger(tmp_path / "run.sqlite")
        opened.append(ledger)
        stages = []
        for number, model in enumerate(models):
            stage = ledger.begin_stage(round=number, kind="diagnose", model=f"m{number}", strata=[], plan={})
            ledger.save_rollouts(stage.stage_id, 0, [graded(name, said) for name, all in model.items() for said in all])
            stages.append(stage.stage_id)
        return ledger, stages

    yield make
    for ledger in opened:
        ledger.close()
