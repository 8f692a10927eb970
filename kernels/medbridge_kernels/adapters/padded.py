"""The GRPO loss of padded batches: [batch, length, ...] in, [batch, length] out. It packs, and computes nothing itself.

Logits are not copied: their rows are viewed as [batch * length, vocab], and the fast back ends don't read those outside
the mask. Of hidden states, which are narrow, the rows in the mask are gathered, so that padding costs no product with
the output layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medbridge_kernels import reference
from medbridge_kernels.advantages import group_advantages
from medbridge_kernels.config import LossConfig
from medbridge_kernels.grpo import LossOutputs, grpo_loss
from medbridge_kernels.linear_grpo import linear_grpo_loss
from medbridge_kernels.reference import PolicyInputs

_PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "temperature")
"""Options of the loss that may be [batch, length]."""


def padded_grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_offsets: Tensor | None = None,
    surrogate_weights: Tensor | None = None,
    config: LossConfig,
    **options: Any,
) -> tuple[Tensor, LossOutputs]:
    """`grpo_loss` of padded logits.

    Args:
        logits: [batch, length, vocab], shifted: (b, t) is the distribution of token (b, t). Or [batch, length + 1,
            vocab] as a model makes them of the completion's last prompt token onwards, whose last row predicts nothing
            that is in `token_ids`. Not copied if rows lie evenly in memory: `logits[:, :-1]` doesn't, so give the
            unshifted ones whole.
        token_ids: int64 [batch, length]; outside the mask any value.
        mask: bool, or integer 0 and 1, [batch, length]; None: every token counts. It may have holes.
        advantages: [batch], [batch, 1] or, one for each token, [batch, length].
        rewards, group_offsets: in place of `advantages`, as in `grpo_loss`.
        surrogate_weights: [batch], [batch, 1] or [batch, length], at least 0: what each token's surrogate is multiplied
            by, such as an importance correction that is already made. (A surrogate is proportional to the size of its
            advantage, so they go into the advantages; metrics that go by an advantage's sign then take a weight of 0
            for an advantage of 0.)
        config: which loss.
        options: further keywords of `grpo_loss`; `old_logprobs`, `ref_logprobs` and `rollout_logprobs` are [batch,
            length], `temperature` a number or the same.

    Returns:
        The loss and the outputs, `logprobs` and `entropy` [batch, length]. Without a `normalizer`,
        ``normalize="sequences"`` divides by the batch size.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `grpo_loss`.
    """
    if logits.ndim != 3 or token_ids.ndim != 2 or not _fits(logits, token_ids):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and token_ids of shape {tuple(token_ids.shape)}: must be [batch, "
            "length, vocab], or [batch, length + 1, vocab] if they aren't shifted, and [batch, length]"
        )
    if options.get("inplace") and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace: the logits are a leaf of the graph, which would lose its values; give what a model made"
        )
    length = token_ids.shape[1]
    unshifted = logits.shape[1] > length
    if unshifted:
        mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    rows = _Rows(token_ids, None, int(unshifted))
    loss, outputs = grpo_loss(
        logits.reshape(-1, logits.shape[-1]),
        **rows.inputs(mask, advantages, rewards, group_offsets, surrogate_weights, config, options),
    )
    return loss, rows.unpack(outputs)


def padded_linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_offsets: Tensor | None = None,
    surrogate_weights: Tensor | None = None,
    config: LossConfig,
    gather: bool = True,
    **options: Any,
) -> tuple[Tensor, LossOutputs]:
    """`linear_grpo_loss` of padded hidden states.

    Args:
        hidden: [batch, length, width], shifted: (b, t) is the state that predicts token (b, t).
        weight: [vocab, width].
        gather: leave out the rows outside the mask before the output layer. Their number is known after waiting for
            the device; False computes all rows without waiting, and compiles to one graph.
        token_ids, mask, advantages, rewards, group_offsets, surrogate_weights, config: as in `padded_grpo_loss`.
        options: further keywords of `linear_grpo_loss`, [batch, length] where they are per token.

    Returns, Raises:
        As `padded_grpo_loss`.
    """
    if hidden.ndim != 3 or hidden.shape[:2] != token_ids.shape:
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} and token_ids of shape {tuple(token_ids.shape)}: must be [batch, "
            "length, width] and [batch, length]"
        )
    chosen = None
    if gather and mask is not None:
        _check("mask", mask, token_ids)
        if mask.is_floating_point():
            raise TypeError(f"mask must be bool or an integer 0 and 1, got {mask.dtype}")
        chosen, mask = mask.bool(), None
    rows = _Rows(token_ids, chosen, 0)
    loss, outputs = linear_grpo_loss(
        hidden.reshape(-1, hidden.shape[-1]) if chosen is None else hidden[chosen],
        weight,
        **rows.inputs(mask, advantages, rewards, group_offsets, surrogate_weights, config, options),
    )
    return loss, rows.unpack(outputs)


def clipped(
    logprobs: Tensor, old_logprobs: Tensor | None, mask: Tensor, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Where the ratio is cut below and above, by the sign of the advantage: two bool tensors.

    Of log-probabilities [batch, length] and advantages [batch] or [batch, length]. [batch, 1] where ratio and advantage
    are of sequences.
    """
    batch, length = logprobs.shape
    inputs = PolicyInputs(
        sequence_ids=torch.arange(batch, device=logprobs.device).repeat_interleave(length),
        n_sequences=batch,
        advantages=logprobs.new_zeros(batch),
        per_token=False,
        old_logprobs=None if old_logprobs is None else old_logprobs.reshape(-1),
        ref_logprobs=None,
        rollout_logprobs=None,
        keep=mask.bool().reshape(-1),
    )
    ratio = reference.importance_ratio(logprobs.reshape(-1), inputs, config).reshape(batch, length)
    ratio = ratio[:, :1] if config.ratio_level == "sequence" else ratio
    advantages = _columns("advantages", advantages, batch, length)
    return (ratio < 1 - config.clip_low) & (advantages < 0), (ratio > 1 + config.clip_high) & (advantages > 0)


class _Rows:
    """How [batch, length] becomes packed rows, and back.

    Args:
        token_ids: int64 [batch, length].
        chosen: bool [batch, length], the tokens to gather; None: all.
        extra: rows without a token at the end of each sequence, 0 or 1.
    """

    def __init__(self, token_ids: Tensor, chosen: Tensor | None, extra: int) -> None:
        self.token_ids = token_ids
        self.chosen = chosen
        self.extra = extra

    def flat(self, name: str, values: Tensor | None) -> Tensor | None:
        """[batch, length] as packed rows."""
        if values is None:
            return None
        _check(name, values, self.token_ids)
        if self.chosen is not None:
            return values[self.chosen]
        if self.extra:
            values = torch.nn.functional.pad(values, (0, self.extra))
        return values.reshape(-1)

    def inputs(
        self,
        mask: Tensor | None,
        advantages: Tensor | None,
        rewards: Tensor | None,
        group_offsets: Tensor | None,
        surrogate_weights: Tensor | None,
        config: LossConfig,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """The keywords of `grpo_loss` for these rows."""
        batch, length = self.token_ids.shape
        if surrogate_weights is not None and advantages is None and rewards is not None and group_offsets is not None:
            impl = options.get("impl", "auto")
            advantages = group_advantages(rewards, group_offsets, **config.advantage_options(), impl=impl)
            rewards = group_offsets = None
        found: dict[str, Any] = {
            **options, "rewards": rewards, "group_offsets": group_offsets, "config": config,
            "mask": self.flat("mask", mask), "token_ids": self.flat("token_ids", self.token_ids),
        }  # fmt: skip
        for name in _PER_TOKEN:
            if isinstance(options.get(name), Tensor):
                found[name] = self.flat(name, options[name])
        found["sequence_ids"] = torch.arange(batch, device=self.token_ids.device).repeat_interleave(length + self.extra)
        if self.chosen is not None:
            found["sequence_ids"] = found["sequence_ids"][self.chosen.reshape(-1)]
        if advantages is None:
            return found
        advantages = _columns("advantages", advantages, batch, length)
        if surrogate_weights is not None:
            weights = _columns("surrogate_weights", surrogate_weights, batch, length)
            if weights.device.type == "cpu" and not torch.compiler.is_compiling() and bool((weights < 0).any()):
                raise ValueError("surrogate_weights must be at least 0: one below turns a surrogate's clipping around")
            advantages = advantages * weights
        if advantages.shape[1] == 1:
            return {**found, "advantages": advantages.reshape(-1)}
        if config.normalize == "sequences" and found.get("normalizer") is None:
            found["normalizer"] = float(max(1, batch))
        return {**found, "advantages": self.flat("advantages", advantages), "advantage_level": "token"}

    def unpack(self, outputs: LossOutputs) -> LossOutputs:
        """The outputs as [batch, length]."""
        return replace(outputs, logprobs=self._unpack(outputs.logprobs), entropy=self._unpack(outputs.entropy))

    def _unpack(self, values: Tensor) -> Tensor:
        batch, length = self.token_ids.shape
        if self.chosen is None:
            return values.reshape(batch, length + self.extra)[:, :length]
        return values.new_zeros(batch, length).masked_scatter_(self.chosen, values)


def _fits(logits: Tensor, token_ids: Tensor) -> bool:
    return logits.shape[0] == token_ids.shape[0] and logits.shape[1] - token_ids.shape[1] in (0, 1)


def _check(name: str, values: Tensor, token_ids: Tensor) -> None:
    if values.shape != token_ids.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, must be [batch, length] = {tuple(token_ids.shape)}")


def _columns(name: str, values: Tensor, batch: int, length: int) -> Tensor:
    """[batch] and [batch, 1] as [batch, 1]; [batch, length] as it is."""
    columns = values[:, None] if values.ndim == 1 else values
    if columns.ndim != 2 or columns.shape[0] != batch or columns.shape[1] not in (1, length):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, must be [batch], [batch, 1] or [batch, length] with "
            f"{batch} sequences of length {length}"
        )
    return columns
