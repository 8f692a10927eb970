"""The pool: whatever its engines do, each request is answered once, or the run stops with the promised message."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.rollout import (
    GREEDY,
    EngineFailure,
    EngineStats,
    FailureSettings,
    Request,
    Rollout,
    SamplingSettings,
    TransformersEngine,
)
from medbridge.rollout.pool import Pool
from medbridge.rollout.sharing import TOGETHER
from medbridge.rollout.weights import Weights

PATIENCE = 60.0
"""Seconds after which a test that waits for something fails; none comes near it."""

SAMPLING = SamplingSettings(max_new_tokens=8)
ITEM = Item("d/train/0", "d", "train", "Which?", "yes", None, (), {}, 0.0)


def requests_of(count: int, samples: int = 2) -> list[Request]:
    numbers = tuple(range(samples))
    return [Request(replace(ITEM, id=f"i{n}"), numbers, ((),) * samples) for n in range(count)]


def weights(version: int) -> Weights:
    found = object.__new__(Weights)
    found.version = version
    return found


Failures = dict[int, Exception]
Result = TypeVar("Result")


class Scripted:
    """An engine that answers requests in their order, `width` samples at a time, and fails as it is told.

    `failures` gives what it raises in place of its k-th answer (over its whole life), `starts` how its starts fail, one
    after another. Two threads in it at once, or an answer before its start, fail the test.
    """

    name = "scripted"

    def __init__(self, failures: Failures | None = None, *, starts: Sequence[Exception | None] = (), width: int = 1):
        self.failures = failures or {}
        self.starts = list(starts)
        self.width = width
        self.poison: set[str] = set()
        self.calls: list[str] = []
        self.portions: list[int] = []
        self.at_failure: list[list[str]] = []  # items that were in work
        self.answered = 0
        self.version: int | None = None
        self.before_answer: Callable[[], None] = lambda: None
        self.before_start: Callable[[], None] = lambda: None
        self.on_sleep: list[Exception] = []
        self._user = threading.Lock()

    def _called(self, name: str) -> None:
        assert self._user.acquire(blocking=False), f"{name} while another thread is using the engine"
        self.calls.append(name)
        self._user.release()

    def start(self) -> None:
        self._called("start")
        self.before_start()
        failure = self.starts.pop(0) if self.starts else None
        if failure is not None:
            raise failure
        self.version = 0

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        assert self._user.acquire(blocking=False), "two threads generate on one engine"
        try:
            assert self.version is not None, "it was never started, or closed"
            self.portions.append(len(requests))
            waiting = list(requests)
            while waiting:
                self.before_answer()
                room = self.width
                working = []
                while waiting[len(working) :] and (not working or room >= len(waiting[len(working)].samples)):
                    room -= len(waiting[len(working)].samples)
                    working.append(waiting[len(working)])
                failure = self.failures.pop(self.answered, None)
                if failure is None and any(request.item.id in self.poison for request in working):
                    failure = died("poison")
                self.answered += 1
                if failure is not None:
                    self.at_failure.append([request.item.id for request in working])
                    self.version = None
                    raise failure
                answered = waiting.pop(self.answered % len(working))  # in any order
                yield [
                    Rollout(
                        answered.item.id, sample, order, f"{seed}", np.zeros(1, np.int32), np.zeros(1, np.float32),
                        "stop", 3, weights=self.version,
                    )
                    for sample, order in zip(answered.samples, answered.permutations, strict=True)
                ]  # fmt: skip
        finally:
            self._user.release()

    def update_weights(self, weights: Weights) -> None:
        self._called("update")
        assert self.version is not None
        self.version = weights.version

    def sleep(self) -> None:
        self._called("sleep")
        if self.on_sleep:
            raise self.on_sleep.pop()

    def stats(self) -> EngineStats:
        return EngineStats(completion_tokens=self.answered, prefix_hits=1, prefix_queries=2)

    def close(self) -> None:
        self._called("close")
        self.version = None


def died(detail: str = "exit -9") -> EngineFailure:
    return EngineFailure("sampling", "died", detail)


def hung() -> EngineFailure:
    return EngineFailure("sampling", "hung", "no token for 300 s")


class Case:
    """A pool of scripted engines, and what it said."""

    def __init__(self, *members: Scripted, restarts: int = 3, batch: int = 4) -> None:
        self.said: list[str] = []
        self.members = members
        self.pool = Pool(members, FailureSettings(restarts=restarts), self.said.append, batch=batch)

    def run(self, requests: Sequence[Request], seed: int = 0) -> list[Rollout]:
        """All rollouts; a pool that waits for ever fails the test."""
        return within_patience(lambda: [r for b in self.pool.generate(requests, SAMPLING, seed=seed) for r in b])


def within_patience(work: Callable[[], Result]) -> Result:
    executor = ThreadPoolExecutor(1)
    try:
        return executor.submit(work).result(PATIENCE)
    finally:
        executor.shutdown(wait=False)


def keys(rollouts: Sequence[Rollout]) -> Counter[tuple[str, int]]:
    return Counter((rollout.item_id, rollout.sample) for rollout in rollouts)


def wanted(requests: Sequence[Request]) -> Counter[tuple[str, int]]:
    return Counter((request.item.id, sample) for request in requests for sample in request.samples)


def meet(*members: Scripted) -> None:
    """Have no engine answer anything before each has been asked something."""
    barrier = threading.Barrier(len(members))
    for member in members:
        first = iter([True])
        member.before_answer = lambda first=first: barrier.wait(PATIENCE) if next(first, False) else None  # type: ignore


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


# -- sharing out ---------------------------------------------------------------------------------------------------


def test_one_engine_gets_everything_at_once() -> None:
    case = Case(Scripted())
    asked = requests_of(50)
    assert keys(case.run(asked)) == wanted(asked)
    assert case.members[0].portions == [50]
    assert case.members[0].calls == ["start"]
    assert case.said == []


def test_several_engines_get_equal_parts() -> None:
    members = [Scripted() for _ in range(4)]
    meet(*members)
    case = Case(*members, batch=8)
    asked = requests_of(42)
    assert keys(case.run(asked)) == wanted(asked)
    assert sorted(sum(member.portions) for member in members) == [9, 11, 11, 11]


def test_an_idle_engine_takes_over_what_a_slow_one_has_not_begun() -> None:
    slow, quick = Scripted(), Scripted()
    idle = threading.Event()
    turns = iter([lambda: None, lambda: wait_for(idle)])
    slow.before_answer = lambda: next(turns, lambda: None)()
    quick.stats = lambda: (idle.set(), EngineStats())[1]  # type: ignore[method-assign]
    case = Case(slow, quick, batch=2)
    asked = requests_of(80)
    answers = case.pool.generate(asked, SAMPLING, seed=0)
    found = within_patience(lambda: [rollout for batch in answers for rollout in batch])
    assert keys(found) == wanted(asked)
    assert len(quick.portions) >= 1 and sum(member.answered for member in (slow, quick)) == 80


def test_the_same_item_may_be_asked_twice_and_nothing_may_be_asked() -> None:
    case = Case(Scripted(), Scripted())
    one = requests_of(1, samples=3)[0]
    part = Request(one.item, one.samples[:1], one.permutations[:1])
    none = Request(one.item, (), ())
    asked = [one, part, one, none, part]
    assert keys(case.run(asked)) == wanted(asked)
    assert case.run([]) == [] and case.run([none]) == []


def test_answers_are_handed_on_together_up_to_a_limit() -> None:
    """A caller that was busy gets many at once, and not so many that much hangs on storing them."""

    class Chatty(Scripted):
        def generate(self, *args: Any, **named: Any) -> Iterator[list[Rollout]]:
            for batch in super().generate(*args, **named):
                yield []
                yield batch

    case = Case(Chatty())
    case.pool.start()
    sizes: list[int] = []
    for batch in case.pool.generate(requests_of(300, samples=1), SAMPLING, seed=0):
        if not sizes:
            while case.members[0].answered < 300:
                time.sleep(0.001)
        sizes.append(len(batch))
    assert sum(sizes) == 300 and len(sizes) < 50
    assert max(sizes) == TOGETHER


def test_rollouts_are_those_of_one_engine_alone(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    prompts = PromptSettings(answer_style="text", system="")
    engines = [TransformersEngine(load_policy(), prompts, images, batch_size=8) for _ in range(3)]
    numbers = (GREEDY, 0, 1, 2)
    asked = [Request(i, numbers, tuple(permutation(i, 0, n) for n in numbers)) for i in train_items]
    alone = {(r.item_id, r.sample): r for b in engines[0].generate(asked, SAMPLING, seed=5) for r in b}
    pool = Pool(engines, FailureSettings(), pytest.fail, batch=8)
    pool.start()
    shared = [r for b in pool.generate(asked, SAMPLING, seed=5) for r in b]
    assert len(shared) == len(alone) == 4 * len(train_items)
    for rollout in shared:
        other = alone[rollout.item_id, rollout.sample]
        assert (rollout.text, rollout.token_ids.tolist()) == (other.text, other.token_ids.tolist())
        np.testing.assert_allclose(rollout.logprobs, other.logprobs, atol=1e-4)
    assert pool.stats().completion_tokens >= sum(len(rollout.token_ids) for rollout in shared)
    pool.close()


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [died(), hung(), EngineFailure("sampling", "out of memory", "CUDA")])
def test_an_engine_that_fails_is_restarted_and_its_requests_are_sampled_again(failure: EngineFailure) -> None:
    case = Case(Scripted({10: failure}))
    asked = requests_of(50)
    assert keys(case.run(asked)) == wanted(asked)
    assert case.members[0].calls == ["start", "close", "start"]
    assert case.said == [f"scripted engine {failure}. It is started again (restart 1 of 3)."]
    assert case.pool.stats().restarts == 1


def test_a_restarted_engine_has_the_newest_weights() -> None:
    first, second = Scripted(), Scripted({3: died()})
    case = Case(first, second, batch=50)
    meet(first, second)
    case.pool.start()
    for version in (1, 2):
        case.pool.update_weights(weights(version))
    assert {rollout.weights for rollout in case.run(requests_of(30))} == {2}
    assert second.calls == ["start", "update", "update", "close", "start", "update"]
    assert first.calls == ["start", "update", "update"]


def test_others_go_on_while_one_is_restarted_and_nobody_waits_for_it_at_the_end() -> None:
    back, done = threading.Event(), threading.Event()
    broken, sound = Scripted({0: died()}), Scripted()
    case = Case(broken, sound)
    case.pool.start()
    broken.before_start = lambda: wait_for(back)
    asked = requests_of(40)
    assert keys(case.run(asked)) == wanted(asked)  # which ends although the restart does not
    assert broken.answered <= 1
    case.pool.update_weights(weights(7))  # and so do other calls
    assert sound.calls[-1] == "update" and "update" not in broken.calls
    checked: list[Any] = []
    case.pool.on_each(checked.append)
    assert checked == [sound]
    broken.before_answer = done.set
    sound.before_answer = lambda: wait_for(done)
    back.set()
    found = case.run(asked)
    assert keys(found) == wanted(asked)
    assert {rollout.weights for rollout in found} == {7}


def test_a_request_lost_twice_stops_the_run_and_is_named() -> None:
    member = Scripted()
    member.poison = {"i17"}
    case = Case(member, restarts=9)
    got: list[Rollout] = []
    with pytest.raises(MedbridgeError, match=r"'i17'.*two failures(.|\n)*poison(.|\n)*poison(.|\n)*same command again"):
        for batch in case.pool.generate(requests_of(50), SAMPLING, seed=0):
            got += batch
    assert max(keys(got).values()) == 1 and ("i17", 0) not in keys(got)
    assert len(keys(got)) >= 2 * 16  # all before it were answered
    assert case.pool.stats().restarts == 1  # it would be of no use to start it a second time


def test_requests_that_a_failing_engine_had_not_begun_are_not_lost() -> None:
    """Five failures among many requests: none is in work at two of them."""
    member = Scripted({n: died() for n in (5, 30, 60, 90, 95)}, width=4)
    case = Case(member, restarts=5)
    asked = requests_of(100)
    assert keys(case.run(asked)) == wanted(asked)
    assert len(member.at_failure) == 5


def test_an_engine_without_restarts_left_is_given_up_and_others_go_on() -> None:
    broken = Scripted({0: died()}, starts=[None, died("no GPU"), died("no GPU")])
    sound = Scripted()
    case = Case(broken, sound, restarts=2)
    case.pool.start()
    asked = requests_of(30)
    sound.before_answer = lambda: None
    assert keys(case.run(asked)) == wanted(asked)
    assert keys(case.run(asked)) == wanted(asked)
    assert broken.calls.count("start") <= 3
    if broken.at_failure:  # else the other was quicker
        assert "scripted engine 1 of 2 died while in phase 'sampling'" in case.said[0]
        case.pool.update_weights(weights(1))
        assert {rollout.weights for rollout in case.run(asked)} == {1}


def test_when_no_engine_is_left_the_run_stops_and_says_how_to_go_on() -> None:
    case = Case(
        Scripted({8: died()}, starts=[None, *[EngineFailure("start", "hung", "silent for 900 s")] * 2]), restarts=2
    )
    got: list[Rollout] = []
    with pytest.raises(MedbridgeError, match=r"no rollout engine is left: .*'start': silent for 900 s") as caught:
        for batch in case.pool.generate(requests_of(30), SAMPLING, seed=0):
            got += batch
    assert "rollout.failure.restarts: 2" in str(caught.value) and "same command again" in str(caught.value)
    assert len(keys(got)) == 8 * 2
    assert case.members[0].calls == ["start", "close", "start", "close", "start", "close"]
    assert [line.split("(")[-1] for line in case.said] == ["restart 1 of 2).", "restart 2 of 2)."]
    for call in (case.pool.start, lambda: case.pool.update_weights(weights(1)), lambda: case.run(requests_of(1))):
        with pytest.raises(MedbridgeError, match="no rollout engine is left"):
            call()


def test_restarts_are_counted_over_all_engines_and_calls() -> None:
    case = Case(*(Scripted({1: died()}) for _ in range(3)), restarts=2, batch=50)
    meet(*case.members)
    asked = requests_of(60)
    for _ in range(2):
        assert keys(case.run(asked)) == wanted(asked)
    assert case.pool.stats().restarts == 2
    assert sum(bool(member.at_failure) for member in case.members) == 3
    assert "2 of 3 engines go on without it" in case.said[-1]


def test_a_wrong_request_stops_everything_and_what_was_finished_is_kept() -> None:
    wrong = Scripted({5: MedbridgeError("item 'i5': its prompt is too long")})  # type: ignore[dict-item]
    other = Scripted()
    case = Case(wrong, other)
    got: list[Rollout] = []
    with pytest.raises(MedbridgeError, match="prompt is too long"):
        for batch in case.pool.generate(requests_of(40), SAMPLING, seed=0):
            got += batch
    assert len(keys(got)) == 2 * (5 + other.answered)
    assert case.said == []
    wrong.version = 0
    assert len(case.run(requests_of(10))) == 20  # the pool is as before


def test_nobody_waits_long_for_an_engine_that_hangs_when_all_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medbridge.rollout.sharing.PATIENCE_S", 0.2)
    hangs, wrong = Scripted(), Scripted({0: MedbridgeError("too long")})  # type: ignore[dict-item]
    begun, released, ended = threading.Event(), threading.Event(), threading.Event()
    hangs.before_answer = lambda: (begun.set(), wait_for(released))[1]
    wrong.before_answer = lambda: wait_for(begun)
    case = Case(hangs, wrong)
    with pytest.raises(MedbridgeError, match="too long"):
        case.run(requests_of(10))
    case.pool.sleep()
    within_patience(case.pool.close)
    assert hangs.calls == ["start"] and wrong.calls == ["start", "sleep", "close"]
    real = hangs.close
    hangs.close = lambda: (real(), ended.set())[0]  # type: ignore[method-assign]
    released.set()
    wait_for(ended)
    assert hangs.version is None


def test_an_engine_that_answers_what_nobody_asked_is_found_out() -> None:
    class Twice(Scripted):
        def generate(self, requests: Sequence[Request], *args: Any, **named: Any) -> Iterator[list[Rollout]]:
            for batch in super().generate(requests, *args, **named):
                yield [*batch, *batch]

    class Half(Scripted):
        def generate(self, requests: Sequence[Request], *args: Any, **named: Any) -> Iterator[list[Rollout]]:
            for batch in super().generate(requests, *args, **named):
                yield batch[:1]

    class Silent(Scripted):
        def generate(self, requests: Sequence[Request], *args: Any, **named: Any) -> Iterator[list[Rollout]]:
            yield from super().generate(requests[1:], *args, **named)

    for kind, words in ((Twice, "nobody waits for"), (Half, "nobody waits for"), (Silent, "without a word about 1")):
        with pytest.raises(RuntimeError, match=words):
            Case(kind()).run(requests_of(5))


# -- the caller's own errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["error", "close"])
def test_a_caller_that_stops_leaves_the_engines_clean(how: str) -> None:
    case = Case(Scripted(), Scripted())
    case.pool.start()
    for member in case.members:
        member.before_answer = lambda: time.sleep(0.001)
    stream = case.pool.generate(requests_of(4000), SAMPLING, seed=0)
    next(stream)
    if how == "close":
        within_patience(stream.close)  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError, match="disk"):
            for _ in stream:
                raise ValueError("disk full")
        del stream
    for member in case.members:
        assert member._user.acquire(blocking=False), "its generator is still open"
        member._user.release()
    asked = requests_of(30)
    assert keys(case.run(asked)) == wanted(asked)
    assert all(member.calls == ["start"] for member in case.members)


def test_closing_in_the_middle_ends_everything() -> None:
    case = Case(Scripted(), Scripted())
    for member in case.members:
        member.before_answer = lambda: time.sleep(0.001)
    stream = case.pool.generate(requests_of(4000), SAMPLING, seed=0)
    next(stream)
    within_patience(case.pool.close)
    assert all(member.version is None for member in case.members)
    with pytest.raises(RuntimeError, match="closed while it was sampling"):
        list(stream)


def test_an_engine_that_is_starting_anew_when_the_pool_is_closed_ends_with_its_start() -> None:
    back = threading.Event()
    closed = threading.Event()
    broken, sound = Scripted({0: died()}), Scripted()
    sound.before_answer = lambda: wait_for(failed)
    failed = threading.Event()
    case = Case(broken, sound)
    case.pool.start()
    broken.before_start = lambda: (failed.set(), wait_for(back))[0]
    case.run(requests_of(20))
    within_patience(case.pool.close)
    assert broken.calls[-1] == "start" and sound.calls[-1] == "close"
    real = broken.close
    broken.close = lambda: (real(), closed.set())[0]  # type: ignore[method-assign]
    back.set()
    wait_for(closed)
    assert broken.version is None


# -- all engines ---------------------------------------------------------------------------------------------------


def test_engines_start_at_the_same_time_and_once() -> None:
    members = [Scripted() for _ in range(3)]
    together = threading.Barrier(3)
    for member in members:
        member.before_start = lambda: (together.wait(PATIENCE), None)[1]
    case = Case(*members)
    case.pool.start()
    case.pool.start()
    assert all(member.calls == ["start"] for member in members)


def test_an_engine_that_does_not_start_is_tried_again_and_a_user_error_is_raised() -> None:
    case = Case(Scripted(starts=[died("port taken"), None]), Scripted())
    case.pool.start()
    assert case.members[0].calls == ["start", "close", "start"]
    wrong = Case(Scripted(starts=[MedbridgeError("no such server")]), Scripted())
    with pytest.raises(MedbridgeError, match="no such server"):
        wrong.pool.start()


def test_sleep_reaches_all_that_run_and_a_failure_there_is_mended() -> None:
    case = Case(Scripted(), Scripted())
    case.pool.sleep()
    assert all(member.calls == [] for member in case.members)
    case.pool.start()
    case.members[1].on_sleep = [EngineFailure("sleep", "hung", "silent")]
    case.pool.sleep()
    assert case.members[0].calls == ["start", "sleep"]
    assert case.members[1].calls == ["start", "sleep", "close", "start", "sleep"]


def test_counts_add_up() -> None:
    case = Case(Scripted(), Scripted({2: died()}), batch=50)
    meet(*case.members)
    assert case.pool.stats() == EngineStats()
    case.run(requests_of(30))
    total = case.pool.stats()
    assert (total.prefix_hits, total.prefix_queries) == (2, 4)
    assert total.completion_tokens <= sum(member.answered for member in case.members)
    assert total.restarts == 1


def test_a_check_runs_on_each_engine_and_its_verdict_comes_through() -> None:
    case = Case(Scripted(), Scripted())
    seen: list[Any] = []
    failures = [EngineFailure("sampling", "died", "during the check")]

    def check(engine: Any) -> None:
        seen.append(engine)
        if failures:
            raise failures.pop()

    case.pool.on_each(check)
    assert seen == [case.members[0], case.members[0], case.members[1]]
    assert case.members[0].calls == ["start", "close", "start"]

    def mismatch(engine: Any) -> None:
        raise MedbridgeError("stale")

    with pytest.raises(MedbridgeError, match="stale"):
        case.pool.on_each(mismatch)


# -- any schedule of failures --------------------------------------------------------------------------------------

failure_kinds = st.sampled_from(["died", "hung", "out of memory"])


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Scripted], list[Request], int, int]:
    batch = draw(st.integers(1, 6))
    members = []
    for _ in range(draw(st.integers(1, 4))):
        failures = {
            at: EngineFailure("sampling", draw(failure_kinds), f"at {at}")
            for at in draw(st.sets(st.integers(0, 25), max_size=4))
        }
        starts = [
            EngineFailure("start", "died", "at its start") if bad else None
            for bad in draw(st.lists(st.booleans(), max_size=4))
        ]
        members.append(Scripted(failures, starts=starts, width=batch))
    asked = [
        Request(replace(ITEM, id=f"i{n % 30}"), tuple(range(count)), ((),) * count)
        for n, count in enumerate(draw(st.lists(st.integers(0, 4), max_size=40)))
    ]
    if asked and draw(st.booleans()):
        poison = {draw(st.sampled_from(asked)).item.id}
        for member in members:
            member.poison = poison
    return members, asked, batch, draw(st.integers(0, 5))


@settings(max_examples=300, deadline=None)
@given(schedules())
def test_every_request_is_answered_once_or_the_run_stops_as_promised(
    schedule: tuple[list[Scripted], list[Request], int, int],
) -> None:
    members, asked, batch, restarts = schedule
    case = Case(*members, restarts=restarts, batch=batch)
    got: list[Rollout] = []
    error = ""

    def consume() -> None:
        for found in case.pool.generate(asked, SAMPLING, seed=0):
            assert found
            got.extend(found)

    try:
        within_patience(consume)
    except MedbridgeError as caught:
        error = str(caught)
    assert not keys(got) - wanted(asked)
    lost = Counter(item_id for member in members for ids in member.at_failure for item_id in ids)
    if not error:
        assert keys(got) == wanted(asked)
    elif "no rollout engine is left" in error:
        assert case.pool.stats().restarts == restarts
    else:
        assert "two failures" in error
        assert case.pool.stats().restarts <= restarts
        assert any(count > 1 and repr(item_id) in error for item_id, count in lost.items()), (error, lost)
    assert not any(line for line in case.said if "died" not in line and "hung" not in line and "memory" not in line)
    within_patience(case.pool.close)
