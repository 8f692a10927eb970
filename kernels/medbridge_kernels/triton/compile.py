"""Compiles the kernels ahead of time for GPUs that needn't be there, and reads what the compilers made of them.

The calls are those of the public functions on CPU tensors, so what is compiled is what would be launched: the same
specialisation, constants and warps. Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
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


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiler made of a kernel.

    Attributes:
        kernel: its name.
        registers: per thread.
        spills: bytes of the stack (NVIDIA), or registers that are kept in memory (AMD).
        shared: bytes of shared memory.
        intermediate: PTX (NVIDIA) or the assembly (AMD).
        code: the machine code (NVIDIA) or the assembly (AMD).
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    intermediate: str
    code: bytes | str

    def loads(self) -> dict[int, int]:
        """How many instructions of each width in bytes load from global memory."""
        return self._widths("LDG", "load")

    def stores(self) -> dict[int, int]:
        """How many instructions of each width in bytes store to global memory."""
        return self._widths("STG", "store")

    def _widths(self, nvidia: str, amd: str) -> dict[int, int]:
        if isinstance(self.code, bytes):
            text = _cuobjdump("-sass", self.code)
            widths = [_nvidia_width(modifiers) for modifiers in re.findall(rf"\b{nvidia}\.(\S+)", text)]
        else:
            widths = [_amd_width(unit) for unit in re.findall(rf"\b(?:global|buffer|flat)_{amd}_(\w+)", self.code)]
        return dict(Counter(widths))


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
    """Within it, kernels that are launched are compiled for this target of TARGETS instead, into the list it gives."""
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
        calls[f"sweep_backward {name}"] = partial(_sweep_backward, dtype, vocab, False)
        calls[f"sweep_backward {name}, entropy, mask, temperatures"] = partial(_sweep_backward, dtype, vocab, True)
    odd = "bfloat16, entropy, mask, temperatures, odd vocabulary"
    calls[f"sweep {odd}"] = partial(_sweep, torch.bfloat16, vocab + 1, True)
    calls[f"sweep_backward {odd}"] = partial(_sweep_backward, torch.bfloat16, vocab + 1, True)
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
        ratio_level="sequence", kl_coef=0.04, kl_estimator="k2", kl_bias_correction=True, correction="truncate",
        correction_level="sequence",
    )  # fmt: skip
    calls["policy_terms sequence ratio and correction, corrected k2, advantages per token"] = partial(
        _policy, sequences, True, True
    )
    return calls


def compile_shipped(call: Callable[[], Any], target: str) -> list[Compiled]:
    """Compiles what a call of `shipped` launches."""
    with compiling_for(target) as kernels:
        call()
    read = _read_cubin if TARGETS[target].backend == "cuda" else _read_amdgcn
    return [read(kernel) for kernel in kernels]


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
    ref, rollout, mask = (rows, rows, _mask(32)) if full else (None, None, None)
    advantages = rows if per_token else torch.zeros(4)
    return policy_terms(
        rows, rows, rows.long(), len(advantages), advantages, per_token, rows, ref, rollout, mask, 32.0, config
    )


def _mask(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


@lru_cache(maxsize=16)
def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _read_cubin(kernel: Any) -> Compiled:
    cubin = kernel.asm["cubin"]
    usage = {
        name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin))
    }
    spills = usage["STACK"] + usage["LOCAL"]
    return Compiled(kernel.metadata.name, usage["REG"], spills, kernel.metadata.shared, kernel.asm["ptx"], cubin)


def _read_amdgcn(kernel: Any) -> Compiled:
    text = kernel.asm["amdgcn"]
    registers, *spills = (
        int(value)
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        for value in re.findall(rf"\.{name}:\s*(\d+)", text)
    )
    return Compiled(kernel.metadata.name, registers, sum(spills), kernel.metadata.shared, text, text)


def _nvidia_width(modifiers: str) -> int:
    """Bytes, from modifiers such as E.128 or E.U16; without a number 4."""
    bits = re.search(r"\b[US]?(8|16|64|128|256)\b", modifiers)
    return int(bits[1]) // 8 if bits else 4


def _amd_width(unit: str) -> int:
    """Bytes, from units such as dwordx4 or ushort."""
    words = re.fullmatch(r"dword(?:x(\d))?", unit)
    return 4 * int(words[1] or 1) if words else 1 if "byte" in unit else 2
