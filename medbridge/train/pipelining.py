"""Sampling ahead: the next batches are drawn by a thread of their own while the present one is trained on.

What is drawn is decided by the settings and not by who is faster: the batch of a step comes from the weights of
`RlSettings.version`, always. Here stands in which order things happen and who waits for whom, nothing of what they are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from medbridge.train.groups import Batch, GroupSampler

if TYPE_CHECKING:
    from medbridge.train.rl_settings import RlSettings

PATIENCE_S = 15.0
"""How long a training that ends early waits for the sampling thread to come to the end of a portion."""


class Pipeline:
    """Batches of the steps behind `start`, drawn up to `staleness` steps ahead; a context, which ends the thread.

    After step t the trainer waits for what is being sampled, brings the weights to the engine, and trains on while the
    batch of step t + 1 + staleness is sampled. So weights never change while they are read, the engine has one caller
    at a time, and when step t is saved all batches that older weights had to draw are stored: a resumed run needs none
    of those weights. With a staleness of 0 there is no thread: each batch is drawn when it is taken, and the engine
    rests while it is trained on.
    """

    def __init__(self, sampler: GroupSampler, settings: RlSettings, *, start: int) -> None:
        """`sampler` has drawn the batches up to that of step `start`."""
        self._sampler = sampler
        self._rollouts = sampler.rollouts
        self._settings = settings
        self._start = start
        self._closing = threading.Event()
        self._worker = _Worker() if settings.staleness else None
        self._batches: dict[int, Future[Batch]] = {}
        self._seconds = {"seconds_sampling": 0.0, "seconds_syncing": 0.0}

    def __enter__(self) -> Pipeline:
        with self._counted("seconds_syncing"):
            self._rollouts.sync(self._start)
        for step in range(self._start + 1, self._start + 2 + self._settings.staleness):
            self._begin(step)
        if self._worker is not None:
            self._worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        if self._worker is not None:
            self._worker.end()

    def take(self, step: int) -> Batch:
        """The batch of a step; waits for it.

        Raises:
            Exception: what the sampling of it, or of a step before it, has raised.
        """
        with self._counted("seconds_sampling"):
            if self._worker is not None:
                return self._batches.pop(step).result()
            batch = self._sampler.draw(step)
            self._rollouts.rest()
            return batch

    def trained(self, step: int) -> None:
        """Weights are those after `step` now: bring them to the engine where it is their turn, and sample on.

        Raises:
            Exception: what the sampling of a step, or bringing the weights, has raised.
        """
        if step == self._settings.steps:
            return
        if step % self._settings.sync_every == 0:
            with self._counted("seconds_sampling"):
                for batch in self._batches.values():
                    batch.result()
            with self._counted("seconds_syncing"):
                self._rollouts.sync(step)
        self._begin(step + 1 + self._settings.staleness)

    def take_seconds(self) -> dict[str, float]:
        """Seconds that the trainer has waited since the last call: "seconds_sampling" and "seconds_syncing"."""
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return taken

    def _begin(self, step: int) -> None:
        if self._worker is not None and step <= self._settings.steps:
            self._batches[step] = self._worker.submit(lambda: self._sampler.draw(step, self._closing.is_set))

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - began


class _Worker:
    """A thread that runs jobs one after the other. Behind one that fails, none is run: they fail as it did."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # a daemon: an engine that hangs must not keep the process
        self._thread = threading.Thread(target=self._run, name="medbridge sampling", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Callable[[], Batch]) -> Future[Batch]:
        future: Future[Batch] = Future()
        self._jobs.put((future, job))
        return future

    def end(self) -> None:
        """Let it come to the end of what it is at; jobs behind that see for themselves that they are to stop."""
        self._jobs.put(None)
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        failure: BaseException | None = None
        while (entry := self._jobs.get()) is not None:
            future, job = entry
            try:
                if failure is not None:
                    raise failure
                future.set_result(job())
            except BaseException as error:
                failure = error
                future.set_exception(error)
