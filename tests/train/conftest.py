"""Runs of the two trainers in one call, and a model that already answers in the right form."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import ImageCache, Item, PromptSettings, grade, permutation, target_completion
from medbridge.model import ModelSettings, Policy
from medbridge.rollout import Graded, Request, SamplingSettings, TransformersEngine
from medbridge.rollout.weights import Weights
from medbridge.train import Example, RlSettings, SftSettings, train_rl, train_sft
from medbridge.train.rewards import reward

PROMPT = PromptSettings(answer_style="text", system="")


class Killed(Exception):
    """Stands for what ends a stage half-way."""


@dataclass
class Log:
    """What a trainer reported: where it started, and each step's metrics and items."""

    start: int | None = None
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    items: dict[int, list[str]] = field(default_factory=dict)

    def series(self, name: str) -> list[float]:
        return [self.metrics[step][name] for step in sorted(self.metrics)]


class Answers:
    """The right answers of items, under an option order that changes with each visit."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, visit: int) -> Example:
        item = self.items[index]
        order = permutation(item, 0, visit)
        return Example(item, order, target_completion(item, order, PROMPT))


@pytest.fixture(scope="session")
def answers() -> type[Answers]:
    return Answers


@pytest.fixture(scope="session")
def killed() -> type[Killed]:
    return Killed


def callbacks(kill_at: int | None) -> tuple[Log, Callable[[int], None], Callable[..., None]]:
    log = Log()

    def on_start(step: int) -> None:
        log.start = step

    def on_step(step: int, metrics: dict[str, float], ids: list[str]) -> None:
        if step == kill_at:
            raise Killed
        log.metrics[step], log.items[step] = metrics, ids

    return log, on_start, on_step


@pytest.fixture
def sft(tmp_path: Path, images: ImageCache) -> Callable[..., Log]:
    """`train_sft` with small defaults; `kill_at` ends it after that step's update and before it is recorded."""
    defaults: dict[str, Any] = {
        "steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 1,
    }  # fmt: skip

    def run(
        policy: Policy,
        examples: Any,
        *,
        replay: Any = None,
        model: ModelSettings | None = None,
        checkpoints: Path | None = None,
        kill_at: int | None = None,
        seed: int = 0,
        score: Callable[[int], float] | None = None,
        **settings: Any,
    ) -> Log:
        log, on_start, on_step = callbacks(kill_at)
        train_sft(
            policy, examples, replay, SftSettings(**{**defaults, **settings}), model=model or ModelSettings(),
            prompts=PROMPT, images=images, seed=seed, checkpoints=checkpoints or tmp_path / "checkpoints",
            on_start=on_start, on_step=on_step, score=score,
        )  # fmt: skip
        return log

    return run


class Rollouts:
    """Samples and rewards with real engines, as the pipeline does; `store` plays the ledger.

    `policy` is the one in training. Where `apart` is given, completions are drawn by that one, which gets a copy of the
    weights at each sync, as an engine in another process does.
    """

    def __init__(
        self,
        policy: Policy,
        images: ImageCache,
        *,
        seed: int,
        store: dict[int, list[Graded]],
        apart: Policy | None = None,
        score: Callable[[Item, Graded], float] | None = None,
        batch_size: int = 64,
    ) -> None:
        self.policy = policy
        self.engine = TransformersEngine(apart or policy, PROMPT, images, batch_size=batch_size)
        self.shares_weights = apart is None
        self.seed = seed
        self.kept = store
        self.score = score
        self.drawn: list[tuple[int, str]] = []
        self.synced: list[int] = []

    def stored(self, step: int) -> list[Graded]:
        return list(self.kept.get(step, []))

    def sample(
        self, step: int, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Generator[list[Graded], None, None]:
        self.drawn += [(step, request.item.id) for request in requests]
        by_id = {request.item.id: request.item for request in requests}
        for rollouts in self.engine.generate(requests, sampling, seed=self.seed + step):
            graded = []
            for rollout in rollouts:
                outcome = grade(by_id[rollout.item_id], rollout.permutation, rollout.text, PROMPT)
                entry = Graded(rollout, outcome, reward(outcome, 0.1))
                if self.score is not None:
                    entry = replace(entry, reward=self.score(by_id[rollout.item_id], entry))
                graded.append(entry)
            yield graded

    def store(self, step: int, graded: Sequence[Graded]) -> None:
        self.kept.setdefault(step, []).extend(graded)

    def sync(self, version: int) -> None:
        if not self.shares_weights:
            self.engine.policy.model.load_state_dict(self.policy.model.state_dict())
        self.engine.update_weights(Weights(self.engine.policy, version, Path("unused")))
        self.synced.append(version)

    def rest(self) -> None:
        self.engine.sleep()


@pytest.fixture(scope="session")
def rollouts_of() -> type[Rollouts]:
    return Rollouts


@pytest.fixture
def rl(tmp_path: Path, images: ImageCache) -> Callable[..., Log]:
    """`train_rl` with small defaults; keywords as for `sft`, `store` with rollouts by step, `more` of `train_rl`."""
    defaults: dict[str, Any] = {
        "steps": 6, "prompts_per_step": 3, "completions": 4, "micro_batch_size": 5, "learning_rate": 2e-3,
        "warmup_steps": 1,
    }  # fmt: skip

    def run(
        policy: Policy,
        items: Sequence[Item],
        *,
        model: ModelSettings | None = None,
        checkpoints: Path | None = None,
        kill_at: int | None = None,
        seed: int = 0,
        store: dict[int, list[Graded]] | None = None,
        rollouts: Any = None,
        rollout: SamplingSettings | None = None,
        more: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Log:
        log, on_start, on_step = callbacks(kill_at)
        train_rl(
            policy, items, RlSettings(**{**defaults, **settings}),
            rollouts or Rollouts(policy, images, seed=seed, store={} if store is None else store),
            model=model or ModelSettings(), prompts=PROMPT, images=images,
            rollout=rollout or SamplingSettings(max_new_tokens=8), seed=seed,
            checkpoints=checkpoints or tmp_path / "checkpoints", on_start=on_start, on_step=on_step, **(more or {}),
        )  # fmt: skip
        return log

    return run
