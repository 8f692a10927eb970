"""Group advantages against a loop over exact fractions, and where other trainers went wrong."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge_kernels import group_advantages

BASELINES = ["mean", "loo", "none"]
SCALES = ["std", "batch_std", "none"]


def offsets_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def spread(values: list[Fraction], unbiased: bool) -> float:
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - unbiased))


def naive(groups: list[list[float]], baseline: str, scale: str, unbiased: bool, eps: float) -> list[float]:
    """By the definition, one group and one reward at a time."""
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
                "std": spread(valid, unbiased) + eps,
                "batch_std": spread(batch, unbiased) + eps,
                "none": 1.0,
            }
            result.append(float(advantage) / divisor[scale])
    return result


reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 1 / 3, math.nan]), st.floats(-100, 100, width=32))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(reward, max_size=6), max_size=6),
    st.sampled_from(BASELINES),
    st.sampled_from(SCALES),
    st.booleans(),
)
def test_equal_to_the_definition(groups: list[list[float]], baseline: str, scale: str, unbiased: bool) -> None:
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    found = group_advantages(
        rewards, offsets_of([len(g) for g in groups]), baseline=baseline, scale=scale, unbiased=unbiased
    )
    expected = torch.tensor(naive(groups, baseline, scale, unbiased, 1e-4), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 123.456, -2e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(baseline: str, scale: str, value: float, dtype: torch.dtype) -> None:
    rewards = torch.full((1 + 2 + 7 + 5000 + 3,), value, dtype=dtype)
    rewards[-3:] = torch.tensor([0.0, 1.0, 1.0])  # another group, so that the batch has a spread
    found = group_advantages(rewards, offsets_of([1, 2, 7, 5000, 3]), baseline=baseline, scale=scale)
    assert (found[:-3] == 0).all()
    assert (found[-3:] != 0).all()


@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_nan_rewards_are_left_out_and_get_zero(baseline: str) -> None:
    nan = math.nan
    found = group_advantages(
        torch.tensor([nan, 0.0, 1.0, 1.0, nan, nan, 5.0]), offsets_of([4, 2, 1]), baseline=baseline
    )
    without = group_advantages(torch.tensor([0.0, 1.0, 1.0]), offsets_of([3]), baseline=baseline)
    torch.testing.assert_close(found[1:4], without)
    assert (found[[0, 4, 5, 6]] == 0).all()


def test_nearly_equal_rewards_keep_their_sign_and_scale() -> None:
    rewards = torch.tensor([1e6, 1e6 + 0.0625, 1e6, 1e6], dtype=torch.float32)
    found = group_advantages(rewards, offsets_of([4]), eps=0.0)
    torch.testing.assert_close(found, torch.tensor([-0.5, 1.5, -0.5, -0.5]))


def test_unequal_groups_are_not_one_group() -> None:
    found = group_advantages(torch.tensor([0.0, 1.0, 10.0, 10.0, 13.0]), offsets_of([2, 3]), scale="none")
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5, -1.0, -1.0, 2.0]))


def test_no_rewards_and_empty_groups() -> None:
    assert group_advantages(torch.empty(0), torch.tensor([0])).shape == (0,)
    assert group_advantages(torch.empty(0), torch.tensor([0, 0, 0])).shape == (0,)
    found = group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0, 2, 2]), scale="none")
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5]))


def test_no_gradient_and_the_dtype_of_the_rewards() -> None:
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float16, requires_grad=True)
    found = group_advantages(rewards, offsets_of([2]))
    assert found.dtype == torch.float16
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("rewards", "offsets", "options", "error", "message"),
    [
        (torch.tensor([0, 1]), offsets_of([2]), {}, TypeError, "rewards must be floating point"),
        (torch.rand(2), offsets_of([2]).int(), {}, TypeError, "group_offsets must be int64"),
        (torch.rand(2, 1), offsets_of([2]), {}, ValueError, r"rewards must be \[sequences\]"),
        (torch.rand(2), torch.tensor(2), {}, ValueError, r"group_offsets must be \[groups \+ 1\]"),
        (torch.rand(2), offsets_of([3]), {}, ValueError, r"rise from 0 to the 2 rewards, got \[0, 3\]"),
        (torch.rand(2), torch.tensor([1, 2]), {}, ValueError, "rise from 0"),
        (torch.rand(2), torch.tensor([0, 2, 1, 2]), {}, ValueError, "rise from 0"),
        (torch.rand(2), offsets_of([2]), {"baseline": "median"}, ValueError, "baseline = 'median'"),
        (torch.rand(2), offsets_of([2]), {"scale": "mad"}, ValueError, "scale = 'mad'"),
        (torch.rand(2), offsets_of([2]), {"impl": "triton"}, NotImplementedError, "isn't available"),
        (torch.rand(2), offsets_of([2]), {"impl": "cuda"}, ValueError, "impl = 'cuda'"),
    ],
)
def test_refusals(
    rewards: torch.Tensor, offsets: torch.Tensor, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        group_advantages(rewards, offsets, **options)
