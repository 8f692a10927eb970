"""Compiles the kernels ahead of time for GPUs that needn't be there, and reads what the compilers made of them.

The calls are those of the public functions on CPU tensors, so what is compiled is what would be launched: the same
specialisation, constants and warps. Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from medbridge_kernels.config import PRESETS, LossConfig
from medbridge_kernels.triton import launch
from medbridge_kernels.triton.advantages import group_advantages
from medbridge_kernels.triton.policy import policy_terms
from medbridge_kernels.triton.vocabulary import sweep, sweep_backward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program may have."""


_read: dict[str, Compiled] = {}
"""What was read already, by the kernel's hash: presets share kernels."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiler made of a kernel.

    Attributes:
        kernel: its name.
        registers: per thread.
        spills: registers that are kept in memory (AMD), or bytes of the stack (NVIDIA).
        shared: bytes of shared memory.
        loads, stores: how many instructions of each width in bytes access global memory.
        intermediate: PTX (NVIDIA) or the assembly itself (AMD).
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    intermediate: str


class _Elsewhere:
    """A driver of a GPU that isn't here: enough for Triton to specialise and compile a call."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # the key of a kernel's cache

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(name: str) -> Iterator[list[Any]]:
    """Within it, kernels that are launched are compiled for this target (see TARGETS) instead, into the list it gives."""
    target, launched = TARGETS[name], []
    run, active, warp = JITFunction.run, driver._active, launch.WARP

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched.append(run(self, *args, grid=grid, warmup=True, **options))
        return launched[-1]

    driver.set_active(_Elsewhere(target))
    JITFunction.run, launch.WARP = compile_only, target.warp_size
    try:
        yield launched
    finally:
        driver.set_active(active)
        JITFunction.run, launch.WARP = run, warp


def shipped(vocab: int = 151_936) -> dict[str, Callable[[], Any]]:
    """Calls that launch every configuration that is shipped, by what they are."""
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        calls[f"sweep {name}"] = partial(_sweep, dtype, vocab, False)
        calls[f"sweep {name}, entropy, mask, temperatures"] = partial(_sweep, dtype, vocab, True)
        calls[f"sweep {name}, entropy, mask, temperatures, odd vocabulary"] = partial(_sweep, dtype, vocab + 1, True)
        calls[f"sweep_backward {name}"] = partial(_sweep_backward, dtype, vocab, False)
        calls[f"sweep_backward {name}, entropy, mask, temperatures"] = partial(_sweep_backward, dtype, vocab, True)
        calls[f"sweep_backward {name}, entropy, mask, temperatures, odd vocabulary"] = partial(
            _sweep_backward, dtype, vocab + 1, True
        )
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        calls[f"group_advantages {name}, loo, batch_std"] = partial(_advantages, dtype, "loo", "batch_std")
    for baseline, scale in (("mean", "std"), ("loo", "batch_std"), ("none", "none")):
        calls[f"group_advantages float32, {baseline}, {scale}"] = partial(_advantages, torch.float32, baseline, scale)
    for preset in PRESETS:
        config = LossConfig.preset(preset)
        calls[f"policy_terms {preset}"] = partial(_policy, config, False, False)
        full = LossConfig.preset(preset, kl_coef=0.04, entropy_coef=0.01, correction="mask", off_policy_threshold=0.1)
        calls[f"policy_terms {preset}, KL, entropy, correction, off-policy mask"] = partial(_policy, full, True, False)
    sequences = LossConfig(
        ratio_level="sequence", kl_coef=0.04, kl_estimator="k2", correction="truncate", correction_level="sequence"
    )
    calls["policy_terms sequence ratio and correction, k2, advantages per token"] = partial(
        _policy, sequences, True, True
    )
    return calls


def compile_shipped(call: Callable[[], Any], target: str) -> list[Compiled]:
    """Compiles what a call of `shipped` launches."""
    with compiling_for(target) as kernels:
        call()
    read = _read_cubin if TARGETS[target].backend == "cuda" else _read_amdgcn
    for kernel in kernels:
        if kernel.hash not in _read:
            _read[kernel.hash] = read(kernel)
    return [_read[kernel.hash] for kernel in kernels]


def _sweep(dtype: torch.dtype, vocab: int, full: bool) -> Any:
    logits = torch.empty(2, vocab, dtype=dtype)
    temperature = torch.ones(2) if full else 1.0
    return sweep(logits, torch.zeros(2, dtype=torch.int64), _mask(2) if full else None, temperature, entropy=full)


def _sweep_backward(dtype: torch.dtype, vocab: int, full: bool) -> Any:
    logits, rows = torch.empty(2, vocab, dtype=dtype), torch.zeros(2)
    keep, temperature = (_mask(2), rows) if full else (None, 1.0)
    entropy = rows if full else None
    return sweep_backward(logits, rows.long(), keep, temperature, rows, entropy, rows, entropy, logits)


def _advantages(dtype: torch.dtype, baseline: str, scale: str) -> Any:
    return group_advantages(torch.zeros(8, dtype=dtype), torch.tensor([0, 8]), baseline, scale, True, 1e-4)


def _policy(config: LossConfig, full: bool, per_token: bool) -> Any:
    rows = torch.zeros(32)
    others = (rows, rows, rows) if full else (rows, None, None)
    advantages = rows if per_token else torch.zeros(4)
    ids = torch.zeros(32, dtype=torch.int64)
    mask = _mask(32) if full else None
    return policy_terms(rows, rows, ids, len(advantages), advantages, per_token, *others, mask, 32.0, config)


def _mask(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def _read_cubin(kernel: Any) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", []))
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = numbers["STACK"] + numbers["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Compiled(
        kernel.metadata.name, numbers["REG"], spills, kernel.metadata.shared,
        _widths(re.findall(r"\bLDG\.(\S+)", sass)), _widths(re.findall(r"\bSTG\.(\S+)", sass)), kernel.asm["ptx"],
    )  # fmt: skip


def _widths(modifiers: list[str]) -> dict[int, int]:
    """Instructions by bytes, from modifiers such as E.128 or E.U16; without a number 4."""
    widths: dict[int, int] = {}
    for text in modifiers:
        bits = re.search(r"\b[US]?(8|16|64|128|256)\b", text)
        width = int(bits[1]) // 8 if bits else 4
        widths[width] = widths.get(width, 0) + 1
    return widths


def _read_amdgcn(kernel: Any) -> Compiled:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]

    def widths(kind: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for unit in re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+)", text):
            words = re.fullmatch(r"dword(?:x(\d))?", unit)
            width = 4 * int(words[1] or 1) if words else 1 if "byte" in unit else 2
            found[width] = found.get(width, 0) + 1
        return found

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Compiled(
        kernel.metadata.name, number("vgpr_count"), spills, kernel.metadata.shared, widths("load"), widths("store"), text
    )
