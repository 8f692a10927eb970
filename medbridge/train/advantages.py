"""Advantages: what a completion is credited with, from the rewards of its group. One function an algorithm.

Rewards come flat, a group after the other, with offsets: group g has `offsets[g]` up to `offsets[g + 1]`, of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medbridge.support.passk import pass_at_k_advantages, pass_at_k_weights
from medbridge_kernels import LossConfig, group_advantages

Algorithm = Literal["group", "pkpo", "pass_at_k"]


def advantages(algorithm: Algorithm, rewards: Tensor, offsets: Tensor, *, k: int, config: LossConfig) -> Tensor:
    """Advantage of each completion [sequences] by the algorithm of that name; the group's own at k = 1.

    Args:
        algorithm: as `RlSettings.advantage`.
        rewards: floating point [sequences].
        offsets: int64 [groups + 1].
        k: the number of completions of which the best counts.
        config: the loss, whose baseline and scale are the group's.

    Raises:
        ValueError: a group of fewer than k completions.
    """
    if algorithm == "group" or k == 1:
        return group_advantages(rewards, offsets, **config.advantage_options())
    sizes = offsets.diff()
    if len(sizes) and int(sizes.min()) < k:
        raise ValueError(f"a group has {int(sizes.min())} completions, too few for the best of {k}")
    return (pkpo if algorithm == "pkpo" else pass_at_k)(rewards, offsets, k)


def pkpo(rewards: Tensor, offsets: Tensor, k: int) -> Tensor:
    """n s_i, with s_i = (k / n) E_J[max(g_i, max J) - max J]: J is any k - 1 of the others (arXiv 2505.15201, eq. 33).

    `sum_i s_i grad log p(i)` is unbiased for the gradient of the expected best of k, for rewards of any value, and of
    the paper's baselines "leave one out, minus one" has the least variance. The loss takes a mean over completions
    where the paper has a sum over s_i, hence the n. Dividing by a standard deviation would weigh easy and hard groups
    otherwise than that gradient does, so nothing is divided. No advantage is negative: what is not the best of any k is
    left alone, and is not pushed down.
    """
    sizes = offsets.diff()
    weights = pass_at_k_weights(rewards.double().numpy(), k, "loo_minus_one", offsets.numpy())
    return (torch.from_numpy(weights) * sizes.repeat_interleave(sizes)).to(rewards.dtype)


def pass_at_k(rewards: Tensor, offsets: Tensor, k: int) -> Tensor:
    """(E_J[max(g_i, max J)] - mean) / sd, of the maximum over all k-subsets of the group (arXiv 2508.10751, sec. 2.4).

    GRPO's advantage of subsets of k in place of single completions, averaged over all subsets that a completion is in.
    What the paper derives for rewards of 0 and 1 holds for any: only the maximum's mean and deviation are used.
    A completion that is wrong is pushed down less the more the others are right without it. A group whose every subset
    has the same best one gives exactly 0.
    """
    weights = pass_at_k_advantages(rewards.double().numpy(), k, offsets.numpy())
    return torch.from_numpy(weights).to(rewards.dtype)


def differ(algorithm: Algorithm, rewards: Sequence[float], k: int) -> bool:
    """Whether any advantage of one group's rewards is other than 0.

    The best one must stand above k - 1 others under pkpo (there is a J below it), and above k under pass_at_k (there is
    a subset without it).
    """
    below = 1 if algorithm == "group" or k == 1 else k - 1 if algorithm == "pkpo" else k
    return max(rewards) > sorted(rewards)[below - 1]
