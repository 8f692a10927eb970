"""When Liger's kernels are taken, and (in a process of its own, in Triton's interpreter) that they compute the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.model.liger import wanted

HERE = Path(__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_them_for_training_on_a_gpu() -> None:
    assert wanted("auto", GPU, trainable=True)
    assert not wanted("auto", GPU, trainable=False)
    assert not wanted("auto", CPU, trainable=True)


def test_they_can_be_left_out_or_demanded() -> None:
    assert not wanted(False, GPU, trainable=True)
    assert wanted(True, GPU, trainable=False)


def test_demanded_where_there_is_no_gpu(load_policy: Callable[..., Policy]) -> None:
    with pytest.raises(MedbridgeError, match=r"model\.liger is true, and the model is on cpu"):
        load_policy(liger=True, device="cpu", trainable=True)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not wanted("auto", GPU, trainable=True)
    with pytest.raises(MedbridgeError, match="liger-kernel is not installed"):
        wanted(True, GPU, trainable=True)


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
        "--import-mode=importlib", str(HERE / "interpreted_liger.py"),
    ]  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
