"""Group-relative advantages of rewards in ragged groups: checks the input and picks the back end."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from medbridge_kernels import native, ops, reference
from medbridge_kernels.config import Baseline, Scale
from medbridge_kernels.impl import Impl, choose

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    unbiased: bool = True,
    eps: float = 1e-4,
    impl: Impl = "auto",
) -> Tensor:
    """Advantage of each sequence: ``(reward - baseline) / (scale + eps)`` within its group.

    The baseline "mean" is the group's mean, "loo" the mean of the others (leave-one-out), "none" is 0. The
    scale "std" is the group's standard deviation, "batch_std" that of all rewards, "none" leaves the
    difference as it is. NaN rewards are left out of all of them and get 0. A group whose rewards are all
    equal, a singleton above all, gives exactly 0; only with neither a baseline nor its own scale is its
    advantage the reward itself.

    Args:
        rewards: floating point [sequences], the groups one after another.
        group_offsets: int64 [groups + 1]; group g has the sequences from group_offsets[g] up to
            group_offsets[g + 1]. Groups may be empty and of any size.
        baseline, scale: see above.
        unbiased: divide the sum of squares by count - 1, not by count.
        eps: added to the scale.
        impl: back end: "auto", "reference", "native" (CPU) or "triton" (GPU). All of them compute in float64.

    Returns:
        Advantages [sequences] in the dtype of the rewards, without a gradient.

    Raises:
        TypeError: rewards that aren't floating point, offsets that aren't int64.
        ValueError: a wrong shape or choice; offsets that don't rise from 0 to the number of rewards (seen for
            CPU tensors only: on a GPU the check would wait for the device).
        NotImplementedError: a back end that isn't available.
    """
    chosen = choose(impl, rewards, _DTYPES)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be floating point, got {rewards.dtype}")
    if group_offsets.dtype != torch.int64:
        raise TypeError(f"group_offsets must be int64, got {group_offsets.dtype}")
    if rewards.ndim != 1:
        raise ValueError(f"rewards must be [sequences], got shape {tuple(rewards.shape)}")
    if group_offsets.ndim != 1 or group_offsets.numel() == 0:
        raise ValueError(f"group_offsets must be [groups + 1], got shape {tuple(group_offsets.shape)}")
    for name, value, choices in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        if value not in get_args(choices):
            raise ValueError(f"{name} = {value!r}, must be one of {', '.join(get_args(choices))}")
    compiling = torch.compiler.is_compiling()
    if chosen == "native" and not compiling:  # past the operator's overhead, and it checks the offsets itself
        try:
            return native.group_advantages(rewards, group_offsets, baseline, scale, unbiased, eps)
        except ValueError:
            _check_offsets(group_offsets, rewards.numel())  # says more
            raise
    if group_offsets.device.type == "cpu" and not compiling:
        _check_offsets(group_offsets, rewards.numel())
    if chosen == "reference":
        return reference.group_advantages(rewards, group_offsets, baseline, scale, unbiased, eps)
    return ops.group_advantages(rewards.detach(), group_offsets, baseline, scale, unbiased, eps, chosen)


def _check_offsets(offsets: Tensor, count: int) -> None:
    if int(offsets[0]) == 0 and int(offsets[-1]) == count and not bool((offsets.diff() < 0).any()):
        return
    raise ValueError(f"group_offsets must rise from 0 to the {count} rewards, got {_shorten(offsets.tolist())}")


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"
