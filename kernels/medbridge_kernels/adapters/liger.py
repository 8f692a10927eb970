"""This package's loss behind the argument forms of Liger's GRPO losses, `LigerFusedLinearGRPOLoss` and
`triton_grpo_loss`.

Follows liger-kernel 0.8.5, which is not imported. What its losses can do and this one can't is refused by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medbridge_kernels.adapters.loss_types import typed_config
from medbridge_kernels.adapters.padded import clipped, padded_grpo_loss, padded_linear_grpo_loss
from medbridge_kernels.config import Level, LossConfig
from medbridge_kernels.grpo import LossOutputs
from medbridge_kernels.impl import Impl
from medbridge_kernels.linear_grpo import linear_token_logprobs


class FusedLinearGRPOLoss(nn.Module):
    """In the place of `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`: the loss from hidden states.

    Args:
        beta: weight of the KL term (k3); above 0 it needs the reference policy.
        use_ref_model: whether there is one; with beta above 0 it must be True.
        chunk_size: the memory budget, as the logits of so many sequences. None: the default of `linear_grpo_loss`.
        epsilon_low, epsilon_high: the ratio is clipped to 1 - epsilon_low and 1 + epsilon_high; for "cispo" to
            epsilon_high from above alone. "sapo" doesn't read them.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo" or "sapo".
        max_completion_length: for "dr_grpo", which divides by it and the number of sequences.
        importance_sampling_level: "token", or "sequence" for GSPO's ratio.
        sapo_temperature_pos, sapo_temperature_neg: for "sapo".
        temperature: of the policy.
        delta: upper limit of the ratio that isn't clipped, above 1 + epsilon_high.
        use_bias_correction_kl: the KL term is multiplied by the ratio; not read without one (beta = 0), as in Liger.
        impl: back end, as in `grpo_loss`. (Liger's `compiled` has no counterpart: there is nothing to compile.)

    Raises:
        ValueError: for a value that this loss has no equivalent for.
    """

    def __init__(
        self,
        beta: float = 0.04,
        *,
        use_ref_model: bool = True,
        chunk_size: int | None = None,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: Level = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.config = loss_config(
            loss_type, beta, epsilon_low, epsilon_high, importance_sampling_level, sapo_temperature_pos,
            sapo_temperature_neg, delta, use_bias_correction_kl,
        )  # fmt: skip
        if beta and not use_ref_model:
            raise ValueError(f"beta = {beta} needs a reference policy: use_ref_model=True, or beta=0.0")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size = {chunk_size} sequences, must be at least 1")
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.impl = impl

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics: the mean KL, where there is a KL term, and the share of tokens that are clipped.

        Args:
            _input: hidden states [batch, length, width].
            lin_weight, bias: [vocab, width] and [vocab].
            selected_token_ids: int64 [batch, length]; attention_mask: 0 and 1, the same.
            advantages: [batch].
            ref_per_token_logps, old_per_token_logps: [batch, length]; None of the latter: the current ones.
            ref_input, ref_weight, ref_bias: hidden states and output layer of the reference policy, in the place of
                ref_per_token_logps.
            vllm_is_ratio: factor of the surrogate, at least 0, [batch, length], [batch, 1] or [batch].
            num_items_in_batch: tokens of the whole step on all processes, for "dapo" and "cispo"; None: those of this
                call.

        Raises:
            ValueError: as in `grpo_loss`; a reference policy that is missing, or that use_ref_model=False says there
                isn't.
        """
        if not self.use_ref_model and not (ref_per_token_logps is None and ref_input is None):
            raise ValueError("there is a reference policy, and use_ref_model=False: leave it out, or set it to True")
        mask = attention_mask.bool()
        if self.config.kl_coef and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("beta needs ref_per_token_logps, or ref_input and ref_weight")
            ref_per_token_logps = self._logprobs(ref_input, ref_weight, ref_bias, selected_token_ids, mask)
        budget = None
        if self.chunk_size is not None:
            budget = self.chunk_size * _input.shape[1] * lin_weight.shape[0] * lin_weight.element_size()
        loss, outputs = padded_linear_grpo_loss(
            _input, lin_weight, selected_token_ids, mask=mask, advantages=advantages, surrogate_weights=vllm_is_ratio,
            config=self.config, old_logprobs=old_per_token_logps, temperature=self.temperature, bias=bias,
            ref_logprobs=ref_per_token_logps if self.config.kl_coef else None, memory_budget=budget, impl=self.impl,
            normalizer=_normalizer(self.loss_type, mask, self.max_completion_length, num_items_in_batch),
        )  # fmt: skip
        return loss, _metrics(outputs, old_per_token_logps, mask, advantages, self.config)

    @torch.no_grad()
    def _logprobs(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor) -> Tensor:
        found = linear_token_logprobs(
            hidden[mask], weight, token_ids[mask], self.temperature, bias=bias, impl=self.impl
        )
        return found.new_zeros(mask.shape).masked_scatter_(mask, found)


def fused_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    *,
    reduce: bool,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = False,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: Level = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """In the place of `liger_kernel.transformers.grpo_loss.triton_grpo_loss`: the loss from unshifted logits.

    Args:
        logits: [batch, length + 1, vocab], the last row of each sequence predicts nothing; not copied.
        old_logp, ref_logp: [batch, length] or None.
        completion_ids: int64 [batch, length]; completion_mask: 0 and 1, the same, or None.
        advantages: [batch].
        reduce: must be True, which isn't Liger's default: losses of single tokens aren't made.
        inplace: the backward pass writes over the logits (Liger's default is True); see `grpo_loss`.
        max_completion_length: for "dr_grpo"; None: the length of the batch.
        temperature, beta, eps_low, eps_high, loss_type, importance_sampling_level, sapo_temperature_pos,
            sapo_temperature_neg, vllm_is_ratio, delta, use_bias_correction_kl, num_items_in_batch, impl: as in
            `FusedLinearGRPOLoss`.

    Returns:
        The loss and a list of metrics, as `FusedLinearGRPOLoss`.

    Raises:
        ValueError: as in `FusedLinearGRPOLoss` and `grpo_loss`.
    """
    if not reduce:
        raise ValueError("reduce=False: losses of single tokens aren't made, only their reduction by loss_type")
    config = loss_config(
        loss_type, beta, eps_low, eps_high, importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg,
        delta, use_bias_correction_kl,
    )  # fmt: skip
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()
    if max_completion_length is None:
        max_completion_length = completion_ids.shape[1]
    loss, outputs = padded_grpo_loss(
        logits, completion_ids, mask=mask, advantages=advantages, surrogate_weights=vllm_is_ratio, config=config,
        old_logprobs=old_logp, ref_logprobs=ref_logp if config.kl_coef else None, temperature=temperature,
        normalizer=_normalizer(loss_type, mask, max_completion_length, num_items_in_batch), inplace=inplace, impl=impl,
    )  # fmt: skip
    return loss, list(_metrics(outputs, old_logp, mask, advantages, config))


def loss_config(
    loss_type: str,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    importance_sampling_level: Level,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    delta: float | None,
    use_bias_correction_kl: bool,
) -> LossConfig:
    """The loss that Liger's options ask for.

    Raises:
        ValueError: for one that this loss has no equivalent for.
    """
    return typed_config(
        loss_type, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta, kl_coef=beta,
        kl_bias_correction=use_bias_correction_kl and beta != 0, sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        ratio_level=importance_sampling_level,
    )  # fmt: skip


def _normalizer(
    loss_type: str, mask: Tensor, max_completion_length: int | None, num_items_in_batch: int | Tensor | None
) -> float | Tensor:
    """What Liger divides the sum by: "dapo" and "cispo" by a process's share of the tokens on all of them."""
    batch = max(1, len(mask))
    if loss_type == "bnpo":
        return mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        assert max_completion_length is not None
        return float(batch * max_completion_length)
    if loss_type not in ("dapo", "cispo"):
        return float(batch)
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is None:
        count = mask.sum().float()
        if spread:
            torch.distributed.all_reduce(count)
    else:
        count = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (count / (torch.distributed.get_world_size() if spread else 1)).clamp(min=1.0)


def _metrics(
    outputs: LossOutputs, old_logprobs: Tensor | None, mask: Tensor, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, ...]:
    low, high = clipped(outputs.logprobs, old_logprobs, mask, advantages, config)
    cut = ((low | high) & mask).sum() / mask.sum().clamp(min=1)
    if config.surrogate == "sapo":  # which clips nothing
        cut = torch.zeros_like(cut)
    return (outputs.metrics["kl"], cut) if config.kl_coef else (cut,)
