"""TRL's `GRPOTrainer` with this package's loss: its configuration, its batch, and a mix-in for the trainer itself.

Follows TRL 1.16. Nothing here imports TRL; whatever has a `GRPOConfig`'s fields will do. What TRL's loss can do and
this one can't is refused by name.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from medbridge_kernels.adapters.loss_types import typed_config
from medbridge_kernels.adapters.padded import clipped, padded_grpo_loss, padded_linear_grpo_loss
from medbridge_kernels.config import LossConfig
from medbridge_kernels.grpo import LossOutputs
from medbridge_kernels.impl import Impl

_FOLLOWS = "1.16."
"""Release of TRL whose options are all known here: a later one may have some that change the loss."""

_CORRECTIONS: dict[str, dict[str, Any]] = {
    "token_truncate": {"correction": "truncate", "correction_level": "token"},
    "token_mask": {"correction": "mask", "correction_level": "token"},
    "sequence_truncate": {"correction": "truncate", "correction_level": "sequence"},
    "sequence_mask": {"correction": "mask", "correction_level": "sequence"},
}
"""TRL's `vllm_importance_sampling_mode`."""


def loss_config(args: Any) -> LossConfig:
    """The loss that a `trl.GRPOConfig` asks for.

    A field that `args` hasn't is taken as not in use. `loss_type="grpo"` with `importance_sampling_level="sequence"` is
    GSPO.

    Raises:
        ValueError: an option that this loss has no equivalent for, with what to do about it.
    """
    _refuse(args)
    low, high = getattr(args, "epsilon", 0.2), getattr(args, "epsilon_high", None)
    correction: dict[str, Any] = {}
    if _corrects(args):
        cap, floor = args.vllm_importance_sampling_clip_max, args.vllm_importance_sampling_clip_min
        correction = {
            **_CORRECTIONS[args.vllm_importance_sampling_mode],
            "correction_cap": float("inf") if cap is None else cap,
            "correction_floor": 0.0 if floor is None else max(0.0, floor),
        }
    return typed_config(
        args.loss_type,
        epsilon_low=low,
        epsilon_high=low if high is None else high,
        delta=getattr(args, "delta", None),
        sapo_temperature_pos=getattr(args, "sapo_temperature_pos", 1.0),
        sapo_temperature_neg=getattr(args, "sapo_temperature_neg", 1.05),
        ratio_level=getattr(args, "importance_sampling_level", "token"),
        kl_coef=getattr(args, "beta", 0.0),
        kl_bias_correction=getattr(args, "beta", 0.0) != 0 and getattr(args, "use_bias_correction_kl", False),
        entropy_coef=getattr(args, "entropy_coef", 0.0),
        off_policy_threshold=getattr(args, "off_policy_mask_threshold", None),
        **correction,
    )


def _corrects(args: Any) -> bool:
    return bool(getattr(args, "use_vllm", False) and getattr(args, "vllm_importance_sampling_correction", False))


def _refuse(args: Any) -> None:
    """Raise for what would otherwise be dropped, or read in another way than TRL does."""

    def get(name: str, default: Any) -> Any:
        return getattr(args, name, default)

    mode = args.vllm_importance_sampling_mode if _corrects(args) else None
    refusals = [
        ("top_entropy_quantile", get("top_entropy_quantile", 1.0) < 1, "set it to 1.0"),
        ("use_adaptive_entropy", get("use_adaptive_entropy", False), "set it to False"),
        # TRL takes the mean entropy over the tokens of a micro-batch: as "bnpo" weighs its tokens, and no other.
        ("entropy_coef", get("entropy_coef", 0.0) != 0 and args.loss_type != "bnpo",
         f"loss_type {args.loss_type!r} doesn't weigh tokens as TRL's entropy bonus does: set it to 0.0, or use bnpo"),
        ("vllm_importance_sampling_mode", mode is not None and mode not in _CORRECTIONS,
         f"use one of {', '.join(_CORRECTIONS)}"),
        ("router_aux_loss_coef", bool(get("router_aux_loss_coef", None)), "set it to 0.0"),
    ]  # fmt: skip
    for option, refused, cure in refusals:
        if refused:
            raise ValueError(f"{option} = {getattr(args, option)!r} isn't possible with this loss: {cure}")


def step_normalizer(
    args: Any, inputs: Mapping[str, Any], *, accumulation_steps: int, processes: int, training: bool
) -> float | Tensor:
    """What TRL divides the sum of a micro-batch by, with the accumulation of gradients in it.

    Sequences of the micro-batch (grpo, sapo), its tokens (bnpo), sequences times the longest completion allowed
    (dr_grpo), or the process's share of the tokens of an optimizer step (dapo, cispo), whose count in the whole
    generation batch TRL has in `inputs["num_items_in_batch"]`.
    """
    accumulation = float(accumulation_steps) if training else 1.0
    batch = max(1, len(inputs["completion_ids"]))
    if args.loss_type in ("dapo", "cispo"):
        count = inputs["num_items_in_batch"].clamp(min=1.0) / processes
        return count * (accumulation / args.steps_per_generation) if training else count
    if args.loss_type == "bnpo":
        return loss_mask(inputs).sum().clamp(min=1) * accumulation
    if args.loss_type == "dr_grpo":
        return batch * args.max_completion_length * accumulation
    return batch * accumulation


def loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens that count, bool [batch, length]: of completions, and not written by a tool."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if inputs.get("tool_mask") is not None else mask


def trl_grpo_loss(
    logits: Tensor,
    inputs: Mapping[str, Any],
    args: Any,
    *,
    accumulation_steps: int = 1,
    processes: int = 1,
    training: bool = True,
    inplace: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, LossOutputs]:
    """The loss that `GRPOTrainer._compute_loss` returns, from logits.

    Args:
        logits: [batch, length, vocab] at the completion tokens, shifted, or unshifted [batch, length + 1, vocab]; not
            yet divided by `args.temperature`.
        inputs: TRL's batch: completion_ids, completion_mask and maybe tool_mask [batch, length]; advantages [batch] or
            [batch, length]; num_items_in_batch; old_per_token_logps, ref_per_token_logps, sampling_per_token_logps
            [batch, length] where there are any. An importance_sampling_ratio, [batch, length] or [batch, 1], is taken
            as it stands; without it, the correction is made from old_per_token_logps and sampling_per_token_logps.
        args: a `trl.GRPOConfig`, or what has its fields.
        accumulation_steps: micro-batches of an optimizer step; processes: how many train together.
        training: False in evaluation, where nothing is accumulated.
        inplace, impl: as in `grpo_loss`.

    Returns:
        The loss and the outputs, `logprobs` and `entropy` [batch, length].

    Raises:
        ValueError: as `loss_config`, and as in `grpo_loss`.
    """
    normalizer = step_normalizer(
        args, inputs, accumulation_steps=accumulation_steps, processes=processes, training=training
    )
    rows = _rows(inputs, args)
    return padded_grpo_loss(logits, normalizer=normalizer, inplace=inplace, impl=impl, **rows)


def trl_linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    inputs: Mapping[str, Any],
    args: Any,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    accumulation_steps: int = 1,
    processes: int = 1,
    training: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, LossOutputs]:
    """The same from hidden states, without logits.

    Args:
        hidden: [batch, length, width], the states that predict the completion tokens.
        weight, bias, logit_scale, softcap: the output layer, as in `linear_grpo_loss`.
        inputs, args, accumulation_steps, processes, training, impl: as in `trl_grpo_loss`.

    Returns, Raises:
        As `trl_grpo_loss`.
    """
    normalizer = step_normalizer(
        args, inputs, accumulation_steps=accumulation_steps, processes=processes, training=training
    )
    return padded_linear_grpo_loss(
        hidden, weight, normalizer=normalizer, bias=bias, logit_scale=logit_scale, softcap=softcap, impl=impl,
        **_rows(inputs, args),
    )  # fmt: skip


def _rows(inputs: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """TRL's batch as the keywords of the padded losses."""
    config, weights = loss_config(args), None
    if _corrects(args) and inputs.get("importance_sampling_ratio") is not None:
        weights = inputs["importance_sampling_ratio"]
        config = replace(config, correction="none", correction_level="token", correction_cap=2.0, correction_floor=0.0)
    return {
        "token_ids": inputs["completion_ids"],
        "mask": loss_mask(inputs),
        "advantages": inputs["advantages"],
        "surrogate_weights": weights,
        "old_logprobs": inputs.get("old_per_token_logps"),
        "ref_logprobs": inputs.get("ref_per_token_logps") if config.kl_coef else None,
        "rollout_logprobs": inputs.get("sampling_per_token_logps"),
        "temperature": args.temperature,
        "config": config,
    }


class MedbridgeLossMixin:
    """A `trl.GRPOTrainer` whose loss is this package's, from hidden states and never from logits.

    ::

        class Trainer(MedbridgeLossMixin, GRPOTrainer):
            pass

    Everything but the loss is TRL's: generation, rewards, advantages, the log-probabilities of the old and the
    reference policy. It logs the metrics that TRL logs.

    Attributes:
        kernels_impl: back end, "auto" unless a subclass says otherwise.

    Raises:
        ValueError: when the trainer is made, for options that this loss can't honour (see `loss_config`), and for a
            mixture-of-experts auxiliary loss or DeepSpeed's ZeRO stage 3.
    """

    kernels_impl: Impl = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        release = importlib.metadata.version("trl")
        if not release.startswith(_FOLLOWS):
            warnings.warn(
                f"this loss follows TRL {_FOLLOWS}x, and {release} is installed: an option that is new in it may be "
                "read by TRL's loss alone",
                stacklevel=2,
            )
        loss_config(trainer.args)
        if trainer.aux_loss_enabled:
            raise ValueError("the model's auxiliary router loss isn't made here: set router_aux_loss_coef = 0.0")
        if getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
            raise ValueError("DeepSpeed's ZeRO stage 3 shards the output layer, which is needed whole: use stage 2")
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        _add_policy_loss(model)

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        trainer: Any = self
        training = trainer.model.training
        length = inputs["completion_ids"].shape[1]
        found: list[tuple[Tensor, LossOutputs]] = []

        def policy_loss(states: Tensor, head: Any, config: Any) -> tuple[Tensor, LossOutputs]:
            states = states[:, -length - 1 : -1]
            single = trainer.args.cast_lm_head_to_fp32
            scale, softcap = output_scaling(config)
            autocast = torch.is_autocast_enabled(states.device.type) and not single
            with torch.autocast(states.device.type, enabled=autocast):
                return trl_linear_grpo_loss(
                    states.float() if single else states, _whole(head.weight), inputs, trainer.args,
                    bias=None if head.bias is None else _whole(head.bias), logit_scale=scale, softcap=softcap,
                    accumulation_steps=trainer.current_gradient_accumulation_steps if training else 1,
                    processes=trainer.accelerator.num_processes, training=training, impl=trainer.kernels_impl,
                )  # fmt: skip

        def forward(*, labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> SimpleNamespace:
            found.append(model(**model_inputs, policy_loss=policy_loss))
            outputs = found[-1][1]
            return SimpleNamespace(log_probs=outputs.logprobs, entropy=outputs.entropy)

        # TRL knows what each model's forward pass takes; only what it calls is another.
        completion = inputs["completion_ids"]
        known = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
        trainer._get_per_token_logps_and_entropies(
            forward,
            torch.cat([inputs["prompt_ids"], completion], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            length,
            compute_entropy=True,
            **{name: value for name, value in inputs.items() if name in known},
        )
        ((loss, outputs),) = found
        self._log_loss(loss.detach(), outputs, inputs)
        return loss

    def _log_loss(self, loss: Tensor, outputs: LossOutputs, inputs: Mapping[str, Any]) -> None:
        trainer: Any = self
        accelerator, config = trainer.accelerator, loss_config(trainer.args)
        log = trainer._metrics["train" if trainer.model.training else "eval"]
        mask = loss_mask(inputs)
        tokens = mask.sum().float()
        sums = {"entropy": (outputs.entropy.sum(), tokens)}
        if config.kl_coef:
            sums["kl"] = (outputs.metrics["kl"] * tokens, tokens)
        extremes = {}
        if config.surrogate != "sapo":
            low, high = clipped(outputs.logprobs, inputs.get("old_per_token_logps"), mask, inputs["advantages"], config)
            if config.surrogate == "cispo":
                sums["cispo_clip_ratio"] = _sum_and_count(high, mask)
            else:
                extremes = {"clip_ratio/low_min": (low, "amin"), "clip_ratio/high_max": (high, "amax")}
                for name, cut in (("low", low), ("high", high), ("region", low | high)):
                    sums[f"clip_ratio/{name}_mean"] = _sum_and_count(cut, mask)
        local = torch.stack([torch.stack(pair) for pair in sums.values()])
        totals = accelerator.reduce(local, reduction="sum").tolist()  # waits for the device once
        for name, (total, count) in zip(sums, totals, strict=True):
            log[name].append(total / max(count, 1.0))
        for name, (cut, extreme) in extremes.items():
            share, count = _sum_and_count(cut, mask, dim=1)
            shares = accelerator.gather(share / count)
            shares = shares[~shares.isnan()]  # of a sequence without a token
            log[name].append(getattr(shares, extreme)().item() if shares.numel() else float("nan"))
        if config.entropy_coef:
            accumulation = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
            policy = loss * accumulation + config.entropy_coef * outputs.entropy.sum() / tokens.clamp(min=1)
            log["policy_loss"].append(accelerator.gather(policy).nanmean().item())
            if trainer.model.training and accelerator.sync_gradients:
                log["entropy_coef"].append(config.entropy_coef)


def _sum_and_count(values: Tensor, mask: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum over what counts and how much that is: tokens in the mask, or sequences where [batch, 1]."""
    if values.shape[1] != mask.shape[1]:
        mask = torch.ones_like(values)
    return (values & mask).sum(dim).float(), mask.sum(dim).float()


def output_scaling(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap of the logits, by the names that transformers' configurations have for them."""
    config = config.get_text_config()
    scale = next(
        (
            getattr(config, name)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(config, name, None) is not None
        ),
        None,
    )
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:  # a divisor, but for one model
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


def _add_policy_loss(model: Any) -> None:
    """`model(..., policy_loss=f)` returns f(hidden states, output layer, configuration).

    The loss is made inside the model's forward pass, so that wrappers that watch it or gather parameters for it (DDP,
    FSDP) see all that it uses. Without the keyword the forward pass is as before.
    """
    before: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)  # generation checks its arguments against the signature
    def forward(self: Any, *args: Any, policy_loss: Any = None, **kwargs: Any) -> Any:
        if policy_loss is None:
            return before(*args, **kwargs)
        backbone = self.base_model(*args, **kwargs, use_cache=False)
        return policy_loss(backbone.last_hidden_state, self.get_output_embeddings(), self.config)

    model.forward = MethodType(forward, model)


def _whole(parameter: Any) -> Any:
    """A parameter, gathered where FSDP2 shards it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
