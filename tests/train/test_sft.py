"""Bridging: the loss is the cross-entropy of the completion tokens, whatever the micro-batches; replay; learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medbridge.data import ImageCache, Item, PromptSettings, grade, permutation
from medbridge.model import LoraSettings, Policy
from medbridge.rollout import GREEDY, Request, SamplingSettings, TransformersEngine
from medbridge.train import SftSettings
from medbridge.train.parameters import add_adapters
from medbridge.train.sft import SupervisedTerm, Supervision, seeded

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
PROMPT = PromptSettings(answer_style="text", system="")


def plain_loss(policy: Policy, examples: list[Any], images: ImageCache) -> torch.Tensor:
    """Mean cross-entropy over completion tokens, one example at a time through the whole model with all its logits."""
    terms = []
    for entry in examples:
        [prompt] = policy.encode(entry.item, [entry.order], PROMPT, images)
        completion = policy.completion_ids(entry.completion)
        ids = torch.cat([prompt.ids, torch.tensor(completion)])[None]
        types = {}
        if prompt.type_ids is not None:
            types = policy.type_argument(
                torch.cat([prompt.type_ids, torch.zeros(len(completion), dtype=torch.long)])[None]
            )
        logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **prompt.vision).logits[0]
        logits[:, policy.banned] = -1e9
        for offset, token in enumerate(completion):
            terms.append(-logits[len(prompt.ids) + offset - 1].log_softmax(-1)[token])
    return torch.stack(terms).mean()


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def accumulate(policy: Policy, batch: Any, settings: SftSettings, images: ImageCache) -> tuple[float, int]:
    """The gradient of the mean loss of a batch."""
    return SupervisedTerm(policy, Supervision(batch, None, settings), PROMPT, images, seed=0).backward(batch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_the_completion_tokens_alone(
    architecture: str, load_policy: Callable[..., Policy], answers: Any, train_items: list[Item], images: ImageCache
) -> None:
    """Against the plain model in float64: at most twice the error that it makes in float32."""
    policy, loaded = load_policy(architecture, trainable=True), load_policy(architecture)
    double = Policy(loaded.model.double(), loaded.processor, path=loaded.path, compute_dtype=torch.float64)
    source = answers(train_items)
    batch = [source.example(index, 0) for index in range(5)]
    plain = {}
    for name, model in (("float64", double), ("float32", policy)):
        expected = plain_loss(model, batch, images)
        expected.backward()
        plain[name] = gradients(model)
        model.model.zero_grad(set_to_none=True)
    loss, tokens = accumulate(policy, batch, SftSettings(), images)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert tokens == sum(len(policy.completion_ids(entry.completion)) for entry in batch)
    found, exact = gradients(policy), plain["float64"]
    assert found.keys() == exact.keys()

    def error(of: dict[str, torch.Tensor]) -> float:
        return max(float((of[name] - value).norm()) for name, value in exact.items())

    assert 0 < error(found) <= 2 * error(plain["float32"])
    assert error(plain["float32"]) < 1e-5 * max(float(value.norm()) for value in exact.values())


def test_the_micro_batch_size_does_not_change_the_gradient(
    load_policy: Callable[..., Policy], answers: Any, train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    source = answers(train_items)
    batch = [source.example(index, 0) for index in range(7)]
    found = {}
    for micro in (1, 3, 7, 50, "50 tokens", "150 tokens"):
        limit = {"micro_batch_tokens": int(micro.split()[0])} if isinstance(micro, str) else {"micro_batch_size": micro}
        loss, _ = accumulate(policy, batch, SftSettings(**limit), images)
        found[micro] = (loss, gradients(policy))
        policy.model.zero_grad(set_to_none=True)
    for micro in found:
        assert found[micro][0] == pytest.approx(found[7][0], abs=1e-5)
        for name, gradient in found[micro][1].items():
            torch.testing.assert_close(gradient, found[7][1][name], atol=1e-5, rtol=1e-3, msg=f"{micro} {name}")


def test_the_reported_loss_is_the_one_before_the_update_and_falls(
    load_policy: Callable[..., Policy],
    sft: Callable[..., Any],
    answers: Any,
    train_items: list[Item],
    images: ImageCache,
) -> None:
    policy, untouched = load_policy(trainable=True), load_policy(trainable=True)
    source = answers(train_items[:4])
    log = sft(policy, source, steps=30, batch_size=4, micro_batch_size=2)
    with torch.no_grad():
        before = float(plain_loss(untouched, [source.example(index, 0) for index in range(4)], images))
    losses = log.series("loss")
    assert losses[0] == pytest.approx(before, abs=1e-4)
    assert losses[-1] < 0.3 * losses[0]
    assert sorted(log.metrics) == list(range(1, 31))
    assert all(set(log.items[step]) == {item.id for item in train_items[:4]} for step in log.items)
    assert log.series("tokens_per_second")[-1] > 0
    assert not policy.model.training


def test_what_was_trained_is_answered(
    load_policy: Callable[..., Policy],
    sft: Callable[..., Any],
    answers: Any,
    train_items: list[Item],
    images: ImageCache,
) -> None:
    """Loss on the right tokens, positions and images: the training answers are given back by the engine."""
    policy = load_policy(trainable=True)
    sft(policy, answers(train_items), steps=160, batch_size=12, micro_batch_size=12, learning_rate=3e-3)
    requests = [Request(item, (GREEDY,), (permutation(item, 0, 3),)) for item in train_items]
    engine = TransformersEngine(policy, PROMPT, images, batch_size=64)
    [batch] = engine.generate(requests, SamplingSettings(max_new_tokens=8), seed=0)
    outcomes = [grade(item, r.permutation, r.text, PROMPT) for item, r in zip(train_items, batch, strict=True)]
    assert all(outcome.well_formed for outcome in outcomes)
    assert sum(outcome.status == "correct" for outcome in outcomes) >= 8  # guessing: 5 of 12


def test_replay_takes_its_share_of_every_batch(
    load_policy: Callable[..., Policy], sft: Callable[..., Any], answers: Any, train_items: list[Item]
) -> None:
    weak, others = train_items[:3], train_items[3:]
    log = sft(
        load_policy(trainable=True), answers(weak), replay=answers(others), batch_size=8, replay_share=0.25, steps=4
    )
    names = {item.id for item in weak}
    for ids in log.items.values():
        assert len(ids) == 8
        assert sum(name not in names for name in ids) == 2
    assert len({name for ids in log.items.values() for name in ids if name not in names}) == 8
    alone = sft(load_policy(trainable=True), answers(weak), replay_share=0.25, steps=1, batch_size=8)
    assert set(alone.items[1]) == names  # nothing to replay: the whole batch is the stratum's


def test_a_gradient_that_is_not_finite_ends_the_stage(
    load_policy: Callable[..., Policy], sft: Callable[..., Any], answers: Any, train_items: list[Item], tmp_path: Path
) -> None:
    from medbridge.errors import MedbridgeError

    policy = load_policy(trainable=True)
    with torch.no_grad():
        policy.model.lm_head.weight[3] = float("nan")
    before = policy.model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    with (
        pytest.raises(
            MedbridgeError, match="step 2: the gradient norm is nan at a loss of nan, and 2 updates in a row"
        ),
        pytest.warns(UserWarning, match="step 1: the gradient norm is nan at a loss of nan; the update is skipped"),
    ):
        sft(policy, answers(train_items), max_skipped_steps=2)
    assert torch.equal(policy.model.model.language_model.layers[0].mlp.up_proj.weight, before)
    assert not (tmp_path / "checkpoints").exists()


def test_the_loss_needs_no_plain_output_layer(
    load_policy: Callable[..., Policy], answers: Any, train_items: list[Item], images: ImageCache
) -> None:
    """Adapters on the output layer: only the model can make its logits then."""
    policy, adapted = load_policy(trainable=True), load_policy(trainable=True)
    add_adapters(adapted, LoraSettings(rank=2, targets=["lm_head"]), seed=0)
    assert adapted.output_layer() is None
    batch = [answers(train_items).example(index, 0) for index in range(4)]
    losses = [accumulate(one, batch, SftSettings(), images)[0] for one in (policy, adapted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert any(bool(p.grad.any()) for name, p in adapted.model.named_parameters() if "lora_B" in name)


def test_seeded_generators_depend_on_all_their_parts() -> None:
    def draw(*parts: object) -> float:
        return float(torch.rand(1, generator=seeded(*parts)))

    assert draw(1, "a", 2) == draw(1, "a", 2)
    assert len({draw(1, "a", 2), draw(2, "a", 2), draw(1, "b", 2), draw(1, "a", 3)}) == 4
