"""What is kept and shown of the steps of a training stage: ledger, terminal, TensorBoard, W&B, profile.

It adds what only the machine knows: the MFU and the peak of memory. Nothing that is trained depends on it.
"""

from __future__ import annotations

import resource
import sys
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from medbridge.ledger import Stage
from medbridge.model import Policy
from medbridge.profiling import Profiler
from medbridge.sinks import Sink, open_sinks
from medbridge.train.flops import FlopCounter, peak

if TYPE_CHECKING:
    from medbridge.stages import Training


class Recorder:
    """The callbacks of one training stage, a context around its training."""

    def __init__(self, run: Training, stage: Stage, policy: Policy, steps: int, method: str) -> None:
        """`method` is what the terminal calls it."""
        self._run = run
        self._stage = stage
        self._policy = policy
        self._steps = steps
        self._method = method
        self._flops = FlopCounter(policy)
        self._sinks: list[Sink] = []
        self._profiler: Profiler | None = None
        self._open = ExitStack()

    def __enter__(self) -> Recorder:
        title = f"{self._stage.kind}: {self._method}"
        self._view = self._open.enter_context(self._run.reporter.training(title, self._steps))
        self._open.enter_context(self._flops.counting())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._profiler is not None:
                self._profiler.close()
            for sink in self._sinks:
                sink.close()
        finally:
            self._open.close()

    def on_start(self, step: int) -> None:
        """Training goes on behind `step`: what was recorded of later ones is forgotten."""
        run, stage = self._run, self._stage
        run.ledger.rewind(stage.stage_id, step)
        self._view.begin(step)
        self._sinks = open_sinks(run.settings, run.folder, stage, first_step=step + 1, say=run.reporter.say)
        if run.profile:
            folder = run.folder / "profile" / f"{stage.stage_id:02d}-{stage.kind}"
            self._profiler = Profiler(folder, run.profile, run.reporter.say)
            self._profiler.start()

    def on_step(self, step: int, metrics: dict[str, float], ids: list[str]) -> None:
        """A step is done."""
        metrics = metrics | self._speed(metrics) | {"memory_gb": peak_memory_gb(self._policy.device)}
        self._run.ledger.log_step(self._stage.stage_id, step, metrics, ids)
        self._run.keep_time()
        self._view.show(step, metrics)
        for sink in self._sinks:
            sink.log(step, metrics)
        if self._profiler is not None:
            self._profiler.step(metrics)

    def _speed(self, metrics: dict[str, float]) -> dict[str, float]:
        flops, tokens = self._flops.take()
        seconds = metrics.get("seconds_training", 0.0)
        if not flops or not seconds:  # a step whose groups all agree computes nothing
            return {}
        return {"mfu": flops / (seconds * self._peak()), "trained_tokens_per_second": tokens / seconds}

    def _peak(self) -> float:
        """FLOP/s that the device could reach: noted in the run, once for each device and type."""
        device, dtype = self._policy.device, self._policy.compute_dtype
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        key = f"{name}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
        noted = self._run.ledger.meta("peak_flops") or {}
        if key not in noted:
            value, source = peak(device, dtype)
            noted = {**noted, key: {"flops": value, "source": source}}
            self._run.ledger.set_meta("peak_flops", noted)
        return float(noted[key]["flops"])


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in units of 1e9 bytes: on the GPU by torch, or in main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e9
