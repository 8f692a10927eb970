"""A run that is killed ten times ends with the same verdicts, rollouts and weights as one that never was.

The processes are real and so are the kills (SIGKILL). Each kill waits until its stage has stored a pseudo-random share
of its rows, and then a random moment longer, so that it falls anywhere within a batch, a checkpoint or a saved model.
"""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from medbridge.ledger import Ledger

TABLES = ("items", "stages", "rollouts", "outcomes", "tallies", "verdicts", "batches")
TIMES = re.compile(r"seconds|_per_second$|^loss_share|_hit_rate$|^mfu$|^memory_gb$")
"""Metrics and totals that depend on when a process was killed; a step that was sampled before has no sampling speed."""

STAGES = ["format", "diagnose", "bridge", "diagnose", "sharpen", "diagnose", "evaluate", "evaluate"]
KILLED = [1, 2, 3, 3, 4, 5, 5, 6, 7, 8]
"""Stage that each kill falls into, by its number: all of them, and the two that train twice."""


def rows_of(database: Path, stage: int) -> int:
    """Rollouts and optimizer steps that a stage has stored so far; steps count for more, since there are fewer."""
    if not database.is_file():
        return -1
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db:
        try:
            [rollouts] = db.execute("SELECT COUNT(*) FROM rollouts WHERE stage_id = ?", (stage,)).fetchone()
            [steps] = db.execute("SELECT COUNT(*) FROM batches WHERE stage_id = ?", (stage,)).fetchone()
            [begun] = db.execute("SELECT COUNT(*) FROM stages WHERE stage_id = ?", (stage,)).fetchone()
        except sqlite3.OperationalError:  # its tables are not made yet
            return -1
    return int(rollouts + 20 * steps) if begun else -1


def finish(processes: Any, argv: list[object], log: Path) -> None:
    code = processes.wait(processes.start(argv, log))
    assert code == 0, log.read_text()[-3000:]


def state(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on kills: times and rates are left out."""
    ledger = Ledger(folder / "run.sqlite", read_only=True)
    stages = ledger.stages()
    found: dict[str, Any] = {
        "stages": [(s.kind, s.status, s.round, s.model, s.result_model, s.strata, s.plan) for s in stages],
        "counts": {table: ledger.count(table) for table in TABLES},
        "items": ledger.items(),
        "finished": (ledger.meta("finished"), ledger.meta("outcome"), ledger.meta("base_model")),
    }
    for stage in stages:
        key = f"{stage.stage_id} {stage.kind}"
        found[f"{key} verdicts"] = ledger.verdicts(stage.stage_id)
        found[f"{key} tallies"] = ledger.tallies(stage.stage_id)
        found[f"{key} trained"] = ledger.trained_items(stage.stage_id)
        found[f"{key} metrics"] = {
            name: values for name, values in ledger.metrics(stage.stage_id).items() if not TIMES.search(name)
        }
        found[f"{key} summary"] = {k: v for k, v in stage.summary.items() if not TIMES.search(k)}
        found[f"{key} rollouts"] = [
            (
                entry.rollout.item_id, entry.rollout.sample, entry.rollout.permutation, entry.rollout.text,
                entry.rollout.token_ids.tobytes(), entry.rollout.logprobs.tobytes(), entry.rollout.finish_reason,
                entry.outcome, entry.reward,
            )
            for entry in ledger.rollouts(stage.stage_id)
        ]  # fmt: skip
    ledger.close()
    for path in sorted((folder / "models").rglob("*")):
        if path.is_file() and not path.relative_to(folder / "models").parts[0].startswith("."):
            found[f"file {path.relative_to(folder)}"] = path.read_bytes()
    return found


@pytest.mark.slow
def test_ten_kills_change_nothing(
    processes: Any, tiny_config: Callable[..., dict[str, Any]], make_tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_tiny_data(tmp_path / "data", 48)
    config = tmp_path / "run.yaml"
    settings = tiny_config(
        model={"from_nothing": {"format_steps": 12}},
        data={"sources": [{"kind": "jsonl", "path": str(data)}]},
        rollout={"batch_size": 40},
        diagnosis={"samples": 12},
        # A stratum whose support is surely above guessing is sharpened, since no accuracy is surely 1.
        gate={"support_threshold": 0.0, "accuracy_target": 1.0, "replicates": 200},
        sft={
            "steps": 45, "batch_size": 12, "micro_batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 3,
            "checkpoint_every": 7,
        },
        rl={
            "steps": 20, "prompts_per_step": 8, "completions": 6, "micro_batch_size": 48, "learning_rate": 3e-4,
            "checkpoint_every": 3,
        },
    )  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    log = tmp_path / "log"

    straight = tmp_path / "straight"
    finish(processes, ["medbridge.cli", "run", config, "--run", straight], log)
    expected = state(straight)
    assert [kind for kind, *_ in expected["stages"]] == STAGES
    totals = {number: rows_of(straight / "run.sqlite", number) for number in range(1, len(STAGES) + 1)}

    generator = random.Random(20)
    cut = tmp_path / "cut"
    targets = sorted((stage, generator.random()) for stage in KILLED)
    targets[3] = (3, 1.0)  # behind the last step, while the model is saved
    hit = []
    for stage, share in targets:
        child = processes.start(["medbridge.cli", "run", config, "--run", cut], log)
        deadline = time.monotonic() + 120
        while rows_of(cut / "run.sqlite", stage) < share * totals[stage] and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.03))
        assert processes.kill(child) == -9, log.read_text()[-3000:]
        ledger = Ledger(cut / "run.sqlite", read_only=True)
        hit.append(ledger.stages()[-1].kind)
        ledger.close()
    assert set(hit) >= {"format", "diagnose", "bridge", "sharpen", "evaluate"}, hit

    finish(processes, ["medbridge.cli", "run", config, "--run", cut], log)
    found = state(cut)
    assert found["counts"] == expected["counts"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, key
    finish(processes, ["medbridge.cli", "run", config, "--run", cut], log)  # and once more adds nothing
    assert state(cut)["counts"] == expected["counts"]
    assert not [path for path in (cut / "checkpoints").glob("*") if path.is_dir() and not path.name.startswith(".")]
