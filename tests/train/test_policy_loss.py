"""The loss that is cut off from the model gives the model the gradient of the whole graph, and tells what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.model import Policy
from medbridge.train.policy_loss import PolicyLoss, _Clock
from medbridge_kernels import LossConfig, grpo_loss

PROMPT = PromptSettings(answer_style="text", system="")
ARCHITECTURES = ["qwen2_5_vl", "gemma3"]


def micro_batch(policy: Policy, items: list[Item], images: ImageCache) -> tuple[Any, dict[str, Tensor]]:
    """Rows of three items with made-up completions, and what the loss wants to know of them."""
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(5, 200, (length,), generator=generator).tolist() for length in (4, 1, 6)]
    prompts = [policy.encode(item, [permutation(item, 0, 0)], PROMPT, images)[0] for item in items[:3]]
    batch = policy.collate(prompts, completions)
    tokens = len(batch.labels)
    inputs = {
        "sequence_ids": batch.sequence_ids,
        "advantages": torch.tensor([1.0, -0.5, 0.7]),
        "old_logprobs": -5 + 0.1 * torch.randn(tokens, generator=generator),
        "ref_logprobs": -5 + 0.1 * torch.randn(tokens, generator=generator),
    }
    return batch, inputs


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-9, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("preset", ["grpo", "gspo", "cispo"])
def test_the_gradient_is_that_of_the_whole_graph(
    architecture: str,
    softcap: float | None,
    preset: str,
    load_policy: Callable[..., Policy],
    train_items: list[Item],
    images: ImageCache,
) -> None:
    policy = load_policy(architecture, trainable=True)
    policy._softcap = softcap
    config = LossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01)
    batch, inputs = micro_batch(policy, train_items, images)
    whole, _ = grpo_loss(
        policy.completion_logits(batch), batch.labels, **inputs, temperature=0.8, config=config, impl="reference"
    )
    whole.backward()
    expected = gradients(policy)
    loss, outputs = PolicyLoss(policy, config, "auto", 0.8).backward(
        policy.completion_hidden(batch), batch.labels, **inputs
    )
    torch.testing.assert_close(loss, whole.detach(), atol=1e-6, rtol=1e-5)
    assert not loss.requires_grad
    assert "kl" in outputs.metrics
    assert_equal(gradients(policy), expected)


class Adapted(torch.nn.Module):
    """An output layer that is more than its weight, as one with adapters is."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = torch.nn.Parameter(torch.full((base.weight.shape[0],), 0.1))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) * (1 + self.more)


def test_an_output_layer_that_is_not_linear_makes_its_own_logits(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    policy.model.set_output_embeddings(Adapted(policy.model.get_output_embeddings()))
    assert policy.output_layer() is None
    batch, inputs = micro_batch(policy, train_items, images)
    config = LossConfig()
    whole, _ = grpo_loss(policy.completion_logits(batch), batch.labels, **inputs, config=config, impl="reference")
    whole.backward()
    expected = gradients(policy)
    assert any(name.endswith("more") for name in expected)
    by_hidden = PolicyLoss(policy, config, "auto", 1.0)
    by_hidden.comparing = True
    by_hidden.backward(policy.completion_hidden(batch), batch.labels, **inputs)
    assert_equal(gradients(policy), expected)
    assert by_hidden.take_seconds().keys() == {"seconds_loss"}
    with torch.no_grad():
        hidden = policy.completion_hidden(batch)
        logprobs = by_hidden.logprobs(hidden, batch.labels)
        picked = policy.head(hidden).log_softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, picked, atol=1e-5, rtol=1e-5)


def test_it_tells_what_plain_torch_would_cost_once_and_trains_nothing_by_it(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    batch, inputs = micro_batch(policy, train_items, images)
    loss = PolicyLoss(policy, LossConfig(), "auto", 1.0)
    loss.comparing = True
    loss.backward(policy.completion_hidden(batch), batch.labels, **inputs)
    first, first_gradient = loss.take_seconds(), gradients(policy)
    loss.backward(policy.completion_hidden(batch), batch.labels, **inputs)
    second, second_gradient = loss.take_seconds(), gradients(policy)
    assert first.keys() == {"seconds_loss", "seconds_loss_plain", "seconds_comparing"}
    assert second.keys() == {"seconds_loss"}
    assert all(value > 0 for value in [first["seconds_loss"], first["seconds_comparing"], second["seconds_loss"]])
    for name, value in first_gradient.items():
        assert torch.equal(value, second_gradient[name]), name
    assert loss.take_seconds() == {"seconds_loss": 0.0}


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_metrics_do_not_depend_on_the_micro_batches(
    sizes: tuple[int, ...], load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    loss = PolicyLoss(policy, LossConfig(correction="mask", correction_cap=1.1), "auto", 1.0)
    assert loss.take_metrics() == {}
    lengths, generator = (4, 1, 6), torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 200, (length,), generator=generator).tolist() for length in lengths]
    prompts = [policy.encode(item, [permutation(item, 0, 0)], PROMPT, images)[0] for item in train_items[:3]]
    engine = [-5.5 + torch.randn(length, generator=generator) for length in lengths]
    old = [-5.5 + 0.1 * torch.randn(length, generator=generator) for length in lengths]
    at = 0
    now = []
    for size in sizes:
        part = slice(at, at + size)
        batch = policy.collate(prompts[part], rows[part])
        _, outputs = loss.backward(
            policy.completion_hidden(batch), batch.labels, sequence_ids=batch.sequence_ids,
            advantages=torch.tensor([1.0, -0.5, 0.7])[part], old_logprobs=torch.cat(old[part]),
            rollout_logprobs=torch.cat(engine[part]), normalizer=3.0,
        )  # fmt: skip
        now.append(outputs.logprobs)
        at += size
    found = loss.take_metrics()
    for prefix, over, under in (("", now, old), ("rollout_", old, engine)):
        ratio = (torch.cat(over) - torch.cat(under)).double().exp()
        assert found[f"{prefix}ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert found[f"{prefix}ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-5)
        share = float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()))
        assert share < 0.999
        assert found[f"{prefix}effective_sample_size"] == pytest.approx(share, rel=1e-5)
    assert found["rollout_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-5)
    assert found["corrected"] == pytest.approx(float((ratio > 1.1).double().mean()))
    assert 0 < found["entropy"] < 6.1
    assert loss.take_metrics() == {}


def test_banned_tokens_have_no_probability(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy()
    layer = policy.output_layer()
    assert layer is not None and layer.banned_ids is not None and layer.banned_ids.tolist() == policy.banned
    batch, _ = micro_batch(policy, train_items, images)
    with torch.no_grad():
        logprobs = PolicyLoss(policy, LossConfig(), "auto", 1.0).logprobs(
            policy.completion_hidden(batch), torch.full_like(batch.labels, policy.banned[0])
        )
    assert (logprobs < -1e8).all()


def test_the_clock_adds_up_and_starts_anew() -> None:
    clock = _Clock(torch.device("cpu"))
    with clock.running():
        torch.ones(100).sum()
    with clock.running():
        torch.ones(100).sum()
    assert clock.take() > 0
    assert clock.take() == 0
