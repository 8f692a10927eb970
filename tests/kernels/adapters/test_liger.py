"""Liger's argument forms through the adapter against Liger's own losses: loss, gradients and metrics.

Its chunked loss runs here as it is; its Triton loss in Triton's interpreter, in a child process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

from medbridge_kernels.adapters.liger import FusedLinearGRPOLoss, fused_grpo_loss

VOCAB, WIDTH, BATCH, LENGTH = 37, 8, 4, 6
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def batch(seed: int = 0, bias: bool = False) -> dict[str, Any]:
    """Arguments of `LigerFusedLinearGRPOLoss.forward`, half a nat off policy; one sequence counts no token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    data = {
        "_input": normal(BATCH, LENGTH, WIDTH),
        "lin_weight": normal(VOCAB, WIDTH),
        "selected_token_ids": torch.randint(VOCAB, (BATCH, LENGTH), generator=generator),
        "attention_mask": (torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 1, 0])[:, None]).float(),
        "advantages": torch.tensor([1.2, -0.7, -1.5, 0.4]),
        "bias": normal(VOCAB) if bias else None,
    }
    logits = torch.nn.functional.linear(data["_input"], data["lin_weight"], data["bias"]) / 0.8
    logprobs = logits.log_softmax(-1).gather(-1, data["selected_token_ids"][..., None]).squeeze(-1)
    data["old_per_token_logps"] = logprobs + 0.4 * normal(BATCH, LENGTH)
    data["ref_per_token_logps"] = logprobs + 0.4 * normal(BATCH, LENGTH)
    return data


def run(loss: Any, data: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Loss, metrics, and gradients of hidden states, weight and bias."""
    leaves = [name for name in ("_input", "lin_weight", "bias") if data[name] is not None]
    data = data | {name: data[name].clone().requires_grad_() for name in leaves}
    value, metrics = loss(**data)
    (3 * value).backward()
    return value.detach(), list(metrics), [data[name].grad for name in leaves]


def assert_same(options: dict[str, Any], data: dict[str, Any]) -> None:
    liger = LigerFusedLinearGRPOLoss(compiled=False, temperature=0.8, **options)
    loss, metrics, gradients = run(liger, data)
    ours = run(FusedLinearGRPOLoss(temperature=0.8, **options), data)
    assert gradients[0].any()
    torch.testing.assert_close(ours[0], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], metrics, rtol=1e-5, atol=1e-6)
    for found, expected in zip(ours[2], gradients, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


CASES: list[dict[str, Any]] = [
    *({"loss_type": kind, "beta": beta} for kind in LOSS_TYPES for beta in (0.0, 0.3)),
    *({"loss_type": kind, "beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 0.28, "delta": 1.4}
      for kind in LOSS_TYPES[:4]),
    *({"loss_type": kind, "importance_sampling_level": "sequence"} for kind in LOSS_TYPES[:4]),
    *({"loss_type": kind, "use_bias_correction_kl": True, "beta": 0.3} for kind in LOSS_TYPES),
    {"loss_type": "grpo", "use_bias_correction_kl": True, "beta": 0.3, "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 2.0},
    {"loss_type": "grpo", "chunk_size": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_equal_to_ligers_chunked_loss(options: dict[str, Any]) -> None:
    if options["loss_type"] == "dr_grpo":
        options = options | {"max_completion_length": 9}
    if not options.get("beta", 0.04):
        options = options | {"use_ref_model": False}
    for seed in range(3):
        data = batch(seed, bias=seed == 1)
        if not options.get("beta", 0.04):
            data["ref_per_token_logps"] = None
        if seed == 2:
            data["old_per_token_logps"] = None
        assert_same(options, data)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_ready_made_ratios(kind: str) -> None:
    options = {"loss_type": kind, "max_completion_length": 9}
    ratio = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(1)) * 2
    ratio[0, 1] = ratio[1, 0] = 0.0  # masked out
    assert_same(options, {**batch(), "vllm_is_ratio": ratio})
    assert_same(options, {**batch(), "vllm_is_ratio": ratio[:, 1:2]})
    assert_same(options, {**batch(), "vllm_is_ratio": ratio, "old_per_token_logps": None})
    with pytest.raises(ValueError, match="surrogate_weights must be at least 0"):
        FusedLinearGRPOLoss(**options)(**batch(), vllm_is_ratio=-ratio)


@pytest.mark.parametrize("kind", ["dapo", "cispo", "grpo"])
@pytest.mark.parametrize("items", [40, torch.tensor(40)])
def test_tokens_of_the_whole_step(kind: str, items: Any) -> None:
    assert_same({"loss_type": kind}, {**batch(), "num_items_in_batch": items})


def test_reference_policy_from_hidden_states() -> None:
    data = {**batch(), "ref_per_token_logps": None}
    generator = torch.Generator().manual_seed(9)
    data["ref_input"] = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    data["ref_weight"] = torch.randn(VOCAB, WIDTH, generator=generator)
    data["ref_bias"] = torch.randn(VOCAB, generator=generator)
    assert_same({"loss_type": "grpo"}, data)


def test_frozen_weight_gets_no_gradient() -> None:
    data = batch()
    hidden = data.pop("_input").requires_grad_()
    loss, _ = FusedLinearGRPOLoss(loss_type="grpo")(hidden, **data)
    loss.backward()
    assert hidden.grad is not None and data["lin_weight"].grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "luspo"}, "loss_type = 'luspo'"),
        ({"loss_type": "vespo"}, "loss_type = 'vespo'"),
        ({"delta": 1.1}, "delta = 1.1"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta = 2.0"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "sapo_temperature_negative"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"use_ref_model": False}, "needs a reference policy"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**options)(**batch())


def test_refusals_of_a_call() -> None:
    with pytest.raises(ValueError, match="ref_per_token_logps, or ref_input"):
        FusedLinearGRPOLoss()(**{**batch(), "ref_per_token_logps": None})
    with pytest.raises(ValueError, match="use_ref_model=False"):
        FusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(**batch())
    with pytest.raises(TypeError, match="compiled"):
        FusedLinearGRPOLoss(compiled=True)  # type: ignore[call-arg]
    data = batch()
    with pytest.raises(ValueError, match="single tokens"):
        fused_grpo_loss(
            torch.randn(BATCH, LENGTH + 1, VOCAB), None, None, data["selected_token_ids"], data["advantages"],
            beta=0.0, reduce=False,
        )  # fmt: skip


TRITON = """
import torch
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
from medbridge_kernels.adapters.liger import fused_grpo_loss

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
B, L, V = 3, 4, 50
logits = torch.randn(B, L + 1, V, generator=generator)
ids = torch.randint(V, (B, L), generator=generator)
logprobs = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
near = [logprobs + 0.4 * torch.randn(B, L, generator=generator) for _ in range(2)]
advantages = torch.tensor([1.0, -0.8, 0.5])
mask = (torch.arange(L) < torch.tensor([L, 2, 3])[:, None]).int()
ratio = 2 * torch.rand(B, L, generator=generator)
compared = 0
for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"):
    for options in (
        {"beta": 0.0}, {"beta": 0.3, "vllm_is_ratio": ratio}, {"beta": 0.1, "delta": 1.5},
        {"importance_sampling_level": "sequence", "vllm_is_ratio": ratio[:, :1]},
        {"num_items_in_batch": 17, "vllm_is_ratio": ratio[:, 0]},
    ):
        if kind in ("cispo", "sapo") and ("delta" in options or "importance_sampling_level" in options):
            continue  # Liger hasn't these
        found = []
        for loss_of, more in ((triton_grpo_loss, {"inplace": False}), (fused_grpo_loss, {})):
            z = logits.clone().requires_grad_()
            loss, metrics = loss_of(z, *near, ids, advantages, mask, loss_type=kind, reduce=True, **options, **more)
            (2 * loss).backward()
            found.append((loss.detach(), list(metrics), z.grad))
        assert found[0][2].any() and not found[1][2][:, -1].any()
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
        compared += 1
assert compared == 26, compared
print("compared", compared)
"""


def test_equal_to_ligers_triton_loss() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compared 26"
