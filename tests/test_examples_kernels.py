"""The examples that embed the kernels, run as a user would, on the small model made from nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Run an example with a few options; returns what it printed."""
    work = tmp_path_factory.mktemp("examples")

    def run_example(name: str, *options: str) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), "--data", str(tiny_data), "--work", str(work), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run_example


def test_trl_grpo(run) -> None:
    """The example itself stops where the two losses differ by more than 1e-5."""
    said = run("trl_grpo.py", "--steps", "2", "--prompts", "2", "--completions", "4", "--tokens", "6")
    differences = re.search(r"difference of the loss (\S+), of the gradients (\S+)", said)
    assert differences and all(float(difference) <= 1e-5 for difference in differences.groups())
    assert re.search(r"trained 2 steps, reward 0\.\d+ to 0\.\d+", said)
    assert "'clip_ratio/region_mean'" in said and "'kl'" in said


def test_grpo_loop(run) -> None:
    said = run("grpo_loop.py", "--steps", "2")
    assert re.findall(r"step (\d): reward 0\.\d+, loss [+-]\d\.\d+, entropy \d\.\d+", said) == ["1", "2"]
