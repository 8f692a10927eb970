"""What the calls take of memory: never the logits of hidden states whole, and little beside the results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medbridge_kernels import LossConfig, linear_grpo_loss, linear_token_logprobs
from tests.kernels.conftest import batch

MIB = 1 << 20
TOKENS, VOCAB, WIDTH = 120, 500, 8
COUPLED = [LossConfig.preset("gspo"), LossConfig(off_policy_threshold=0.1)]


class Allocations(TorchDispatchMode):
    """Largest memory of a tensor that an operation made, also within this package's operators, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "medbridge_kernels":
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("config", [LossConfig(entropy_coef=0.1), LossConfig.preset("cispo"), *COUPLED])
@pytest.mark.parametrize("rows", [1, 21])
def test_no_more_logits_at_a_time_than_the_budget(
    rows: int, config: LossConfig, softcap: float | None, dtype: torch.dtype
) -> None:
    data = batch(0, [12] * 10, VOCAB, dtype)
    budget = rows * VOCAB * dtype.itemsize * (2 if softcap else 1)
    leaves = [torch.randn(n, WIDTH).to(dtype).requires_grad_() for n in (TOKENS, VOCAB)]
    given = {name: data[name] for name in ("token_ids", "sequence_ids", "advantages", "old_logprobs", "mask")}
    allocations = Allocations()
    with allocations:
        loss, _ = linear_grpo_loss(
            *leaves, **given, config=config, softcap=softcap, memory_budget=budget, impl="native"
        )
        loss.backward()
    # With a soft cap the half of it is for the tanh. Beside the logits: the gradient of the weight in float32.
    assert allocations.largest <= max(budget // (2 if softcap else 1), VOCAB * WIDTH * 4)
    assert allocations.largest < TOKENS * VOCAB * dtype.itemsize / 4


def test_no_more_logits_at_a_time_for_log_probabilities() -> None:
    leaves = [torch.randn(n, WIDTH).requires_grad_() for n in (TOKENS, VOCAB)]
    allocations = Allocations()
    with allocations:
        logprobs, entropy = linear_token_logprobs(
            *leaves, torch.zeros(TOKENS, dtype=torch.int64), entropy=True, memory_budget=5 * VOCAB * 4, impl="native"
        )
        (logprobs.sum() + entropy.sum()).backward()
    assert allocations.largest <= VOCAB * WIDTH * 4


def test_the_recorder_sees_logits_that_are_whole() -> None:
    leaves = [torch.randn(n, WIDTH).requires_grad_() for n in (TOKENS, VOCAB)]
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    for options in ({"impl": "reference"}, {"impl": "native", "memory_budget": 1 << 30}):
        allocations = Allocations()
        with allocations:
            linear_token_logprobs(*leaves, ids, **options).sum().backward()
        assert allocations.largest >= TOKENS * VOCAB * 4


CHILD = """
import json, sys, torch
from medbridge_kernels import LossConfig, grpo_loss, linear_grpo_loss, token_logprobs

torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))

def grown(call):
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts from what is resident now
    before = resident()
    call()
    return peak() - before

def rows(tokens):
    ids = torch.zeros(tokens, dtype=torch.int64)
    return {"token_ids": ids, "sequence_ids": torch.arange(tokens) // 16, "advantages": torch.randn(-(-tokens // 16)),
            "old_logprobs": torch.full((tokens,), -9.0), "rollout_logprobs": torch.full((tokens,), -9.0)}

def linear(tokens, vocab, budget, config, dtype, **options):
    leaves = [torch.randn(n, 32).to(dtype).requires_grad_() for n in (tokens, vocab)]
    given = rows(tokens)
    def call():
        loss, _ = linear_grpo_loss(*leaves, **given, config=config, memory_budget=budget, **options)
        loss.backward()
    return call

def from_logits(tokens, vocab, inplace):
    hidden, weight = torch.randn(tokens, 8).requires_grad_(), torch.randn(8, vocab)
    logits, given = hidden @ weight, rows(tokens)
    def call():
        grpo_loss(logits, **given, config=LossConfig(entropy_coef=0.1), inplace=inplace, impl="native")[0].backward()
    return call

def logprobs(tokens, vocab, impl):
    logits, ids = torch.randn(tokens, vocab), torch.zeros(tokens, dtype=torch.int64)
    return lambda: token_logprobs(logits, ids, entropy=True, impl=impl)

cases = {
    "uncoupled": lambda size: linear(*size, LossConfig(), torch.float32),
    "coupled": lambda size: linear(*size, LossConfig.preset("gspo"), torch.float32),
    "bfloat16": lambda size: linear(*size, LossConfig(), torch.bfloat16),
    "soft cap": lambda size: linear(*size, LossConfig(), torch.float32, softcap=5.0),
    "reference": lambda size: linear(*size, LossConfig(), torch.float32, impl="reference"),
    "in place": lambda size: from_logits(*size[:2], True),
    "not in place": lambda size: from_logits(*size[:2], False),
    "log-probabilities": lambda size: logprobs(*size[:2], "native"),
    "log-probabilities by the reference": lambda size: logprobs(*size[:2], "reference"),
}
for make in cases.values():  # libraries that are loaded with the first call
    make((40, 300, 1 << 16))()
torch.manual_seed(0)
print(json.dumps({name: grown(make(json.loads(sys.argv[1]))) for name, make in cases.items()}))
"""


def test_peak_memory() -> None:
    tokens, vocab, budget = 1024, 10_000, 4 * MIB
    logits, weight = tokens * vocab * 4, vocab * 32 * 4
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([tokens, vocab, budget])], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    grown = json.loads(child.stdout)
    small = 8 * MIB  # what allocators and libraries keep
    assert grown["reference"] > 2 * logits  # that the figures are of this
    for name in ("uncoupled", "coupled", "bfloat16", "soft cap"):
        assert grown[name] < budget + 4 * weight + small, (name, grown[name] / MIB)
    assert 0.95 * logits < grown["not in place"] < logits + 2 * small, grown["not in place"] / MIB
    assert grown["in place"] < 2 * small, grown["in place"] / MIB
    assert grown["log-probabilities"] < small, grown["log-probabilities"] / MIB
    assert math.isfinite(grown["log-probabilities by the reference"])
