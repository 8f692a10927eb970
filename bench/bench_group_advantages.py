"""Group advantages of 100,000 rewards in ragged groups on a CPU, side by side with what trainers do.

    pytest bench/bench_group_advantages.py -s

Groups of 1 to 16 rewards. The peers: a loop that gathers the rewards of each prompt in a dictionary, with Python's
numbers, and with tensors as trainers keep them (a scalar tensor per reward, `torch.mean` and `torch.std` per group);
and the definition in plain torch. Prints median, fastest and slowest of interleaved rounds, the ratio to the package's
median, and the largest error against the definition in float64. It asserts accuracy and no time: machines are shared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import Case, rounded, table, timed
from torch import Tensor

from medbridge_kernels import group_advantages, native

REWARDS, LARGEST_GROUP, ROUNDS, SLOW_ROUNDS, EPS = 100_000, 16, 51, 5, 1e-4


def ragged() -> tuple[Tensor, Tensor]:
    """Rewards, and offsets of their groups."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, LARGEST_GROUP + 1, (REWARDS,), generator=generator)
    ends = sizes.cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[ends < REWARDS], torch.tensor([REWARDS])])
    return torch.rand(REWARDS, generator=generator), offsets


def number_loop(prompts: list[int], tensor: Tensor) -> Tensor:
    """By prompt, in Python's numbers."""
    rewards = tensor.tolist()
    groups = defaultdict(list)
    for prompt, reward in zip(prompts, rewards, strict=True):
        groups[prompt].append(reward)
    mean, deviation = {}, {}
    for prompt, group in groups.items():
        mean[prompt] = sum(group) / len(group)
        squares = sum((reward - mean[prompt]) ** 2 for reward in group)
        deviation[prompt] = math.sqrt(squares / max(1, len(group) - 1))
    pairs = zip(prompts, rewards, strict=True)
    return torch.tensor([(reward - mean[prompt]) / (deviation[prompt] + EPS) for prompt, reward in pairs])


def tensor_loop(prompts: list[int], rewards: Tensor) -> Tensor:
    """By prompt, in tensors."""
    groups = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(rewards[row])
    mean, deviation = {}, {}
    for prompt, group in groups.items():
        stacked = torch.stack(group)
        mean[prompt] = stacked.mean()
        deviation[prompt] = stacked.std() if len(group) > 1 else torch.tensor(1.0)
    advantages = torch.empty_like(rewards)
    for row, prompt in enumerate(prompts):
        advantages[row] = (rewards[row] - mean[prompt]) / (deviation[prompt] + EPS)
    return advantages


@pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
def test_side_by_side(save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]) -> None:
    rewards, offsets = ragged()
    prompts = torch.repeat_interleave(offsets.diff()).tolist()
    calls: dict[str, Callable[[], Tensor]] = {
        "medbridge": lambda: group_advantages(rewards, offsets, eps=EPS),
        "dictionary loop": lambda: number_loop(prompts, rewards),
        "dictionary of tensors": lambda: tensor_loop(prompts, rewards),
        "definition": lambda: group_advantages(rewards, offsets, eps=EPS, impl="reference"),
    }
    rounds = {"dictionary of tensors": SLOW_ROUNDS}
    times = timed({name: Case(call, rounds=rounds.get(name)) for name, call in calls.items()}, ROUNDS)
    exact = group_advantages(rewards.double(), offsets, eps=EPS, impl="reference")
    errors = {name: float((call().double() - exact).abs().max()) for name, call in calls.items()}
    with capsys.disabled():
        figures = table(f"{REWARDS} rewards in {len(offsets) - 1} groups", times, {"largest error": errors})
    shape = {"rewards": REWARDS, "groups": len(offsets) - 1, "rounds": ROUNDS}
    bytes_moved = 2 * rewards.nbytes + offsets.nbytes
    own = rounded(bytes_moved / times["medbridge"].median / 1e9)
    save(
        "group_advantages", "pytest bench/bench_group_advantages.py -s", shape | figures | {"gigabytes_per_second": own}
    )
    assert errors["medbridge"] <= 1e-6
