"""Sharpening: the gradient is the policy gradient with group advantages, nothing moves without a signal, it learns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medbridge.data import ImageCache, Item, Outcome, PromptSettings, permutation
from medbridge.errors import MedbridgeError
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.rollout import Graded, Request, SamplingSettings, TransformersEngine
from medbridge.train import RlSettings, SftSettings, Supervision
from medbridge.train.groups import Batch, Group, GroupSampler
from medbridge.train.learner import Learner, _deal
from medbridge.train.optimization import Trainable
from medbridge.train.rewards import reward
from medbridge.train.sft import SupervisedTerm

PROMPT = PromptSettings(answer_style="text", system="")
LIMIT = 8


class Recorder:
    """Takes the place of the optimizer: keeps the gradient of each update and changes nothing."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, step: int, loss: float) -> dict[str, float]:
        named = self.policy.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.policy.model.zero_grad(set_to_none=True)
        return {}


def sampled(
    policy: Policy, items: Sequence[Item], images: ImageCache, rewards: Sequence[float], completions: int
) -> Batch:
    """Real completions of the policy, a group an item, with rewards as given."""
    requests = [Request(item, tuple(range(completions)), (permutation(item, 0, 1),) * completions) for item in items]
    engine = TransformersEngine(policy, PROMPT, images, batch_size=64)
    sampling = SamplingSettings(temperature=0.8, top_p=1.0, max_new_tokens=LIMIT)
    rollouts = (r for batch in engine.generate(requests, sampling, seed=0) for r in batch)
    outcome = Outcome("wrong", 0, "x", (0, 1), False)
    graded = [Graded(r, outcome, value) for r, value in zip(rollouts, rewards, strict=True)]
    return grouped(requests, graded)


def grouped(requests: Sequence[Request], graded: Sequence[Graded]) -> Batch:
    entries = iter(graded)
    groups = [Group(request, tuple(next(entries) for _ in request.samples)) for request in requests]
    return Batch(groups, [], len(groups), 0, 0.0)


def changed(batch: Batch, change: Callable[[int, Graded], Graded]) -> Batch:
    """The batch with each completion changed, by its number."""
    return grouped([group.request for group in batch.groups], [change(n, e) for n, e in enumerate(batch.sampled)])


def gradient(
    policy: Policy, batch: Batch, images: ImageCache, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of the one update of a batch, and the step's metrics."""
    recorder = Recorder(policy)
    chosen = RlSettings(**{"temperature": 0.8, "completions": 4, "micro_batch_size": 5, **settings})
    metrics = Learner(policy, chosen, PROMPT, images, LIMIT).update(1, batch, recorder)  # type: ignore[arg-type]
    [found] = recorder.gradients
    return found, metrics


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
    batch = sampled(policy, items, images, REWARDS, 4)
    expected = naive_gradient(policy, items, batch.sampled, images, loss, 4)
    for micro in (1, 5, 100):
        found, metrics = gradient(policy, batch, images, loss=loss, micro_batch_size=micro)
        assert_close(found, expected)
        assert metrics["reward"] == pytest.approx(np.mean(REWARDS), abs=1e-6)
        assert metrics["signal"] == pytest.approx(2 / 3)
        assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)


def shorten(entry: Graded, count: int) -> Graded:
    rollout = entry.rollout
    cut = dataclasses.replace(rollout, token_ids=rollout.token_ids[:count], logprobs=rollout.logprobs[:count])
    return dataclasses.replace(entry, rollout=cut)


def rows_of(learner: Learner, batch: Batch) -> list[Any]:
    return learner._rows(batch, learner._encode(batch), [group.rewards for group in batch.groups], 1)


def padded_gradient(policy: Policy, batch: Batch, images: ImageCache) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss of the one update of a batch from padded rows that each repeat their prompt."""
    learner = Learner(policy, RlSettings(temperature=0.8, completions=4), PROMPT, images, LIMIT)
    rows = rows_of(learner, batch)
    moved = [row for row in rows if row.moves]
    collated = policy.collate([row.prompt for row in moved], [row.rollout.token_ids.tolist() for row in moved])
    loss, _ = learner.loss.backward(
        policy.completion_hidden(collated), collated.labels, sequence_ids=collated.sequence_ids,
        advantages=torch.tensor([row.advantage for row in moved]),
        rollout_logprobs=torch.from_numpy(np.concatenate([row.rollout.logprobs for row in moved])),
        normalizer=float(len(rows)),
    )  # fmt: skip
    recorder = Recorder(policy)
    recorder.step(1, float(loss))
    return recorder.gradients[0], float(loss)


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_packed_rows_are_as_exact_as_padded_ones(
    architecture: str, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    """Against padded rows in float64: at most twice the error that padded rows make in float32."""
    policy, loaded = load_policy(architecture, trainable=True), load_policy(architecture)
    double = Policy(loaded.model.double(), loaded.processor, path=loaded.path, compute_dtype=torch.float64)
    batch = changed(
        sampled(policy, train_items[:3], images, REWARDS, 4), lambda number, entry: shorten(entry, 1 + number % LIMIT)
    )
    exact, loss = padded_gradient(double, batch, images)
    padded, _ = padded_gradient(policy, batch, images)
    whole = sum(float(value.norm()) ** 2 for value in exact.values()) ** 0.5

    def errors(found: dict[str, torch.Tensor]) -> dict[str, float]:
        assert found.keys() == exact.keys()
        return {name: float((found[name] - value).norm()) / whole for name, value in exact.items()}

    worst = max(errors(padded).values())
    for tokens in (1, 100, 10_000):
        packed, metrics = gradient(policy, batch, images, micro_batch_tokens=tokens, micro_batch_size=None)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
        assert 0 < max(errors(packed).values()) <= 2 * worst
    assert worst < 1e-5


def test_a_group_has_its_prompt_in_each_micro_batch_once(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    items = train_items[:3]
    batch = sampled(policy, items, images, REWARDS, 4)
    lengths: list[int] = []
    embedding = policy.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    prompts = [len(policy.encode(i, [permutation(i, 0, 1)], PROMPT, images)[0].ids) for i in items[:2]]  # two move
    completions = sum(len(entry.rollout.token_ids) for entry in batch.sampled[:8])
    gradient(policy, batch, images, micro_batch_size=None)
    assert lengths == [sum(prompts) + completions]
    lengths.clear()
    gradient(policy, batch, images, micro_batch_size=1)
    assert len(lengths) == 8 and sum(lengths) == 4 * sum(prompts) + completions


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo"])
def test_completions_of_unequal_length_are_weighted_as_the_loss_says(
    loss: Any, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    items = train_items[:3]
    batch = changed(
        sampled(policy, items, images, REWARDS, 4), lambda number, entry: shorten(entry, 1 + number % LIMIT)
    )
    found, _ = gradient(policy, batch, images, loss=loss, micro_batch_size=3)
    assert_close(found, naive_gradient(policy, items, batch.sampled, images, loss, 4))


def test_the_kl_term_pulls_towards_the_first_model(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy, reference = load_policy(trainable=True), load_policy()
    items = train_items[:3]
    settings = RlSettings(temperature=0.8, completions=4, micro_batch_size=5, kl_coefficient=0.5)
    learner = Learner(policy, settings, PROMPT, images, LIMIT)  # keeps its copy of the model here
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    batch = sampled(policy, items, images, REWARDS, 4)
    recorder = Recorder(policy)
    metrics = learner.update(1, batch, recorder)  # type: ignore[arg-type]
    expected = naive_gradient(policy, items, batch.sampled, images, "grpo", 4, reference, 0.5)
    assert_close(recorder.gradients[0], expected)
    assert metrics["kl"] > 0
    without = naive_gradient(policy, items, batch.sampled, images, "grpo", 4)
    assert any(not torch.allclose(without[name], expected[name], atol=1e-5) for name in expected)


def test_no_kl_keeps_no_copy_and_reports_none(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    learner = Learner(policy, RlSettings(completions=4), PROMPT, images, LIMIT)
    assert learner.first is None
    batch = sampled(policy, train_items[:3], images, REWARDS, 4)
    assert "kl" not in learner.update(1, batch, Recorder(policy))  # type: ignore[arg-type]


def test_several_updates_share_out_the_batch_and_clip(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    batch = sampled(policy, train_items[:3], images, REWARDS, 4)
    recorder = Recorder(policy)
    settings = RlSettings(
        temperature=0.8, completions=4, updates_per_batch=3, learning_rate=0.02, warmup_steps=0
    )  # fmt: skip
    Learner(policy, settings, PROMPT, images, LIMIT).update(1, batch, recorder)  # type: ignore[arg-type]
    assert 2 <= len(recorder.gradients) <= 3  # a share of rows without advantage makes no update
    trainable = Trainable(policy, ModelSettings(), settings, 1, seed=0)
    metrics = Learner(policy, settings, PROMPT, images, LIMIT).update(1, batch, trainable)
    assert metrics["ratio_max"] > 1.2  # the last update sees a policy that has moved
    assert metrics["clip_low"] + metrics["clip_high"] > 0
    # and still the engine is compared with the policy that the step began with
    assert metrics["rollout_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["rollout_kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("groups", "updates"), [(6, 2), (5, 3), (3, 3), (2, 5), (1, 2), (4, 1), (0, 2)])
def test_updates_take_whole_groups(
    groups: int, updates: int, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    """So that a prompt is encoded in one update only; with fewer groups than updates rows are shared out."""
    policy = load_policy(trainable=True)
    learner = Learner(policy, RlSettings(completions=4), PROMPT, images, LIMIT)
    rows = rows_of(learner, sampled(policy, train_items[:groups], images, REWARDS[:4] * groups, 4))
    parts = _deal(rows, updates, 1)
    assert len(parts) == updates
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    prompts = [{id(row.prompt) for row in part} for part in parts]
    if groups >= updates:
        assert sum(map(len, prompts)) == groups
        assert max(map(len, prompts)) - min(map(len, prompts)) <= 1
    else:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if groups:
        assert [[id(row) for row in part] for part in _deal(rows, updates, 2)] != [list(map(id, p)) for p in parts]


# -- the best of k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "loss"), [("pkpo", "dr_grpo"), ("pass_at_k", "grpo")])
def test_the_best_of_k_takes_the_place_of_the_groups_advantage(
    advantage: Any, loss: Any, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    """Group 1 has two right answers of four and group 2 one: three of the first are never all wrong."""
    policy = load_policy(trainable=True)
    batch = sampled(policy, train_items[:2], images, (1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0), 4)
    settings = {"advantage": advantage, "loss": loss, "pass_k": 3, "completions": 4, "temperature": 0.8, "steps": 4}
    recorder = Recorder(policy)
    learner = Learner(policy, RlSettings(**settings), PROMPT, images, LIMIT, first_k=3)
    metrics = [learner.update(step, batch, recorder) for step in (1, 2, 3)]  # type: ignore[arg-type]
    assert [each["pass_k"] for each in metrics] == [3.0, 2.0, 1.0]
    # pkpo compares with the best of two others, which may both be wrong
    assert [each["signal"] for each in metrics] == ([1.0, 1.0, 1.0] if advantage == "pkpo" else [0.5, 1.0, 1.0])
    ordinary, plain = gradient(policy, batch, images, loss=loss)
    assert "pass_k" not in plain
    assert_close(recorder.gradients[2], ordinary)
    low, high = -(3**-1.5), 3**-0.5
    by_hand: dict[str, list[float]] = {
        "pkpo": [1, 0, 1, 0, 0, 0, 0, 3],
        "pass_at_k": [0, 0, 0, 0, low, low, low, high],
    }
    rows = learner._rows(batch, learner._encode(batch), [group.rewards for group in batch.groups], 3)
    assert [row.advantage for row in rows] == pytest.approx(by_hand[advantage], abs=1e-6)
    assert [row.moves for row in rows] == [value != 0 for value in by_hand[advantage]]
    learner._optimize(rows, [], 1, recorder)  # type: ignore[arg-type]
    assert_close(recorder.gradients[0], recorder.gradients[3])


def test_a_stage_anneals_from_the_diagnosed_k(
    formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any], train_items: list[Item]
) -> None:
    settings = {"advantage": "pass_at_k", "anneal_share": 0.7, "dynamic_sampling": 1}
    with pytest.raises(MedbridgeError, match=r"rl\.pass_k is diagnosed, and no diagnosis has named a k"):
        rl(load_policy(path=formed, trainable=True), train_items, **settings)
    log = rl(load_policy(path=formed, trainable=True), train_items, more={"diagnosed_k": 3}, **settings)
    assert log.series("pass_k") == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    with pytest.warns(UserWarning, match=r"diagnosed k is 16, .* takes 3 at most"):
        log = rl(load_policy(path=formed, trainable=True), train_items, steps=1, more={"diagnosed_k": 16}, **settings)
    assert log.series("pass_k") == [3.0]


# -- a mixed step --------------------------------------------------------------------------------------------------


def doubled(load_policy: Callable[..., Policy]) -> Policy:
    loaded = load_policy(trainable=True)
    return Policy(loaded.model.double().train(), loaded.processor, path=loaded.path, compute_dtype=torch.float64)


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize(("weight", "bound"), [(1.0, 1e-13), (0.5, 1e-13), (0.3, 1e-6)])
def test_a_mixed_step_is_the_sum_of_both_gradients(
    weight: float, bound: float, kl: float, load_policy: Callable[..., Policy], answers: Any, train_items: list[Item],
    images: ImageCache,
) -> None:  # fmt: skip
    """In float64: each term by its own count, one update. (transformers norms in float32: only halves scale.)"""
    policy = doubled(load_policy)
    batch = sampled(policy, train_items[:3], images, REWARDS, 4)
    imitated = Supervision(answers(train_items[4:]), None, SftSettings(batch_size=3, micro_batch_size=2), weight)
    recorder = Recorder(policy)
    settings = RlSettings(temperature=0.8, completions=4, micro_batch_size=5, kl_coefficient=kl)
    Learner(policy, settings, PROMPT, images, LIMIT).update(2, batch, recorder)  # type: ignore[arg-type]
    term = SupervisedTerm(policy, imitated, PROMPT, images, seed=7)
    alone = SupervisedTerm(
        policy, Supervision(imitated.examples, None, imitated.settings), PROMPT, images, seed=7
    )  # of weight 1
    loss, _ = alone.backward(alone.batch(2))
    recorder.step(2, loss)
    learner = Learner(policy, settings, PROMPT, images, LIMIT, supervised=term)
    metrics = learner.update(2, batch, recorder, term.batch(2))  # type: ignore[arg-type]
    sharpened, bridged, mixed = recorder.gradients
    assert metrics["sft_loss"] == pytest.approx(loss, rel=1e-12)
    scale = max(float(value.abs().max()) for value in mixed.values())
    for name, value in mixed.items():
        parts = sharpened.get(name, torch.zeros_like(value)) + weight * bridged[name]
        torch.testing.assert_close(value, parts, atol=bound * scale, rtol=0, msg=name)
    for part in (sharpened, bridged):
        assert max(float(value.abs().max()) for value in part.values()) > 1e-3 * scale


def test_a_mixed_step_imitates_where_no_group_teaches(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], sft: Callable[..., Any], rollouts_of: Any,
    answers: Any, train_items: list[Item], images: ImageCache,
) -> None:  # fmt: skip
    """It is then a bridge step, bit by bit, with the optimizer of the sharpen stage."""
    optimizer = {"steps": 4, "learning_rate": 2e-3, "warmup_steps": 1, "schedule": "constant"}
    bridged, mixed = load_policy(trainable=True), load_policy(trainable=True)
    log = sft(bridged, answers(train_items), batch_size=4, **optimizer)
    same = rollouts_of(mixed, images, seed=0, store={}, score=lambda item, entry: 1.1)
    both = rl(
        mixed, train_items, rollouts=same, more={"supervised": Supervision(answers(train_items), None, SftSettings(
            batch_size=4, micro_batch_size=4, learning_rate=1.0))}, **optimizer,
    )  # fmt: skip
    assert both.series("sft_loss") == log.series("loss")
    assert both.series("loss") == [0.0] * 4
    assert all(torch.equal(t, mixed.model.state_dict()[name]) for name, t in bridged.model.state_dict().items())
    assert [ids[3:] for ids in both.items.values()] == list(log.items.values())


def test_updates_of_a_mixed_step_share_its_examples(
    load_policy: Callable[..., Policy], answers: Any, train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    batch = sampled(policy, train_items[:3], images, REWARDS, 4)
    seen: list[list[str]] = []

    class Listening(SupervisedTerm):
        def backward(self, batch: Any) -> tuple[float, int]:
            seen.append([example.item.id for example in batch])
            return super().backward(batch)

    for size, updates, made in ((5, 3, 3), (2, 3, 3), (1, 3, 3)):
        seen.clear()
        term = Listening(
            policy, Supervision(answers(train_items), None, SftSettings(batch_size=size)), PROMPT, images, seed=0
        )
        recorder = Recorder(policy)
        settings = RlSettings(temperature=0.8, completions=4, updates_per_batch=updates)
        learner = Learner(policy, settings, PROMPT, images, LIMIT, supervised=term)
        metrics = learner.update(1, batch, recorder, term.batch(1))  # type: ignore[arg-type]
        assert 2 <= len(recorder.gradients) <= made  # an update with neither rows nor examples isn't made
        assert [item for part in seen for item in part] == [example.item.id for example in term.batch(1)]
        assert max(map(len, seen)) - min(map(len, seen)) <= 1
        assert metrics["sft_loss"] > 0


def test_the_score_of_each_checkpoint_and_of_the_last_step(
    formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any], sft: Callable[..., Any], answers: Any,
    train_items: list[Item], tmp_path: Path,
) -> None:  # fmt: skip
    """The best checkpoint stays beside the newest, and a score that draws random numbers changes nothing."""
    final_weights = []
    for score in (lambda step: float(torch.rand(())) - step, None):
        policy = load_policy(path=formed, trainable=True)
        folder = tmp_path / f"rl {score is None}"
        options = {"steps": 7, "checkpoint_every": 2, "keep_checkpoints": 1, "checkpoints": folder}
        log = rl(policy, train_items, more={"score": score}, **options)
        scored = [step for step, metrics in log.metrics.items() if "held_out_accuracy" in metrics]
        assert scored == ([] if score is None else [2, 4, 6, 7])
        kept = sorted(path.name for path in folder.glob("step-*"))
        assert kept == (["step-000006"] if score is None else ["step-000002", "step-000006"])
        final_weights.append(final(policy))
        other = tmp_path / f"sft {score is None}"
        log = sft(load_policy(trainable=True), answers(train_items), score=score, **{**options, "checkpoints": other})
        assert [step for step, metrics in log.metrics.items() if "held_out_accuracy" in metrics] == scored
        assert sorted(path.name for path in other.glob("step-*")) == kept
    assert all(torch.equal(value, final_weights[1][name]) for name, value in final_weights[0].items())


# -- engine and trainer --------------------------------------------------------------------------------------------


def apart(size: float) -> Callable[[int, Graded], Graded]:
    """Log-probabilities of an engine that is off by some noise."""
    generator = np.random.default_rng(0)

    def change(_: int, entry: Graded) -> Graded:
        off = generator.normal(0, size, len(entry.rollout.logprobs)).astype(np.float32)
        return dataclasses.replace(
            entry, rollout=dataclasses.replace(entry.rollout, logprobs=entry.rollout.logprobs + off)
        )

    return change


@pytest.mark.parametrize("updates", [1, 2])
def test_the_mismatch_is_measured_over_the_whole_step(
    updates: int, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    clean = sampled(policy, train_items[:3], images, REWARDS, 4)  # its log-probabilities are the trainer's
    batch = changed(clean, apart(0.5))
    moved = slice(0, 8)  # the last group has no advantage, and isn't looked at
    own, engines = (
        np.concatenate([e.rollout.logprobs for e in b.sampled[moved]]).astype(np.float64) for b in (clean, batch)
    )
    ratio = np.exp(own - engines)
    expected = {
        "rollout_ratio_mean": ratio.mean(),
        "rollout_ratio_max": ratio.max(),
        "rollout_kl": (ratio - 1 - np.log(ratio)).mean(),
        "rollout_effective_sample_size": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
        "corrected": (ratio > 2).mean(),
    }
    assert expected["rollout_effective_sample_size"] < 0.9 and expected["corrected"] > 0
    settings = RlSettings(temperature=0.8, completions=4, micro_batch_size=3, updates_per_batch=updates)
    metrics = Learner(policy, settings, PROMPT, images, LIMIT).update(1, batch, Recorder(policy))  # type: ignore[arg-type]
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3), name


def test_the_correction_weighs_each_token_by_the_ratio(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    clean = sampled(policy, train_items[:3], images, REWARDS, 4)
    on_policy, _ = gradient(policy, clean, images)
    ignored, metrics = gradient(policy, changed(clean, apart(0.5)), images, correction="none")
    assert_close(ignored, on_policy)  # only logged
    assert metrics["rollout_kl"] > 0.01 and "corrected" not in metrics

    # An engine that is exactly half as sure of each token: all ratios are 2, so is the gradient.
    def half(_: int, entry: Graded) -> Graded:
        lower = entry.rollout.logprobs - np.float32(np.log(2))
        return dataclasses.replace(entry, rollout=dataclasses.replace(entry.rollout, logprobs=lower))

    doubled = {name: 2 * value for name, value in on_policy.items()}
    assert_close(gradient(policy, changed(clean, half), images, correction_cap=3.0)[0], doubled)
    capped = {name: 1.5 * value for name, value in on_policy.items()}
    assert_close(gradient(policy, changed(clean, half), images, correction_cap=1.5)[0], capped)
    beyond, metrics = gradient(policy, changed(clean, half), images, correction="mask", correction_cap=1.5)
    assert all(not value.any() for value in beyond.values()) and metrics["corrected"] == 1
    noisy = {
        level: gradient(policy, changed(clean, apart(0.5)), images, correction_level=level)[0]
        for level in ("token", "sequence")
    }
    assert any(not torch.allclose(noisy["token"][name], noisy["sequence"][name], atol=1e-4) for name in on_policy)
    _, metrics = gradient(policy, changed(clean, lambda _, e: likelier(e)), images, off_policy_threshold=0.1)
    assert 0 < metrics["off_policy"] < 1  # only those with a negative advantage


def likelier(entry: Graded) -> Graded:
    return dataclasses.replace(
        entry, rollout=dataclasses.replace(entry.rollout, logprobs=entry.rollout.logprobs + np.float32(0.5))
    )


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_cut_completions_count_in_the_baseline_and_give_no_gradient(
    kl: float, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)

    def cut(number: int, entry: Graded) -> Graded:
        reason: Any = "length" if number in (0, 5) else "stop"
        return dataclasses.replace(entry, rollout=dataclasses.replace(entry.rollout, finish_reason=reason))

    batch = changed(sampled(policy, train_items[:3], images, REWARDS, 4), cut)
    settings = {"kl_coefficient": kl, "completions": 4, "temperature": 0.8}
    masked, metrics = gradient(policy, batch, images, mask_truncated=True, **settings)
    assert metrics["masked"] == 2 and metrics["truncated"] == 2 / 12
    # by hand: the gradient of all rows, less that of the two
    whole, _ = gradient(policy, batch, images, **settings)
    learner = Learner(policy, RlSettings(**settings), PROMPT, images, LIMIT)
    rows = rows_of(learner, batch)
    for number, row in enumerate(rows):
        row.moves = number in (0, 5)
    recorder = Recorder(policy)
    learner._optimize(rows, [], 1, recorder)  # type: ignore[arg-type]
    assert_close(masked, {name: whole[name] - recorder.gradients[0][name] for name in whole})


def test_a_nucleus_needs_a_correction() -> None:
    with pytest.raises(ValueError, match=r"top_p\n.*not the policy's own: .* correction to truncate or mask"):
        RlSettings(top_p=0.9, correction="none")
    assert RlSettings(top_p=0.9).top_p == 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"correction": "none", "correction_cap": 3.0}, "correction_cap = 3.0 isn't read"),
        ({"correction_cap": 1.0, "correction_floor": 1.0}, "must be 0 <= floor < cap"),
        ({"checkpoint_every": 10, "sync_every": 4}, "checkpoint_every is 10, and 4 doesn't divide it"),
        ({"staleness": 9}, "less than or equal to 8"),
        ({"dynamic_sampling": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_would_go_wrong_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RlSettings(**settings)


def test_weights_in_training_are_not_sampled_ahead(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], train_items: list[Item]
) -> None:
    policy = load_policy(trainable=True)
    for settings in ({"staleness": 1}, {"sync_every": 2}):
        with pytest.raises(MedbridgeError, match=r"very weights that are trained.*rollout\.engine to vllm"):
            rl(policy, train_items, **settings)


# -- steps ---------------------------------------------------------------------------------------------------------


def test_without_a_difference_in_reward_the_weights_stay(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], rollouts_of: Any, train_items: list[Item],
    images: ImageCache,
) -> None:  # fmt: skip
    for dynamic in (0, 2):
        policy = load_policy(trainable=True)
        before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
        same = rollouts_of(policy, images, seed=0, store={}, score=lambda item, entry: 1.1)
        log = rl(policy, train_items, rollouts=same, steps=3, dynamic_sampling=dynamic)
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
        assert log.series("signal") == [0.0, 0.0, 0.0]
        assert log.series("reward") == pytest.approx([1.1] * 3)
        assert log.series("groups_sampled") == [3.0 * (1 + dynamic)] * 3
        assert log.series("groups_without_signal") == log.series("groups_sampled")
        assert all("gradient_norm" not in metrics for metrics in log.metrics.values())
        assert [len(ids) for ids in log.items.values()] == [0 if dynamic else 3] * 3


def test_sampling_for_training_has_its_own_temperature_and_nucleus(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], rollouts_of: Any, train_items: list[Item],
    images: ImageCache,
) -> None:  # fmt: skip
    policy = load_policy(trainable=True)
    seen: list[SamplingSettings] = []

    class Listening(rollouts_of):
        def sample(self, step: int, requests: Any, sampling: SamplingSettings) -> Any:
            seen.append(sampling)
            return super().sample(step, requests, sampling)

    measured = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=6, stop=("</x>",))
    options = {"rollout": measured, "steps": 1, "temperature": 1.3}
    listening = Listening(policy, images, seed=0, store={}, score=lambda item, entry: entry.rollout.sample % 2)
    log = rl(policy, train_items, rollouts=listening, **options)
    assert seen == [SamplingSettings(temperature=1.3, top_p=1.0, max_new_tokens=6, stop=("</x>",))]
    assert log.metrics[1]["rollout_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    listening.kept.clear()
    cut = rl(policy, train_items, rollouts=listening, top_p=0.8, **options)
    assert seen[1].top_p == 0.8
    # the trainer's distribution is the whole one: each ratio is the mass of the token's nucleus
    assert 0.8 <= cut.metrics[1]["rollout_ratio_mean"] < 0.95 and cut.metrics[1]["rollout_ratio_max"] < 1.01


# -- sampling ahead ------------------------------------------------------------------------------------------------


def final(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_pipelined_run_equals_one_step_after_the_other(
    staleness: int, formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any], rollouts_of: Any,
    train_items: list[Item], images: ImageCache, tmp_path: Path,
) -> None:  # fmt: skip
    """Bit by bit: against a plain loop that keeps the weights of every step and loads those that were promised."""
    settings = {
        "steps": 6, "prompts_per_step": 3, "completions": 4, "micro_batch_size": 5, "learning_rate": 2e-3,
        "warmup_steps": 1, "dynamic_sampling": 1, "staleness": staleness,
    }  # fmt: skip
    ahead = load_policy(path=formed, trainable=True)
    engine = rollouts_of(ahead, images, seed=0, store={}, apart=load_policy(path=formed), batch_size=4)
    log = rl(ahead, train_items, rollouts=engine, **settings)
    assert log.series("staleness_mean") == [min(step - 1, staleness) for step in range(1, 7)]
    assert engine.synced == [0, 1, 2, 3, 4, 5]
    assert all(seconds > 0 for seconds in log.series("seconds_syncing")[:-1])  # the last step's weights stay here
    assert all(rate > 0 for rate in log.series("tokens_per_second"))

    chosen = RlSettings(**settings)
    policy, sampling_policy = load_policy(path=formed, trainable=True), load_policy(path=formed)
    rollouts = rollouts_of(policy, images, seed=0, store={}, apart=sampling_policy, batch_size=4)
    sampling = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=8)
    sampler = GroupSampler(train_items, chosen, rollouts, sampling, seed=0, position=0)
    learner, kept = Learner(policy, chosen, PROMPT, images, 8), [final(policy)]
    trainable = Trainable(policy, ModelSettings(), chosen, chosen.steps, seed=0)
    for step in range(1, 7):
        now = final(policy)
        policy.model.load_state_dict(kept[max(0, step - 1 - staleness)])
        rollouts.sync(max(0, step - 1 - staleness))
        policy.model.load_state_dict(now)
        batch = sampler.draw(step)
        trainable.begin(step)
        learner.update(step, batch, trainable)
        kept.append(final(policy))
    assert all(torch.equal(tensor, kept[-1][name]) for name, tensor in final(ahead).items())
    assert not all(torch.equal(tensor, kept[0][name]) for name, tensor in final(ahead).items())
    for step, batch in engine.kept.items():
        for one, two in zip(batch, rollouts.kept[step], strict=True):
            assert one.rollout.logprobs.tobytes() == two.rollout.logprobs.tobytes()
            assert one.rollout.weights == two.rollout.weights == max(0, step - 1 - staleness)


def test_a_skipped_sync_stops_the_run_before_it_trains_on_stale_completions(
    load_policy: Callable[..., Policy], rl: Callable[..., Any], rollouts_of: Any, train_items: list[Item],
    images: ImageCache,
) -> None:  # fmt: skip
    policy = load_policy(trainable=True)

    class Forgetful(rollouts_of):
        def sync(self, version: int) -> None:
            if version != 2:
                super().sync(version)

    stale = Forgetful(policy, images, seed=0, store={}, apart=load_policy())
    with pytest.raises(MedbridgeError, match=r"version 1, and version 2 was asked for: .* missed a weight sync"):
        rl(policy, train_items, rollouts=stale)
    assert sorted(stale.kept) == [1, 2]


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
        (5, {"dynamic_sampling": 2}),
        (5, {"advantage": "pkpo", "loss": "dr_grpo", "pass_k": 4, "anneal_share": 1.0, "dynamic_sampling": 1}),
        (5, {"consistency_weight": 0.5, "ema_decay": 0.5, "ema_every": 2}),
        (4, {"consistency_weight": 0.5, "ema_decay": 0.5, "model": ModelSettings(lora=LoraSettings(rank=4))}),
        (5, {"kl_coefficient": 0.1, "kl_reference": "ema", "ema_decay": 0.5, "updates_per_batch": 2}),
        (5, {"kl_coefficient": 0.1, "model": ModelSettings(lora=LoraSettings(rank=4, dropout=0.1))}),
        (5, {"supervised": True, "updates_per_batch": 2, "model": ModelSettings(lora=LoraSettings(dropout=0.1))}),
    ],
    ids=[
        "before a checkpoint", "behind a checkpoint", "kl, two updates", "adapters", "adapters, no checkpoint",
        "groups replaced", "pkpo", "consistency", "consistency, adapters", "kl to the average", "kl, adapters", "mixed",
    ],
)  # fmt: skip
def test_a_stage_cut_off_ends_with_the_same_bits(
    kill_at: int, changes: dict[str, Any], formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any],
    killed: type[Exception], train_items: list[Item], answers: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """The killed process had stored the rollouts of its last step, and the resumed one trains on them."""
    lora = changes["model"].lora if "model" in changes else None
    if changes.get("supervised"):
        examples = Supervision(
            answers(train_items), answers(train_items[:4]), SftSettings(batch_size=4, replay_share=0.3)
        )
        changes = {name: value for name, value in changes.items() if name != "supervised"}
        changes["more"] = {"supervised": examples}
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
    assert_same_rollouts(straight, stored)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def assert_same_rollouts(straight: dict[int, list[Graded]], stored: dict[int, list[Graded]]) -> None:
    """The same completions, none of them twice; their order in the store may differ."""
    assert straight.keys() == stored.keys()
    for step, batch in straight.items():
        by_sample = {(entry.rollout.item_id, entry.rollout.sample): entry.rollout for entry in stored[step]}
        assert len(by_sample) == len(stored[step]) == len(batch)
        for entry in batch:
            other = by_sample[entry.rollout.item_id, entry.rollout.sample]
            assert entry.rollout.text == other.text and entry.rollout.weights == other.weights
            assert entry.rollout.logprobs.tobytes() == other.logprobs.tobytes()


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_pipelined_stage_resumes_wherever_it_is_cut_off(
    staleness: int, formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any], rollouts_of: Any,
    killed: type[Exception], train_items: list[Item], images: ImageCache, tmp_path: Path,
) -> None:  # fmt: skip
    """Killed again and again, each time some portions of completions later; also while weights go to the engine."""
    settings = {
        "steps": 6, "checkpoint_every": 2, "dynamic_sampling": 1, "staleness": staleness, "completions": 3,
        "prompts_per_step": 2,
    }  # fmt: skip

    class Mortal(rollouts_of):
        lives = 10**9

        def step_nearer(self) -> None:
            self.lives -= 1
            if self.lives < 0:
                raise killed

        def store(self, step: int, graded: Sequence[Graded]) -> None:
            self.step_nearer()
            super().store(step, graded)

        def sync(self, version: int) -> None:
            self.step_nearer()
            super().sync(version)

    def attempt(store: dict[int, list[Graded]], folder: Path, lives: int) -> Policy:
        policy = load_policy(path=formed, trainable=True)
        engine = Mortal(policy, images, seed=0, store=store, apart=load_policy(path=formed), batch_size=3)
        engine.lives = lives
        rl(policy, train_items, rollouts=engine, checkpoints=folder, **settings)
        return policy

    straight: dict[int, list[Graded]] = {}
    whole = attempt(straight, tmp_path / "straight", 10**9)
    stored: dict[int, list[Graded]] = {}
    for lives in itertools.count(1, 3):
        try:
            resumed = attempt(stored, tmp_path / "cut", lives)
            break
        except killed:
            continue
    assert lives > 7  # it was killed a few times
    assert_same_rollouts(straight, stored)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


# -- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"advantage": "pkpo", "loss": "dr_grpo", "pass_k": 4},
        {"advantage": "pass_at_k", "pass_k": 4},
        {"consistency_weight": 0.5, "kl_coefficient": 0.01, "kl_reference": "ema", "ema_decay": 0.9},
    ],
    ids=["grpo", "pkpo", "pass at k", "consistency"],
)
def test_it_learns_which_answer_earns_the_reward(
    settings: dict[str, Any], formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any],
    train_items: list[Item],
) -> None:  # fmt: skip
    """The model guesses left or right in the right form; right is only ever "left"."""
    items = [dataclasses.replace(item, answer="left") for item in train_items if item.answer in ("left", "right")]
    log = rl(
        load_policy(path=formed, trainable=True), items, steps=30, prompts_per_step=6, completions=8,
        micro_batch_size=64, learning_rate=1e-3, **settings,
    )  # fmt: skip
    accuracy, format_share = log.series("accuracy"), log.series("format")
    assert 0.2 < np.mean(accuracy[:3]) < 0.8
    assert np.mean(accuracy[-3:]) > 0.85
    assert np.mean(format_share[-3:]) > 0.85
    assert np.mean(log.series("reward")[-3:]) > np.mean(log.series("reward")[:3])
