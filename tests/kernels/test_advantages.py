"""Group advantages against a loop over exact fractions, and where other trainers went wrong."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge_kernels import group_advantages
from tests.kernels.conftest import IMPLS, exact_advantages, offsets_of

pytestmark = pytest.mark.usefixtures("poisoned")
BASELINES = ["mean", "loo", "none"]
SCALES = ["std", "batch_std", "none"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 1 / 3, math.nan]), st.floats(-100, 100, width=32))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(reward, max_size=6), max_size=6),
    st.sampled_from(BASELINES),
    st.sampled_from(SCALES),
    st.booleans(),
    st.sampled_from([1e-4, 0.5]),
)
def test_equal_to_the_definition(
    impl: str, groups: list[list[float]], baseline: str, scale: str, unbiased: bool, eps: float
) -> None:
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    found = group_advantages(
        rewards, offsets_of([len(g) for g in groups]), baseline=baseline, scale=scale, unbiased=unbiased, eps=eps,
        impl=impl,
    )  # fmt: skip
    expected = torch.tensor(exact_advantages(groups, baseline, scale, unbiased, eps), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("baseline", "scale"), list(itertools.product(BASELINES, SCALES)))
@pytest.mark.parametrize("sizes", [[1], [2], [7], [5000], [1, 0, 2, 7, 0, 5000, 300]])
def test_groups_of_any_size(sizes: list[int], baseline: str, scale: str, impl: str) -> None:
    rewards = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    offsets = offsets_of(sizes)
    found = group_advantages(rewards, offsets, baseline=baseline, scale=scale, impl=impl)
    groups = [part.double() for part in rewards.split(sizes)]
    spread = {
        "std": [float(g.std()) + 1e-4 if len(g) > 1 else 1.0 for g in groups],
        "batch_std": [float(rewards.double().std()) + 1e-4 if len(rewards) > 1 else 1e-4] * len(groups),
        "none": [1.0] * len(groups),
    }
    expected = []
    for group, divisor in zip(groups, spread[scale], strict=True):
        others = (group.sum() - group) / max(1, len(group) - 1)
        base = {"mean": group.mean() if len(group) else 0, "loo": others, "none": 0}[baseline]
        single = len(group) == 1 and (baseline != "none" or scale == "std")
        expected.append((group - base) / divisor * (not single))
    torch.testing.assert_close(found, torch.cat(expected).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 123.456, -2e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rewards_give_exactly_zero(
    baseline: str, scale: str, value: float, dtype: torch.dtype, impl: str
) -> None:
    rewards = torch.full((1 + 2 + 7 + 5000 + 3,), value, dtype=dtype)
    rewards[-3:] = torch.tensor([0.0, 1.0, 1.0])  # another group, so that the batch has a spread
    offsets = offsets_of([1, 2, 7, 5000, 3])
    for eps in (1e-4, 1e-30):
        found = group_advantages(rewards, offsets, baseline=baseline, scale=scale, impl=impl, eps=eps)
        assert (found[:-3] == 0).all()
        assert (found[-3:] != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_nan_rewards_are_left_out_and_get_zero(scale: str, baseline: str, impl: str) -> None:
    nan = math.nan
    options: dict[str, Any] = {"baseline": baseline, "scale": scale, "impl": impl}
    found = group_advantages(torch.tensor([nan, 0.0, 1.0, 1.0, nan, nan]), offsets_of([4, 2]), **options)
    without = group_advantages(torch.tensor([0.0, 1.0, 1.0]), offsets_of([3]), **options)
    torch.testing.assert_close(found[1:4], without)
    assert (found[[0, 4, 5]] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nearly_equal_rewards_keep_their_sign_and_scale(impl: str) -> None:
    rewards = torch.tensor([1e6, 1e6 + 0.0625, 1e6, 1e6], dtype=torch.float32)
    found = group_advantages(rewards, offsets_of([4]), eps=0.0, impl=impl)
    torch.testing.assert_close(found, torch.tensor([-0.5, 1.5, -0.5, -0.5]))
    rewards = 1e8 + torch.tensor([0.0, 1e-7, 2e-7, 3e-7], dtype=torch.float64).cumsum(0)
    found = group_advantages(rewards, offsets_of([4]), eps=0.0, impl=impl)
    deviation = (rewards - rewards[0]) - (rewards - rewards[0]).mean()
    torch.testing.assert_close(found, deviation / (rewards - rewards[0]).std(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_unequal_groups_are_not_one_group(impl: str) -> None:
    rewards = torch.tensor([0.0, 1.0, 10.0, 10.0, 13.0])
    found = group_advantages(rewards, offsets_of([2, 3]), scale="none", impl=impl)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5, -1.0, -1.0, 2.0]))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rewards_and_empty_groups(impl: str) -> None:
    for baseline, scale in itertools.product(BASELINES, SCALES):
        options: dict[str, Any] = {"baseline": baseline, "scale": scale, "impl": impl}
        assert group_advantages(torch.empty(0), torch.tensor([0]), **options).shape == (0,)
        assert group_advantages(torch.empty(0), torch.tensor([0, 0, 0]), **options).shape == (0,)
    found = group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0, 2, 2]), scale="none", impl=impl)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_and_the_dtype_of_the_rewards(dtype: torch.dtype, impl: str) -> None:
    rewards = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    found = group_advantages(rewards, offsets_of([2]), impl=impl)
    assert found.dtype == dtype
    assert not found.requires_grad
    assert rewards.detach().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout(impl: str) -> None:
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    offsets = torch.stack([offsets_of([3, 5])] * 2, dim=1)
    expected = group_advantages(rewards[1].clone(), offsets[:, 0].clone(), impl=impl)
    strided = rewards.t().contiguous()[:, 1]
    torch.testing.assert_close(group_advantages(strided, offsets[:, 0], impl=impl), expected, rtol=0, atol=0)
    same = group_advantages(torch.tensor(0.3).expand(8), offsets[:, 0], impl=impl)
    assert not same.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("rewards", "offsets", "options", "error", "message"),
    [
        (torch.tensor([0, 1]), offsets_of([2]), {}, (TypeError, NotImplementedError), "floating point|it takes float"),
        (torch.rand(2), offsets_of([2]).int(), {}, TypeError, "group_offsets must be int64"),
        (torch.rand(2, 1), offsets_of([2]), {}, ValueError, r"rewards must be \[sequences\]"),
        (torch.rand(2), torch.tensor(2), {}, ValueError, r"group_offsets must be \[groups \+ 1\]"),
        (torch.rand(2), torch.empty(0, dtype=torch.int64), {}, ValueError, r"group_offsets must be \[groups \+ 1\]"),
        (torch.rand(2), offsets_of([3]), {}, ValueError, r"rise from 0 to the 2 rewards, got \[0, 3\]"),
        (torch.rand(2), torch.tensor([1, 2]), {}, ValueError, "rise from 0"),
        (torch.rand(2), torch.tensor([0, 2, 1, 2]), {}, ValueError, "rise from 0"),
        (torch.rand(2), torch.tensor([0, -1, 2]), {}, ValueError, "rise from 0"),
        (torch.rand(2), torch.arange(20), {}, ValueError, r"\[0, 1, 2, 3, 4, 5, \.\.\., 19\]"),
        (torch.rand(2), offsets_of([2]), {"baseline": "median"}, ValueError, "baseline = 'median'"),
        (torch.rand(2), offsets_of([2]), {"scale": "mad"}, ValueError, "scale = 'mad'"),
        (torch.rand(2), offsets_of([2]), {"impl": "cuda"}, ValueError, "impl = 'cuda'"),
    ],
)
def test_refusals(
    rewards: torch.Tensor, offsets: torch.Tensor, options: dict[str, Any], error: Any, message: str, impl: str
) -> None:
    with pytest.raises(error, match=message):
        group_advantages(rewards, offsets, **{"impl": impl, **options})
