"""Writes docs/triton-kernels.md: registers, spills, shared memory and loads of every Triton kernel that is shipped,
compiled ahead of time for GPUs that needn't be there. It measures no time. Run: python bench/triton_table.py
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton

from medbridge_kernels.triton import compile
from medbridge_kernels.triton.launch import LAUNCHES

VOCAB = 151_936
PAGE = Path(__file__).parents[1] / "docs" / "triton-kernels.md"
HEAD = f"""# The Triton kernels as compiled

Written by `bench/triton_table.py` with triton {{version}}: each kernel is compiled for its GPUs ahead of time, by the
calls that launch it, and read from the machine code. No time was measured: GPU figures are **not yet measured on a
GPU**.

A cell says registers per thread / spills (bytes of stack on NVIDIA, registers on AMD) / bytes of shared memory. "Load"
is the widest load of global memory in bytes, the least over the GPUs. "Bytes per row" is all that is read and written
for a row of {VOCAB:,} logits; with an odd vocabulary, of one logit more.

## Launches

| kernel | bytes per element | tile | threads |
| --- | --- | --- | --- |
"""


def bytes_per_row(label: str) -> int | None:
    """Bytes that one row of the vocabulary sweep reads and writes; None for other kernels."""
    if not label.startswith("sweep"):
        return None
    size = 4 if "float32" in label else 2
    logits = (VOCAB + ("odd" in label)) * size
    full = "entropy" in label
    if label.startswith("sweep_backward"):
        # label, lse and its gradient; entropy, its gradient and temperature, mask
        return 2 * logits + 8 + 4 + 4 + full * (4 + 4 + 4 + 1)
    # label and its logit, log-probability and lse; entropy and temperature, mask
    return logits + 8 + size + 4 + 4 + full * (4 + 4 + 1)


def lines() -> list[str]:
    """The page."""
    rows = [HEAD.format(version=triton.__version__).rstrip("\n")]
    rows += [f"| {name} | {size} | {item.tile} | {item.threads} |" for (name, size), item in LAUNCHES.items()]
    targets = list(compile.TARGETS)
    rows += ["", "## Kernels", "", f"| call | kernel | {' | '.join(targets)} | load | bytes per row |"]
    rows += ["| --- " * (len(targets) + 4) + "|"]
    for label, call in compile.shipped(VOCAB).items():
        by_target = [compile.compile_shipped(call, target) for target in targets]
        moved = bytes_per_row(label)
        for kernels in zip(*by_target, strict=True):
            cells = [f"{kernel.registers} / {kernel.spills} / {kernel.shared}" for kernel in kernels]
            widest = min(max(kernel.loads()) for kernel in kernels)
            cells += [str(widest), "" if moved is None else f"{moved:,}"]
            rows.append(f"| {label} | {kernels[0].kernel} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()) + "\n")
    print(f"wrote {PAGE}")
