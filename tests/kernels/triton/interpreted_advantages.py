"""The group advantage in Triton's interpreter, against the reference, which is float64 inside as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medbridge_kernels import reference
from medbridge_kernels.triton import advantages, group_advantages
from medbridge_kernels.triton.launch import LAUNCHES, Launch

NAN = float("nan")
OFFSETS = torch.tensor([0, 1, 3, 3, 10, 60, 61])
BASELINES, SCALES = ("mean", "loo", "none"), ("std", "batch_std", "none")


def draw(dtype: torch.dtype = torch.float64, offsets: Tensor = OFFSETS) -> Tensor:
    count = int(offsets[-1])
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    return rewards.to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for few rewards."""
    for name in ("group_advantages", "batch_moments"):
        monkeypatch.setitem(LAUNCHES, (name, 8), Launch(8, 32))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_equals_the_reference(baseline: str, scale: str, unbiased: bool) -> None:
    rewards = draw()
    rewards[4] = rewards[20] = rewards[60] = NAN
    rewards[1:3] = 0.1
    found = group_advantages(rewards, OFFSETS, baseline, scale, unbiased, 1e-4)
    expected = reference.group_advantages(rewards, OFFSETS, baseline, scale, unbiased, 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_dtypes(dtype: torch.dtype, scale: str) -> None:
    rewards = draw(dtype)
    rewards[7] = NAN
    found = group_advantages(rewards, OFFSETS, "mean", scale, True, 1e-4)
    expected = reference.group_advantages(rewards, OFFSETS, "mean", scale, True, 1e-4)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("scale", ["std", "batch_std"])
def test_large_groups_at_the_shipped_tile(scale: str) -> None:
    offsets = torch.tensor([0, 5_000, 5_001, 12_000])
    rewards = draw(offsets=offsets) + 1e6  # the spread is small beside the mean
    found = group_advantages(rewards, offsets, "loo", scale, True, 1e-4)
    expected = reference.group_advantages(rewards, offsets, "loo", scale, True, 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 7, 200])
def test_equal_rewards_give_exactly_0(value: float, size: int) -> None:
    rewards = torch.full((size,), value, dtype=torch.float32)
    for baseline, scale in (("mean", "std"), ("loo", "none"), ("none", "std"), ("mean", "batch_std")):
        found = group_advantages(rewards, torch.tensor([0, size]), baseline, scale, True, 1e-8)
        assert found.count_nonzero() == 0 and found.isfinite().all()


def test_nearly_equal_rewards() -> None:
    rewards = torch.full((64,), 0.75, dtype=torch.float64)
    rewards[5] += 2**-50
    found = group_advantages(rewards, torch.tensor([0, 64]), "mean", "none", True, 1e-4)
    expected = torch.full((64,), -(2**-56), dtype=torch.float64)
    expected[5] += 2**-50
    assert torch.equal(found, expected)


def test_all_nan_and_no_rewards() -> None:
    found = group_advantages(torch.full((3,), NAN), torch.tensor([0, 1, 3]), "mean", "batch_std", True, 1e-4)
    assert found.tolist() == [0.0, 0.0, 0.0]
    for offsets in ([0], [0, 0, 0]):
        assert group_advantages(torch.empty(0), torch.tensor(offsets), "mean", "std", True, 1e-4).shape == (0,)


def test_offsets_that_lie_outside_touch_nothing_there() -> None:
    storage = torch.full((40,), 5.0)
    rewards = storage[10:20].copy_(torch.arange(10.0))
    written = []
    full_like = torch.full_like

    def watched(tensor: Tensor, value: float) -> Tensor:
        written.append(full_like(storage, value))
        return written[-1][10:20]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advantages.torch, "full_like", watched)
        found = group_advantages(rewards, torch.tensor([-9, 2, 7, 5, 2**40]), "mean", "std", True, 1e-4)
    assert found.isfinite().all()  # every reward is in some group, and none outside is
    assert written[0][:10].isnan().all() and written[0][20:].isnan().all()
    left_out = group_advantages(rewards, torch.tensor([2, 5]), "mean", "std", True, 1e-4)
    assert left_out.isnan().tolist() == [True] * 2 + [False] * 3 + [True] * 5
