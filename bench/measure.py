"""Times, peak memory and copy bandwidth, as the benchmarks of the kernels measure them on a CPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIB = 1 << 20


class Times(tuple[float, ...]):
    """Seconds of a case in each round."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    def over(self, other: Times) -> float:
        """Median of the ratios within a round: both ran one after the other, at the machine's speed of the moment."""
        return statistics.median(mine / theirs for mine, theirs in zip(self, other, strict=False))


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed, and what is done before each time and not counted. What `run` returns is freed uncounted too.

    warm: it has run before, and does not take part in the round that isn't counted.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    rounds: int | None = None
    warm: bool = False


def timed(cases: Mapping[str, Case], rounds: int) -> dict[str, Times]:
    """Times of each case over interleaved rounds, after one that isn't counted; some only take part in the first."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            if number > (case.rounds or rounds) or (case.warm and not number):
                continue
            case.prepare()
            gc.collect()
            start = time.perf_counter()
            result = case.run()
            if number:
                taken[name].append(time.perf_counter() - start)
            del result
    return {name: Times(times) for name, times in taken.items()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values, both taken in float64 and in blocks of rows."""
    difference = norm = 0.0
    for a, b in zip(found.split(4096), exact.split(4096), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        norm += float(b.double().square().sum())
    return (difference / norm) ** 0.5


class Memory(NamedTuple):
    """Resident memory in MiB.

    `beyond` is the peak of a call beyond what was there before and what it returned; `left` is what the first such call
    of a process left behind: buffers of libraries, compiled code.
    """

    beyond: float
    left: float


def peak_memory(build: Callable[..., Callable[[], tuple[Tensor, ...]]], *arguments: Any) -> Memory:
    """Of the call that `build(*arguments)` gives, in a process of its own.

    The call runs twice. The second is measured: the first compiles where there is something to compile. The tensors
    that it returns (gradients) don't count.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory, build, arguments).result()


def _peak_memory(build: Callable[..., Callable[[], tuple[Tensor, ...]]], arguments: tuple[Any, ...]) -> Memory:
    call = build(*arguments)
    at_first = resident()
    call()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    returned = call()
    peak = _status("VmHWM")
    bytes_returned = sum(tensor.numel() * tensor.element_size() for tensor in returned)
    return Memory((peak - before - bytes_returned) / MIB, (before - at_first) / MIB)


def steps_peak(build: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Peak of resident memory, in MiB, in two calls of what `build(*arguments)` gives, beyond what was there before.

    In a process of its own. For training steps: what the first call makes and keeps, as optimizer states, counts.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_steps_peak, build, arguments).result()


def _steps_peak(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> float:
    call = build(*arguments)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(2):
        call()
    return (_status("VmHWM") - before) / MIB


def resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


def table(title: str, times: Mapping[str, Times], columns: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Prints a line per case: times, ratio to the first, and `columns` of a value per case. Returns the figures."""
    own = next(iter(times.values()))
    heads = ["median ms", "fastest", "slowest", "ratio", *columns]
    name_width, width = max(map(len, times)), 2 + max(map(len, heads))
    print(f"\n{title}\n  {'':<{name_width}}" + "".join(f"{head:>{width}}" for head in heads))
    figures = {}
    for name, found in times.items():
        row: dict[str, float] = {
            "median_milliseconds": rounded(1e3 * found.median),
            "fastest_milliseconds": rounded(1e3 * min(found)),
            "slowest_milliseconds": rounded(1e3 * max(found)),
            "ratio": rounded(found.over(own), 3),
        }
        extra = {column: values[name] for column, values in columns.items() if name in values}
        cells = [f"{value:.4g}" for value in row.values()]
        cells += [f"{extra[column]:.2g}" if column in extra else "" for column in columns]
        print(f"  {name:<{name_width}}" + "".join(f"{cell:>{width}}" for cell in cells))
        figures[name] = row | {column.replace(" ", "_"): rounded(value, 3) for column, value in extra.items()}
    return figures


def product(size: int) -> Case:
    """What the processor can do at most: a product of two square float32 matrices, 2 size^3 operations."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return Case(lambda: torch.mm(a, b, out=out))


def copies(values: int) -> dict[str, Case]:
    """What the memory can do with arrays of so many float32, by torch on all threads.

    "copy" reads one and writes one, "add" reads two and writes a third.
    """
    a, b, c = (torch.full((values,), 0.5) for _ in range(3))
    return {"copy": Case(lambda: c.copy_(a)), "add": Case(lambda: torch.add(a, b, out=c))}
