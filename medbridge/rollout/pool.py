"""Several engines behind the protocol of one: requests shared out, failed engines restarted, each rollout yielded once.

Engines tell of their failures themselves (`EngineFailure`); what is done about them is decided here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from medbridge.errors import MedbridgeError
from medbridge.rollout.engine import Engine, EngineFailure, EngineStats, Request, Rollout, SamplingSettings
from medbridge.rollout.settings import FailureSettings
from medbridge.rollout.sharing import Portion, Share

if TYPE_CHECKING:
    from medbridge.rollout.weights import Weights

STATS_S = 0.5
"""Seconds between two looks at the counts of an engine that is sampling: a look may be a question to its process."""


class _Seat:
    """One engine of the pool and how it stands. Its lock is held by the one thread that uses the engine."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.lock = threading.Lock()
        self.live = True  # False: it failed when no restart was left
        self.started = False
        self.failure: EngineFailure | None = None  # what it has to be restarted for
        self.weights: Weights | None = None
        self.stats = EngineStats()
        self._looked = 0.0

    def look(self, *, now: bool = False) -> None:
        """Note the engine's counts, which only the thread that uses it may ask for."""
        if now or time.monotonic() - self._looked > STATS_S:
            self.stats, self._looked = self.engine.stats(), time.monotonic()

    def stop(self) -> None:
        self.started, self.weights = False, None
        self.engine.close()


class Pool:
    """Engines that share out requests. One that fails is restarted with the newest weights; others go on meanwhile.

    Restarts are counted over all engines and the pool's whole life. An engine that fails when none is left is given up;
    when the last one is, a MedbridgeError says what happened. Requests that a failing engine was at are sampled
    again; one that is lost twice is more likely the cause than the victim, and stops the run.
    """

    def __init__(
        self, members: Sequence[Engine], failure: FailureSettings, say: Callable[[str], None], *, batch: int = 256
    ) -> None:
        """`say` is told of each failure and what is done about it; `batch` completions fill one engine."""
        self.name = members[0].name
        self.members = tuple(members)
        self._allowed = failure.restarts
        self._say = say
        self._batch = batch
        self._seats = [
            _Seat(engine, f"{engine.name} engine" + (f" {number} of {len(members)}" if len(members) > 1 else ""))
            for number, engine in enumerate(members, start=1)
        ]
        self._lock = threading.Lock()
        self._restarts = 0
        self._last = ""
        self._newest: Weights | None = None
        self._share: Share | None = None
        self._closed = False

    # -- all engines ---------------------------------------------------------------------------------------

    def start(self) -> None:
        self._closed = False
        self._each(self._live(), lambda engine: None)

    def update_weights(self, weights: Weights) -> None:
        self._newest = weights
        self._each(self._live(), lambda engine: None)  # `_ready` brings them, also to an engine that is starting anew

    def sleep(self) -> None:
        self._each([seat for seat in self._live() if seat.started], lambda engine: engine.sleep())

    def stats(self) -> EngineStats:
        return sum((seat.stats for seat in self._seats), EngineStats(restarts=self._restarts))

    def close(self) -> None:
        self._closed = True
        if self._share is not None:
            self._share.stop(RuntimeError("the pool was closed while it was sampling"))
            self._share.wait_until_left()
        for seat in self._seats:
            # one that is in use is starting anew or hangs; its thread stops it when that has ended
            if seat.lock.acquire(blocking=False):
                try:
                    seat.stop()
                finally:
                    seat.lock.release()

    def on_each(self, action: Callable[[Engine], None]) -> None:
        """Do something on one engine after another, such as a check, in this thread; one that fails is restarted.

        Not on an engine that is being restarted at the time, unless all are.
        """
        self._each(self._live(), action, together=False)

    def _live(self) -> list[_Seat]:
        return [seat for seat in self._seats if seat.live]

    def _each(self, seats: Sequence[_Seat], action: Callable[[Engine], None], *, together: bool = True) -> None:
        """Do something on engines when they are ready; not on those that another thread restarts."""
        held = [seat for seat in seats if seat.lock.acquire(blocking=False)]
        if not held:  # all are starting anew, and there is nothing to go on with
            held = [seat for seat in seats if seat.lock.acquire()]
        errors: list[BaseException] = []

        def work(seat: _Seat) -> None:
            try:
                while not errors and self._ready(seat):
                    try:
                        action(seat.engine)
                        return
                    except EngineFailure as failure:
                        seat.failure = failure
            except BaseException as error:
                errors.append(error)
            finally:
                seat.lock.release()

        others = held[1:] if together else []
        threads = [threading.Thread(target=work, args=(seat,), name=seat.name, daemon=True) for seat in others]
        for thread in threads:
            thread.start()
        for seat in held[: len(held) - len(others)]:
            work(seat)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self._require_one()

    # -- sampling ------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        self._require_one()
        self._closed = False
        seats = self._live()
        share = self._share = Share(requests, engines=len(seats), batch=self._batch)
        try:
            for seat in seats:
                share.enter()
                threading.Thread(
                    target=self._work, args=(seat, share, sampling, seed), name=seat.name, daemon=True
                ).start()
            yield from share.results()
        finally:
            share.stop()
            share.wait_until_left()

    def _work(self, seat: _Seat, share: Share, sampling: SamplingSettings, seed: int) -> None:
        """The thread of one engine during one call."""
        if not seat.lock.acquire(blocking=False):
            with share.away():  # the thread of an earlier call is still restarting it
                seat.lock.acquire()
        try:
            while share.wanted():
                if not self._is_ready(seat):
                    with share.away():
                        self._ready(seat, share)
                    if not seat.live:
                        self._require_one()
                        break
                portion = share.take()
                if portion.jobs:
                    self._sample(seat, share, portion, sampling, seed)
        except BaseException as error:
            share.stop(error)  # raised in the caller's thread
        finally:
            try:
                if self._closed:
                    seat.stop()
            finally:
                seat.lock.release()
                share.leave()

    def _sample(self, seat: _Seat, share: Share, portion: Portion, sampling: SamplingSettings, seed: int) -> None:
        stream = seat.engine.generate(portion.requests, sampling, seed=seed)
        try:
            try:
                for rollouts in stream:
                    share.finish(portion.settle(rollouts), rollouts)
                    seat.look()
                    if share.stopped or share.give_back(portion):
                        return
                seat.look(now=True)
            finally:
                if isinstance(stream, Generator):
                    stream.close()
        except EngineFailure as failure:
            seat.failure = failure
            share.lose(portion, seat.name, failure)
            return
        if portion.missing:
            missing = portion.missing[0].request.item.id
            raise RuntimeError(f"{seat.name} ended without a word about {len(portion.missing)} requests ({missing!r})")

    # -- restarts ------------------------------------------------------------------------------------------

    def _is_ready(self, seat: _Seat) -> bool:
        return seat.live and seat.started and seat.failure is None and seat.weights is self._newest

    def _ready(self, seat: _Seat, share: Share | None = None) -> bool:
        """Bring an engine to where it can be used, restarting it as often as is allowed; False: it is given up.

        Once `share` has been stopped, nothing more is done: the weights may be in training by now.
        """
        while seat.live and not (share and share.stopped):
            try:
                if seat.failure is not None:
                    self._prepare_restart(seat, seat.failure)
                elif not seat.started:
                    seat.engine.start()
                    seat.started = True
                elif self._newest is not None and seat.weights is not self._newest:
                    newest = self._newest
                    seat.engine.update_weights(newest)
                    seat.weights = newest
                else:
                    return True
            except EngineFailure as failure:
                seat.failure = failure
        return False

    def _prepare_restart(self, seat: _Seat, failure: EngineFailure) -> None:
        with self._lock:
            granted = self._restarts < self._allowed
            self._restarts += granted
            number = self._restarts
            self._last = f"{seat.name} {failure}"
            seat.live, seat.failure = granted, None
            others = len(self._live())
        if granted:
            self._say(f"{seat.name} {failure}. It is started again (restart {number} of {self._allowed}).")
        elif others:
            self._say(
                f"{seat.name} {failure}. No restart is left (rollout.failure.restarts: {self._allowed}); "
                f"{others} of {len(self._seats)} engines go on without it."
            )
        seat.stop()

    def _require_one(self) -> None:
        if not self._live():
            raise MedbridgeError(
                f"no rollout engine is left: {self._last}. No restart is left either (rollout.failure.restarts: "
                f"{self._allowed}). Rollouts that were finished are kept. Mend the cause and run the same command "
                "again: it goes on from there."
            )
