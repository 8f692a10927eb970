"""The GRPO loss and log-probabilities from logits on a CPU, side by side with their peers in one run.

    pytest bench/bench_grpo.py -s

2,048 tokens (16 completions of 128) x vocabulary 32,000, float32. Loss and gradient of the logits, written over them by
the package; log-probabilities without gradients. The peers: TRL 1.16 (`selective_log_softmax_and_entropy` and
`GRPOTrainer._compute_loss`), the definition of the loss in plain torch, and the same compiled by torch.compile.

The ceiling is what the memory can do at the least: read the logits for the loss, read them and write the gradient for
the backward pass. Three times the logits' bytes, at the bandwidth of a copy of an array of the logits' size by torch on
all threads (`copy_`: one read, one write), in the same rounds. "add" reads two such arrays and writes a third: the
same bytes, measured. Log-probabilities read the logits once. Errors are relative to float64.

It asserts accuracy and no time: machines are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from measure import Case, Times, copies, relative_error, rounded, table, timed
from peers import Step
from torch import Tensor

from medbridge_kernels import native, token_logprobs

SEQUENCES, LENGTH, VOCAB, ROUNDS = 16, 128, 32_000, 11
TOKENS = SEQUENCES * LENGTH

Loss = Callable[[Tensor], Tensor]
Saver = Callable[[str, str, dict[str, Any]], Path]


def compiled(step: Step) -> Loss:
    """The definition, compiled."""
    return torch.compile(lambda logits: peers.eager_logits(step, logits), fullgraph=True)


def ratios(times: dict[str, Times], copies_of_logits: float) -> dict[str, float]:
    """Each peer over ours, and ours over the least that the memory needs."""
    own = times["medbridge"]
    found = {f"{name}_over_ours": other.over(own) for name, other in times.items() if name != "medbridge"}
    bound = Times(copies_of_logits * seconds for seconds in times["copy"])
    return {name: rounded(value, 3) for name, value in found.items() | {("ours_over_bound", own.over(bound))}}


def losses(step: Step, source: Tensor) -> dict[str, Any]:
    """Loss and gradient."""
    buffer = source.clone()
    functions: dict[str, Loss] = {
        "medbridge": partial(peers.medbridge_logits, step),
        "TRL": partial(peers.trl_logits, step),
        "torch.compile": compiled(step),
        "eager torch": partial(peers.eager_logits, step),
    }

    def run(name: str) -> tuple[Tensor, Tensor]:
        return peers.through_logits(functions[name], buffer)

    cases = {name: Case(partial(run, name), prepare=lambda: buffer.copy_(source)) for name in functions}
    times = timed(cases | copies(source.numel()), ROUNDS)
    exact_loss, exact_gradient = peers.through_logits(partial(peers.exact_logits, step), source.double())
    errors: dict[str, dict[str, float]] = {"loss error": {}, "gradient error": {}}
    for name in functions:
        buffer.copy_(source)
        loss, gradient = run(name)
        errors["loss error"][name] = abs(float(loss) - float(exact_loss))
        errors["gradient error"][name] = relative_error(gradient, exact_gradient)
    figures = table(f"Loss and gradient, {TOKENS} x {VOCAB} float32, 2 threads", times, errors)
    return figures | {"ratios": ratios(times, 1.5)}


def logprobs(step: Step, logits: Tensor) -> dict[str, Any]:
    """Log-probabilities without gradients."""
    from trl.trainer.utils import selective_log_softmax

    ids = step.token_ids.flatten()
    padded = logits.view(SEQUENCES, LENGTH, VOCAB)

    def eager() -> Tensor:
        return logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)

    calls = {
        "medbridge": lambda: token_logprobs(logits, ids),
        "medbridge, with entropy": lambda: token_logprobs(logits, ids, entropy=True)[0],
        "TRL": lambda: selective_log_softmax(padded, step.token_ids).flatten(),
        "torch.compile": torch.compile(eager, fullgraph=True),
        "eager torch": eager,
    }
    with torch.no_grad():
        times = timed({name: Case(call) for name, call in calls.items()} | copies(logits.numel()), ROUNDS)
        exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, None]).squeeze(-1)
        errors = {name: relative_error(call(), exact) for name, call in calls.items()}
    figures = table(f"Log-probabilities, {TOKENS} x {VOCAB} float32", times, {"error": errors})
    return figures | {"ratios": ratios(times, 0.5)}


@pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
def test_side_by_side(save: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    peers.prepare_imports()
    step = Step.random(SEQUENCES, LENGTH, VOCAB)
    logits = 2 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1))
    with capsys.disabled():
        figures = {"loss": losses(step, logits), "log-probabilities": logprobs(step, logits)}
        for name, found in figures.items():
            print(
                f"  {name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["ratios"].items())
            )
    shape = {"tokens": TOKENS, "vocabulary": VOCAB, "rounds": ROUNDS, "peers": peers.versions()}
    save("grpo", "pytest bench/bench_grpo.py -s", shape | figures)
    ours, theirs = figures["loss"]["medbridge"], figures["loss"]["eager torch"]
    assert ours["loss_error"] <= 1e-6
    assert ours["gradient_error"] <= 2 * theirs["gradient_error"]
    assert (
        figures["log-probabilities"]["medbridge"]["error"] <= 2 * figures["log-probabilities"]["eager torch"]["error"]
    )
