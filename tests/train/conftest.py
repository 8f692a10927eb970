"""Runs of the two trainers in one call, and a model that already answers in the right form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import ImageCache, Item, PromptSettings, grade, permutation, target_completion
from medbridge.model import ModelSettings, Policy
from medbridge.rollout import Graded, Request, SamplingSettings, TransformersEngine
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
        **settings: Any,
    ) -> Log:
        log, on_start, on_step = callbacks(kill_at)
        train_sft(
            policy, examples, replay, SftSettings(**{**defaults, **settings}), model=model or ModelSettings(),
            prompts=PROMPT, images=images, seed=seed, checkpoints=checkpoints or tmp_path / "checkpoints",
            on_start=on_start, on_step=on_step,
        )  # fmt: skip
        return log

    return run


class Sampler:
    """Samples and rewards the requests of a step, as the pipeline does; `store` plays the ledger."""

    def __init__(self, policy: Policy, images: ImageCache, *, seed: int, store: dict[int, list[Graded]]) -> None:
        self.engine = TransformersEngine(policy, PROMPT, images, batch_size=64)
        self.seed = seed
        self.store = store
        self.drawn: list[int] = []

    def __call__(self, step: int, requests: Sequence[Request], sampling: SamplingSettings) -> list[Graded]:
        if step not in self.store:
            self.drawn.append(step)
            by_id = {request.item.id: request.item for request in requests}
            rollouts = [r for batch in self.engine.generate(requests, sampling, seed=self.seed + step) for r in batch]
            outcomes = [grade(by_id[r.item_id], r.permutation, r.text, PROMPT) for r in rollouts]
            self.store[step] = [Graded(r, o, reward(o, 0.1)) for r, o in zip(rollouts, outcomes, strict=True)]
        return self.store[step]


@pytest.fixture
def rl(tmp_path: Path, images: ImageCache) -> Callable[..., Log]:
    """`train_rl` with small defaults; keywords as for `sft`, and `store` with the rollouts by step."""
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
        sample: Any = None,
        max_new_tokens: int = 8,
        **settings: Any,
    ) -> Log:
        log, on_start, on_step = callbacks(kill_at)
        train_rl(
            policy, items, RlSettings(**{**defaults, **settings}),
            sample or Sampler(policy, images, seed=seed, store={} if store is None else store),
            model=model or ModelSettings(), prompts=PROMPT, images=images, max_new_tokens=max_new_tokens, seed=seed,
            checkpoints=checkpoints or tmp_path / "checkpoints", on_start=on_start, on_step=on_step,
        )  # fmt: skip
        return log

    return run
