"""Sampling ahead: who waits for whom, which weights a batch gets, and how it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from medbridge.train import RlSettings
from medbridge.train.groups import Batch, Stopped
from medbridge.train.pipelining import Pipeline


class Stage:
    """A training whose weights are a number, with its sampler and engine.

    They watch that the engine has one caller at a time, and one version of the weights while a batch is drawn.
    """

    def __init__(self, *, drawing_s: float = 0.0, **settings: Any) -> None:
        self.settings = RlSettings(steps=8, checkpoint_every=6, **settings)
        self.drawing_s = drawing_s
        self.weights = self.engine = 0
        self.busy = threading.Lock()
        self.versions: dict[int, int] = {}
        self.synced: list[int] = []
        self.rested: list[int] = []
        self.drawn_when: dict[int, int] = {}
        self.threads: set[str] = set()

    @property
    def rollouts(self) -> Stage:
        return self

    def rest(self) -> None:
        self.rested.append(self.weights + 1)

    def draw(self, step: int, stopped: Callable[[], bool] = lambda: False) -> Batch:
        assert self.busy.acquire(blocking=False), "the engine has two callers"
        self.threads.add(threading.current_thread().name)
        before = self.engine
        time.sleep(self.drawing_s)
        if stopped():
            self.busy.release()
            raise Stopped
        assert self.engine == before, "weights changed while they were sampled from"
        self.versions[step], self.drawn_when[step] = self.engine, self.weights
        self.busy.release()
        return Batch([], [], step, 0, 0.0)

    def sync(self, version: int) -> None:
        with self.busy:
            assert version == self.weights
            self.engine = version
            self.synced.append(version)

    def pipeline(self, start: int = 0) -> Pipeline:
        return Pipeline(self, self.settings, start=start)  # type: ignore[arg-type]

    def train(self, start: int = 0, fail_at: int | None = None) -> None:
        self.weights = start
        with self.pipeline(start) as pipeline:
            for step in range(start + 1, self.settings.steps + 1):
                assert pipeline.take(step).position == step
                if step == fail_at:
                    raise ZeroDivisionError
                self.weights = step
                pipeline.trained(step)


@pytest.mark.parametrize("staleness", [0, 1, 2, 8])
@pytest.mark.parametrize("drawing_s", [0.0, 0.01])
def test_each_batch_gets_the_weights_it_was_promised(staleness: int, drawing_s: float) -> None:
    stage = Stage(staleness=staleness, drawing_s=drawing_s)
    stage.train()
    assert stage.versions == {step: stage.settings.version(step) for step in range(1, 9)}
    assert stage.synced == list(range(8))  # not behind the last step, which nothing is sampled for
    in_main = stage.threads == {threading.main_thread().name}
    assert in_main == (staleness == 0)
    assert stage.rested == ([] if staleness else list(range(1, 9)))  # the engine rests while the trainer doesn't


def test_the_next_batch_is_drawn_while_this_one_trains() -> None:
    stage = Stage(staleness=1)
    begun = threading.Event()
    draw = stage.draw

    def drawing(step: int, stopped: Callable[[], bool] = bool) -> Batch:
        if step == 3:
            begun.set()
        return draw(step, stopped)

    stage.draw = drawing  # type: ignore[method-assign]
    with stage.pipeline() as pipeline:
        pipeline.take(1)
        stage.weights = 1
        pipeline.trained(1)
        pipeline.take(2)
        assert begun.wait(10)  # step 2 is "in training" here
    assert stage.synced == [0, 1]


def test_weights_travel_every_so_many_steps() -> None:
    stage = Stage(sync_every=3, staleness=1)
    stage.train()
    assert stage.synced == [0, 3, 6]
    assert stage.versions == {1: 0, 2: 0, 3: 0, 4: 0, 5: 3, 6: 3, 7: 3, 8: 6}


def test_when_a_step_is_saved_older_weights_have_drawn_all_that_they_had_to() -> None:
    """Right after `trained(step)`, where the checkpoint is written: what was drawn by then needs no older weights."""
    for staleness in (1, 3):
        stage = Stage(staleness=staleness, drawing_s=0.002)
        with stage.pipeline() as pipeline:
            for step in range(1, 8):
                pipeline.take(step)
                stage.weights = step
                pipeline.trained(step)
                lacking = [later for later in range(1, 9) if later not in stage.versions]
                assert all(stage.settings.version(later) >= step for later in lacking)


def test_waiting_is_counted_apart() -> None:
    stage = Stage(staleness=1, drawing_s=0.02)
    with stage.pipeline() as pipeline:
        pipeline.take(1)
        first = pipeline.take_seconds()
        assert first["seconds_sampling"] > 0 and first["seconds_syncing"] >= 0
        assert pipeline.take_seconds() == {"seconds_sampling": 0.0, "seconds_syncing": 0.0}
        stage.weights = 1
        pipeline.trained(1)
        assert pipeline.take_seconds()["seconds_sampling"] > 0  # for the batch that is drawn ahead


@pytest.mark.parametrize("staleness", [0, 2])
def test_errors_of_the_thread_reach_the_trainer(staleness: int) -> None:
    stage = Stage(staleness=staleness)
    draw = stage.draw

    def failing(step: int, stopped: Callable[[], bool] = bool) -> Batch:
        if step == 3:
            raise ConnectionError("gone")
        return draw(step, stopped)

    stage.draw = failing  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="gone"):
        stage.train()
    assert sorted(stage.versions) == [1, 2]  # nothing was drawn behind it
    assert not [thread for thread in threading.enumerate() if thread.name == "medbridge sampling"]


def test_a_training_that_fails_ends_the_thread() -> None:
    stage = Stage(staleness=3, drawing_s=0.01)
    with pytest.raises(ZeroDivisionError):
        stage.train(fail_at=2)
    assert not [thread for thread in threading.enumerate() if thread.name == "medbridge sampling"]
    assert len(stage.versions) < 8


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Where the tests run in the background, ctrl-C is ignored from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_trainer_waits() -> None:
    stage = Stage(staleness=1)
    main = threading.main_thread().ident
    assert main is not None
    draw = stage.draw

    def interrupted(step: int, stopped: Callable[[], bool] = bool) -> Batch:
        if step == 2:
            time.sleep(0.05)  # the trainer is through with the first step and waits
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
        return draw(step, stopped)

    stage.draw = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stage.train()
    assert not [thread for thread in threading.enumerate() if thread.name == "medbridge sampling"]


def test_an_engine_that_hangs_does_not_keep_a_training_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medbridge.train.pipelining.PATIENCE_S", 0.05)
    release = threading.Event()
    stage = Stage(staleness=1)

    def hangs(step: int, stopped: Callable[[], bool] = bool) -> Batch:
        release.wait(30)
        raise Stopped

    stage.draw = hangs  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), stage.pipeline():
        raise ZeroDivisionError
    thread = next(thread for thread in threading.enumerate() if thread.name == "medbridge sampling")
    assert thread.daemon
    release.set()
    thread.join(10)
    assert not thread.is_alive()
