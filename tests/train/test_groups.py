"""Groups: what a step asks for, what takes the place of groups without a signal, and what an engine may not do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medbridge.data import Item, Outcome, permutation
from medbridge.errors import MedbridgeError
from medbridge.rollout import Graded, Request, Rollout, SamplingSettings
from medbridge.train import RlSettings
from medbridge.train.groups import Batch, Group, GroupSampler, Stopped, describe
from medbridge.train.optimization import Shuffle

Rewards = Callable[[str, int, int], float]
"""The reward of a sample: by item id, sample and step."""


def graded(
    item_id: str, sample: int, reward: float, *, order: Any = (0, 1), weights: int = 0, **changes: Any
) -> Graded:
    ids = np.arange(1 + sample % 3, dtype=np.int32)
    rollout = Rollout(item_id, sample, order, "x", ids, np.full(len(ids), -1.0, np.float32), "stop", 5, weights=weights)
    return Graded(replace(rollout, **changes), Outcome("correct" if reward else "wrong", 0, "x", (0, 1), True), reward)


class Scripted:
    """An engine and a store by rule: one portion a request, in reverse order; `kill_after` so many portions it dies."""

    shares_weights = False

    def __init__(self, rewards: Rewards, *, weights: Callable[[int], int] = lambda step: step - 1) -> None:
        self.rewards = rewards
        self.weights = weights
        self.kept: dict[int, list[Graded]] = {}
        self.asked: list[list[str]] = []
        self.portions = 0
        self.kill_after: int | None = None
        self.closed = 0

    def stored(self, step: int) -> list[Graded]:
        return self.kept.get(step, [])

    def sample(
        self, step: int, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Generator[list[Graded], None, None]:
        self.asked.append([request.item.id for request in requests])
        try:
            for request in reversed(requests):
                if self.portions == self.kill_after:
                    raise KeyboardInterrupt
                self.portions += 1
                yield [
                    graded(
                        request.item.id, sample, self.rewards(request.item.id, sample, step), order=order,
                        weights=self.weights(step),
                    )
                    for sample, order in zip(request.samples, request.permutations, strict=True)
                ]  # fmt: skip
        finally:
            self.closed += 1

    def store(self, step: int, portion: Sequence[Graded]) -> None:
        self.kept.setdefault(step, []).extend(portion)

    def sync(self, version: int) -> None:
        raise AssertionError("nothing here syncs")

    def rest(self) -> None:
        raise AssertionError("nothing here rests")


def sampler(items: Sequence[Item], rollouts: Any, position: int = 0, first_k: int = 1, **settings: Any) -> GroupSampler:
    chosen = RlSettings(**{"prompts_per_step": 3, "completions": 4, **settings})
    return GroupSampler(items, chosen, rollouts, SamplingSettings(), seed=0, position=position, first_k=first_k)


def ids(groups: Sequence[Group]) -> list[str]:
    return [group.request.item.id for group in groups]


def mixed(item_id: str, sample: int, step: int) -> float:
    return float(sample % 2)


# -- what is asked -------------------------------------------------------------------------------------------------


def test_groups_share_one_order_and_number_their_samples_on(train_items: list[Item]) -> None:
    batch = sampler(train_items[:2], Scripted(mixed), prompts_per_step=4).draw(5)
    names = ids(batch.groups)
    assert sorted(names) == sorted([train_items[0].id, train_items[1].id] * 2)  # two epochs
    samples: dict[str, list[int]] = {}
    for group in batch.groups:
        samples.setdefault(group.request.item.id, []).extend(group.request.samples)
        assert set(group.request.permutations) == {permutation(group.request.item, 0, 5)}
        assert len(group.request.permutations) == 4
    assert set(map(tuple, samples.values())) == {tuple(range(8))}


def test_the_order_changes_from_step_to_step(train_items: list[Item]) -> None:
    item = next(item for item in train_items if len(item.options or ()) == 3)
    drawing = sampler([item], Scripted(mixed), prompts_per_step=1)
    orders = {drawing.draw(step).groups[0].request.permutations[0] for step in range(1, 30)}
    assert orders == set(itertools.permutations(range(3)))


def test_completions_come_in_any_order_and_stand_in_that_of_the_requests(train_items: list[Item]) -> None:
    rollouts = Scripted(mixed)
    batch = sampler(train_items, rollouts).draw(1)
    assert ids(batch.groups) == rollouts.asked[0]
    assert [entry.rollout.item_id for entry in rollouts.kept[1]] != [entry.rollout.item_id for entry in batch.sampled]
    for group in batch.groups:
        assert [entry.rollout.sample for entry in group.graded] == [0, 1, 2, 3]
        assert {entry.rollout.item_id for entry in group.graded} == {group.request.item.id}
        assert group.rewards == [0.0, 1.0, 0.0, 1.0]


def test_steps_go_through_the_data_one_after_the_other(train_items: list[Item]) -> None:
    drawing = sampler(train_items, Scripted(mixed))
    batches = [drawing.draw(step) for step in range(1, 8)]
    taken = [train_items[index].id for index, _ in Shuffle(len(train_items), 0).take(0, 21)]
    assert [name for batch in batches for name in ids(batch.groups)] == taken
    assert [batch.position for batch in batches] == [3, 6, 9, 12, 15, 18, 21]


# -- dynamic sampling ----------------------------------------------------------------------------------------------


def flat_for(names: set[str]) -> Rewards:
    return lambda item_id, sample, step: 1.0 if item_id in names else float(sample == 2)


def test_groups_without_a_signal_are_replaced(train_items: list[Item]) -> None:
    order = [train_items[index].id for index, _ in Shuffle(len(train_items), 0).take(0, 12)]
    rollouts = Scripted(flat_for({order[0], order[2], order[4]}))
    drawing = sampler(train_items, rollouts, dynamic_sampling=3)
    batch = drawing.draw(1)
    assert rollouts.asked == [order[:3], order[3:5], order[5:6]]
    assert ids(batch.groups) == [order[1], order[3], order[5]]
    assert ids(batch.left_out) == [order[0], order[2], order[4]]
    assert batch.groups[0].rewards == [0.0, 0.0, 1.0, 0.0]  # a lone correct sample is a signal
    assert batch.position == 6
    assert len(rollouts.kept[1]) == 24  # what is left out is stored too
    metrics = describe(batch, 1, mask_truncated=False)
    assert metrics["groups_sampled"] == 6 and metrics["groups_without_signal"] == 3 and metrics["signal"] == 0.5
    assert metrics["reward"] == pytest.approx((3 * 4 + 3) / 24)  # of all that was sampled
    assert ids(drawing.draw(2).groups)[0] == order[6]


@pytest.mark.parametrize(("advantage", "loss"), [("pkpo", "dr_grpo"), ("pass_at_k", "grpo")])
def test_groups_without_a_signal_for_the_best_of_k_are_replaced(
    advantage: str, loss: str, train_items: list[Item]
) -> None:
    """With k = 3 of 4: by pkpo two wrong ones must lie below a right one, and by pass_at_k three. With k = 1 one."""
    order = [train_items[index].id for index, _ in Shuffle(len(train_items), 0).take(0, 12)]
    right = {order[0]: 1, order[1]: 2, order[2]: 3}  # all others: one
    rollouts = Scripted(lambda item_id, sample, step: float(sample < right.get(item_id, 1)))
    settings: dict[str, Any] = {
        "advantage": advantage,
        "loss": loss,
        "steps": 2,
        "anneal_share": 0.5,
        "dynamic_sampling": 1,
    }
    drawing = sampler(train_items, rollouts, first_k=3, **settings)
    left_out = [order[2]] if advantage == "pkpo" else [order[1], order[2]]
    batch = drawing.draw(1)
    assert ids(batch.left_out) == left_out
    assert describe(batch, 1, mask_truncated=False)["groups_without_signal"] == 0
    metrics = describe(batch, 1, mask_truncated=False, algorithm=advantage, k=3)  # type: ignore[arg-type]
    assert metrics["groups_without_signal"] == len(left_out) and metrics["pass_k"] == 3
    again = sampler(train_items, rollouts, first_k=3, **settings)
    assert not again.draw(2).left_out  # k has come down to 1


@pytest.mark.parametrize("rounds", [1, 2])
def test_at_the_limit_the_step_goes_on_with_what_it_has(rounds: int, train_items: list[Item]) -> None:
    order = [train_items[index].id for index, _ in Shuffle(len(train_items), 0).take(0, 12)]
    rollouts = Scripted(flat_for(set(order) - {order[1]}))
    batch = sampler(train_items, rollouts, dynamic_sampling=rounds).draw(1)
    assert ids(batch.groups) == [order[1]]
    assert len(batch.left_out) == 2 + 2 * rounds and batch.position == 3 + 2 * rounds
    none = sampler(train_items, Scripted(lambda *_: 0.0), dynamic_sampling=rounds).draw(1)
    assert not none.groups and len(none.left_out) == 3 + 3 * rounds


def test_without_dynamic_sampling_nothing_is_left_out(train_items: list[Item]) -> None:
    batch = sampler(train_items, Scripted(lambda *_: 0.0)).draw(1)
    assert len(batch.groups) == 3 and not batch.left_out and batch.position == 3
    assert describe(batch, 1, mask_truncated=False)["signal"] == 0


def test_a_group_of_cut_completions_teaches_nothing_where_these_are_masked() -> None:
    request = Request(Item, (0, 1), ((0, 1), (0, 1)))  # type: ignore[arg-type]
    cut, whole = (graded("a", n, float(n), finish_reason=reason) for n, reason in enumerate(("length", "stop")))
    both_cut = replace(whole, rollout=replace(whole.rollout, finish_reason="length"))
    assert Group(request, (cut, whole)).teaches(mask_truncated=True)
    assert Group(request, (cut, both_cut)).teaches(mask_truncated=False)
    assert not Group(request, (cut, both_cut)).teaches(mask_truncated=True)
    metrics = describe(Batch([Group(request, (cut, whole))], [], 1, 0, 0.0), 3, mask_truncated=True)
    assert metrics["masked"] == 1 and metrics["truncated"] == 0.5 and metrics["staleness_mean"] == 2
    assert "tokens_per_second" not in metrics  # nothing was drawn


@pytest.mark.parametrize("kill_after", range(12))
def test_a_step_cut_off_anywhere_asks_for_the_same_items_again(kill_after: int, train_items: list[Item]) -> None:
    order = [train_items[index].id for index, _ in Shuffle(len(train_items), 0).take(0, 12)]
    rewards = flat_for({order[0], order[2], order[4], order[7]})
    straight = Scripted(rewards)
    whole = sampler(train_items, straight, dynamic_sampling=3)
    expected = [whole.draw(1), whole.draw(2)]
    assert straight.portions == 10

    cut = Scripted(rewards)
    cut.kill_after = kill_after
    steps = sampler(train_items, cut, dynamic_sampling=3)
    if kill_after < straight.portions:
        with pytest.raises(KeyboardInterrupt):
            for step in (1, 2):
                steps.draw(step)
    cut.kill_after = None
    again = sampler(train_items, cut, dynamic_sampling=3)
    for step, batch in zip((1, 2), expected, strict=True):
        found = again.draw(step)
        assert ids(found.groups) == ids(batch.groups) and ids(found.left_out) == ids(batch.left_out)
        assert found.position == batch.position
    assert cut.portions == straight.portions  # nothing was sampled twice, nothing was lost
    counts = {step: len({(e.rollout.item_id, e.rollout.sample) for e in kept}) for step, kept in cut.kept.items()}
    assert counts == {step: len(kept) for step, kept in straight.kept.items()}


# -- what an engine may not do -------------------------------------------------------------------------------------


class Spoilt(Scripted):
    """An engine whose portions are changed on their way."""

    def __init__(self, spoil: Callable[[list[Graded]], list[Graded]]) -> None:
        super().__init__(mixed)
        self.spoil = spoil

    def sample(self, *arguments: Any) -> Generator[list[Graded], None, None]:
        for portion in super().sample(*arguments):
            yield self.spoil(portion)


@pytest.mark.parametrize(
    ("spoil", "words", "kept"),
    [
        (lambda portion: portion[:-1], "without 3 of the completions", 9),
        (lambda portion: [*portion, portion[0]], "has come already", 0),
        (lambda portion: [graded("other", 0, 1.0), *portion], "sample 0 of item 'other'", 0),
    ],
    ids=["missing", "doubled", "not asked for"],
)
def test_missing_doubled_and_foreign_completions_are_refused(
    spoil: Any, words: str, kept: int, train_items: list[Item]
) -> None:
    rollouts = Spoilt(spoil)
    with pytest.raises(MedbridgeError, match=words):
        sampler(train_items, rollouts).draw(1)
    assert len(rollouts.kept.get(1, [])) == kept and rollouts.closed == 1


def test_stale_completions_are_refused_before_they_are_stored(train_items: list[Item]) -> None:
    rollouts = Scripted(mixed, weights=lambda step: 0)  # an engine that was never synced
    drawing = sampler(train_items, rollouts)
    drawing.draw(1)
    with pytest.raises(MedbridgeError, match=r"version 0, and version 1 was asked for: .* missed a weight sync"):
        drawing.draw(2)
    assert sorted(rollouts.kept) == [1]
    rollouts.kept[1] = [graded("a", 0, 1.0, weights=7)]
    with pytest.raises(MedbridgeError, match="version 7, and version 0"):
        sampler(train_items, rollouts).draw(1)
    assert sampler(train_items, Scripted(mixed, weights=lambda step: 0), staleness=1).draw(2).groups  # as promised


def test_it_stops_behind_a_portion_and_keeps_it(train_items: list[Item]) -> None:
    rollouts = Scripted(mixed)
    with pytest.raises(Stopped):
        sampler(train_items, rollouts).draw(1, lambda: rollouts.portions == 2)
    assert len(rollouts.kept[1]) == 8 and rollouts.closed == 1
    with pytest.raises(Stopped):
        sampler(train_items, rollouts).draw(1, lambda: True)
    assert len(rollouts.asked) == 1  # not even begun


def test_the_version_that_settings_promise() -> None:
    assert [RlSettings().version(step) for step in (1, 2, 9)] == [0, 1, 8]
    assert [RlSettings(staleness=2).version(step) for step in (1, 2, 3, 4, 9)] == [0, 0, 0, 1, 6]
    every = RlSettings(staleness=1, sync_every=3, checkpoint_every=6)
    assert [every.version(step) for step in range(1, 10)] == [0, 0, 0, 0, 3, 3, 3, 6, 6]
