"""bench/gpu_kernels.py on a machine without a GPU: what it says then, and its tests in Triton's interpreter.

The device itself is tested nowhere but on one: this keeps the script able to run there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medbridge_kernels import triton

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_exits_with_2() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(triton.why_missing() is not None, reason=str(triton.why_missing()))
def test_its_tests_pass_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = run("--interpret", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert "timings" not in found
    assert set(found["tests"]) >= {"vocabulary sweep", "losses", "linear losses", "advantages", "edges", "in place"}
    for name, result in found["tests"].items():
        assert result["cases"] > 0, name
        assert result["failures"] == [], name
        assert result["largest_share_of_allowed_error"] <= 1, name
