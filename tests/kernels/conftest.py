"""What the kernels' tests share: packed batches, few configurations that hold every pair of options, error budgets."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge_kernels import LossConfig

IMPLS = ["reference", "native"]
FAST_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN (integers: their largest), so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


# --- batches ---


def packed_ids(lengths: Sequence[int]) -> Tensor:
    """Sequence ids of packed rows."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def offsets_of(sizes: Sequence[int]) -> Tensor:
    """Offsets of groups of these sizes."""
    return torch.tensor([0, *sizes]).cumsum(0)


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """In float64, of logits over temperature."""
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[..., None]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def batch(
    seed: int = 0,
    lengths: Sequence[int] = (3, 1, 4),
    vocab: int = 7,
    dtype: torch.dtype = torch.float64,
    spread: float = 0.5,
    temperature: float | Tensor = 0.7,
) -> dict[str, Any]:
    """Arguments of `grpo_loss`; `spread` moves the policies that are compared with off the current one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logits = (2 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    token_ids = torch.randint(vocab, (tokens,), generator=generator)
    logprobs = log_softmax(logits, temperature).gather(-1, token_ids[:, None])[:, 0]
    noise = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    old, ref, rollout = (logprobs + spread * noise).to(torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.rand(tokens, generator=generator) < 0.8
    if tokens:
        mask[0] = True
    return {
        "logits": logits,
        "token_ids": token_ids,
        "sequence_ids": packed_ids(lengths),
        "advantages": torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(old.dtype),
        "old_logprobs": old,
        "ref_logprobs": ref,
        "rollout_logprobs": rollout,
        "mask": mask,
        "temperature": temperature,
    }


# --- every pair of options ---

VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "delta": {"delta": 1.5},
    "cispo": {"surrogate": "cispo", "clip_high": 0.3},
    "sapo": {"surrogate": "sapo", "sapo_temperature_negative": 1.5},
}
LEVELS = ["token", "sequence"]
NORMALIZE = ["tokens", "sequences", "constant"]
OPTIONS: dict[str, list[Any]] = {
    "kl": [{}, {"kl_estimator": "k2"}]
    + [{"kl_coef": 0.3, "kl_estimator": k} for k in ("k1", "k2", "k3")]
    + [{"kl_coef": 0.3, "kl_bias_correction": True}],
    "entropy": [{}, {"entropy_coef": 0.1}, {"entropy_coef": -0.2}],
    "correction": [{}]
    + [
        {"correction": kind, "correction_level": level, "correction_cap": 1.3, "correction_floor": floor}
        for kind, floor in (("truncate", 0.0), ("truncate", 0.8), ("mask", 0.7))
        for level in LEVELS
    ],
    "off_policy": [{}, {"off_policy_threshold": 0.1}],
    "old": ["given", None],
    "advantages": ["sequence", "token", "rewards"],
    "mask": ["some", None],
    "temperature": [1.0, 0.7, "tensor"],
    "normalizer": [None, "number", "tensor"],
    "rollout": ["given", "some NaN", None],
}


def is_allowed(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of OPTIONS has what it needs."""
    return not choice.get("correction") or choice["rollout"] is not None


def covering(options: Mapping[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few choices of one value for each option in which every pair of values of two options occurs that may."""
    draw = random.Random(seed)

    def pairs(places: Mapping[str, int]) -> set[Any]:
        return set(itertools.combinations(places.items(), 2))

    drawn = [{name: draw.randrange(len(values)) for name, values in options.items()} for _ in range(600)]
    pool = [
        (choice, pairs(places))
        for places in drawn
        if is_allowed(choice := {name: options[name][place] for name, place in places.items()})
    ]
    missing, found = set().union(*(held for _, held in pool)), []
    while missing:
        choice, held = max(pool, key=lambda one: len(one[1] & missing))
        missing -= held
        found.append(choice)
    return found


CASES = covering(OPTIONS)


def configured(choice: Mapping[str, Any], **variant: Any) -> LossConfig:
    """The configuration of a choice of OPTIONS."""
    parts = (choice[name] for name in ("kl", "entropy", "correction", "off_policy"))
    return LossConfig(**variant, **{name: value for part in parts for name, value in part.items()})


def arguments(choice: Mapping[str, Any], config: LossConfig, data: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """`batch` data as a choice of OPTIONS has it, with `normalizer`."""
    generator = torch.Generator().manual_seed(seed)
    data = dict(data)
    tokens, dtype = len(data["token_ids"]), data["advantages"].dtype
    if choice["temperature"] == "tensor":
        data["temperature"] = (0.5 + torch.rand(tokens, generator=generator)).to(dtype)
    else:
        data["temperature"] = choice["temperature"]
    if choice["old"] is None:
        data["old_logprobs"] = None
    if choice["mask"] is None:
        data["mask"] = None
    if choice["rollout"] is None:
        data["rollout_logprobs"] = None
    elif choice["rollout"] == "some NaN":
        lost = torch.rand(tokens, generator=generator) < 0.3
        data["rollout_logprobs"] = data["rollout_logprobs"].masked_fill(lost, math.nan)
    if choice["advantages"] == "token":
        data["advantages"] = torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)
        data["advantage_level"] = "token"
    elif choice["advantages"] == "rewards":
        data["rewards"] = data.pop("advantages")
        data["group_offsets"] = offsets_of([2, len(data["rewards"]) - 2])
    number = 7.5
    given = {None: None, "number": number, "tensor": torch.tensor(number, dtype=dtype)}[choice["normalizer"]]
    data["normalizer"] = number if given is None and config.normalize == "constant" else given
    return data


# --- oracles ---


def _spread(values: list[Fraction], unbiased: bool) -> float:
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - unbiased))


def exact_advantages(
    groups: list[list[float]], baseline: str, scale: str, unbiased: bool = True, eps: float = 1e-4
) -> list[float]:
    """By the definition, one group and one reward at a time, in exact fractions."""
    result = []
    batch = [Fraction(r) for group in groups for r in group if not math.isnan(r)]
    for group in groups:
        valid = [Fraction(r) for r in group if not math.isnan(r)]
        for reward in group:
            if math.isnan(reward) or ((baseline != "none" or scale == "std") and len(set(valid)) == 1):
                result.append(0.0)
                continue
            advantage = Fraction(reward)
            if baseline == "mean":
                advantage -= sum(valid) / len(valid)
            elif baseline == "loo":
                advantage -= (sum(valid) - advantage) / (len(valid) - 1)
            divisor = {
                "std": _spread(valid, unbiased) + eps,
                "batch_std": _spread(batch, unbiased) + eps,
                "none": 1.0,
            }
            result.append(float(advantage) / divisor[scale])
    return result


class Errors:
    """Errors against float64, ours beside those of torch's own code in the same dtype, over many results."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        """Of one result."""
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == exact.shape, name
        exact = exact.detach().double()
        assert exact.isfinite().all() and ours.isfinite().all(), name
        for place, found in enumerate((ours, theirs)):
            self._sums[name][place] += float((found.detach().double() - exact).square().sum())

    def check(self, times: float = 2.0) -> None:
        """At most twice torch's error (in the root of the sum of the squares), for each name."""
        assert self._sums
        for name, (ours, theirs) in self._sums.items():
            assert math.sqrt(ours) <= times * math.sqrt(theirs), (name, math.sqrt(ours), math.sqrt(theirs))
