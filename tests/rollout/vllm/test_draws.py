"""Requests taken apart and answers put together, with a real prompter and no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from medbridge.data import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import Prompter
from medbridge.rollout import GREEDY, EngineFailure, Request, SamplingSettings
from medbridge.rollout.vllm.draws import Draw, Opened, ask, how, read, sample_seed, split
from medbridge.rollout.vllm.wire import Message

if TYPE_CHECKING:
    from medbridge.data import Item

PROMPT = PromptSettings(answer_style="text", system="")
A, B = (0, 1, 2), (2, 1, 0)


@pytest.fixture(scope="module")
def prompter(model_folder: Callable[[str], Path]) -> Prompter:
    return Prompter.load(str(model_folder("qwen2_5_vl")))


def answer(draw: Draw, completions: list[list[int]], logprob: float = -0.5, reason: str = "length") -> Message:
    lengths = [len(ids) for ids in completions]
    ids = np.array([token for completion in completions for token in completion], np.int32)
    fields = {
        "draw": 0, "lengths": lengths, "reasons": [reason] * len(lengths), "prompt_tokens": 40, "images": 1,
        "version": 3,
    }  # fmt: skip
    return Message("drawn", fields, (ids.tobytes(), np.full(len(ids), logprob, np.float32).tobytes()))


def test_samples_that_share_an_order_are_one_draw_and_the_greedy_one_is_its_own(train_items: list[Item]) -> None:
    request = Request(train_items[0], (0, GREEDY, 1, 2, 5), (A, A, B, A, B))
    draws = list(split(Opened(request), seed=7))
    assert [(draw.positions, draw.permutation) for draw in draws] == [([0, 3], A), ([1], A), ([2, 4], B)]
    assert draws[1].seeds == []
    item_id = train_items[0].id
    assert draws[0].seeds == [sample_seed(7, item_id, 0), sample_seed(7, item_id, 2)]
    assert list(split(Opened(Request(train_items[0], (), ())), seed=7)) == []


def test_samples_have_seeds_of_their_own() -> None:
    seeds = {sample_seed(seed, item, sample) for seed in (0, 1) for item in ("a", "b|0") for sample in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_asked(prompter: Prompter, train_items: list[Item]) -> None:
    draw = next(split(Opened(Request(train_items[0], (0,), (A,))), seed=7))
    message = ask(11, draw, prompter, PROMPT)
    assert np.frombuffer(message.blobs[0], np.int32).tolist() == prompter.prompt_ids(train_items[0], A, PROMPT)
    assert (message["draw"], message["images"], message["seeds"]) == (11, train_items[0].images, draw.seeds)
    common = how(SamplingSettings(temperature=0.3, top_p=0.8, max_new_tokens=9, stop=("x",)), prompter)
    assert common.fields == {
        "temperature": 0.3, "top_p": 0.8, "max_tokens": 9, "stop": ["x"], "stop_ids": prompter.stop_ids,
        "banned": prompter.banned,
    }  # fmt: skip


def test_answers_go_to_their_places(prompter: Prompter, train_items: list[Item]) -> None:
    opened = Opened(Request(train_items[0], (0, GREEDY, 4), (A, B, A)))
    sampled, greedy = split(opened, seed=0)
    words = prompter.tokenizer("bright", add_special_tokens=False)["input_ids"]
    end = prompter.stop_ids[0]
    read(answer(greedy, [[*words, end]], reason="stop"), greedy, prompter, ())
    assert [rollout is None for rollout in opened.rollouts] == [True, False, True]
    read(answer(sampled, [words, [end]]), sampled, prompter, ())
    first, middle, last = opened.rollouts
    assert first is not None and middle is not None and last is not None
    assert (first.sample, first.text, first.token_ids.tolist(), first.permutation) == (0, "bright", words, A)
    assert (middle.sample, middle.text, middle.finish_reason, middle.permutation) == (GREEDY, "bright", "stop", B)
    assert middle.token_ids.tolist() == [*words, end]
    assert (last.sample, last.text, last.token_ids.tolist(), last.weights, last.images) == (4, "", [end], 3, 1)
    assert first.token_ids.dtype == np.int32 and first.logprobs.dtype == np.float32
    assert first.token_ids.flags.owndata  # else each would hold the whole message


def test_a_stop_text_cuts_where_our_own_engine_cuts(prompter: Prompter, train_items: list[Item]) -> None:
    draw = next(split(Opened(Request(train_items[0], (0,), (A,))), seed=0))
    ids = prompter.tokenizer("very bright", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    rollout = read(answer(draw, [[*ids, *ids]]), draw, prompter, ("bri",))[0]
    assert rollout.text == "very " and rollout.finish_reason == "stop"
    assert "bri" in prompter.decode(rollout.token_ids.tolist())
    assert "bri" not in prompter.decode(rollout.token_ids[:-1].tolist())
    assert len(rollout.logprobs) == len(rollout.token_ids)


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf")])
def test_a_log_probability_that_is_no_number(prompter: Prompter, train_items: list[Item], logprob: float) -> None:
    draw = next(split(Opened(Request(train_items[0], (0,), (A,))), seed=0))
    with pytest.raises(MedbridgeError, match=f"item '{train_items[0].id}': .*no finite log-probability"):
        read(answer(draw, [[5]], logprob), draw, prompter, ())


def test_a_completion_that_was_given_up(prompter: Prompter, train_items: list[Item]) -> None:
    draw = next(split(Opened(Request(train_items[0], (0,), (A,))), seed=0))
    with pytest.raises(EngineFailure, match=r"gave up a completion of item .* \(abort\)"):
        read(answer(draw, [[5]], reason="abort"), draw, prompter, ())
