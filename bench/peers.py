"""The same GRPO loss by others, as the benchmarks of the kernels call it: TRL's trainer, Liger's losses, plain torch.

Every function here takes a `Step` (and logits, or hidden states and weight), and makes loss and gradients. The loss is
the one that all of them have: clipped, mean over the tokens of the step ("dapo" of TRL and Liger, preset "bnpo" here).
"""

from __future__ import annotations

import os
import types
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from medbridge_kernels import LossConfig, grpo_loss, linear_grpo_loss, reference
from medbridge_kernels.reference import PolicyInputs

CONFIG = LossConfig.preset("bnpo")
CLIP = 0.2


@dataclass(frozen=True, slots=True)
class Step:
    """Completions of equal length, so that padded and packed are the same."""

    token_ids: Tensor
    """[sequences, length]"""
    advantages: Tensor
    """[sequences]"""
    old_logprobs: Tensor
    """[sequences, length]"""

    @classmethod
    def random(cls, sequences: int, length: int, vocab: int, device: str = "cpu", seed: int = 0) -> Step:
        """Token ids and advantages; the old log-probabilities are those of a policy near the uniform one."""
        generator = torch.Generator().manual_seed(seed)
        advantages = torch.randn(sequences, generator=generator)
        old = 0.1 * torch.randn(sequences, length, generator=generator) - torch.tensor(float(vocab)).log()
        ids = torch.randint(vocab, (sequences, length), generator=generator)
        return cls(ids.to(device), (advantages - advantages.mean()).to(device), old.to(device))

    @property
    def packed(self) -> dict[str, Any]:
        """Arguments of the package's own functions."""
        sequences, length = self.token_ids.shape
        ids = torch.arange(sequences, device=self.token_ids.device).repeat_interleave(length)
        return {
            "token_ids": self.token_ids.flatten(),
            "sequence_ids": ids,
            "advantages": self.advantages,
            "old_logprobs": self.old_logprobs.flatten(),
            "config": CONFIG,
        }

    @property
    def mask(self) -> Tensor:
        return torch.ones_like(self.token_ids)


def prepare_imports() -> None:
    """Lets TRL and Liger import beside a CPU build of torch, and keeps them offline; before the first of them."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    from medbridge.torchvision_ops import declare

    declare()


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in ("trl", "liger-kernel", "triton", "accelerate"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- the package, and the definition in plain torch ---


def medbridge_linear(step: Step, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Loss, gradient of hidden states [tokens, width] and of the weight [vocab, width]."""
    loss, _ = linear_grpo_loss(hidden, weight, impl="auto", **step.packed)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


class _Logits(torch.autograd.Function):
    """Stands for the model that made the logits: takes their gradient, and copies nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor, taken: list[Tensor]) -> Tensor:
        ctx.taken = taken
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.taken.append(grads[0])
        return None, None, None


def through_logits(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of the logits, which are no leaf of the graph: it may be written over them."""
    taken: list[Tensor] = []
    loss = loss_of(_Logits.apply(torch.zeros((), requires_grad=True), logits, taken))
    loss.backward()
    return loss.detach(), taken[0]


def medbridge_logits(step: Step, logits: Tensor, inplace: bool = True) -> Tensor:
    """Loss of packed logits [tokens, vocab]."""
    return grpo_loss(logits, inplace=inplace, **step.packed)[0]


def policy_inputs(step: Step) -> PolicyInputs:
    ids = step.packed
    return PolicyInputs(
        sequence_ids=ids["sequence_ids"], n_sequences=len(step.advantages), advantages=step.advantages, per_token=False,
        old_logprobs=ids["old_logprobs"], ref_logprobs=None, rollout_logprobs=None,
        keep=torch.ones_like(ids["token_ids"], dtype=torch.bool),
    )  # fmt: skip


def exact_logits(step: Step, logits: Tensor) -> Tensor:
    """The loss as defined, in the dtype of the logits: float64 for errors."""
    inputs = policy_inputs(step)
    return reference.grpo_loss(logits, step.token_ids.flatten(), inputs, False, 1.0, CONFIG, None)[0]


def eager_logits(step: Step, logits: Tensor) -> Tensor:
    """The definition of the loss and of the same outputs, in plain torch."""
    logprobs, entropy = reference.logprobs_and_entropy(logits.float(), step.token_ids.flatten())
    return reference.policy_terms(logprobs, entropy.detach(), policy_inputs(step), CONFIG, None)[0]


# --- TRL ---


class _HiddenStates(nn.Module):
    """A causal language model whose body is done: it has given these hidden states [sequences, 1 + length, width]."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(model_type="benchmark")
        self.config.get_text_config = lambda: self.config
        self.head = types.SimpleNamespace(weight=weight, bias=None)
        self.base_model = lambda **inputs: types.SimpleNamespace(last_hidden_state=hidden)

    def forward(self, **inputs: Any) -> Any:
        raise NotImplementedError("only the fused output layer is called")

    def get_output_embeddings(self) -> Any:
        return self.head


def trl_trainer(model: nn.Module) -> Any:
    """What `GRPOTrainer._compute_loss` of TRL 1.16 reads of its trainer, with the values of its default settings."""
    from accelerate import Accelerator
    from trl import GRPOTrainer

    trainer = types.SimpleNamespace(
        model=model, accelerator=Accelerator(cpu=True), temperature=1.0, loss_type="dapo", beta=0.0,
        epsilon_low=CLIP, epsilon_high=CLIP, importance_sampling_level="token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        args=types.SimpleNamespace(delta=None, steps_per_generation=1),
    )  # fmt: skip
    trainer.accelerator.autocast = nullcontext  # which it is without mixed precision, only slower to enter
    trainer._get_per_token_logps_and_entropies = types.MethodType(
        GRPOTrainer._get_per_token_logps_and_entropies, trainer
    )
    return trainer


def _trl_inputs(step: Step) -> dict[str, Tensor]:
    """A batch as TRL's trainer makes it, with prompts of one token."""
    prompt = step.token_ids[:, :1]
    return {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": step.token_ids,
        "completion_mask": step.mask, "advantages": step.advantages, "old_per_token_logps": step.old_logprobs,
        "num_items_in_batch": step.mask.sum(),
    }  # fmt: skip


def _trl_loss(trainer: Any, model: Any, step: Step) -> Tensor:
    from trl import GRPOTrainer

    return GRPOTrainer._compute_loss(trainer, model, _trl_inputs(step))


def trl_linear(step: Step, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """TRL 1.16's trainer: its fused output layer, then its loss. `hidden` is [sequences, 1 + length, width]."""
    from trl.trainer.utils import add_fused_lm_head

    model = _HiddenStates(hidden, weight)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    loss = _trl_loss(trl_trainer(model), model, step)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


def trl_logits(step: Step, logits: Tensor) -> Tensor:
    """TRL's loss of packed logits [tokens, vocab], with its own log-probabilities and entropies of them."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    sequences, length = step.token_ids.shape
    trainer = trl_trainer(nn.Module())

    def logprobs_and_entropies(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        padded = logits.view(sequences, length, -1)
        return *selective_log_softmax_and_entropy(padded, step.token_ids, entropy_requires_grad=False), None

    trainer._get_per_token_logps_and_entropies = logprobs_and_entropies
    return _trl_loss(trainer, trainer.model, step)


def trl_whole(step: Step, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """TRL's functions with the logits made whole, as its trainer did before it had the fused output layer."""
    loss = trl_logits(step, nn.functional.linear(hidden, weight))
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


# --- Liger ---


def liger_linear(
    step: Step, hidden: Tensor, weight: Tensor, compiled: bool = True, chunk_size: int = 1
) -> tuple[Tensor, ...]:
    """Liger's fused linear loss; `chunk_size` sequences at a time. `hidden` is [sequences, length, width]."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=chunk_size, epsilon_low=CLIP, epsilon_high=CLIP
    )
    loss, _ = module(hidden, weight, step.token_ids, step.mask, step.advantages, old_per_token_logps=step.old_logprobs)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])


def liger_logits(step: Step, logits: Tensor) -> Tensor:
    """Liger's Triton loss, for GPUs; `logits` is [sequences, length + 1, vocab], its last row unused.

    The gradient is written over them.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        logits, step.old_logprobs, None, step.token_ids, step.advantages, step.mask, temperature=1.0, beta=0.0,
        eps_low=CLIP, eps_high=CLIP, inplace=True, loss_type="dapo", reduce=True,
    )  # fmt: skip
    return loss
