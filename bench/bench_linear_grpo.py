"""The GRPO loss from hidden states on a CPU, forward and backward, side by side with its peers in one run.

    pytest bench/bench_linear_grpo.py -s

512 tokens (8 completions of 64), at three sizes of the output layer. The peers:

- the three bare matrix products that no implementation can do without (logits, gradient of the hidden states, gradient
  of the weight), whole and in the package's chunks of tokens, into memory that is there already; and whole into fresh
  memory, which every implementation has to take for its gradients (its first touch costs page faults)
- TRL 1.16: its trainer's output layer and loss, as `GRPOTrainer._compute_loss` runs them without a GPU; and its
  functions on logits that are made whole, as its trainer used to
- Liger's fused linear loss: compiled, as is its default; not compiled; and all completions as one chunk

Prints median, fastest and slowest of interleaved rounds, the ratio to the package's median, the error of the loss and
the relative errors of both gradients against float64, and the peak of resident memory beyond inputs and gradients in a
process of its own. It asserts accuracy and memory, and no time: machines are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peers
import pytest
import torch
from measure import Case, Memory, peak_memory, relative_error, rounded, table, timed
from peers import Step
from torch import Tensor

from medbridge_kernels import linear, native

SEQUENCES, LENGTH, ROUNDS = 8, 64, 5
TOKENS = SEQUENCES * LENGTH
SLOW_ROUNDS = 3  # of those that take several times as long
MEMORY_LIMIT = 200  # MiB beyond inputs and gradients


class Size(NamedTuple):
    vocab: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"vocabulary {self.vocab}, width {self.width}, {name}"


SIZES = [
    Size(151_936, 1024, torch.float32),
    Size(32_000, 2048, torch.float32),
    Size(151_936, 1024, torch.bfloat16),
]


class Layer(NamedTuple):
    """A step, and what the output layer gets: packed hidden states and weight."""

    step: Step
    hidden: Tensor
    weight: Tensor

    @classmethod
    def random(cls, size: Size) -> Layer:
        """Logits have a standard deviation of 2, so that the distributions are neither flat nor certain."""
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(TOKENS, size.width, generator=generator)
        weight = torch.randn(size.vocab, size.width, generator=generator).mul_(2 / size.width**0.5)
        step = Step.random(SEQUENCES, LENGTH, size.vocab)
        return cls(step, hidden.to(size.dtype).requires_grad_(), weight.to(size.dtype).requires_grad_())

    def padded(self, prompt: int = 0) -> Tensor:
        """Hidden states [sequences, length + prompt, width], a leaf."""
        states = self.hidden.detach().view(SEQUENCES, LENGTH, -1)
        return torch.nn.functional.pad(states, (0, 0, 0, prompt)).requires_grad_()


def medbridge(layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: peers.medbridge_linear(*layer)


def trl(layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    hidden = layer.padded(prompt=1)
    return lambda: peers.trl_linear(layer.step, hidden, layer.weight)


def trl_whole(layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: peers.trl_whole(*layer)


def liger(layer: Layer, **options: Any) -> Callable[[], tuple[Tensor, ...]]:
    hidden = layer.padded()
    return lambda: peers.liger_linear(layer.step, hidden, layer.weight, **options)


def products(layer: Layer, rows: int, fresh: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    """The three matrix products, `rows` tokens at a time."""
    hidden, weight = layer.hidden.detach(), layer.weight.detach()
    like = partial(torch.empty, dtype=weight.dtype)
    kept = like(rows, len(weight)), torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> tuple[Tensor, ...]:
        logits, by_hidden, by_weight = (
            (like(rows, len(weight)), torch.empty_like(hidden), torch.empty_like(weight)) if fresh else kept
        )
        for start in range(0, TOKENS, rows):
            part = slice(start, start + rows)
            torch.mm(hidden[part], weight.t(), out=logits)
            torch.mm(logits, weight, out=by_hidden[part])
            torch.addmm(by_weight, logits.t(), hidden[part], beta=int(start > 0), out=by_weight)
        return logits, by_hidden, by_weight

    return run


PEERS: dict[str, Callable[[Layer], Callable[[], tuple[Tensor, ...]]]] = {
    "medbridge": medbridge,
    "TRL": trl,
    "TRL, whole logits": trl_whole,
    "Liger, compiled": liger,
    "Liger, not compiled": partial(liger, compiled=False),
    "Liger, one chunk": partial(liger, compiled=False, chunk_size=SEQUENCES),
}


def chunk_rows(size: Size) -> int:
    """Rows of the package's chunks at its default budget."""
    most = linear.DEFAULT_BUDGET["cpu"] // (size.vocab * size.dtype.itemsize)
    return -(-TOKENS // -(-TOKENS // most))


class Exact(NamedTuple):
    """In float64."""

    loss: float
    hidden: Tensor
    weight: Tensor

    @classmethod
    def of(cls, layer: Layer) -> Exact:
        hidden, weight = layer.hidden.detach().double(), layer.weight.detach().double()
        loss, gradient = peers.through_logits(partial(peers.exact_logits, layer.step), hidden @ weight.t())
        return cls(float(loss), gradient @ weight, gradient.t() @ hidden)

    def errors(self, loss: Tensor, by_hidden: Tensor, by_weight: Tensor) -> tuple[float, float, float]:
        """Of the loss, absolute, and of the gradients, relative."""
        if by_hidden.ndim == 3:
            by_hidden = by_hidden[:, :LENGTH].reshape(TOKENS, -1)
        hidden_error, weight_error = relative_error(by_hidden, self.hidden), relative_error(by_weight, self.weight)
        return abs(float(loss) - self.loss), hidden_error, weight_error


def memory_of(name: str, size: Size) -> Memory:
    return peak_memory(_memory_case, name, size)


def _memory_case(name: str, size: Size) -> Callable[[], tuple[Tensor, ...]]:
    """The call, after a tiny one that loads libraries; its gradients alone count as returned."""
    peers.prepare_imports()
    PEERS[name](Layer.random(Size(64, 16, size.dtype)))()
    return PEERS[name](Layer.random(size))


def measured(size: Size) -> dict[str, Any]:
    """Everything of one size, printed; the figures."""
    layer = Layer.random(size)
    rows = chunk_rows(size)
    calls = {name: make(layer) for name, make in PEERS.items()}
    bare = {
        "products, whole": Case(products(layer, TOKENS)),
        "products, in chunks": Case(products(layer, rows)),
        "products, fresh memory": Case(products(layer, TOKENS, fresh=True)),
    }
    ours = {"medbridge": Case(calls["medbridge"])}
    others = {name: Case(call, rounds=SLOW_ROUNDS) for name, call in calls.items() if name not in ours}
    times = timed(ours | bare | others, ROUNDS)
    del bare
    exact = Exact.of(layer)
    errors = {name: exact.errors(*call()) for name, call in calls.items()}
    del exact
    memory = {name: memory_of(name, size) for name in PEERS}
    columns = {
        "loss error": {name: found[0] for name, found in errors.items()},
        "hidden error": {name: found[1] for name, found in errors.items()},
        "weight error": {name: found[2] for name, found in errors.items()},
        "MiB beyond": {name: found.beyond for name, found in memory.items()},
        "MiB left": {name: found.left for name, found in memory.items()},
    }
    figures = table(f"{TOKENS} tokens, {size}; chunks of {rows} tokens", times, columns)
    own = times["medbridge"]
    fastest = min(times["products, whole"], times["products, in chunks"], key=lambda found: found.median)
    ratios = {
        "ours_over_products": own.over(fastest),
        "ours_over_products_in_fresh_memory": own.over(times["products, fresh memory"]),
        "TRL_over_ours": times["TRL"].over(own),
        "Liger_over_ours": times["Liger, compiled"].over(own),
    }
    print("  " + ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in ratios.items()), flush=True)
    return figures | {"rows_of_a_chunk": rows, "ratios": {name: rounded(value, 3) for name, value in ratios.items()}}


@pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
def test_side_by_side(save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]) -> None:
    peers.prepare_imports()
    figures: dict[str, Any] = {"tokens": TOKENS, "rounds": ROUNDS, "peers": peers.versions()}
    for size in SIZES:
        with capsys.disabled():
            figures[str(size)] = measured(size)
        # each, since a whole run takes a quarter of an hour
        save("linear_grpo", "pytest bench/bench_linear_grpo.py -s", figures)
    for size in SIZES:
        found = figures[str(size)]
        for column in ("loss_error", "hidden_error", "weight_error"):
            # chunked or not: a loss near 0 is a sum that cancels, and which way its rounding falls is chance
            theirs = max(found[name][column] for name in ("TRL", "TRL, whole logits"))
            assert found["medbridge"][column] <= 2 * max(theirs, 1e-7), (str(size), column)
        assert found["medbridge"]["MiB_beyond"] <= MEMORY_LIMIT, str(size)
