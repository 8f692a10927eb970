"""The books of one call to a pool: which requests wait, which are out, which are finished, which were lost once.

Threads meet here. Nothing is sampled here, and engines are not known.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from medbridge.errors import MedbridgeError
from medbridge.rollout.engine import EngineFailure, Request, Rollout

GIVE_BACK = 4
"""Full batches that an engine must still have before it for it to share them with an idle one, at the loss of what it
has begun. (Simulated with lognormal lengths on 2 and 8 engines, all equal or one at half or a tenth of the speed: 2, 4
and 8 are about the same. Small portions from the start cost more, since each ends with a batch that is not full.)
"""

TOGETHER = 64
"""Most answers that are handed on at once: what is stored in one transaction, and lost where it is cut off."""

PATIENCE_S = 15.0
"""How long a call that ends early waits for its engines to come to an answer. One that hangs is left to itself."""

RETRY_PART = 4
"""Requests that were lost once are sampled again in portions of this part of a full batch: few can be to blame."""


class Job:
    """One request on its way."""

    __slots__ = ("done", "lost", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.done = False
        self.lost: str | None = None  # how, the first time


class Portion:
    """Requests that one engine samples in one call."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.open_samples = sum(len(job.request.samples) for job in jobs)
        self._by_item: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            self._by_item[job.request.item.id].append(job)

    @property
    def requests(self) -> list[Request]:
        return [job.request for job in self.jobs]

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if not job.done]

    def settle(self, rollouts: Sequence[Rollout]) -> list[Job]:
        """Mark the requests done that `rollouts` answer.

        Raises:
            RuntimeError: they are no whole requests of this portion, or of one that is done.
        """
        found = []
        at = 0
        while at < len(rollouts):
            job = self._answered(rollouts, at)
            job.done = True
            found.append(job)
            self.open_samples -= len(job.request.samples)
            at += len(job.request.samples)
        return found

    def _answered(self, rollouts: Sequence[Rollout], at: int) -> Job:
        item_id = rollouts[at].item_id
        waiting = [job for job in self._by_item[item_id] if not job.done]
        for job in sorted(waiting, key=lambda job: len(job.request.samples), reverse=True):
            own = rollouts[at : at + len(job.request.samples)]
            if all(r.item_id == item_id for r in own) and tuple(r.sample for r in own) == job.request.samples:
                return job
        raise RuntimeError(f"an engine yielded a rollout of item {item_id!r} that nobody waits for: {rollouts[at]}")


class Share:
    """Requests shared out to engines, and their rollouts on the way back; each request is answered once.

    A thread is inside from `enter` to `leave`, and not while it is `away`: the call ends when nobody is inside.
    """

    def __init__(self, requests: Sequence[Request], *, engines: int, batch: int) -> None:
        """`batch` completions fill one of the `engines`."""
        self._fresh = deque(Job(request) for request in requests if request.samples)
        self._again: deque[Job] = deque()
        self._batch = batch
        self._each = math.ceil(len(self._fresh) / engines)
        self._idle = 0
        self._open = len(self._fresh)
        self._finished: deque[Sequence[Rollout]] = deque()
        self._inside = 0
        self._error: BaseException | None = None
        self.stopped = False
        self._changed = threading.Condition()

    # -- for the engines' threads --------------------------------------------------------------------------

    def enter(self) -> None:
        with self._changed:
            self._inside += 1

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def away(self) -> Iterator[None]:
        """For what may take minutes, and that nobody need wait for once all requests are answered."""
        self.leave()
        try:
            yield
        finally:
            self.enter()

    def wanted(self) -> bool:
        """Wait until requests are there to be taken; False: none will be any more."""
        with self._changed:
            self._idle += 1
            while not (self.stopped or self._fresh or self._again or not self._open):
                self._changed.wait()  # those that are out may be lost, or given back
            self._idle -= 1
            return not self.stopped and bool(self._fresh or self._again)

    def take(self) -> Portion:
        """An engine's part of what waits; empty where another thread was quicker."""
        with self._changed:
            if self.stopped:
                return Portion(())
            if not self._again:
                return Portion([self._fresh.popleft() for _ in range(min(self._each, len(self._fresh)))])
            return Portion(self._fill(self._again, max(1, self._batch // RETRY_PART)))

    @staticmethod
    def _fill(queue: deque[Job], samples: int) -> list[Job]:
        """Take requests of so many samples in all, but at least one."""
        jobs: list[Job] = []
        while queue and (not jobs or samples >= len(queue[0].request.samples)):
            samples -= len(queue[0].request.samples)
            jobs.append(queue.popleft())
        return jobs

    def give_back(self, portion: Portion) -> bool:
        """Whether an engine should leave the rest of its portion: others are idle, and it has much before it."""
        with self._changed:
            if self._fresh or self._again or not self._idle or portion.open_samples < GIVE_BACK * self._batch:
                return False
            self._return(portion.missing, takers=self._idle + 1)
            portion.jobs = ()
            return True

    def _return(self, jobs: Sequence[Job], *, takers: int) -> None:
        if jobs:
            self._fresh.extendleft(reversed(jobs))
            self._each = math.ceil(len(jobs) / takers)
            self._changed.notify_all()

    def finish(self, jobs: Sequence[Job], rollouts: Sequence[Rollout]) -> None:
        with self._changed:
            self._open -= len(jobs)
            if rollouts:
                self._finished.append(rollouts)
            self._changed.notify_all()

    def lose(self, portion: Portion, name: str, failure: EngineFailure) -> None:
        """Have what an engine did not finish sampled again; what was lost before stops the call.

        Engines begin requests in their order. So what it was at are the first of the missing, as many as fill a batch;
        should it have begun more, they are the first of those that it takes up next.
        """
        waiting = deque(portion.missing)
        begun = self._fill(waiting, self._batch)
        others = list(waiting)
        with self._changed:
            self._return(others, takers=max(1, self._idle))
            twice = [job for job in begun if job.lost]
            for job in begun:
                if not job.lost:
                    job.lost = f"{name}: {failure}"
                    self._again.append(job)
            self._changed.notify_all()
        if twice:
            self.stop(_lost_twice(twice, f"{name}: {failure}"))

    def stop(self, error: BaseException | None = None) -> None:
        """Give out no more; the first `error` is raised where the results are read."""
        with self._changed:
            self.stopped = True
            self._error = self._error or error
            self._changed.notify_all()

    # -- for the caller ------------------------------------------------------------------------------------

    def results(self) -> Iterator[list[Rollout]]:
        """Rollouts as they come: those that were finished while the caller was busy, together."""
        while batch := self._next():
            yield batch
        if self._error is not None:
            raise self._error

    def _next(self) -> list[Rollout]:
        with self._changed:
            while not self._finished and self._open and not self.stopped:
                self._changed.wait()
        if self.stopped:
            self.wait_until_left()  # what engines had finished by then is not lost
        with self._changed:
            ready = [self._finished.popleft() for _ in range(min(TOGETHER, len(self._finished)))]
        return [rollout for rollouts in ready for rollout in rollouts]

    def wait_until_left(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._inside, PATIENCE_S)


def _lost_twice(jobs: Sequence[Job], second: str) -> MedbridgeError:
    ids = list(dict.fromkeys(job.request.item.id for job in jobs))
    named = ", ".join(repr(item_id) for item_id in islice(ids, 8)) + (" ..." if len(ids) > 8 else "")
    what = f"item {named} was" if len(ids) == 1 else f"of the items {named}, sampled together, some were"
    return MedbridgeError(
        f"{what} in work at two failures of an engine, and so is likely to cause them.\n"
        f"  first {jobs[0].lost}\n  then {second}\n"
        "Rollouts that were finished are kept. Mend the cause (or take the item out of the data, in a new run) and run "
        "the same command again: it goes on from there."
    )
