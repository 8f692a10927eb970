"""Loads a policy in a process of its own, and writes what share of freed tensors then stays with the process.

Not a test: `test_policy.py` starts it. Arguments: the model's folder, its settings as JSON, "trained" or "", and the
file to write.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from medbridge.model import ModelSettings, Policy

BLOCK = 16 << 20
BLOCKS = 12


def resident() -> int:
    """Bytes of memory that are this process's now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(folder: str, settings: str, trained: str, out: str) -> None:
    policy = Policy.load(folder, ModelSettings.model_validate_json(settings), trainable=bool(trained))
    before = resident()
    blocks = [torch.ones(BLOCK, dtype=torch.uint8, device=policy.device) for _ in range(BLOCKS)]
    assert resident() - before > BLOCK * (BLOCKS - 1)
    del blocks
    Path(out).write_text(str((resident() - before) / (BLOCK * BLOCKS)))


main(*sys.argv[1:])
