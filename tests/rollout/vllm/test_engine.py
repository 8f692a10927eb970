"""The engine on real vLLM: what it draws against our own engine and model, and what happens when its process breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from medbridge.data import PromptSettings, permutation
from medbridge.errors import MedbridgeError
from medbridge.rollout import GREEDY, EngineFailure, FailureSettings, Request, SamplingSettings, TransformersEngine
from medbridge.rollout.vllm.engine import VllmEngine
from medbridge.rollout.weights import Weights

if TYPE_CHECKING:
    from medbridge.data import ImageCache, Item
    from medbridge.model import Policy
    from medbridge.rollout import Rollout

PROMPT = PromptSettings(answer_style="text", system="")
SHORT = SamplingSettings(max_new_tokens=12)
START_S, STALL_S = 400.0, 6.0


@pytest.fixture(scope="module")
def policy(load_policy: Callable[..., Policy]) -> Policy:
    return load_policy()


@pytest.fixture(scope="module")
def ours(policy: Policy, images: ImageCache) -> TransformersEngine:
    """The same model in this process."""
    return TransformersEngine(policy, PROMPT, images, batch_size=64)


def request(item: Item, samples: Sequence[int]) -> Request:
    return Request(item, tuple(samples), tuple(permutation(item, 0, sample) for sample in samples))


def drawn(engine: Any, requests: Sequence[Request], sampling: SamplingSettings = SHORT, seed: int = 0) -> list[Rollout]:
    """All rollouts, in the requests' order."""
    batches = list(engine.generate(requests, sampling, seed=seed))
    found = {}
    for rollout in (rollout for batch in batches for rollout in batch):
        key = (rollout.item_id, rollout.sample, rollout.permutation)
        assert key not in found
        found[key] = rollout
    asked = [(r.item.id, s, p) for r in requests for s, p in zip(r.samples, r.permutations, strict=True)]
    assert len(found) == len(asked)
    return [found[key] for key in asked]


def assert_same(one: Iterable[Rollout], other: Iterable[Rollout], *, weights: bool = True) -> None:
    """Equal but for rounding of the log-probabilities."""
    for a, b in zip(one, other, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        for name in ("item_id", "sample", "permutation", "text", "finish_reason", "prompt_tokens", "images"):
            assert getattr(a, name) == getattr(b, name), name
        assert not weights or a.weights == b.weights


def test_greedy_is_our_own_engine(engine: VllmEngine, ours: TransformersEngine, train_items: list[Item]) -> None:
    """With images, in every order of the options; with an item that has none."""
    requests = [
        Request(item, (GREEDY,), (order,))
        for item in train_items[:4]
        for order in permutations(range(len(item.options or ())))
    ]
    blind = replace(train_items[0], id="blind", images=())
    single = replace(train_items[1], id="\u00fcber/\U0001f980 1")
    requests += [request(blind, (GREEDY,)), request(single, (GREEDY,))]
    theirs = drawn(engine, requests)
    assert_same(theirs, drawn(ours, requests))
    assert {rollout.images for rollout in theirs} == {0, 1}
    assert len({round(float(rollout.logprobs[0]), 3) for rollout in theirs}) > 10  # not one answer to everything


def test_several_images_keep_their_order(
    engine: VllmEngine, ours: TransformersEngine, train_items: list[Item], odd_pictures: list[str]
) -> None:
    one = replace(train_items[0], id="forwards", images=tuple(odd_pictures))
    other = replace(train_items[0], id="backwards", images=tuple(reversed(odd_pictures)))
    twice = replace(train_items[0], id="twice", images=(odd_pictures[0], odd_pictures[0]))
    requests = [Request(item, (GREEDY,), ((0, 1, 2),)) for item in (one, other, twice)]
    theirs = drawn(engine, requests)
    assert_same(theirs, drawn(ours, requests))
    assert [rollout.images for rollout in theirs] == [3, 3, 2]
    assert abs(theirs[0].logprobs[0] - theirs[1].logprobs[0]) > 1e-3


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 1.0), (1.3, 0.5)])
def test_sampled_logprobs_are_those_of_the_distribution_drawn_from(
    engine: VllmEngine, policy: Policy, images: ImageCache, train_items: list[Item], temperature: float, top_p: float
) -> None:
    """n > 1 of one prompt beside a greedy one; against the model's own logits, cut and renormalised."""
    sampling = SamplingSettings(temperature=temperature, top_p=top_p, max_new_tokens=12)
    item = train_items[0]
    order = (1, 0, 2)
    samples = (3, GREEDY, 0, 1, 2, 7)
    rollouts = drawn(engine, [Request(item, samples, (order,) * len(samples))], sampling)
    assert len({tuple(rollout.token_ids.tolist()) for rollout in rollouts}) == len(samples)
    for rollout in rollouts:
        expected = nucleus_logprobs(policy, images, item, rollout, temperature, top_p)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)


@torch.inference_mode()
def nucleus_logprobs(
    policy: Policy, images: ImageCache, item: Item, rollout: Rollout, temperature: float, top_p: float
) -> np.ndarray:
    prompt = policy.encode(item, [rollout.permutation], PROMPT, images)
    batch = policy.collate(prompt, [rollout.token_ids.tolist()])
    logits = policy.head(policy.completion_hidden(batch)).double()
    if rollout.sample == GREEDY:
        temperature, top_p = 1.0, 1.0
    probabilities = (logits / temperature).softmax(-1)
    descending, ids = probabilities.sort(-1, descending=True)
    kept = torch.zeros_like(probabilities, dtype=torch.bool).scatter(
        -1, ids, descending.cumsum(-1) - descending < top_p
    )
    cut = torch.where(kept, probabilities, 0.0)
    return (cut / cut.sum(-1, keepdim=True)).gather(-1, batch.labels[:, None]).log()[:, 0].numpy()


def test_a_draw_repeats_alone_and_in_a_crowd(engine: VllmEngine, train_items: list[Item]) -> None:
    """Prompts of the crowd are long, so that vLLM computes them in parts: there its own seeds fail on a CPU."""
    item = train_items[0]
    long = "Is it so? " * 25
    crowd = [request(replace(train_items[k % 6], id=f"crowd {k}", question=f"{k} {long}"), range(8)) for k in range(40)]
    wanted = request(item, range(12))
    alone = drawn(engine, [wanted], seed=5)
    assert_same(drawn(engine, [*crowd[:20], wanted, *crowd[20:]], seed=5)[160:172], alone)
    # one of the crowd by itself, some of its samples only, in another order
    some = replace(crowd[39], samples=(5, 2), permutations=(crowd[39].permutations[5], crowd[39].permutations[2]))
    everyone = drawn(engine, crowd, seed=5)
    assert_same(drawn(engine, [some], seed=5), [everyone[39 * 8 + 5], everyone[39 * 8 + 2]])
    other = drawn(engine, [wanted], seed=6)
    assert all(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(alone, other, strict=True))


def test_stop_texts_end_a_completion_as_on_our_own_engine(
    engine: VllmEngine, ours: TransformersEngine, train_items: list[Item]
) -> None:
    requests = [request(item, (GREEDY, 0, 1)) for item in train_items[:4]]
    free = drawn(engine, requests)
    text = next(rollout.text for rollout in free if rollout.sample == GREEDY)
    stop = (text[3:5], next(rollout.text for rollout in free if rollout.sample == 0)[4:6])
    sampling = SamplingSettings(max_new_tokens=12, stop=stop)
    stopped = drawn(engine, requests, sampling)
    greedy = [at for at, rollout in enumerate(stopped) if rollout.sample == GREEDY]
    assert_same([stopped[at] for at in greedy], [drawn(ours, requests, sampling)[at] for at in greedy])
    ends = 0
    for rollout, whole in zip(stopped, free, strict=True):
        assert not any(end in rollout.text for end in stop)
        length = len(rollout.token_ids)
        assert rollout.token_ids.tolist() == whole.token_ids[:length].tolist()
        if length < len(whole.token_ids):
            ends += 1
            assert rollout.finish_reason == "stop"
    assert ends >= 2


def test_a_stop_token_ends_a_completion(
    start_engine: Callable[..., VllmEngine], engine: VllmEngine, train_items: list[Item]
) -> None:
    """Any token that the prompter calls one, whatever the model's generation config says; it is kept as a token."""
    free = drawn(engine, [request(train_items[0], range(4))])
    token = int(free[0].token_ids[5])
    stops = engine.prompter.stop_ids
    try:
        engine.prompter.stop_ids = [*stops, token]
        found = drawn(engine, [request(train_items[0], range(4))])[0]
    finally:
        engine.prompter.stop_ids = stops
    end = free[0].token_ids.tolist().index(token) + 1
    assert found.token_ids.tolist() == free[0].token_ids[:end].tolist()
    assert found.finish_reason == "stop"
    assert found.text == engine.prompter.decode(found.token_ids[:-1].tolist())


def test_banned_tokens_are_never_drawn(engine: VllmEngine, train_items: list[Item]) -> None:
    sampling = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=64)
    rollouts = drawn(engine, [request(item, range(16)) for item in train_items[:6]], sampling)
    ids = np.concatenate([rollout.token_ids for rollout in rollouts])
    assert len(ids) > 4000  # a model that knows nothing draws each of its 400 tokens about ten times
    assert len(engine.prompter.banned) == 2
    assert not np.isin(ids, engine.prompter.banned).any()
    assert len(np.unique(ids)) > 250


def test_an_over_long_prompt_is_refused_before_anything_is_sampled(engine: VllmEngine, train_items: list[Item]) -> None:
    before = engine.stats()
    long = replace(train_items[0], id="the long one", question="Is it bright? " * 400)
    with pytest.raises(MedbridgeError, match=r"item 'the long one': its prompt has \d+ tokens, and vLLM takes 512"):
        list(engine.generate([request(train_items[1], (0,)), request(long, (0,))], SHORT, seed=0))
    assert engine.stats() == before
    assert len(drawn(engine, [request(train_items[1], (0,))])) == 1


def test_a_completion_takes_no_more_than_there_is_room_for(engine: VllmEngine, train_items: list[Item]) -> None:
    """A prompt a little shorter than the longest sequence: its completion is cut there."""
    question, item = "", train_items[0]
    order = permutation(item, 0, 0)
    while True:
        longer = replace(item, id="nearly", question=f"{question} Is it bright?".strip())
        length = engine.prompter.length(longer, order, PROMPT, engine.images)
        if length > 506:
            break
        question, fitting, tokens = longer.question, longer, length
    rollout = drawn(engine, [Request(fitting, (0,), (order,))], SamplingSettings(max_new_tokens=100))[0]
    assert rollout.prompt_tokens == tokens
    assert len(rollout.token_ids) == 512 - tokens
    assert rollout.finish_reason == "length"


def test_no_requests_and_no_samples(engine: VllmEngine, train_items: list[Item]) -> None:
    assert list(engine.generate([], SHORT, seed=0)) == []
    nothing = Request(train_items[0], (), ())
    assert len(drawn(engine, [nothing, request(train_items[1], (4,))])) == 1


def test_one_item_twice_in_one_call(engine: VllmEngine, train_items: list[Item]) -> None:
    requests = [request(train_items[0], (0, 1)), request(train_items[0], (2, 0))]
    batches = sorted(engine.generate(requests, SHORT, seed=0), key=lambda batch: batch[1].sample)
    assert [[rollout.sample for rollout in batch] for batch in batches] == [[2, 0], [0, 1]]
    assert_same(batches[0][1:], batches[1][:1])


def test_a_call_that_is_left_early_leaves_nothing_behind(engine: VllmEngine, train_items: list[Item]) -> None:
    requests = [request(replace(train_items[k % 6], id=f"many {k}"), range(8)) for k in range(60)]
    sampling = SamplingSettings(max_new_tokens=100)
    stream = engine.generate(requests, sampling, seed=0)
    first = next(stream)
    assert len(first) == 8
    stream.close()
    before = engine.stats()
    wanted = [request(train_items[0], range(4))]
    assert_same(drawn(engine, wanted), drawn(engine, wanted))
    assert engine.stats().completion_tokens - before.completion_tokens <= 2 * 4 * 12
    kept = engine.generate(requests, sampling, seed=0)
    next(kept)
    assert_same(drawn(engine, wanted), drawn(engine, wanted))
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(kept)
    assert len(drawn(engine, wanted)) == 4


def test_prompt_and_image_are_computed_once(engine: VllmEngine, train_items: list[Item]) -> None:
    before = engine.stats()
    item = replace(train_items[0], id="cached", question="How bright would you say is it? " * 6)
    rollouts = drawn(engine, [request(item, range(16))])
    after = engine.stats()
    tokens = rollouts[0].prompt_tokens
    orders = len({rollout.permutation for rollout in rollouts})
    assert after.prompt_tokens - before.prompt_tokens == sum(rollout.prompt_tokens for rollout in rollouts)
    assert after.prefix_queries - before.prefix_queries == 16 * tokens
    assert after.prefix_hits - before.prefix_hits >= 15 * (tokens - 64)
    assert after.image_queries - before.image_queries == orders
    assert after.image_hits - before.image_hits >= orders - 1


def test_new_weights_are_sampled_from(
    engine: VllmEngine, load_policy: Callable[..., Policy], images: ImageCache, train_items: list[Item], tmp_path: Path
) -> None:
    """And nothing that was computed with the old ones is used any more; sleeping changes nothing on a CPU."""
    requests = [request(item, (GREEDY, 0)) for item in train_items[:4]]
    before = drawn(engine, requests)
    policy = load_policy()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    changed = Weights(policy, 1, tmp_path)
    engine.sleep()
    engine.update_weights(changed)
    changed.release()
    after = drawn(engine, requests)
    assert {rollout.weights for rollout in after} == {1}
    greedy = slice(0, None, 2)
    assert_same(after[greedy], drawn(TransformersEngine(policy, PROMPT, images, batch_size=64), requests)[greedy],
                weights=False)  # fmt: skip
    first = Weights(load_policy(), 2, tmp_path)
    engine.update_weights(first)
    first.release()
    assert_same(drawn(engine, requests), before, weights=False)


# -- failures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(start_engine: Callable[..., VllmEngine], tmp_path_factory: pytest.TempPathFactory) -> VllmEngine:
    """An engine that may be broken, with little patience once it has started."""
    return start_engine(
        failure=FailureSettings(start_timeout_s=START_S, stall_timeout_s=STALL_S),
        log=tmp_path_factory.mktemp("logs") / "vllm.log",
    )


def group_members(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(entry.name))
    return found


def comes_true(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def pid_of(engine: VllmEngine) -> int:
    assert engine._process is not None and engine._process.pid is not None
    return engine._process.pid


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGKILL, "died", r"killed by signal 9 \(perhaps the kernel.*the last words of its log: \S"),
        (signal.SIGSTOP, "hung", r"no sign of life for [67] s"),
    ],
)
def test_a_process_that_breaks_while_it_samples(
    victim: VllmEngine, train_items: list[Item], number: signal.Signals, kind: str, words: str
) -> None:
    """It is told with the phase; nothing of it is left; started again, it draws what it would have drawn."""
    requests = [request(replace(train_items[k % 6], id=f"many {k}"), range(8)) for k in range(60)]
    victim.start()
    pid = pid_of(victim)
    got: list[Rollout] = []
    with pytest.raises(EngineFailure, match=words) as caught:
        for batch in victim.generate(requests, SamplingSettings(max_new_tokens=64), seed=0):
            if not got:
                os.kill(pid, number)
            got += batch
    assert (caught.value.phase, caught.value.kind) == ("sampling", kind)
    assert 0 < len(got) < 480
    assert comes_true(lambda: not group_members(pid))
    with pytest.raises(EngineFailure):
        next(iter(victim.generate(requests[:1], SHORT, seed=0)))  # it does not go on with other weights by itself
    victim.close()
    if number == signal.SIGKILL:
        victim.start()
        done = got[0].item_id
        again = drawn(victim, [r for r in requests if r.item.id == done], SamplingSettings(max_new_tokens=64))
        assert_same(again, got[:8])
        assert victim.stats().prefix_queries > 0


def test_a_model_that_vllm_cannot_hold(
    start_engine: Callable[..., VllmEngine], model_folder: Callable[[str], Path]
) -> None:
    """Starting again would not help, so it is no EngineFailure."""
    from medbridge.model import Prompter

    prompter = Prompter.load(str(model_folder("qwen2_5_vl")))
    with pytest.raises(MedbridgeError, match=r"vLLM can't run model .*max_length|vLLM can't run model .*max_model_len"):
        start_engine(prompter=prompter, max_length=10_000_000)


PARENT = """
import os, sys
from pathlib import Path
from medbridge.data import ImageCache, PromptSettings
from medbridge.model import Prompter
from medbridge.rollout import FailureSettings, VllmSettings
from medbridge.rollout.vllm.engine import VllmEngine
model, log, told = sys.argv[1:]
engine = VllmEngine(
    Prompter.load(model), PromptSettings(), ImageCache(1 << 20), model=model,
    settings=VllmSettings(kv_cache_gb=0.125, max_length=512), failure=FailureSettings(start_timeout_s=400),
    dtype="float32", seed=0, log=Path(log),
)
engine.start()
Path(told + ".part").write_text(str(engine._process.pid))
os.rename(told + ".part", told)

import time
time.sleep(600)
"""


def test_vllm_ends_with_the_process_that_started_it(
    start_engine: Callable[..., VllmEngine], processes: Any, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    script, told = tmp_path / "parent.py", tmp_path / "told"
    script.write_text(PARENT)
    parent = processes.start([script, model_folder("qwen2_5_vl"), tmp_path / "vllm.log", told], tmp_path / "parent.log")
    until = time.monotonic() + START_S
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert told.exists(), (tmp_path / "parent.log").read_text() + (tmp_path / "vllm.log").read_text()[-3000:]
    pid = int(told.read_text())
    assert group_members(pid)
    processes.kill(parent)
    assert comes_true(lambda: not group_members(pid))
