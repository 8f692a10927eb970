"""The group advantage in Triton: one program per group, of any size. In float64, like `reference.group_advantages`,
whose maths this is: rewards are few.
"""

# Triton's kernels carry no types but tl.constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medbridge_kernels.triton.launch import LAUNCHES, on_device

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_rewards(rewards_ptr, index, end):
    """Rewards in float64 and which of them are valid; 0 where not."""
    reward = tl.load(rewards_ptr + index, mask=index < end, other=0.0).to(tl.float64)
    valid = (index < end) & (reward == reward)
    return tl.where(valid, reward, 0.0), valid


@triton.jit
def group_mean(rewards_ptr, start, end, TILE: tl.constexpr):
    """Number, mean, what rounding left of the mean (see `deviation`), largest and smallest of the valid rewards."""
    count = tl.full((TILE,), 0.0, tl.float64)
    total = tl.full((TILE,), 0.0, tl.float64)
    largest = tl.full((TILE,), -INFINITY, tl.float64)
    smallest = tl.full((TILE,), INFINITY, tl.float64)
    lane = tl.arange(0, TILE)
    for first in range(start, end, TILE):
        reward, valid = load_rewards(rewards_ptr, first + lane, end)
        count += valid.to(tl.float64)
        total += reward
        largest = tl.maximum(largest, tl.where(valid, reward, -INFINITY))
        smallest = tl.minimum(smallest, tl.where(valid, reward, INFINITY))
    count = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.maximum(count, 1.0)
    left = tl.full((TILE,), 0.0, tl.float64)
    for first in range(start, end, TILE):
        reward, valid = load_rewards(rewards_ptr, first + lane, end)
        left += tl.where(valid, reward - mean, 0.0)
    rest = tl.sum(left, axis=0) / tl.maximum(count, 1.0)
    return count, mean, rest, tl.max(largest, axis=0), tl.min(smallest, axis=0)


@triton.jit
def deviation(reward, mean, rest):
    """From the mean, in two steps as in the reference: beside the rounding of the mean nearly equal rewards vanish."""
    return (reward - mean) - rest


@triton.jit
def square_sum(rewards_ptr, start, end, mean, rest, TILE: tl.constexpr):
    """Sum of the squared deviations from the mean."""
    total = tl.full((TILE,), 0.0, tl.float64)
    for first in range(start, end, TILE):
        reward, valid = load_rewards(rewards_ptr, first + tl.arange(0, TILE), end)
        centred = deviation(reward, mean, rest)
        total += tl.where(valid, centred * centred, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def standard_deviation(squares, count, UNBIASED: tl.constexpr):
    """sqrt(sum of squares / count), or / (count - 1)."""
    if UNBIASED:
        count -= 1.0
    return tl.sqrt(squares / tl.maximum(count, 1.0))


@triton.jit(do_not_specialize=["n_rewards"])
def batch_moments_kernel(rewards_ptr, n_rewards, moments_ptr, TILE: tl.constexpr):
    """Number, mean and sum of squared deviations of one tile of the batch, to moments [tiles, 3]."""
    tile = tl.program_id(0).to(tl.int64)
    start = tile * TILE
    end = tl.minimum(start + TILE, n_rewards)
    count, mean, rest, _, _ = group_mean(rewards_ptr, start, end, TILE)
    tl.store(moments_ptr + 3 * tile, count)
    tl.store(moments_ptr + 3 * tile + 1, mean + rest)
    tl.store(moments_ptr + 3 * tile + 2, square_sum(rewards_ptr, start, end, mean, rest, TILE))


@triton.jit
def batch_moments(moments_ptr, n_tiles, TILE: tl.constexpr):
    """Number and sum of squared deviations of the whole batch: the deviations in the tiles and those of their means."""
    counts = tl.full((TILE,), 0.0, tl.float64)
    sums = tl.full((TILE,), 0.0, tl.float64)
    lane = tl.arange(0, TILE)
    for first in range(0, n_tiles, TILE):
        here = first + lane < n_tiles
        count = tl.load(moments_ptr + 3 * (first + lane), mask=here, other=0.0)
        counts += count
        sums += count * tl.load(moments_ptr + 3 * (first + lane) + 1, mask=here, other=0.0)
    count_all = tl.sum(counts, axis=0)
    mean_all = tl.sum(sums, axis=0) / tl.maximum(count_all, 1.0)
    squares = tl.full((TILE,), 0.0, tl.float64)
    for first in range(0, n_tiles, TILE):
        here = first + lane < n_tiles
        count = tl.load(moments_ptr + 3 * (first + lane), mask=here, other=0.0)
        apart = tl.load(moments_ptr + 3 * (first + lane) + 1, mask=here, other=0.0) - mean_all
        squares += tl.load(moments_ptr + 3 * (first + lane) + 2, mask=here, other=0.0) + count * apart * apart
    return count_all, tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["n_rewards", "n_tiles"])
def group_advantages_kernel(
    rewards_ptr,
    n_rewards,
    group_offsets_ptr,
    moments_ptr,
    n_tiles,
    eps: tl.float64,
    advantages_ptr,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    UNBIASED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Advantages of one group."""
    group = tl.program_id(0).to(tl.int64)
    # Whatever the offsets are, nothing outside the rewards is touched.
    start = tl.maximum(tl.load(group_offsets_ptr + group), 0)
    end = tl.minimum(tl.load(group_offsets_ptr + group + 1), n_rewards)

    count, mean, rest, largest, smallest = group_mean(rewards_ptr, start, end, TILE)
    divisor = 1.0
    if SCALE == "std":
        squares = square_sum(rewards_ptr, start, end, mean, rest, TILE)
        divisor = standard_deviation(squares, count, UNBIASED) + eps
    elif SCALE == "batch_std":
        count_all, squares = batch_moments(moments_ptr, n_tiles, TILE)
        divisor = standard_deviation(squares, count_all, UNBIASED) + eps

    for first in range(start, end, TILE):
        index = first + tl.arange(0, TILE)
        reward, valid = load_rewards(rewards_ptr, index, end)
        advantage = reward
        if BASELINE != "none":
            advantage = deviation(reward, mean, rest)
        if BASELINE == "loo":  # r - mean of the others = (r - mean) * count / (count - 1)
            advantage = advantage * (count / tl.maximum(count - 1.0, 1.0))
        advantage = advantage / divisor
        if BASELINE != "none" or SCALE == "std":
            # (r - mean) / (std + eps) of equal rewards is rounding noise, not 0. A singleton is such a group.
            advantage = tl.where(largest == smallest, 0.0, advantage)
        advantage = tl.where(valid, advantage, 0.0)
        if advantages_ptr.dtype.element_ty.primitive_bitwidth < 64:  # in two steps, as torch rounds
            advantage = advantage.to(tl.float32)
        tl.store(advantages_ptr + index, advantage.to(advantages_ptr.dtype.element_ty), mask=index < end)


def group_advantages(
    rewards: Tensor, group_offsets: Tensor, baseline: str, scale: str, unbiased: bool, eps: float
) -> Tensor:
    """Advantages [sequences] in the dtype of the rewards; see `medbridge_kernels.group_advantages`.

    A reward that the offsets leave out gets NaN: they can't be checked on a GPU without waiting for it.
    """
    rewards = rewards.contiguous()
    n_rewards, n_groups = rewards.numel(), group_offsets.numel() - 1
    advantages = torch.full_like(rewards, float("nan"))
    if n_rewards == 0 or n_groups == 0:
        return advantages
    launch, batch_launch = LAUNCHES["group_advantages", 8], LAUNCHES["batch_moments", 8]
    moments, n_tiles = None, 0
    with on_device(rewards):
        if scale == "batch_std":
            n_tiles = triton.cdiv(n_rewards, batch_launch.tile)
            moments = torch.empty(n_tiles, 3, dtype=torch.float64, device=rewards.device)
            batch_moments_kernel[(n_tiles,)](
                rewards, n_rewards, moments, TILE=batch_launch.tile, num_warps=batch_launch.warps()
            )
        group_advantages_kernel[(n_groups,)](
            rewards, n_rewards, group_offsets.contiguous(), moments, n_tiles, eps, advantages,
            BASELINE=baseline, SCALE=scale, UNBIASED=unbiased, TILE=launch.tile, num_warps=launch.warps(),
        )  # fmt: skip
    return advantages
