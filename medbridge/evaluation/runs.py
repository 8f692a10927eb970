"""Evaluation of what a run has measured. It samples nothing: `medbridge.pipeline` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from medbridge.config import RunSettings, load_config
from medbridge.data.readings import READINGS, ReadingName
from medbridge.errors import MedbridgeError
from medbridge.evaluation.answered import answered_in_stage
from medbridge.evaluation.evaluate import Evaluation, evaluate
from medbridge.evaluation.judged import OpenJudge
from medbridge.ledger import Ledger, Stage
from medbridge.measurement import NO_VERDICT

_MEASURING = ("diagnose", "evaluate")


def evaluate_run(
    folder: Path,
    stage_id: int | None = None,
    *,
    by: Sequence[str] | None = None,
    reading: ReadingName = "standard",
    ordered: Sequence[str] = (),
    open_judge: OpenJudge | None = None,
    judge_decides: bool = False,
) -> Evaluation:
    """Evaluate one measurement of a run.

    Args:
        folder: of the run.
        stage_id: a finished measuring stage; None: the last one on the test split, or else the last diagnosis.
        by: tags that make up a stratum; None: the run's own.
        reading, ordered, open_judge, judge_decides: as `evaluate` has them.

    Raises:
        MedbridgeError: there is no run, or no such measurement in it.
    """
    ledger = Ledger(folder / "run.sqlite", read_only=True)
    try:
        settings: RunSettings = load_config(folder / "config.yaml")
        stage = _chosen(ledger, folder, stage_id)
        return evaluate_stage(
            ledger, stage, settings, by=by, reading=reading, ordered=ordered, open_judge=open_judge,
            judge_decides=judge_decides,
        )  # fmt: skip
    finally:
        ledger.close()


def evaluate_stage(
    ledger: Ledger,
    stage: Stage,
    settings: RunSettings,
    *,
    by: Sequence[str] | None = None,
    reading: ReadingName = "standard",
    readings: Sequence[ReadingName] = READINGS,
    ordered: Sequence[str] = (),
    open_judge: OpenJudge | None = None,
    judge_decides: bool = False,
) -> Evaluation:
    """Evaluate a finished measuring stage, with the `readings` that are wanted beside each other.

    The run's own strata keep the verdicts that the stage gave them, where answers are read as it read them.
    """
    entries = answered_in_stage(ledger, stage, readings)
    own = settings.data.strata
    verdicts = ledger.verdicts(stage.stage_id)
    refused = {name: row.reason for name, row in verdicts.items() if row.reason.startswith(NO_VERDICT)}
    same = reading == "standard" and not judge_decides and (by is None or list(by) == own)
    splits = sorted({entry.item.split for entry in entries})
    return evaluate(
        entries,
        by=own if by is None else by,
        reading=reading,
        ordered=ordered,
        gate=settings.gate,
        sequential=stage.kind == "diagnose" and settings.diagnosis.sequential,
        seed=settings.seed,
        open_judge=open_judge,
        judge_decides=judge_decides,
        source=f"{stage.model} on the {' and '.join(splits)} split",
        given={name: (row.kind, row.reason) for name, row in verdicts.items()} if same else {},
        doubted={e.item.id: refused[name] for e in entries if (name := e.item.stratum(own)) in refused},
        guard=settings.guard,
    )


def stored_evaluation(ledger: Ledger, stage: Stage) -> Evaluation | None:
    """Of a finished measuring stage by the standard reading alone, which needs no texts; None where the run's records
    can't tell (a run of other versions, a damaged record).
    """
    try:
        settings = RunSettings.model_validate(ledger.meta("config"))
        return evaluate_stage(ledger, stage, settings, readings=("standard",))
    except (MedbridgeError, ValidationError):
        return None


def last_measurement(ledger: Ledger) -> Stage | None:
    """The last finished measurement on the test split, or else the last diagnosis."""
    done = [stage for stage in ledger.stages() if stage.kind in _MEASURING and stage.status == "done"]
    tests = [stage for stage in done if stage.kind == "evaluate"]
    found = tests or done
    return found[-1] if found else None


def _chosen(ledger: Ledger, folder: Path, stage_id: int | None) -> Stage:
    if stage_id is None:
        last = last_measurement(ledger)
        if last is None:
            raise MedbridgeError(
                f"{folder}: nothing is measured in this run yet. Finish `medbridge diagnose --run {folder}` first, or "
                "give a configuration or --model and --data to measure one."
            )
        return last
    known = [stage for stage in ledger.stages() if stage.kind in _MEASURING and stage.status == "done"]
    for stage in known:
        if stage.stage_id == stage_id:
            return stage
    have = ", ".join(f"{stage.stage_id} ({stage.kind} of {stage.model})" for stage in known)
    raise MedbridgeError(f"{folder}: --stage {stage_id} is no finished measurement; there are: {have or 'none'}.")
