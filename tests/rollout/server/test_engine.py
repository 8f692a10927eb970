"""The engine that asks a server, against a server of our own: what it asks, what it gives, and each way of failing."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from medbridge.errors import MedbridgeError

if TYPE_CHECKING:
    from medbridge.data import ImageCache, Item
    from medbridge.model import Policy, Prompter
    from medbridge.rollout import Request, Rollout
    from medbridge.rollout.server.engine import ServerEngine

Connect = Callable[..., "ServerEngine"]
Fake = Any
KEY_VARIABLE = "MEDBRIDGE_TEST_SERVER_KEY"
GENERATE = "/inference/v1/generate"


def requests_of(items: list[Item], samples: int = 3) -> list[Request]:
    from medbridge.data import permutation
    from medbridge.rollout import GREEDY, Request

    numbers = (GREEDY, *range(samples))
    return [Request(item, numbers, tuple(permutation(item, 0, n) for n in numbers)) for item in items]


def draw(engine: ServerEngine, requests: list[Request], seed: int = 0, **sampling: Any) -> list[list[Rollout]]:
    from medbridge.rollout import SamplingSettings

    return list(engine.generate(requests, SamplingSettings(**{"max_new_tokens": 8, **sampling}), seed=seed))


def by_sample(batches: list[list[Rollout]]) -> dict[tuple[str, int], Rollout]:
    found = {(rollout.item_id, rollout.sample): rollout for batch in batches for rollout in batch}
    assert len(found) == sum(len(batch) for batch in batches)
    return found


# -- what is asked and what is given -----------------------------------------------------------------------


def test_gives_whole_requests_with_their_samples_in_order(
    fake: Fake, connect: Connect, train_items: list[Item], prompter: Prompter
) -> None:
    engine = connect(fake.url)
    engine.start()
    requests = requests_of(train_items, 5)
    batches = draw(engine, requests)
    wanted = {request.item.id: request for request in requests}
    assert {batch[0].item_id for batch in batches} == set(wanted)
    for batch in batches:
        request = wanted[batch[0].item_id]
        assert [rollout.sample for rollout in batch] == list(request.samples)
        assert [rollout.permutation for rollout in batch] == list(request.permutations)
        for rollout in batch:
            assert rollout.finish_reason == "stop"
            assert rollout.token_ids[-1] == prompter.stop_ids[0]
            assert rollout.text == prompter.decode(rollout.token_ids[:-1].tolist())
            assert rollout.logprobs.dtype == np.float32
            assert len(rollout.logprobs) == len(rollout.token_ids)
            assert rollout.images == len(request.item.images)


def test_prompts_are_the_trainers(
    fake: Fake, connect: Connect, train_items: list[Item], load_policy: Callable[..., Policy], images: ImageCache
) -> None:
    from medbridge.data import PromptSettings

    engine = connect(fake.url)
    engine.start()
    policy = load_policy()
    settings = PromptSettings(answer_style="text", system="")
    for request in requests_of(train_items[:3]):
        for rollout in draw(engine, [request])[0]:
            encoded = policy.encode(request.item, [rollout.permutation], settings, images)[0]
            assert rollout.prompt_tokens == len(encoded.ids)
    for body in fake.bodies():
        pictures = [Image.open(io.BytesIO(base64.b64decode(p["url"].split(",")[1]))) for p in body["content_parts"]]
        known = [np.asarray(images.get(item.images[0])) for item in train_items[:3]]
        assert any(np.array_equal(picture, np.asarray(pictures[0])) for picture in known)


def test_says_every_parameter_of_the_sampling(
    fake: Fake, connect: Connect, train_items: list[Item], prompter: Prompter
) -> None:
    from medbridge.rollout import GREEDY, Request

    engine = connect(fake.url)
    engine.start()
    one, other = (0, 1, 2), (2, 1, 0)
    draw(engine, [Request(train_items[0], (3, GREEDY, 4), (one, one, other))], stop=["never"], top_p=0.8)
    greedy, *drawn = sorted((body["sampling_params"] for body in fake.bodies()), key=lambda p: p["temperature"])
    assert (greedy["temperature"], greedy["top_p"]) == (0.0, 1.0)
    assert [(params["temperature"], params["top_p"]) for params in drawn] == [(0.7, 0.8)] * 2
    assert drawn[0]["seed"] != drawn[1]["seed"]
    for params in (greedy, *drawn):
        assert (params["n"], params["top_k"], params["min_p"], params["repetition_penalty"]) == (1, 0, 0.0, 1.0)
        assert (params["stop"], params["stop_token_ids"]) == (["never"], prompter.stop_ids)
        assert params["logit_bias"] == {str(token): -100.0 for token in prompter.banned}
        assert params["max_tokens"] == 8


def test_a_server_of_ours_is_asked_once_for_the_samples_of_an_option_order(train_items: list[Item]) -> None:
    from medbridge.rollout import GREEDY, Request
    from medbridge.rollout.server.generation import parts

    one, other = (0, 1, 2), (2, 1, 0)
    request = Request(train_items[0], (3, GREEDY, 4, 5, 6), (one, one, other, one, one))
    found = {(part.samples, part.positions, part.permutation, part.greedy) for part in parts(request, 2)}
    assert found == {
        ((3, 5), (0, 3), one, False),
        ((6,), (4,), one, False),
        ((GREEDY,), (1,), one, True),
        ((4,), (2,), other, False),
    }


def test_each_sample_has_its_own_seed_whichever_it_is_asked_with(train_items: list[Item], prompter: Prompter) -> None:
    from medbridge.rollout import Request, SamplingSettings
    from medbridge.rollout.server.generation import SEEDS, parts, sampling_params

    order = (0, 1, 2)

    def asked(*samples: int) -> dict[str, Any]:
        part = parts(Request(train_items[0], samples, (order,) * len(samples)), 99)[0]
        return sampling_params(part, SamplingSettings(), prompter, seed=0, max_tokens=5)

    together = asked(4, 7, 9)
    assert together["n"] == 3
    assert together["extra_args"][SEEDS] == [asked(sample)["seed"] for sample in (4, 7, 9)]
    assert together["seed"] == asked(4)["seed"] and "extra_args" not in asked(4)


def test_a_draw_depends_on_seed_item_and_sample_only(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    engine = connect(fake.url)
    engine.start()
    requests = requests_of(train_items[:6])
    first, again, other = draw(engine, requests), draw(engine, requests[::-1]), draw(engine, requests, seed=1)
    alone = by_sample([batch for request in requests for batch in draw(engine, [request])])
    changed = 0
    for key, rollout in by_sample(first).items():
        np.testing.assert_array_equal(rollout.token_ids, by_sample(again)[key].token_ids)
        np.testing.assert_array_equal(rollout.token_ids, alone[key].token_ids)
        changed += rollout.token_ids.tolist() != by_sample(other)[key].token_ids.tolist()
    assert changed == 6 * 3  # all but the greedy ones


def test_cuts_texts_before_stop_texts_and_tokens_after_them(
    fake: Fake, connect: Connect, train_items: list[Item], prompter: Prompter
) -> None:
    engine = connect(fake.url)
    engine.start()
    requests = requests_of(train_items[:1])
    plain = by_sample(draw(engine, requests))
    whole = plain[train_items[0].id, 0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = by_sample(draw(engine, requests, stop=["never", stop]))[train_items[0].id, 0]
    assert cut.text == whole[: whole.index(stop)]
    whole_ids = plain[train_items[0].id, 0].token_ids
    np.testing.assert_array_equal(cut.token_ids, whole_ids[: len(cut.token_ids)])
    assert stop in prompter.decode(cut.token_ids.tolist())
    assert stop not in prompter.decode(cut.token_ids[:-1].tolist())
    assert (cut.finish_reason, len(cut.logprobs)) == ("stop", len(cut.token_ids))


def test_a_cut_completion_says_so(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    engine = connect(fake.url)
    engine.start()
    for rollout in draw(engine, requests_of(train_items[:1]), max_new_tokens=2)[0]:
        assert rollout.finish_reason == "length"
        assert len(rollout.token_ids) == 2


def test_keeps_no_more_in_flight_than_the_server_decodes(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    fake.delay_s = 0.02
    engine = connect(fake.url, max_seqs=4)
    engine.start()
    batches = draw(engine, requests_of(train_items, 6))
    assert len(by_sample(batches)) == 7 * len(train_items)
    assert 1 < fake.most_in_flight <= 4
    assert max(body["sampling_params"]["n"] for body in fake.bodies()) <= 4


def test_nothing_asked_gives_nothing(fake: Fake, connect: Connect) -> None:
    engine = connect(fake.url)
    engine.start()
    assert draw(engine, []) == []


def test_a_finished_request_is_given_while_others_run(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    from medbridge.rollout import SamplingSettings

    held = threading.Event()
    requests = requests_of(train_items[:4], 1)

    def hold(path: str, body: Any) -> Any:
        if "allowed_token_ids" not in body["sampling_params"]:
            with fake.lock:
                fake.count = getattr(fake, "count", 0) + 1
            if fake.count > 4:
                held.wait(20)
        return fake.answer(path, body)

    engine = connect(fake.url)
    engine.start()
    fake.answers[GENERATE] = hold
    stream = engine.generate(requests, SamplingSettings(max_new_tokens=8), seed=0)
    first = next(stream)
    assert len(first) == 2
    held.set()
    assert len(by_sample([first, *stream])) == 8


def test_leaving_early_leaves_the_engine_usable(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    from medbridge.rollout import SamplingSettings

    engine = connect(fake.url, max_seqs=2)
    engine.start()
    fake.delay_s = 0.05
    stream = engine.generate(requests_of(train_items), SamplingSettings(max_new_tokens=8), seed=0)
    next(stream)
    stream.close()
    asked = len(fake.bodies())
    assert asked < 4 * len(train_items)
    fake.delay_s = 0
    assert len(draw(engine, requests_of(train_items[:2]))) == 2


def test_counts_tokens_and_cache_hits_since_its_start(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    fake.tokens = 1000
    engine = connect(fake.url)
    engine.start()
    rollouts = by_sample(draw(engine, requests_of(train_items[:2]))).values()
    drawn = sum(len(rollout.token_ids) for rollout in rollouts)
    stats = engine.stats()
    assert stats.completion_tokens == drawn
    assert stats.prompt_tokens == sum(rollout.prompt_tokens for rollout in rollouts)
    assert (stats.prefix_hits, stats.prefix_queries) == (2 * drawn, 3 * drawn)
    engine.close()
    assert engine.stats() == stats
    fake.tokens = 0
    engine.start()
    assert engine.stats() == stats


# -- before anything is sampled ----------------------------------------------------------------------------


def refusal(engine: ServerEngine) -> str:
    with pytest.raises(MedbridgeError) as caught:
        engine.start()
    assert engine._client is None
    return str(caught.value)


def test_no_server(fake: Fake, connect: Connect) -> None:
    fake.close()
    said = refusal(connect(fake.url))
    assert fake.url in said and "--enable-scale-out" in said and "--logprobs-mode processed_logprobs" in said


def test_key(fake: Fake, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "right"
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert f"Set {KEY_VARIABLE}" in refusal(connect(fake.url))
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    said = refusal(connect(fake.url))
    assert "refuses the key" in said and KEY_VARIABLE in said and "wrong" not in said
    monkeypatch.setenv(KEY_VARIABLE, "right")
    connect(fake.url).start()


def test_another_model(fake: Fake, connect: Connect, prompter: Prompter) -> None:
    fake.models = [{"id": "other", "root": "/models/other", "max_model_len": 100}]
    said = refusal(connect(fake.url))
    assert "other (/models/other)" in said and prompter.path in said and "--served-model-name" in said


@pytest.mark.parametrize("by", ["id", "root", "link"])
def test_the_model_under_either_of_its_names(
    fake: Fake, connect: Connect, prompter: Prompter, tmp_path: Path, by: str
) -> None:
    path = prompter.path
    if by == "link":
        (tmp_path / "link").symlink_to(path)
        path = str(tmp_path / "link")
    fake.models = [
        {"id": "a", "root": "b"},
        {"id": "c", "root": "d", "max_model_len": 300, ("id" if by == "id" else "root"): path},
    ]
    connect(fake.url).start()


def test_an_old_server(fake: Fake, connect: Connect) -> None:
    fake.version = "0.11.2"
    assert "runs vLLM 0.11.2" in refusal(connect(fake.url))


def test_raw_logprobs(fake: Fake, connect: Connect) -> None:
    fake.processed = False
    said = refusal(connect(fake.url))
    assert "raw log-probabilities" in said and "--logprobs-mode processed_logprobs" in said


@pytest.mark.parametrize(
    ("path", "answer", "word"),
    [
        (GENERATE, (403, {"error": {"message": "Scale-out endpoints are disabled."}}), "--enable-scale-out"),
        (GENERATE, (200, {"choices": [{"index": 0, "token_ids": [1], "logprobs": None}]}), "no log-probabilities"),
        ("/v1/models", (404, {}), "no vLLM server"),
        ("/v1/models", (200, "<html>"), "no vLLM server"),
        ("/version", (404, {}), "which vLLM"),
    ],
)
def test_what_lacks_something(fake: Fake, connect: Connect, path: str, answer: Any, word: str) -> None:
    fake.answers[path] = answer
    assert word in refusal(connect(fake.url))


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_sampled(
    fake: Fake, connect: Connect, train_items: list[Item]
) -> None:
    from dataclasses import replace

    engine = connect(fake.url)
    engine.start()
    long = replace(train_items[1], id="long-one", question="word " * 400)
    with pytest.raises(MedbridgeError, match=r"'long-one'.*400 with the answer"):
        draw(engine, requests_of([train_items[0], long]))
    assert fake.bodies() == []


def test_the_settings_may_ask_for_less_than_the_server_takes(
    fake: Fake, connect: Connect, train_items: list[Item]
) -> None:
    engine = connect(fake.url, max_length=100)
    engine.start()
    length = draw(engine, requests_of(train_items[:1], 1))[0][0].prompt_tokens
    draw(engine, requests_of(train_items[:1], 1), max_new_tokens=90)
    assert fake.bodies()[-1]["sampling_params"]["max_tokens"] <= 100 - length
    short = connect(fake.url, max_length=length)
    short.start()
    with pytest.raises(MedbridgeError, match=train_items[0].id):
        draw(short, requests_of(train_items[:1], 1))


# -- failures ----------------------------------------------------------------------------------------------


def failure(engine: ServerEngine, requests: list[Request]) -> Any:
    from medbridge.rollout import EngineFailure

    with pytest.raises(EngineFailure) as caught:
        draw(engine, requests)
    return caught.value


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((500, {"error": {"message": "EngineCore encountered an issue."}}), "died"),
        ((500, {"error": {"message": "CUDA out of memory. Tried to allocate"}}), "out of memory"),
        ((502, "bad gateway"), "died"),
        ((0, None), "died"),
    ],
)
def test_a_server_that_fails(fake: Fake, connect: Connect, train_items: list[Item], answer: Any, kind: str) -> None:
    engine = connect(fake.url)
    engine.start()
    fake.answers[GENERATE] = answer
    error = failure(engine, requests_of(train_items[:3]))
    assert (error.phase, error.kind) == ("sampling", kind)
    assert "\n" not in error.detail
    del fake.answers[GENERATE]
    engine.close()
    engine.start()
    assert len(draw(engine, requests_of(train_items[:3]))) == 3


def test_a_request_that_the_server_gives_up(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    def abort(path: str, body: Any) -> Any:
        status, answer = fake.answer(path, body)
        answer["choices"][0]["finish_reason"] = "abort"
        return status, answer

    engine = connect(fake.url)
    engine.start()
    fake.answers[GENERATE] = abort
    assert failure(engine, requests_of(train_items[:3])).kind == "died"


def test_a_kept_connection_that_was_just_closed_is_no_failure(
    fake: Fake, connect: Connect, train_items: list[Item]
) -> None:
    cut: list[Any] = []

    def once(path: str, body: Any) -> Any:
        if not cut:
            cut.append(body)
            return 0, None
        return fake.answer(path, body)

    engine = connect(fake.url)
    engine.start()
    fake.answers[GENERATE] = once
    assert len(draw(engine, requests_of(train_items[:3]))) == 3


def test_a_hung_server_is_noticed_and_what_was_done_is_given(
    fake: Fake, connect: Connect, train_items: list[Item]
) -> None:
    from medbridge.rollout import EngineFailure, SamplingSettings

    engine = connect(fake.url, stall_s=0.8)
    engine.start()
    over = threading.Event()
    first: list[Any] = []

    def hold_others(path: str, body: Any) -> Any:
        first.append(body["content_parts"])
        if body["content_parts"] != first[0]:
            over.wait(30)
        return fake.answer(path, body)

    fake.answers[GENERATE] = hold_others
    got = []
    with pytest.raises(EngineFailure) as caught:
        for batch in engine.generate(requests_of(train_items[:5], 1), SamplingSettings(max_new_tokens=8), seed=0):
            got.append(batch[0].item_id)
    over.set()
    assert (caught.value.phase, caught.value.kind) == ("sampling", "hung")
    assert "no token for" in str(caught.value)
    assert got and set(got) < {item.id for item in train_items[:5]}


def test_a_server_that_answers_nothing_at_all_is_hung(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    engine = connect(fake.url, stall_s=0.8)
    engine.start()
    over = threading.Event()
    for path in (GENERATE, "/metrics", "/health"):
        fake.answers[path] = lambda path, body: (over.wait(30), fake.answer(path, body))[1]
    error = failure(engine, requests_of(train_items[:1]))
    over.set()
    assert error.kind == "hung" and "nothing at all" in error.detail


def test_a_slow_server_whose_tokens_move_is_not_hung(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    engine = connect(fake.url, stall_s=0.8)
    engine.start()

    def slowly(path: str, body: Any) -> Any:
        for _ in range(15):
            time.sleep(0.1)
            fake.tokens += 1
        return fake.answer(path, body)

    fake.answers[GENERATE] = slowly
    assert len(draw(engine, requests_of(train_items[:1]))) == 1


def test_a_prompt_that_the_server_refuses_is_no_failure_of_the_engine(
    fake: Fake, connect: Connect, train_items: list[Item]
) -> None:
    engine = connect(fake.url)
    engine.start()
    fake.answers[GENERATE] = (400, {"error": {"message": "At most 0 image(s) may be provided"}})
    with pytest.raises(MedbridgeError, match="At most 0 image") as caught:
        draw(engine, requests_of(train_items[:1]))
    assert train_items[0].id in str(caught.value)


@pytest.mark.parametrize("change", ["another token", "one less", "no images", "no logprobs", "nan", "no ids"])
def test_an_answer_that_is_not_what_was_asked(
    fake: Fake, connect: Connect, train_items: list[Item], change: str
) -> None:
    def wrong(path: str, body: Any) -> Any:
        status, answer = fake.answer(path, body)
        if change == "another token":
            answer["prompt_token_ids"][0] += 1
        elif change == "one less":
            answer["prompt_token_ids"].pop()
        elif change == "no images":
            answer["mm_placeholders"] = None
        elif change == "no logprobs":
            answer["choices"][0]["logprobs"] = None
        elif change == "nan":
            answer["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0
        else:
            del answer["prompt_token_ids"]
        return status, answer

    engine = connect(fake.url)
    engine.start()
    fake.answers[GENERATE] = wrong
    with pytest.raises(MedbridgeError, match=train_items[0].id):
        draw(engine, requests_of(train_items[:1]))


def test_a_users_server_is_waited_for_when_it_was_there_before(
    fake: Fake, connect: Connect, train_items: list[Item], prompter: Prompter
) -> None:
    engine = connect(fake.url)
    engine.start()
    fake.close()
    error = failure(engine, requests_of(train_items[:1]))
    assert error.kind == "died"
    engine.close()
    back: list[Any] = []
    timer = threading.Timer(0.6, lambda: back.append(type(fake)(prompter, prompter.path, port=fake.port)))
    timer.start()
    engine.start()
    assert len(draw(engine, requests_of(train_items[:1]))) == 1
    back[0].close()


def test_a_users_server_that_does_not_come_back(fake: Fake, connect: Connect) -> None:
    from medbridge.rollout import EngineFailure

    engine = connect(fake.url, start_s=0.5)
    engine.start()
    engine.close()
    fake.close()
    with pytest.raises(EngineFailure, match=r"not back after 0\.5 s") as caught:
        engine.start()
    assert caught.value.phase == "start"


def test_it_starts_when_it_is_used_and_closes_twice(fake: Fake, connect: Connect, train_items: list[Item]) -> None:
    engine = connect(fake.url)
    assert len(draw(engine, requests_of(train_items[:1]))) == 1
    engine.close()
    engine.close()


# -- weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def weights(load_policy: Callable[..., Policy], tmp_path: Path) -> Any:
    from medbridge.rollout.weights import Weights

    made = Weights(load_policy(), 3, tmp_path)
    yield made
    made.release()


def test_new_weights(fake: Fake, connect: Connect, train_items: list[Item], weights: Any) -> None:
    engine = connect(fake.url)
    engine.start()
    assert draw(engine, requests_of(train_items[:1]))[0][0].weights == 0
    before = len(fake.asked)
    engine.update_weights(weights)
    assert [path for path, _ in fake.asked[before:]] == [
        "/pause", "/collective_rpc", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache", "/resume",
    ]  # fmt: skip
    files = fake.bodies("/collective_rpc")[0]["args"][0]
    assert [Path(file).is_file() for file in files] == [True] * len(files) != []
    assert draw(engine, requests_of(train_items[:1]))[0][0].weights == 3
    engine.close()
    engine.start()
    assert draw(engine, requests_of(train_items[:1]))[0][0].weights == 0


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/pause", (404, {}), ["VLLM_SERVER_DEV_MODE=1", "--worker-extension-cls"]),
        ("/collective_rpc", (404, {}), ["VLLM_SERVER_DEV_MODE=1", "--worker-extension-cls"]),
        ("/collective_rpc", (500, {"error": {"message": "no file"}}), ["no file", "same path"]),
        ("/collective_rpc", (200, {"results": [["lm_head"], []]}), ["'lm_head'"]),
        ("/reset_prefix_cache", (200, {"success": False}), ["prefix cache"]),
    ],
)
def test_a_server_that_does_not_take_weights(
    fake: Fake, connect: Connect, weights: Any, path: str, answer: Any, words: list[str]
) -> None:
    engine = connect(fake.url)
    engine.start()
    fake.answers[path] = answer
    with pytest.raises(MedbridgeError) as caught:
        engine.update_weights(weights)
    assert all(word in str(caught.value) for word in words)
    if path != "/pause":
        assert fake.asked[-1][0] in ("/resume", "/health")


def test_a_server_that_dies_under_new_weights(fake: Fake, connect: Connect, weights: Any) -> None:
    from medbridge.rollout import EngineFailure

    engine = connect(fake.url)
    engine.start()
    fake.answers["/collective_rpc"] = (0, None)
    fake.answers["/health"] = (503, "")
    with pytest.raises(EngineFailure) as caught:
        engine.update_weights(weights)
    assert (caught.value.phase, caught.value.kind) == ("weights", "died")


def test_a_server_that_hangs_under_new_weights(fake: Fake, connect: Connect, weights: Any) -> None:
    from medbridge.rollout import EngineFailure

    engine = connect(fake.url, stall_s=0.4)
    engine.start()
    over = threading.Event()
    fake.answers["/collective_rpc"] = lambda path, body: (over.wait(30), fake.answer(path, body))[1]
    with pytest.raises(EngineFailure) as caught:
        engine.update_weights(weights)
    over.set()
    assert (caught.value.phase, caught.value.kind) == ("weights", "hung")
