"""Sharpening: the gradient is the policy gradient with group advantages, nothing moves without a signal, it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medbridge.data import ImageCache, Item, Outcome, PromptSettings, permutation
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.rollout import Graded, Request, Rollout, SamplingSettings, TransformersEngine
from medbridge.train import RlSettings
from medbridge.train.optimization import Trainable
from medbridge.train.rewards import reward
from medbridge.train.rl import _groups, _Learner

PROMPT = PromptSettings(answer_style="text", system="")
LIMIT = 8


class Recorder:
    """Takes the place of the optimizer: keeps the gradient of each update and changes nothing."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, step: int) -> dict[str, float]:
        named = self.policy.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.policy.model.zero_grad(set_to_none=True)
        return {}


def sampled(
    policy: Policy, items: Sequence[Item], images: ImageCache, rewards: Sequence[float], completions: int
) -> tuple[list[Request], list[Graded]]:
    """Real completions of the policy with rewards as given."""
    requests = _groups(items, 1, completions, 0)
    engine = TransformersEngine(policy, PROMPT, images, batch_size=64)
    sampling = SamplingSettings(temperature=0.8, top_p=1.0, max_new_tokens=LIMIT)
    rollouts = [r for batch in engine.generate(requests, sampling, seed=0) for r in batch]
    outcome = Outcome("wrong", 0, "x", (0, 1), False)
    return requests, [Graded(r, outcome, value) for r, value in zip(rollouts, rewards, strict=True)]


def naive_gradient(
    policy: Policy, items: Sequence[Item], graded: Sequence[Graded], images: ImageCache, loss: str, completions: int,
    reference: Policy | None = None, kl: float = 0.0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """-sum_i A_i sum_t w_it log pi(t) by plain autograd, one sequence at a time, advantages by hand."""
    by_id = {item.id: item for item in items}
    counts = [len(entry.rollout.token_ids) for entry in graded]
    total = torch.zeros(())
    for start in range(0, len(graded), completions):
        group = graded[start : start + completions]
        rewards = np.array([entry.reward for entry in group], dtype=np.float64)
        advantages = rewards - rewards.mean()
        if loss != "dr_grpo":
            advantages = advantages / (rewards.std(ddof=1) + 1e-4)
        for entry, advantage in zip(group, advantages, strict=True):
            rollout = entry.rollout
            [prompt] = policy.encode(by_id[rollout.item_id], [rollout.permutation], PROMPT, images)
            vision = {name: tensor.clone() for name, tensor in prompt.vision.items()}
            ids = rollout.token_ids.tolist()

            def logprobs(of: Policy, prompt: Any = prompt, ids: list[int] = ids, vision: Any = vision) -> torch.Tensor:
                tokens = torch.cat([prompt.ids, torch.tensor(ids)])[None]
                types = {}
                if prompt.type_ids is not None:
                    longer = torch.cat([prompt.type_ids, torch.zeros(len(ids), dtype=torch.long)])
                    types = of.type_argument(longer[None])
                logits = of.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **types, **vision).logits[
                    0, len(prompt.ids) - 1 : -1
                ]
                logits = logits.index_fill(-1, torch.tensor(of.banned), -1e9) / 0.8
                return logits.log_softmax(-1)[torch.arange(len(ids)), ids]

            own = logprobs(policy)
            per_token = -advantage * own
            if reference is not None:
                with torch.no_grad():
                    far = logprobs(reference)
                per_token = per_token + kl * (torch.exp(far - own) - 1 + own - far)
            weight = {
                "grpo": 1 / (len(ids) * len(graded)), "bnpo": 1 / sum(counts), "dapo": 1 / sum(counts),
                "dr_grpo": 1 / (len(graded) * LIMIT),
            }[loss]  # fmt: skip
            total = total + weight * per_token.sum()
    total.backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * max(1.0, scale), rtol=1e-3, msg=name)


REWARDS = (1.0, 0.0, 0.1, 1.1, 0.0, 0.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1)
"""Three groups of four; the last one teaches nothing."""


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_an_on_policy_step_is_the_policy_gradient(
    architecture: str, loss: str, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(architecture, trainable=True)
    items = train_items[:3]
    requests, graded = sampled(policy, items, images, REWARDS, 4)
    assert len({len(entry.rollout.token_ids) for entry in graded}) >= 1
    expected = naive_gradient(policy, items, graded, images, loss, 4)
    for micro in (1, 5, 100):
        settings = RlSettings(loss=loss, temperature=0.8, completions=4, micro_batch_size=micro)
        recorder = Recorder(policy)
        metrics = _Learner(policy, settings, PROMPT, images, LIMIT).update(1, requests, graded, recorder)  # type: ignore[arg-type]
        [found] = recorder.gradients
        assert_close(found, expected)
        assert metrics["reward"] == pytest.approx(np.mean(REWARDS), abs=1e-6)
        assert metrics["signal"] == pytest.approx(2 / 3)
        assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)


def shorten(entry: Graded, count: int) -> Graded:
    rollout = entry.rollout
    cut = dataclasses.replace(rollout, token_ids=rollout.token_ids[:count], logprobs=rollout.logprobs[:count])
    return dataclasses.replace(entry, rollout=cut)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo"])
def test_completions_of_unequal_length_are_weighted_as_the_loss_says(
    loss: Any, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    items = train_items[:3]
    requests, graded = sampled(policy, items, images, REWARDS, 4)
    graded = [shorten(entry, 1 + index % LIMIT) for index, entry in enumerate(graded)]
    settings = RlSettings(loss=loss, temperature=0.8, completions=4, micro_batch_size=3)
    recorder = Recorder(policy)
    _Learner(policy, settings, PROMPT, images, LIMIT).update(1, requests, graded, recorder)  # type: ignore[arg-type]
    assert_close(recorder.gradients[0], naive_gradient(policy, items, graded, images, loss, 4))


def test_the_kl_term_pulls_towards_the_first_model(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy, reference = load_policy(trainable=True), load_policy()
    items = train_items[:3]
    settings = RlSettings(temperature=0.8, completions=4, micro_batch_size=5, kl_coefficient=0.5)
    learner = _Learner(policy, settings, PROMPT, images, LIMIT)  # keeps its copy of the model here
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    requests, graded = sampled(policy, items, images, REWARDS, 4)
    recorder = Recorder(policy)
    metrics = learner.update(1, requests, graded, recorder)  # type: ignore[arg-type]
    expected = naive_gradient(policy, items, graded, images, "grpo", 4, reference, 0.5)
    assert_close(recorder.gradients[0], expected)
    assert metrics["kl"] > 0
    without = naive_gradient(policy, items, graded, images, "grpo", 4)
    assert any(not torch.allclose(without[name], expected[name], atol=1e-5) for name in expected)


def test_no_kl_keeps_no_copy_and_reports_none(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    learner = _Learner(policy, RlSettings(completions=4), PROMPT, images, LIMIT)
    assert learner.reference is None
    requests, graded = sampled(policy, train_items[:3], images, REWARDS, 4)
    assert "kl" not in learner.update(1, requests, graded, Recorder(policy))  # type: ignore[arg-type]


def test_several_updates_share_out_the_batch_and_clip(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    requests, graded = sampled(policy, train_items[:3], images, REWARDS, 4)
    recorder = Recorder(policy)
    settings = RlSettings(
        temperature=0.8, completions=4, updates_per_batch=3, learning_rate=0.02, warmup_steps=0
    )  # fmt: skip
    _Learner(policy, settings, PROMPT, images, LIMIT).update(1, requests, graded, recorder)  # type: ignore[arg-type]
    assert 2 <= len(recorder.gradients) <= 3  # a share of rows without advantage makes no update
    trainable = Trainable(policy, ModelSettings(), settings, 1, seed=0)
    metrics = _Learner(policy, settings, PROMPT, images, LIMIT).update(1, requests, graded, trainable)
    assert metrics["ratio_max"] > 1.2  # the last update sees a policy that has moved
    assert metrics["clip_low"] + metrics["clip_high"] > 0


# -- steps ---------------------------------------------------------------------------------------------------------


def test_without_a_difference_in_reward_the_weights_stay(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}

    def sample(step: int, requests: Sequence[Request], sampling: SamplingSettings) -> list[Graded]:
        engine = TransformersEngine(policy, PROMPT, images, batch_size=64)
        rollouts = [r for batch in engine.generate(requests, sampling, seed=step) for r in batch]
        return [Graded(r, Outcome("correct", 0, "x", (0, 1), True), 1.1) for r in rollouts]

    log = rl(policy, train_items, sample=sample, steps=3, checkpoint_every=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert log.series("signal") == [0.0, 0.0, 0.0]
    assert log.series("accuracy") == [1.0, 1.0, 1.0]
    assert all("gradient_norm" not in metrics for metrics in log.metrics.values())


def test_groups_share_one_order_and_number_their_samples_on(train_items: list[Item]) -> None:
    first, second = train_items[:2]
    requests = _groups([first, second, first], 5, 4, 0)
    assert [r.samples for r in requests] == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7)]
    assert [set(r.permutations) for r in requests] == [{permutation(item, 0, 5)} for item in (first, second, first)]
    assert {_groups([first], step, 2, 0)[0].permutations[0] for step in range(30)} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    }  # fmt: skip


def test_sampling_for_training_has_no_nucleus_cut_and_its_own_temperature(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], train_items: list[Item]
) -> None:
    seen: list[SamplingSettings] = []

    def sample(step: int, requests: Sequence[Request], sampling: SamplingSettings) -> list[Graded]:
        seen.append(sampling)
        empty = np.array([2, 3], dtype=np.int32), np.array([-1.0, -1.0], dtype=np.float32)
        return [
            Graded(
                Rollout(r.item.id, n, r.permutations[0], "", *empty, "length", 9),
                Outcome("wrong", 0, "x", (0, 1), False),
                0.0,
            )
            for r in requests
            for n in r.samples
        ]

    rl(load_policy(trainable=True), train_items, sample=sample, steps=1, temperature=1.3)
    assert seen == [SamplingSettings(temperature=1.3, top_p=1.0, max_new_tokens=8)]


def test_the_reward_is_accuracy_plus_form() -> None:
    assert reward(Outcome("correct", 0, "x", (0, 1), True), 0.1) == 1.1
    assert reward(Outcome("correct", 0, "x", (0, 1), False), 0.1) == 1.0
    assert reward(Outcome("wrong", 0, "x", (0, 1), True), 0.1) == 0.1
    assert reward(Outcome("abstain", None, None, None, False), 0.1) == 0.0


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kill_at", "changes"),
    [
        (2, {}),
        (4, {}),
        (5, {"kl_coefficient": 0.1, "updates_per_batch": 2}),
        (5, {"model": ModelSettings(lora=LoraSettings(rank=4, dropout=0.1))}),
        (2, {"model": ModelSettings(lora=LoraSettings(rank=4))}),
    ],
    ids=["before a checkpoint", "behind a checkpoint", "kl, two updates", "adapters", "adapters, no checkpoint"],
)
def test_a_stage_cut_off_ends_with_the_same_bits(
    kill_at: int, changes: dict[str, Any], formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any],
    killed: type[Exception], train_items: list[Item], tmp_path: Path,
) -> None:  # fmt: skip
    """The killed process had stored the rollouts of its last step, and the resumed one trains on them."""
    lora = changes["model"].lora if "model" in changes else None
    straight: dict[int, list[Graded]] = {}
    whole = load_policy(path=formed, trainable=True, lora=lora)
    log = rl(whole, train_items, store=straight, checkpoints=tmp_path / "straight", checkpoint_every=3, **changes)

    stored: dict[int, list[Graded]] = {}
    options = {"store": stored, "checkpoints": tmp_path / "cut", "checkpoint_every": 3, **changes}
    with pytest.raises(killed):
        rl(load_policy(path=formed, trainable=True, lora=lora), train_items, kill_at=kill_at, **options)
    assert sorted(stored) == list(range(1, kill_at + 1))
    torch.rand(kill_at)
    resumed = load_policy(path=formed, trainable=True, lora=lora)
    again = rl(resumed, train_items, **options)
    assert again.start == 3 * ((kill_at - 1) // 3)
    assert again.items == {step: ids for step, ids in log.items.items() if step > again.start}
    for step, batch in straight.items():
        for one, two in zip(batch, stored[step], strict=True):
            assert one.rollout.text == two.rollout.text
            assert one.rollout.logprobs.tobytes() == two.rollout.logprobs.tobytes()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


# -- learning ------------------------------------------------------------------------------------------------------


def test_it_learns_which_answer_earns_the_reward(
    formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any], train_items: list[Item]
) -> None:
    """The model guesses left or right in the right form; right is only ever "left"."""
    items = [dataclasses.replace(item, answer="left") for item in train_items if item.answer in ("left", "right")]
    log = rl(
        load_policy(path=formed, trainable=True), items, steps=30, prompts_per_step=6, completions=8,
        micro_batch_size=64, learning_rate=1e-3,
    )  # fmt: skip
    accuracy, format_share = log.series("accuracy"), log.series("format")
    assert 0.2 < np.mean(accuracy[:3]) < 0.8
    assert np.mean(accuracy[-3:]) > 0.85
    assert np.mean(format_share[-3:]) > 0.85
    assert np.mean(log.series("reward")[-3:]) > np.mean(log.series("reward")[:3])
