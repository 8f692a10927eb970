"""Rollouts of a sharpen stage: weights are brought and verified, rewards are kept, from whatever thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medbridge.config import RunSettings
from medbridge.data import ImageCache, Item, permutation
from medbridge.data.answers import Outcome
from medbridge.errors import MedbridgeError
from medbridge.ledger import Ledger
from medbridge.model import Policy
from medbridge.rollout import FailureSettings, Graded, Pool, Request, Rollout, SamplingSettings, TransformersEngine
from medbridge.rollout.weights import Weights
from medbridge.stage_rollouts import StageRollouts

SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=6)


class Apart(TransformersEngine):
    """An engine with weights of its own, as one of another process has."""

    name = "apart"
    deaf = False  # says it has taken new weights, and has not
    version = 0

    def update_weights(self, weights: Weights) -> None:
        if not self.deaf:
            self.policy.model.load_state_dict(weights.policy.model.state_dict())
        self.version = weights.version

    def generate(self, requests: list[Request], sampling: SamplingSettings, *, seed: int) -> Iterator[list[Rollout]]:  # type: ignore[override]
        for batch in super().generate(requests, sampling, seed=seed):
            yield [replace(rollout, weights=self.version) for rollout in batch]


@pytest.fixture
def make(
    tiny_settings: Callable[..., RunSettings],
    train_items: list[Item],
    load_policy: Callable[..., Policy],
    images: ImageCache,
    tmp_path: Path,
) -> Iterator[Callable[..., tuple[StageRollouts, list[Apart], Policy]]]:
    ledger = Ledger(tmp_path / "run.sqlite")
    ledger.add_items(train_items, ["task"])
    stage = ledger.begin_stage(round=0, kind="sharpen", model="m", strata=["shade"], plan={})

    def made(members: int = 1, **rl: int) -> tuple[StageRollouts, list[Apart], Policy]:
        settings = tiny_settings(rl=rl)
        policy = load_policy(trainable=True)
        engines = [Apart(load_policy(), settings.data.prompt, images, batch_size=16) for _ in range(members)]
        engine = Pool(engines, FailureSettings(), print) if members > 1 else engines[0]
        rollouts = StageRollouts(
            ledger.path, stage, engine, policy, settings,
            grade=lambda rollout: Graded(rollout, Outcome("wrong", None, None, None, False), 0.25),
            probes=train_items[:3], images=images, scratch=tmp_path / "weights", seed=5,
        )  # fmt: skip
        return rollouts, engines, policy

    yield made
    ledger.close()


def move(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("members", [1, 2])
def test_weights_are_brought_and_verified(
    members: int, make: Callable[..., tuple[StageRollouts, list[Apart], Policy]]
) -> None:
    rollouts, _, policy = make(members)
    for version in range(3):
        rollouts.sync(version)
        found = rollouts.take_metrics()
        assert 0 <= found["probe_difference"] <= found["probe_worst"] < 1e-4
        assert rollouts.take_metrics() == {}
        move(policy)
    rollouts.close()


@pytest.mark.parametrize("members", [1, 2])
def test_an_engine_that_missed_a_sync_stops_the_run(
    members: int, make: Callable[..., tuple[StageRollouts, list[Apart], Policy]]
) -> None:
    rollouts, engines, policy = make(members)
    rollouts.sync(0)
    move(policy)
    engines[-1].deaf = True
    with pytest.raises(MedbridgeError, match=r"does not sample from the trainer's weights of version 1.*nats a token"):
        rollouts.sync(1)
    rollouts.close()


def test_rollouts_are_graded_and_kept_from_another_thread(
    make: Callable[..., tuple[StageRollouts, list[Apart], Policy]], train_items: list[Item]
) -> None:
    rollouts, _, _ = make()
    rollouts.sync(0)
    item = train_items[0]
    request = Request(item, (0, 1), (permutation(item, 0, 1),) * 2)
    drawn: list[Graded] = []

    def work() -> None:
        for graded in rollouts.sample(4, [request], SAMPLING):
            rollouts.store(4, graded)
            drawn.extend(graded)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [entry.reward for entry in drawn] == [0.25, 0.25]
    stored = rollouts.stored(4)
    assert [(e.rollout.sample, e.rollout.text, e.reward) for e in stored] == [
        (e.rollout.sample, e.rollout.text, e.reward) for e in drawn
    ]
    assert rollouts.stored(3) == []


def test_weights_cannot_be_read_live_while_a_batch_is_sampled_ahead(
    make: Callable[..., tuple[StageRollouts, list[Apart], Policy]],
) -> None:
    rollouts, _, _ = make(staleness=1)
    rollouts.sync(0)
    assert rollouts._weights is not None
    with pytest.raises(MedbridgeError, match="being trained on"):
        list(rollouts._weights.tensors())
    exact, _, _ = make()
    exact.sync(0)
    assert exact._weights is not None and list(exact._weights.tensors())
