"""The forecast of Acc@1 after sharpening, against majority votes of known truths and with parts of the data missing."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from medbridge.support import Tally
from medbridge.support.forecast import Forecast, forecast_accuracy, rival_draws

Floats = NDArray[np.float64]
Truth = tuple[Floats, Floats]
"""Probability of the right answer [items] and shares of the wrong answers among wrong ones [items, answers]."""


def sample(generator: np.random.Generator, truth: Truth, n: int, floor: float, abstain: float = 0.0) -> list[Tally]:
    right, wrong = truth
    chances = np.concatenate([right[:, None], (1 - right)[:, None] * wrong], axis=1)
    said = generator.multinomial(
        n, np.concatenate([chances * (1 - abstain), np.full((len(right), 1), abstain)], axis=1)
    )
    return [
        Tally(
            f"item {i}",
            f"item {i}",
            floor,
            n,
            int(row[0]),
            abstained=int(row[-1]),
            votes={str(answer): int(count) for answer, count in enumerate(row[:-1]) if count},
        )
        for i, row in enumerate(said)
    ]


def majority(generator: np.random.Generator, truth: Truth, votes: int = 1001) -> float:
    right, wrong = truth
    said = generator.multinomial(votes, np.concatenate([right[:, None], (1 - right)[:, None] * wrong], axis=1))
    most = said == said.max(axis=1, keepdims=True)
    return float((most[:, 0] / most.sum(axis=1)).mean())


def evenly(items: int, answers: int) -> Floats:
    return np.full((items, answers), 1 / answers)


def one_in_front(items: int, answers: int, share: float) -> Floats:
    shares = np.full((items, answers), (1 - share) / max(answers - 1, 1))
    shares[:, 0] = share if answers > 1 else 1
    return shares


def softmax(generator: np.random.Generator, items: int, answers: int) -> Truth:
    odds = np.exp(1.5 * generator.normal(size=(items, answers + 1)) + np.eye(answers + 1)[0])
    odds /= odds.sum(axis=1, keepdims=True)
    return odds[:, 0], odds[:, 1:] / (1 - odds[:, :1])


KINDS: dict[str, Callable[[np.random.Generator, int, int], Truth]] = {
    "guessed": lambda g, items, m: (np.full(items, 1 / (m + 1)), evenly(items, m)),
    "a little better than guessed": lambda g, items, m: (np.full(items, (1 + 0.2 * m) / (m + 1)), evenly(items, m)),
    "half guessed, half known": lambda g, items, m: (
        np.where(g.random(items) < 0.5, 1 / (m + 1), 0.9),
        evenly(items, m),
    ),
    "confidently wrong": lambda g, items, m: (
        np.where(g.random(items) < 0.6, 0.85, 0.08),
        one_in_front(items, m, 0.9),
    ),
    "half attracted, half guessed": lambda g, items, m: (
        g.beta(1, 1.5, items),
        np.where(g.random((items, 1)) < 0.5, one_in_front(items, m, 1.0), evenly(items, m)),
    ),
    "spread": lambda g, items, m: (g.beta(1, 1, items), g.dirichlet(np.ones(m), items)),
    "softmax": softmax,
}


@pytest.mark.parametrize("wrong_answers", [1, 3, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_is_nearly_unbiased_for_majority_votes(kind: str, wrong_answers: int) -> None:
    generator = np.random.default_rng(wrong_answers)
    errors = []
    for case in range(12):
        truth = KINDS[kind](generator, 300, wrong_answers)
        tallies = sample(generator, truth, 16, 1 / (wrong_answers + 1))
        found = forecast_accuracy(tallies, alpha=0.05, seed=case, replicates=2)
        errors.append(found.value - majority(generator, truth))
    assert abs(np.mean(errors)) <= 0.06


def test_the_largest_share_seen_would_be_biased_and_the_draws_are_not() -> None:
    """Eight wrong votes, evenly spread over three answers: the largest share seen is 0.52 on average, not 1/3."""
    generator = np.random.default_rng(0)
    even = sample(generator, (np.zeros(400), evenly(400, 3)), 8, 0.25)
    seen = np.mean([max(tally.votes.values()) / 8 for tally in even])
    assert seen > 0.5
    assert rival_draws(even, seed=0).mean() == pytest.approx(1 / 3, abs=0.06)
    ahead = sample(generator, (np.zeros(400), one_in_front(400, 3, 0.9)), 8, 0.25)
    assert rival_draws(ahead, seed=0).mean() == pytest.approx(0.9, abs=0.04)


def test_abstentions_are_nobodys_votes() -> None:
    """Half of the samples abstain: right answers at 0.2 of all samples beat rivals at 0.1 each."""
    generator = np.random.default_rng(0)
    truth = (np.full(200, 0.4), evenly(200, 3))
    tallies = sample(generator, truth, 32, 0.25, abstain=0.5)
    assert rival_draws(tallies, seed=0).mean() == pytest.approx(0.3 / 0.8 / 3, abs=0.03)
    assert forecast_accuracy(tallies, alpha=0.05, seed=0, replicates=2).value > 0.9


def test_open_answers_compete_too() -> None:
    """Right in 0.3 of the samples against one rival at 0.5, or against many at 0.07 each."""
    generator = np.random.default_rng(0)
    for wrong, expected in ((one_in_front(150, 10, 0.7), 0.0), (evenly(150, 10), 1.0)):
        tallies = sample(generator, (np.full(150, 0.3), wrong), 16, 0.0)
        found = forecast_accuracy(tallies, alpha=0.05, seed=0, replicates=20)
        assert found.value == pytest.approx(expected, abs=0.2)
        assert (found.floor, found.covered) == (0, pytest.approx(1, abs=0.02))
        assert found.high > 0.95


def test_without_votes_the_strongest_rival_is_assumed() -> None:
    tallies = [Tally(str(i), str(i), 0.25, 40, c) for i, c in enumerate([14] * 20 + [30] * 20)]
    found = forecast_accuracy(tallies, alpha=0.05, seed=0, replicates=20)
    assert found.value == pytest.approx(0.5, abs=0.02)
    assert "Without votes" in found.basis
    voted = [Tally(str(i), str(i), 0.25, 40, 14, votes={"0": 14, "1": 9, "2": 9, "3": 8}) for i in range(20)]
    mixed = forecast_accuracy([*voted, *tallies[20:]], alpha=0.05, seed=0, replicates=20)
    assert mixed.value > 0.9
    assert "20 items without votes" in mixed.basis


def test_right_and_wrong_votes_are_told_apart_by_their_count() -> None:
    """c = 3 of 9: the other answers have 5 and 1 votes whichever of two answers with 3 votes was right."""
    known = [Tally("a", "a", 0.25, 9, 3, votes={"0": 5, "1": 3, "2": 1})]
    assert 0.3 < rival_draws(known, seed=0).mean() < 0.9
    spellings = [Tally("a", "a", 0.0, 9, 3, votes={"mr": 2, "mri": 1, "ct": 5, "us": 1})]
    np.testing.assert_allclose(rival_draws(spellings, seed=0), 1)
    always_right = [Tally("a", "a", 0.25, 9, 9, votes={"2": 9})]
    assert 1 / 3 <= rival_draws(always_right, seed=0).mean() < 1


def test_the_ends_and_the_parts() -> None:
    generator = np.random.default_rng(0)
    right = np.repeat([0.95, 0.36, 0.02], 60)
    wrong = np.concatenate([evenly(60, 3), one_in_front(60, 3, 1.0), one_in_front(60, 3, 1.0)])
    tallies = [
        Tally(t.item_id, t.cluster, t.floor, t.n, t.c, greedy_correct=None if i % 3 else i < 60, votes=t.votes)
        for i, t in enumerate(sample(generator, (right, wrong), 64, 0.25))
    ]
    found = forecast_accuracy(tallies, alpha=0.05, seed=0, replicates=100)
    assert found.value == pytest.approx(1 / 3, abs=0.06)
    assert found.covered == pytest.approx(2 / 3, abs=0.06)
    assert found.ceiling == pytest.approx(found.covered + 0.25 * (1 - found.covered), abs=1e-9)
    assert found.low < found.value < found.ceiling < found.high
    assert found.low > 0.2 and found.high < 0.9
    assert found.acc_at_1 == pytest.approx(1 / 3)
    assert found.accuracy == pytest.approx(np.mean([t.c / 64 for t in tallies]))
    assert (found.items, found.confidence) == (180, 0.9)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["items"] == 180


def test_items_of_one_image_are_less_sure() -> None:
    generator = np.random.default_rng(0)
    tallies = sample(generator, (np.repeat(generator.choice([0.1, 0.9], 30), 4), evenly(120, 3)), 16, 0.25)
    grouped = [Tally(t.item_id, str(i // 4), t.floor, t.n, t.c, votes=t.votes) for i, t in enumerate(tallies)]
    alone, together = (forecast_accuracy(own, alpha=0.05, seed=0) for own in (tallies, grouped))
    assert together.value == alone.value
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_mixed_floors_and_uneven_samples() -> None:
    tallies = [
        *(Tally(f"open {i}", "a", 0.0, 4 + i, 0, votes={"x": 2, "y": 1}) for i in range(10)),
        *(Tally(f"two {i}", f"b{i}", 0.5, 16, 15, votes={"0": 15, "1": 1}) for i in range(10)),
        *(Tally(f"sure {i}", f"c{i}", 1.0, 3, 3, votes={"0": 3}) for i in range(5)),
        Tally("late", "late", 0.25, 0, 0),
    ]
    found = forecast_accuracy(tallies, alpha=0.1, seed=0, replicates=40)
    assert found.items == 25
    assert found.value == pytest.approx(15 / 25, abs=0.05)
    assert "3 to 16 samples" in found.basis


def test_the_same_seed_gives_the_same_forecast() -> None:
    tallies = sample(np.random.default_rng(0), softmax(np.random.default_rng(1), 40, 3), 8, 0.25)

    def forecast(seed: int) -> Forecast:
        return forecast_accuracy(tallies, alpha=0.05, seed=seed, replicates=20)

    assert forecast(1) == forecast(1)
    assert forecast(1) != forecast(2)


@pytest.mark.parametrize("tallies", [[], [Tally("a", "a", 0.25, 0, 0)]])
def test_nothing_sampled_is_refused(tallies: list[Tally]) -> None:
    with pytest.raises(ValueError, match="no items: none of"):
        forecast_accuracy(tallies, alpha=0.05, seed=0)


def test_one_item_is_enough_for_a_wide_forecast() -> None:
    found = forecast_accuracy([Tally("a", "a", 0.25, 1, 1, votes={"0": 1})], alpha=0.05, seed=0)
    assert found.low < 0.1 and found.high > 0.95
