"""Tests every Triton kernel on the GPU at hand, then times them beside their peers; under 8 minutes, no test framework.

    python bench/gpu_kernels.py [--quick] [--out FILE]
    python bench/gpu_kernels.py --interpret [--quick]     the tests alone, tiny, on CPU tensors in Triton's interpreter

Needs torch, triton and the package (installed, or PYTHONPATH=kernels); liger-kernel as a peer where it is there. Prints
as it goes, and writes everything as JSON. Times are medians of CUDA events with a cold L2 cache. Exit code: 0, 1 where
a test fails (nothing is timed then), 2 without a GPU.

Targets, on an H100: 8,192 x 151,936 bfloat16 forward 0.88 ms, forward and backward in place 2.7 ms; from hidden states
of 4,096 60 to 80 ms and 6 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BUDGET = 7.5 * 60
"""Seconds after which no further peer is begun."""
TARGETS = {
    "forward_milliseconds": 0.88,
    "forward_and_backward_milliseconds": 2.7,
    "hidden_milliseconds": [60, 80],
    "hidden_gibibytes": 6,
    "device": "H100",
}
GIB = 1 << 30


def first_line(error: BaseException) -> str:
    """Kind and message of an error, short."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


# --- the tests ---


def run_checks(on_gpu: bool, quick: bool, started: float) -> dict[str, Any]:
    """Runs all, printing a line each; what each found."""
    import gpu_checks

    interpreter = gpu_checks.QUICK_INTERPRETER if quick else gpu_checks.INTERPRETER
    scale = gpu_checks.GPU if on_gpu else interpreter
    results = {}
    for check in gpu_checks.EVERYWHERE + (gpu_checks.ON_GPU if on_gpu else ()):
        began = time.monotonic()
        count, worst, wrong = 0, ("", 0.0), []
        try:
            for what, share in check(scale):
                count += 1
                worst = max(worst, (what, share), key=lambda found: found[1])
                if not share <= 1:
                    wrong.append(f"{what}: {share:.3g}")
        except Exception as error:
            wrong.append(f"stopped by {first_line(error)}")
        name = check.__name__.replace("_", " ")
        results[name] = {
            "cases": count,
            "largest_share_of_allowed_error": worst[1],
            "at": worst[0],
            "failures": wrong,
            "seconds": round(time.monotonic() - began, 1),
        }
        verdict = f"FAILED {len(wrong)}: {'; '.join(wrong[:5])}" if wrong else "ok"
        print(
            f"{time.monotonic() - started:5.0f} s  {name}: {count} cases, worst {worst[1]:.2f} ({worst[0]}): {verdict}",
            flush=True,
        )
    return results


# --- the timings ---


class Stopwatch:
    """Times calls on the device: events, the L2 cache emptied before each, and the host kept ahead of the device."""

    def __init__(self, repeats: int) -> None:
        import torch

        self.torch, self.repeats = torch, repeats
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(max(256 << 20, 4 * cache), dtype=torch.int8, device="cuda")

    def milliseconds(self, call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
        """Median."""
        cuda = self.torch.cuda
        for _ in range(2):
            prepare()
            call()
        cuda.synchronize()
        events = []
        for _ in range(self.repeats):
            prepare()
            self.flush.zero_()
            cuda._sleep(20_000_000)  # cycles, about 10 ms, in which the host queues the call
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            cuda.synchronize()
            events.append(start.elapsed_time(end))
        return statistics.median(events)

    def peak_gibibytes(self, call: Callable[[], Any]) -> float:
        """Memory at its highest during a call beyond what was there before: gradients included."""
        cuda = self.torch.cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        call()
        cuda.synchronize()
        return (cuda.max_memory_allocated() - before) / GIB


class Bench:
    """Figures of cases, each guarded: a peer that is missing or out of memory is said, and ends nothing."""

    def __init__(self, stopwatch: Stopwatch, deadline: float) -> None:
        self.stopwatch, self.deadline = stopwatch, deadline

    def measure(self, title: str, cases: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
        """What each case says, printed; `time` in milliseconds comes with its ratio to the first."""
        print(f"\n{title}")
        figures: dict[str, Any] = {}
        for name, case in cases.items():
            if time.monotonic() > self.deadline:
                figures[name] = {"left_out": "the time was up"}
            else:
                try:
                    figures[name] = case()
                except Exception as error:
                    figures[name] = {"left_out": first_line(error)}
                self.stopwatch.torch.cuda.empty_cache()
            own = next(iter(figures.values())).get("milliseconds")
            if own and "milliseconds" in figures[name]:
                figures[name]["ratio"] = figures[name]["milliseconds"] / own
            print(
                f"  {name:<22} " + ", ".join(f"{key} {_short(value)}" for key, value in figures[name].items()),
                flush=True,
            )
        return figures


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def copy_bandwidth(stopwatch: Stopwatch) -> float:
    """Bytes a second of a copy of 1 GiB, read and written."""
    torch = stopwatch.torch
    source = torch.ones(GIB // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * GIB / (1e-3 * stopwatch.milliseconds(lambda: target.copy_(source)))


def logits_in(bench: Bench, bandwidth: float, tokens: int, vocab: int, quick: bool) -> dict[str, Any]:
    """Log-probabilities with entropy, then loss and gradient, from bfloat16 logits."""
    import peers
    import torch

    from medbridge_kernels import token_logprobs

    sequences = 8
    step = peers.Step.random(sequences, tokens // sequences, vocab, "cuda")
    ids = step.token_ids.flatten()
    source = torch.empty(tokens, vocab, dtype=torch.bfloat16, device="cuda").normal_(0, 2)
    logits = source.clone()
    few = peers.Step.random(sequences, 16, vocab, "cuda")
    few_logits = source[: few.token_ids.numel()].clone()
    exact_loss, exact_gradient = peers.through_logits(partial(peers.exact_logits, few), few_logits.double())

    def eager(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from medbridge_kernels import reference

        return reference.logprobs_and_entropy(values.float(), ids)

    def with_liger_row(values: torch.Tensor) -> torch.Tensor:
        """Liger takes a row more of each sequence, which it doesn't read."""
        return torch.nn.functional.pad(values.view(sequences, -1, vocab), (0, 0, 0, 1))

    def liger_forward() -> dict[str, Any]:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        padded = with_liger_row(source)
        return forward(lambda: fused_selective_log_softmax(padded, step.token_ids, 1.0))

    def forward(call: Callable[[], Any]) -> dict[str, Any]:
        with torch.no_grad():
            taken = bench.stopwatch.milliseconds(call)
        return {"milliseconds": taken, "share_of_copy_bandwidth": source.nbytes / (1e-3 * taken) / bandwidth}

    def both(loss_of: Callable[[peers.Step, torch.Tensor], torch.Tensor], padded: bool = False) -> dict[str, Any]:
        shaped = with_liger_row if padded else torch.clone
        values = shaped(source) if padded else logits
        template = shaped(source) if padded else source
        call = partial(peers.through_logits, partial(loss_of, step), values)
        taken = bench.stopwatch.milliseconds(call, prepare=lambda: values.copy_(template))
        values.copy_(template)
        memory = bench.stopwatch.peak_gibibytes(call)
        loss, gradient = peers.through_logits(partial(loss_of, few), shaped(few_logits))
        if padded:
            gradient = gradient[:, :-1].reshape(few_logits.shape)
        error = float((gradient.double() - exact_gradient).norm() / exact_gradient.norm())
        return {
            "milliseconds": taken,
            "share_of_copy_bandwidth": 3 * source.nbytes / (1e-3 * taken) / bandwidth,
            "gibibytes_beyond": memory,
            "loss_error": abs(float(loss) - float(exact_loss)),
            "gradient_error": error,
        }

    forwards: dict[str, Callable[[], dict[str, Any]]] = {
        "medbridge": lambda: forward(lambda: token_logprobs(source, ids, entropy=True, impl="triton")),
        "medbridge, no entropy": lambda: forward(lambda: token_logprobs(source, ids, impl="triton")),
        "Liger, no entropy": liger_forward,
        "eager torch": lambda: forward(lambda: eager(source)),
    }
    losses: dict[str, Callable[[], dict[str, Any]]] = {
        "medbridge": lambda: both(peers.medbridge_logits),
        "medbridge, out of place": lambda: both(partial(peers.medbridge_logits, inplace=False)),
        "Liger": lambda: both(peers.liger_logits, padded=True),
        "eager torch": lambda: both(peers.eager_logits),
    }
    if not quick:
        compiled = torch.compile(eager)
        forwards["torch.compile"] = lambda: forward(lambda: compiled(source))
        losses["torch.compile"] = lambda: both(torch.compile(peers.eager_logits))
    size = f"{tokens} x {vocab} bfloat16"
    return {
        "forward": bench.measure(f"Log-probabilities and entropies, {size}", forwards),
        "forward and backward": bench.measure(f"Loss and gradient, {size}", losses),
    }


def hidden_in(bench: Bench, tokens: int, vocab: int, width: int, quick: bool) -> dict[str, Any]:
    """Loss and gradients from hidden states and the output layer's weight, in bfloat16."""
    import peers
    import torch

    sequences = 8
    step = peers.Step.random(sequences, tokens // sequences, vocab, "cuda")
    hidden = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    weight = torch.empty(vocab, width, device="cuda").normal_(0, 2 / width**0.5).bfloat16().requires_grad_()
    padded = hidden.detach().view(sequences, -1, width).requires_grad_()
    operations = 6 * tokens * width * vocab

    def products() -> Any:
        with torch.no_grad():
            logits = hidden @ weight.t()
            return logits @ weight, logits.t() @ hidden

    def of(call: Callable[[], Any]) -> dict[str, Any]:
        taken = bench.stopwatch.milliseconds(call)
        return {
            "milliseconds": taken,
            "tera_operations_per_second": operations / taken / 1e9,
            "gibibytes_beyond_inputs": bench.stopwatch.peak_gibibytes(call),
        }

    def eager(loss_of: Callable[[peers.Step, torch.Tensor], torch.Tensor]) -> Any:
        return torch.autograd.grad(loss_of(step, hidden @ weight.t()), [hidden, weight])

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "medbridge": lambda: of(lambda: peers.medbridge_linear(step, hidden, weight)),
        "the three products": lambda: of(products),
        "Liger, one chunk": lambda: of(
            lambda: peers.liger_linear(step, padded, weight, compiled=False, chunk_size=sequences)
        ),
        "Liger": lambda: of(lambda: peers.liger_linear(step, padded, weight, compiled=not quick)),
        "eager torch": lambda: of(lambda: eager(peers.eager_logits)),
    }
    if not quick:
        compiled = torch.compile(peers.eager_logits)
        cases["torch.compile"] = lambda: of(lambda: eager(compiled))
    return bench.measure(f"Loss and gradients from hidden states, {tokens} x {width}, vocabulary {vocab}", cases)


def advantages(bench: Bench, step_milliseconds: float | None) -> dict[str, Any]:
    """Group advantages of a step, and of 100,000 rewards; their share of the loss's forward and backward."""
    import torch

    from medbridge_kernels import group_advantages

    def of(rewards: int, group: int, impl: Any) -> dict[str, Any]:
        values = torch.rand(rewards, device="cuda")
        offsets = torch.arange(0, rewards + 1, group, device="cuda")
        taken = bench.stopwatch.milliseconds(lambda: group_advantages(values, offsets, impl=impl))
        share = {} if step_milliseconds is None else {"share_of_loss_step": taken / step_milliseconds}
        return {"milliseconds": taken, **share}

    return bench.measure(
        "Group advantages",
        {
            "1,024 rewards": lambda: of(1024, 8, "triton"),
            "1,024 rewards, definition": lambda: of(1024, 8, "reference"),
            "100,000 rewards": lambda: of(100_000, 8, "triton"),
        },
    )


def run_timings(quick: bool, started: float) -> dict[str, Any]:
    """All of them."""
    tokens, vocab, width = (2048 if quick else 8192), 151_936, 4096
    stopwatch = Stopwatch(repeats=5 if quick else 15)
    bench = Bench(stopwatch, started + BUDGET)
    bandwidth = copy_bandwidth(stopwatch)
    print(f"\nCopy bandwidth {bandwidth / 1e9:.0f} GB/s")
    found: dict[str, Any] = {"tokens": tokens, "vocabulary": vocab, "width": width, "copy_bytes_per_second": bandwidth}
    found |= logits_in(bench, bandwidth, tokens, vocab, quick)
    stopwatch.torch.cuda.empty_cache()
    found["hidden in"] = hidden_in(bench, tokens, vocab, width, quick)
    stopwatch.torch.cuda.empty_cache()
    found["group advantages"] = advantages(bench, found["forward and backward"]["medbridge"].get("milliseconds"))
    return found


# --- the record ---


def machine() -> dict[str, Any]:
    """Device and versions."""
    import peers
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "hip": torch.version.hip, "device": "Triton's interpreter", **peers.versions(),
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "gibibytes": round(properties.total_memory / GIB, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2,048 tokens, fewer repeats, nothing by torch.compile; with --interpret fewer tests",
    )
    parser.add_argument("--interpret", action="store_true", help="the tests alone, on the CPU")
    parser.add_argument(
        "--out", type=Path, help="where the JSON goes; default: bench/results/gpu_kernels.json, none with --interpret"
    )
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton's own default, said so that it doesn't warn
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import torch

    if not options.interpret and not torch.cuda.is_available():
        print("gpu_kernels: torch finds no GPU here; --interpret runs the tests on the CPU", file=sys.stderr)
        return 2
    started = time.monotonic()
    record: dict[str, Any] = {"machine": machine(), "command": " ".join(["python", *sys.argv]), "targets": TARGETS}
    record["tests"] = run_checks(not options.interpret, options.quick, started)
    failed = [name for name, found in record["tests"].items() if found["failures"]]
    if failed:
        print(f"\nfailed: {', '.join(failed)}; nothing is timed")
    elif not options.interpret:
        record["timings"] = run_timings(options.quick, started)
    record["seconds"] = round(time.monotonic() - started, 1)
    out = options.out
    if out is None and not options.interpret:
        out = Path(__file__).parent / "results" / "gpu_kernels.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\nwritten to {out}, {record['seconds']} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
