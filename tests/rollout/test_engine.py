"""The transformers engine: what it draws is what the plain model would give, whatever the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from medbridge.data import ImageCache, Item, PromptSettings, build_prompt, load_image, permutation
from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.rollout import GREEDY, Engine, EngineStats, Request, Rollout, SamplingSettings, TransformersEngine
from medbridge.rollout.transformers import LOOK_EVERY
from medbridge.rollout.weights import Weights

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
QWEN = ARCHITECTURES[:3]
PROMPT = PromptSettings(answer_style="text", system="")
SAMPLING = SamplingSettings(temperature=0.9, top_p=1.0, max_new_tokens=10)
"""Without a nucleus: whether a token at its edge is within may turn on rounding, and moves all other probabilities."""
NUCLEUS = SAMPLING.model_copy(update={"top_p": 0.95})


@pytest.fixture(scope="module")
def mixed_items(train_items: list[Item], odd_pictures: list[str]) -> list[Item]:
    """Prompts of very different lengths, with 0, 2, 3 and 5 options and 0 to 3 images."""
    paths = odd_pictures
    three, two = train_items[0], train_items[1]
    five = ("dark", "grey", "bright", "left", "right")

    def make(item: Item, name: str, **changes: Any) -> Item:
        return dataclasses.replace(item, id=f"mixed/train/{name}", **changes)

    return [
        make(three, "no image", images=(), question="Which? " * 20),
        three,
        make(three, "five", options=five, floor=0.2, images=(paths[1],)),
        make(two, "several", images=tuple(paths)),
        make(three, "open", options=None, floor=0.0, images=(paths[2],)),
        make(two, "open, no image", options=None, floor=0.0, images=()),
        two,
    ]


def request(item: Item, samples: int) -> Request:
    numbers = (GREEDY, *range(samples))
    return Request(item, numbers, tuple(permutation(item, 0, number) for number in numbers))


def engine(policy: Policy, batch_size: int = 64) -> TransformersEngine:
    return TransformersEngine(policy, PROMPT, ImageCache(1 << 20), batch_size=batch_size)


def generate(
    policy: Policy,
    items: list[Item],
    samples: int = 5,
    *,
    batch_size: int = 64,
    sampling: SamplingSettings = SAMPLING,
    seed: int = 0,
) -> list[Rollout]:
    requests = [request(item, samples) for item in items]
    return [r for batch in engine(policy, batch_size).generate(requests, sampling, seed=seed) for r in batch]


def assert_same(first: list[Rollout], second: list[Rollout]) -> None:
    """The same tokens, and log-probabilities within rounding."""
    for one, two in zip(first, second, strict=True):
        for name in ("item_id", "sample", "permutation", "text", "finish_reason", "prompt_tokens"):
            assert getattr(one, name) == getattr(two, name), (one.item_id, one.sample, name)
        assert one.token_ids.tolist() == two.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


# -- against plain transformers ------------------------------------------------------------------------------------


def plain_greedy(path: str, item: Item, order: tuple[int, ...], banned: list[int], limit: int) -> list[int]:
    """What `generate` of the plain model gives for the processor's own encoding."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    text = processor.apply_chat_template(build_prompt(item, order, PROMPT), tokenize=False, add_generation_prompt=True)
    special = {"add_special_tokens": False} if text.startswith("<bos>") else {}
    pictures = [load_image(path) for path in item.images]
    inputs = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", **special)
    with torch.no_grad():
        found = model.generate(**inputs, do_sample=False, suppress_tokens=banned, max_new_tokens=limit)
    return list(found[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_completions_are_those_of_generate(
    architecture: str, load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy(architecture)
    found = {r.item_id: r for r in generate(policy, mixed_items, samples=2) if r.sample == GREEDY}
    for item in mixed_items:
        ours = found[item.id]
        expected = plain_greedy(policy.path, item, ours.permutation, policy.banned, SAMPLING.max_new_tokens)
        assert ours.token_ids.tolist() == expected, item.id


def test_a_sliding_window_shorter_than_the_prompt(
    load_policy: Callable[..., Policy], mixed_items: list[Item], changed_model: Callable[..., Path]
) -> None:
    window = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    policy = load_policy(path=changed_model("gemma3", {"config.json": {"text_config": window}}))
    assert not policy.full_attention
    found = {r.item_id: r for r in generate(policy, mixed_items, samples=3) if r.sample == GREEDY}
    assert sum(r.prompt_tokens > 24 for r in found.values()) >= 5
    for item in mixed_items:
        ours = found[item.id]
        expected = plain_greedy(policy.path, item, ours.permutation, policy.banned, SAMPLING.max_new_tokens)
        assert ours.token_ids.tolist() == expected, item.id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_a_trainer_recomputes(
    architecture: str, load_policy: Callable[..., Policy], mixed_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(architecture)
    rollouts = generate(policy, mixed_items, sampling=NUCLEUS)
    by_id = {item.id: item for item in mixed_items}
    prompts = [policy.encode(by_id[r.item_id], [r.permutation], PROMPT, images)[0] for r in rollouts]
    batch = policy.collate(prompts, [r.token_ids.tolist() for r in rollouts])
    with torch.no_grad():
        logits = policy.completion_logits(batch)
    temperature = torch.tensor([1.0 if r.sample == GREEDY else NUCLEUS.temperature for r in rollouts])
    scaled = (logits / temperature[batch.rows, None]).log_softmax(-1)
    top_p = torch.tensor([1.0 if r.sample == GREEDY else NUCLEUS.top_p for r in rollouts])
    cut, margin = in_nucleus(scaled, top_p[batch.rows])
    expected = cut.gather(-1, batch.labels[:, None])[:, 0].numpy()
    clear = margin.numpy() > 1e-5
    assert clear.mean() > 0.97
    np.testing.assert_allclose(np.concatenate([r.logprobs for r in rollouts])[clear], expected[clear], atol=1e-4)


def in_nucleus(logprobs: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [rows, vocabulary] cut to the nucleus of each row and renormalised.

    And how far a sum of probabilities is from `top_p` at least [rows]: near 0 rounding decides what is in the nucleus.
    """
    ordered, order = logprobs.double().exp().sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    cut = torch.where(before < top_p[:, None], ordered, 0.0)
    kept = torch.zeros_like(cut).scatter(-1, order, cut)
    margin = torch.where(top_p < 1, (before - top_p[:, None]).abs().amin(-1), 1.0)
    return (kept / kept.sum(-1, keepdim=True)).log(), margin


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_batch_size_changes_nothing(
    architecture: str, load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy(architecture)
    together = generate(policy, mixed_items, batch_size=64)
    assert_same(generate(policy, mixed_items, batch_size=1), together)
    backwards = generate(policy, mixed_items[::-1], batch_size=13)
    assert_same(
        sorted(backwards, key=lambda r: (r.item_id, r.sample)), sorted(together, key=lambda r: (r.item_id, r.sample))
    )


def test_batches_hold_whole_requests_in_order(load_policy: Callable[..., Policy], mixed_items: list[Item]) -> None:
    policy = load_policy()
    requests = [request(item, 4) for item in mixed_items]
    for batch_size, sizes in ((1, [5] * 7), (11, [10, 10, 10, 5]), (64, [35])):
        batches = list(engine(policy, batch_size).generate(requests, SAMPLING, seed=0))
        assert [len(batch) for batch in batches] == sizes
        rollouts = [r for batch in batches for r in batch]
        assert [(r.item_id, r.sample) for r in rollouts] == [(r.item.id, n) for r in requests for n in r.samples]
        assert [r.permutation for r in rollouts] == [order for r in requests for order in r.permutations]
    assert list(engine(policy).generate([], SAMPLING, seed=0)) == []


def test_a_sample_does_not_depend_on_the_samples_beside_it(
    load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy()
    few, many = generate(policy, mixed_items, samples=2), generate(policy, mixed_items, samples=7)
    assert_same(few, [r for r in many if r.sample < 2])


def test_a_run_repeats_exactly_and_another_seed_does_not(
    load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    first, again = generate(load_policy(), mixed_items), generate(load_policy(), mixed_items)
    for one, two in zip(first, again, strict=True):
        assert one.token_ids.tobytes() == two.token_ids.tobytes() and one.logprobs.tobytes() == two.logprobs.tobytes()
    other = generate(load_policy(), mixed_items, seed=1)
    for one, two in zip(first, other, strict=True):
        assert (one.text == two.text) == (one.sample == GREEDY), (one.item_id, one.sample)


@pytest.mark.parametrize("architecture", QWEN)
def test_each_image_is_looked_at_once_a_batch_and_not_once_a_sample(
    architecture: str, load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy(architecture)
    seen: list[int] = []
    policy.model.base_model.visual.register_forward_hook(
        lambda _module, inputs, options, _output: seen.append(len(options.get("grid_thw", inputs[-1]))),
        with_kwargs=True,
    )
    pictured = [item for item in mixed_items if item.images]
    generate(policy, pictured, samples=8, batch_size=64)  # 9 rows an item: all in one batch
    assert seen == [sum(len(item.images) for item in pictured)]
    seen.clear()
    generate(policy, pictured, samples=8, batch_size=9)
    assert seen == [len(item.images) for item in pictured]


# -- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_banned_tokens_never_appear_even_where_they_would_win(
    architecture: str, load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy(architecture)
    head = policy.model.lm_head
    raised = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        raised.weight.copy_(head.weight)
        raised.bias.zero_()
        raised.bias[policy.banned] = 1e4
    unchanged = generate(load_policy(architecture), mixed_items)
    policy.model.lm_head = raised
    with torch.no_grad():
        assert int(policy.model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax()) in policy.banned
    assert_same(generate(policy, mixed_items), unchanged)
    tokens = np.concatenate([r.token_ids for r in unchanged])
    assert not np.isin(tokens, policy.banned).any()


def test_nothing_is_inherited_from_the_generation_config(
    load_policy: Callable[..., Policy], mixed_items: list[Item], changed_model: Callable[..., Path]
) -> None:
    narrow = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "max_length": 3}
    policy = load_policy(path=changed_model("qwen2_5_vl", {"generation_config.json": narrow}))
    assert policy.model.generation_config.top_k == 1
    rollouts = generate(policy, mixed_items, samples=12)
    for item in mixed_items:
        assert len({r.text for r in rollouts if r.item_id == item.id and r.sample != GREEDY}) >= 10
    assert_same(rollouts, generate(load_policy(), mixed_items, samples=12))


def test_a_low_temperature_or_a_small_nucleus_is_nearly_greedy(
    load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy()
    item = dataclasses.replace(mixed_items[1], options=None, floor=0.0)  # one prompt for all samples
    for narrow in ({"temperature": 1e-4, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1e-6}):
        sampling = SamplingSettings(max_new_tokens=6, **narrow)
        assert len({r.text for r in generate(policy, [item], sampling=sampling)}) == 1


def test_completions_stop_or_are_cut(load_policy: Callable[..., Policy], train_items: list[Item]) -> None:
    policy = load_policy()
    head = policy.model.lm_head
    likelier = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        likelier.weight.copy_(head.weight)
        likelier.bias.zero_()
        likelier.bias[policy.stop_ids[0]] = 4.0  # about one in eight tokens ends the turn
    policy.model.lm_head = likelier
    rollouts = generate(policy, train_items[:6], samples=10)
    reasons = {r.finish_reason for r in rollouts}
    assert reasons == {"stop", "length"}
    for r in rollouts:
        ended = np.isin(r.token_ids, policy.stop_ids)
        assert len(r.logprobs) == len(r.token_ids) <= SAMPLING.max_new_tokens
        assert not ended[:-1].any()
        if r.finish_reason == "stop":
            assert ended[-1]
            assert r.text == policy.decode(r.token_ids[:-1].tolist())
        else:
            assert not ended[-1] and len(r.token_ids) == SAMPLING.max_new_tokens
            assert r.text == policy.decode(r.token_ids.tolist())
    one = generate(policy, train_items[:3], sampling=SamplingSettings(max_new_tokens=1))
    assert {len(r.token_ids) for r in one} == {1}


def test_sampling_leaves_the_model_as_it_was(load_policy: Callable[..., Policy], train_items: list[Item]) -> None:
    policy = load_policy(trainable=True)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    policy.model.train()
    generate(policy, train_items[:2])
    assert policy.model.training
    assert all(p.grad is None and p.requires_grad for p in policy.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    policy.model.eval()
    generate(policy, train_items[:2])
    assert not policy.model.training


def test_half_precision_rollouts_are_finite(load_policy: Callable[..., Policy], mixed_items: list[Item]) -> None:
    policy = load_policy(dtype="bfloat16")
    rollouts = generate(policy, mixed_items, samples=2)
    assert len(rollouts) == 3 * len(mixed_items)
    assert all(np.isfinite(r.logprobs).all() and (r.logprobs <= 0).all() for r in rollouts)


# -- stop texts ----------------------------------------------------------------------------------------------------


def test_stop_texts_end_a_completion_where_they_are_complete(
    load_policy: Callable[..., Policy], train_items: list[Item]
) -> None:
    """Against the same draws without them: the same tokens as far as the stop, and the text before it."""
    policy = load_policy()
    long = SAMPLING.model_copy(update={"max_new_tokens": 40})  # longer than looks are apart
    free = generate(policy, train_items[:4], samples=8, sampling=long)
    longest = max(free, key=lambda r: len(r.text)).text
    for stop in (("e",), ("z", longest[20:23], "qu"), (longest[5:9],), ("not there",)):
        bound = long.model_copy(update={"stop": stop})
        for batch_size in (64, 9):
            found = generate(policy, train_items[:4], samples=8, sampling=bound, batch_size=batch_size)
            for one, other in zip(found, free, strict=True):
                assert one.token_ids.tolist() == other.token_ids[: len(one.token_ids)].tolist()
                np.testing.assert_allclose(one.logprobs, other.logprobs[: len(one.token_ids)], atol=1e-4)
                at = [other.text.find(end) for end in stop if end in other.text]
                if not at:
                    assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
                    assert len(one.token_ids) == len(other.token_ids)
                    continue
                assert one.text == other.text[: min(at)] and one.finish_reason == "stop"
                assert any(end in policy.decode(one.token_ids.tolist()) for end in stop)
                assert not any(end in policy.decode(one.token_ids[:-1].tolist()) for end in stop)
    assert any("e" in r.text for r in free) and longest[20:23]


def test_a_stop_text_spares_the_tokens_behind_it(
    load_policy: Callable[..., Policy], train_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy()
    steps: list[int] = []
    advance = TransformersEngine._advance

    def counted(*arguments: Any) -> None:
        steps.append(1)
        advance(*arguments)

    monkeypatch.setattr(TransformersEngine, "_advance", counted)
    letters = tuple("abcdefghijklmnopqrstuvwxyz ")
    sampling = SamplingSettings(max_new_tokens=200, stop=letters)
    found = generate(policy, train_items[:2], sampling=sampling)
    assert all(r.finish_reason == "stop" for r in found)
    assert len(steps) < 3 * LOOK_EVERY


# -- prompts that are too long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lengths_are_those_of_the_encoded_prompts(
    architecture: str, load_policy: Callable[..., Policy], mixed_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(architecture)
    for r, item in zip(generate(policy, mixed_items, samples=0), mixed_items, strict=True):
        assert policy.length(item, r.permutation, PROMPT, images) == r.prompt_tokens


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled(
    load_policy: Callable[..., Policy], mixed_items: list[Item]
) -> None:
    policy = load_policy()
    lengths = {r.item_id: r.prompt_tokens for r in generate(policy, mixed_items, samples=0)}
    longest = max(mixed_items, key=lambda item: lengths[item.id])
    policy.context = lengths[longest.id]
    calls = []
    policy.model.register_forward_hook(lambda *_: calls.append(1))
    policy.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    others = [item for item in mixed_items if item is not longest]
    stream = engine(policy).generate([request(item, 0) for item in (*others, longest)], SAMPLING, seed=0)
    with pytest.raises(MedbridgeError, match=rf"{longest.id!r}.*{policy.context} tokens.*{policy.context} with"):
        next(stream)
    assert not calls
    # one token of room is used, and is not stepped over
    policy.context += 1
    found = {r.item_id: r for r in generate(policy, mixed_items, samples=2)}
    assert len(found[longest.id].token_ids) == 1
    assert max(len(r.token_ids) for r in found.values()) > 1


def test_near_the_limit_every_option_order_is_measured(
    load_policy: Callable[..., Policy], train_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy()
    asked = request(train_items[0], 12)
    orders = list(dict.fromkeys(asked.permutations))
    lengths = {order: policy.context - (order != orders[-1]) for order in orders}  # the last one leaves no room
    assert len(orders) > 2
    monkeypatch.setattr(policy, "length", lambda item, order, *_: lengths[order])
    with pytest.raises(MedbridgeError, match="leave the item out"):
        next(engine(policy).generate([asked], SAMPLING, seed=0))


# -- the protocol --------------------------------------------------------------------------------------------------


def test_it_says_which_weights_it_sampled_from(load_policy: Callable[..., Policy], train_items: list[Item]) -> None:
    policy = load_policy()
    own: Engine = engine(policy)
    requests = [request(train_items[0], 2)]
    own.start()
    assert {r.weights for batch in own.generate(requests, SAMPLING, seed=0) for r in batch} == {0}
    own.update_weights(Weights(policy, 7, Path("unused")))
    own.sleep()
    assert {r.weights for batch in own.generate(requests, SAMPLING, seed=0) for r in batch} == {7}
    with pytest.raises(MedbridgeError, match="its own policy"):
        own.update_weights(Weights(load_policy(), 8, Path("unused")))
    own.close()
    own.close()


def test_it_counts_tokens_and_what_samples_share(load_policy: Callable[..., Policy], mixed_items: list[Item]) -> None:
    own = engine(load_policy())
    assert own.stats() == EngineStats()
    several = mixed_items[3]
    assert len(several.images) == 3
    rollouts = [r for batch in own.generate([request(several, 7)], SAMPLING, seed=0) for r in batch]
    stats = own.stats()
    assert stats.prompt_tokens == stats.prefix_queries == sum(r.prompt_tokens for r in rollouts)
    assert stats.completion_tokens == sum(len(r.token_ids) for r in rollouts)
    assert (stats.image_queries, stats.image_hits) == (24, 21)  # 8 completions of 3 images, each looked at once
    [length] = {r.prompt_tokens for r in rollouts}
    orders = len({r.permutation for r in rollouts})
    computed = stats.prefix_queries - stats.prefix_hits
    assert length < computed < length * orders and stats.restarts == 0
