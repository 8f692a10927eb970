"""Verifying an engine: rounding passes, stale weights and other prompts do not, and the message has both numbers."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.rollout import Request, Rollout, SamplingSettings, TransformersEngine
from medbridge.rollout.verify import PROBE_ITEMS, Mismatch, bound, check_versions, verify

PROMPT = PromptSettings(answer_style="text", system="")


class Changed:
    """A transformers engine whose rollouts are of version 1 and pass through `change`."""

    name = "changed"

    def __init__(self, policy: Policy, images: ImageCache, change: Callable[[Rollout], Rollout] = lambda r: r) -> None:
        self.inner = TransformersEngine(policy, PROMPT, images, batch_size=64)
        self.change = change
        self.requests: list[Request] = []

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        self.requests = list(requests)
        for batch in self.inner.generate(requests, sampling, seed=seed):
            yield [self.change(replace(rollout, weights=1)) for rollout in batch]


@pytest.fixture
def check(train_items: list[Item], images: ImageCache) -> Callable[..., Mismatch]:
    """Verify an engine as version 1 against a policy."""

    def run(engine: Any, policy: Policy, items: Sequence[Item] = train_items, **options: Any) -> Mismatch:
        options = {"dtype": torch.float32, "version": 1, "seed": 0} | options
        return verify(engine, policy, items, PROMPT, images, **options)

    return run


def train(policy: Policy, items: Sequence[Item], images: ImageCache, steps: int, rate: float) -> None:
    """A few real AdamW steps on completions of noise: they move every weight."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        item = items[step % len(items)]
        order = tuple(range(len(item.options or ())))
        prompt = policy.encode(item, [order], PROMPT, images)[0]
        ids = torch.randint(10, 300, (12,), generator=generator).tolist()
        batch = policy.collate([prompt], [ids])
        loss = torch.nn.functional.cross_entropy(policy.completion_logits(batch), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_an_engine_with_the_trainers_weights_passes(
    architecture: str, load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy(architecture, trainable=True)
    policy.model.train()
    engine = Changed(policy, images)
    found = check(engine, policy)
    assert found.bound == 1e-3 and found.worst < 1e-4 and found.mean <= found.worst
    assert found.tokens > 100
    assert policy.model.training
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_the_probe_looks_at_images_first(
    load_policy: Callable[..., Policy],
    train_items: list[Item],
    images: ImageCache,
    check: Callable[..., Mismatch],
) -> None:
    policy = load_policy()
    blind = [dataclasses.replace(item, id=f"{item.id}/blind", images=()) for item in train_items]
    engine = Changed(policy, images)
    check(engine, policy, [*blind, train_items[0]])
    assert [bool(request.item.images) for request in engine.requests] == [True, False, False, False]
    assert len(engine.requests) == PROBE_ITEMS
    check(engine, policy, blind[:1])
    assert len(engine.requests) == 1
    check(engine, policy, [train_items[0], train_items[0]])  # one item twice is one item


def test_stale_weights_are_caught_with_both_numbers(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy(trainable=True)
    stale = load_policy()
    train(policy, train_items, images, 3, 2e-3)
    with pytest.raises(MedbridgeError) as caught:
        check(Changed(stale, images), policy)
    message = str(caught.value)
    numbers = re.search(r"Item '(.+?)'.* lie (\S+) nats .* and (\S+) at worst, over (\d+) tokens", message)
    assert numbers is not None
    assert numbers[1] in {item.id for item in train_items}
    assert 1e-2 < float(numbers[2]) < float(numbers[3]) < 20 and int(numbers[4]) > 30
    assert "float32 explains 0.001 in the mean and 0.01 at worst" in message
    assert "version 1" in message and "Whole probe: mean" in message


def test_one_wrong_item_among_right_ones_is_named(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy()
    bad = train_items[2].id

    def shift(rollout: Rollout) -> Rollout:
        return replace(rollout, logprobs=rollout.logprobs - 0.0011 * (rollout.item_id == bad))

    with pytest.raises(MedbridgeError, match=re.escape(f"Item {bad!r}")):
        check(Changed(policy, images, shift), policy)


def test_a_single_token_far_off_is_caught(
    load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    """Though the mean over its item stays within the bound."""
    policy = load_policy()

    def spike(rollout: Rollout) -> Rollout:
        changed = rollout.logprobs.copy()
        changed[0] += 0.011
        return replace(rollout, logprobs=changed)

    with pytest.raises(MedbridgeError, match=r"and 0\.011 at worst"):
        check(Changed(policy, images, spike), policy)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_undefined_logprobs_are_beyond_any_bound(
    value: float, load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy()
    engine = Changed(policy, images, lambda r: replace(r, logprobs=np.full_like(r.logprobs, value)))
    with pytest.raises(MedbridgeError, match="does not sample from the trainer's weights"):
        check(engine, policy)


def test_another_version_is_caught_however_small_the_step(
    load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy()
    with pytest.raises(MedbridgeError, match="drawn by weights of version 1, and version 2 was asked for"):
        check(Changed(policy, images), policy, version=2)


def test_versions_of_any_rollouts_can_be_checked() -> None:
    rollout = Rollout("a", 0, (), "", np.array([1]), np.array([-1.0]), "stop", 3, weights=4)
    check_versions([rollout, rollout], 4)
    check_versions([], 4)
    with pytest.raises(MedbridgeError, match=r"item 'b'.*version 3.*version 4"):
        check_versions([rollout, replace(rollout, item_id="b", weights=3)], 4)


@pytest.mark.parametrize(
    "change", [{"prompt_tokens": 7}, {"images": 0}, {"images": 2}], ids=["length", "no image", "images"]
)
def test_other_prompts_are_caught(
    change: dict[str, Any], load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy()
    with pytest.raises(MedbridgeError, match=r"the engine's prompt has \d+ tokens and \d images, the trainer's"):
        check(Changed(policy, images, lambda r: replace(r, **change)), policy)
    unknown = Changed(policy, images, lambda r: replace(r, images=None))  # an engine that can't tell
    check(unknown, policy)


def test_a_probe_that_is_not_answered_once_is_caught(
    load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    policy = load_policy()

    class Losing(Changed):
        def generate(self, requests: Sequence[Request], *args: Any, **options: Any) -> Iterator[list[Rollout]]:
            yield from super().generate(requests[1:], *args, **options)

    class Doubling(Changed):
        def generate(self, requests: Sequence[Request], *args: Any, **options: Any) -> Iterator[list[Rollout]]:
            yield from super().generate([*requests, requests[0]], *args, **options)

    for engine in (Losing(policy, images), Doubling(policy, images)):
        with pytest.raises(MedbridgeError, match="did not answer each request of its probe once"):
            check(engine, policy)


def test_adapters_are_compared_as_they_are_sampled(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    """With dropout, which the trainer's side must leave out."""
    from medbridge.model import LoraSettings, ModelSettings
    from medbridge.train import OptimizerSettings
    from medbridge.train.optimization import Trainable

    lora = LoraSettings(rank=2, dropout=0.5)
    policy = load_policy(trainable=True, lora=lora)
    Trainable(policy, ModelSettings(lora=lora), OptimizerSettings(), 1, seed=0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert policy.model.training
    assert check(Changed(policy, images), policy).worst < 1e-4
    with pytest.raises(MedbridgeError, match="adapters"):
        check(Changed(load_policy(), images), policy)


# -- the bound -----------------------------------------------------------------------------------------------------


def test_the_bound_follows_from_type_depth_and_scale(load_policy: Callable[..., Policy]) -> None:
    single, half = load_policy(), load_policy(dtype="bfloat16")
    assert bound(torch.float32, single, 1.0) == bound(torch.float32, single, 20.0) == 1e-3
    assert bound(torch.bfloat16, half, 1.0) == pytest.approx(6 * 2**-8 * 6**0.5)  # two layers
    assert bound(torch.bfloat16, half, 3.0) == pytest.approx(3 * bound(torch.bfloat16, half, 1.0))
    assert bound(torch.float32, half, 1.0) == bound(torch.bfloat16, single, 1.0) == bound(torch.bfloat16, half, 1.0)
    deep = copy.copy(half)
    deep.model = copy.deepcopy(half.model)
    deep.model.config.text_config.num_hidden_layers = 32
    assert bound(torch.bfloat16, deep, 1.0) == pytest.approx(6**0.5 * bound(torch.bfloat16, half, 1.0))


@pytest.mark.parametrize("raised", [1.0, 8.0])
def test_rounding_in_half_precision_lies_well_within_the_bound(
    raised: float, load_policy: Callable[..., Policy], images: ImageCache, check: Callable[..., Mismatch]
) -> None:
    """The engine decodes with a cache and its own masks, so it rounds elsewhere; logits of two scales."""
    policy = load_policy(dtype="bfloat16")
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(raised)
    found = check(Changed(policy, images), policy, dtype=torch.bfloat16)
    assert 0 < 3 * found.mean < found.bound and found.worst < 10 * found.bound / 3
