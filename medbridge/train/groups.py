"""Groups of completions: which a step asks for, which of them teach anything, and which take their place.

How completions are drawn and stored is the caller's; what is learnt from them stands in `rl`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from medbridge.data.items import Item
from medbridge.data.prompts import permutation
from medbridge.errors import MedbridgeError
from medbridge.rollout.engine import Graded, Request, SamplingSettings
from medbridge.rollout.verify import check_versions
from medbridge.train.advantages import Algorithm, differ
from medbridge.train.optimization import Shuffle

if TYPE_CHECKING:
    from medbridge.train.rl_settings import RlSettings


class Rollouts(Protocol):
    """Where the completions of training steps come from, and where they are kept.

    `stored`, `sample` and `store` are called by one thread, which is not the trainer's where `rl.staleness` is above 0
    (a database connection of its own is theirs to open). `sync` and `rest` are called by the trainer's thread while no
    other call is under way.

    Attributes:
        shares_weights: completions are drawn from the very weights that are trained, so that no step can be sampled
            while another trains.
    """

    shares_weights: bool

    def stored(self, step: int) -> Iterable[Graded]:
        """What an earlier process has stored for this step."""
        ...

    def sample(
        self, step: int, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Generator[list[Graded], None, None]:
        """Draw and reward completions, in whole requests and any order. Closed before its end where training ends."""
        ...

    def store(self, step: int, graded: Sequence[Graded]) -> None:
        """Keep what `sample` gave last, all of it or nothing."""
        ...

    def sync(self, version: int) -> None:
        """Have completions drawn from the present weights, those after step `version`, from now on."""
        ...

    def rest(self) -> None:
        """Nothing is sampled until the step in hand has been trained on: memory may go to the trainer."""
        ...


class Stopped(Exception):
    """Training has ended; what was to be sampled is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one request, in the order of its samples, with their rewards."""

    request: Request
    graded: tuple[Graded, ...]

    @property
    def rewards(self) -> list[float]:
        return [float(entry.reward) for entry in self.graded if entry.reward is not None]

    def teaches(self, *, mask_truncated: bool, algorithm: Algorithm = "group", k: int = 1) -> bool:
        """Whether a gradient can come of it: rewards that make advantages, and a completion that counts."""
        counted = not mask_truncated or any(not is_truncated(entry) for entry in self.graded)
        return counted and differ(algorithm, self.rewards, k)


@dataclass(frozen=True, slots=True)
class Batch:
    """What was sampled for a step.

    Attributes:
        groups: what is trained on.
        left_out: groups without a signal, for which others were sampled.
        position: how far in the order of the items this step has come.
        tokens, seconds: drawn for it, and the time that took; what an earlier process stored is not among them.
    """

    groups: list[Group]
    left_out: list[Group]
    position: int
    tokens: int
    seconds: float

    @property
    def sampled(self) -> list[Graded]:
        """All completions, those of groups that are left out too."""
        return [entry for group in (*self.groups, *self.left_out) for entry in group.graded]


class GroupSampler:
    """Draws the batches of one step after the other; each goes on in the data where the one before ended."""

    def __init__(
        self,
        items: Sequence[Item],
        settings: RlSettings,
        rollouts: Rollouts,
        sampling: SamplingSettings,
        *,
        seed: int,
        position: int,
        first_k: int = 1,
    ) -> None:
        """`position` is the last finished batch's, 0 before the first; `first_k` as of `RlSettings.k_at`."""
        self.items = items
        self.settings = settings
        self.rollouts = rollouts
        self.sampling = sampling
        self.seed = seed
        self.position = position
        self.first_k = first_k
        self._shuffle = Shuffle(len(items), seed)

    def draw(self, step: int, stopped: Callable[[], bool] = lambda: False) -> Batch:
        """The groups of a step; those that teach nothing are replaced for as many rounds as the settings allow.

        A further round depends on what the rounds before gave and on nothing else, so that a step which was cut off
        asks for the same items again, and takes from the store what it has of them.

        Args:
            step: counted from 1.
            stopped: asked before each portion of completions.

        Raises:
            MedbridgeError: completions from other weights than those of `settings.version(step)`, missing or doubled.
            Stopped: as `stopped` said.
        """
        known = {_key(entry): entry for entry in self.rollouts.stored(step)}
        check_versions((entry.rollout for entry in known.values()), self.settings.version(step))
        numbered: Counter[str] = Counter()
        wanted = self.settings.prompts_per_step
        groups: list[Group] = []
        left_out: list[Group] = []
        tokens, seconds = 0, 0.0
        for _ in range(1 + self.settings.dynamic_sampling):
            requests = self._next_requests(step, wanted - len(groups), numbered)
            began = time.perf_counter()
            fresh = self._sample(step, [r for r in requests if not _is_answered(r, known)], stopped)
            seconds += time.perf_counter() - began
            tokens += sum(len(entry.rollout.token_ids) for entry in fresh.values())
            known |= fresh
            for request in requests:
                group = Group(request, tuple(known[request.item.id, sample] for sample in request.samples))
                unwanted = self.settings.dynamic_sampling and not self._teaches(group, step)
                (left_out if unwanted else groups).append(group)
            if len(groups) == wanted:
                break
        return Batch(groups, left_out, self.position, tokens, seconds)

    def _teaches(self, group: Group, step: int) -> bool:
        return group.teaches(
            mask_truncated=self.settings.mask_truncated, algorithm=self.settings.advantage,
            k=self.settings.k_at(step, self.first_k),
        )  # fmt: skip

    def _next_requests(self, step: int, count: int, numbered: Counter[str]) -> list[Request]:
        """A request a group, for the next items. An item that comes up twice in a step has its samples numbered on.

        All completions of a group see one option order, since advantages compare like with like.
        """
        requests = []
        for index, _ in self._shuffle.take(self.position, count):
            item = self.items[index]
            samples = tuple(range(numbered[item.id], numbered[item.id] + self.settings.completions))
            numbered[item.id] += self.settings.completions
            requests.append(Request(item, samples, (permutation(item, self.seed, step),) * len(samples)))
        self.position += count
        return requests

    def _sample(
        self, step: int, requests: Sequence[Request], stopped: Callable[[], bool]
    ) -> dict[tuple[str, int], Graded]:
        """The completions of requests by item and sample, each portion checked and stored as it comes."""
        open_ = {(request.item.id, sample) for request in requests for sample in request.samples}
        found: dict[tuple[str, int], Graded] = {}
        if not requests:
            return found
        if stopped():
            raise Stopped
        with closing(self.rollouts.sample(step, requests, self.sampling)) as portions:
            for portion in portions:
                check_versions((entry.rollout for entry in portion), self.settings.version(step))
                for entry in portion:
                    if _key(entry) not in open_:
                        raise MedbridgeError(
                            f"step {step}: the engine gave sample {entry.rollout.sample} of item "
                            f"{entry.rollout.item_id!r}, which was not asked for or has come already. It was not kept."
                        )
                    open_.remove(_key(entry))
                    found[_key(entry)] = entry
                self.rollouts.store(step, portion)
                if stopped():
                    raise Stopped
        if open_:
            item_id, sample = min(open_)
            raise MedbridgeError(
                f"step {step}: the engine ended without {len(open_)} of the completions that were asked for (sample "
                f"{sample} of item {item_id!r} is one). What it gave is kept; the run can be resumed."
            )
        return found


def is_truncated(entry: Graded) -> bool:
    """Whether the completion was cut off before its end."""
    return entry.rollout.finish_reason == "length"


def describe(
    batch: Batch, step: int, *, mask_truncated: bool, algorithm: Algorithm = "group", k: int = 1
) -> dict[str, float]:
    """What was sampled in a step, groups that were left out included: rewards, form, length, signal and age."""
    sampled = batch.sampled
    groups = [*batch.groups, *batch.left_out]
    teaching = sum(group.teaches(mask_truncated=mask_truncated, algorithm=algorithm, k=k) for group in groups)
    metrics = {
        "reward": _mean(group_reward for group in groups for group_reward in group.rewards),
        "accuracy": _mean(entry.outcome.status == "correct" for entry in sampled),
        "format": _mean(entry.outcome.well_formed for entry in sampled),
        "completion_length": _mean(len(entry.rollout.token_ids) for entry in sampled),
        "truncated": _mean(is_truncated(entry) for entry in sampled),
        "signal": teaching / len(groups),
        "groups_sampled": float(len(groups)),
        "groups_without_signal": float(len(groups) - teaching),
        "staleness_mean": _mean(step - 1 - entry.rollout.weights for entry in sampled),
    }
    if algorithm != "group":
        metrics["pass_k"] = float(k)
    if mask_truncated:
        metrics["masked"] = float(sum(is_truncated(entry) for group in batch.groups for entry in group.graded))
    if batch.tokens:
        metrics["tokens_per_second"] = batch.tokens / batch.seconds
    return metrics


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _key(entry: Graded) -> tuple[str, int]:
    return entry.rollout.item_id, entry.rollout.sample


def _is_answered(request: Request, known: dict[tuple[str, int], Graded]) -> bool:
    return all((request.item.id, sample) in known for sample in request.samples)
