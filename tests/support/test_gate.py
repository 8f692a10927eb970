"""The gate on simulated models whose truth is known, and on the corners of its input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medbridge.support import GateSettings, SupportEstimate, Tally, Verdict, decide, mean_curve, measure

Truth = Callable[[np.random.Generator, int, float], np.ndarray]
FAST = GateSettings(replicates=400)


def simulate(
    generator: np.random.Generator,
    truth: Truth,
    items: int,
    floor: float,
    *,
    samples: int = 16,
    per_image: int = 1,
) -> list[Tally]:
    """Items right with the probability that `truth` draws; greedy follows the likelier answer."""
    chance = truth(generator, items, floor)
    correct = generator.binomial(samples, chance)
    greedy = np.where(chance > 0.5, generator.random(items) < 0.97, generator.random(items) < chance)
    return [
        Tally(
            f"item {i}",
            f"image {i // per_image}",
            floor,
            samples,
            int(correct[i]),
            greedy_correct=bool(greedy[i]),
        )
        for i in range(items)
    ]


def guessing(_: np.random.Generator, items: int, floor: float) -> np.ndarray:
    return np.full(items, floor)


def skilled(share: float, chance: float = 0.9) -> Truth:
    """`share` of the items at `chance`, the others guessed."""
    return lambda generator, items, floor: np.where(generator.random(items) < share, chance, floor)


def verdicts(truth: Truth, items: int, floor: float, cases: int, settings: GateSettings = FAST) -> Counter[str]:
    generator = np.random.default_rng(items)
    tallies = (simulate(generator, truth, items, floor) for _ in range(cases))
    return Counter(decide(measure(own, settings, seed=case), settings).kind for case, own in enumerate(tallies))


def tallies_of(counts: list[tuple[int, int]], floor: float = 0.25, greedy: bool | None = None) -> list[Tally]:
    return [Tally(f"item {i}", f"image {i}", floor, n, c, greedy_correct=greedy) for i, (n, c) in enumerate(counts)]


def judge(tallies: list[Tally], settings: GateSettings = FAST) -> tuple[SupportEstimate, Verdict]:
    estimate = measure(tallies, settings, seed=0)
    return estimate, decide(estimate, settings)


# --- known truths ---


@pytest.mark.parametrize("items", [40, 200])
@pytest.mark.parametrize("options", [2, 3, 4, 5])
def test_guessing_is_bridged_and_never_sharpened(options: int, items: int) -> None:
    found = verdicts(guessing, items, 1 / options, 40)
    assert found["bridge"] >= 39
    assert found["sharpen"] == found["done"] == 0


@pytest.mark.parametrize("options", [2, 4])
def test_always_the_same_position_is_guessing(options: int) -> None:
    """Options in an independent order each time: whatever position is preferred, it is right at the floor."""
    generator = np.random.default_rng(0)
    shown = generator.permuted(np.tile(np.arange(options), (100 * 16, 1)), axis=1)[:, 0].reshape(100, 16)
    estimate, verdict = judge(tallies_of([(16, int((row == 0).sum())) for row in shown], 1 / options))
    assert verdict.kind == "bridge"
    assert estimate.support is not None
    assert estimate.support.low < 0 < estimate.support.high


def test_always_the_most_frequent_answer_is_no_support() -> None:
    """Right on 70 % of the items whatever the image, and wrong on the others at every k."""
    found = verdicts(skilled_or_wrong(0.7), 100, 1 / 2, 20)
    assert found["bridge"] >= 18
    assert found["sharpen"] == found["done"] == 0


def skilled_or_wrong(share: float) -> Truth:
    return lambda generator, items, _: np.where(generator.random(items) < share, 0.98, 0.02)


@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
def test_weak_but_broad_support_with_a_low_greedy_accuracy_is_sharpened(floor: float) -> None:
    def truth(generator: np.random.Generator, items: int, floor: float) -> np.ndarray:
        return np.full(items, floor + 0.6 * (1 - floor) if floor else 0.3)

    generator = np.random.default_rng(0)
    tallies = simulate(generator, truth, 150, floor)
    lagging = [Tally(t.item_id, t.cluster, t.floor, t.n, t.c, greedy_correct=i % 2 == 0) for i, t in enumerate(tallies)]
    _, verdict = judge(lagging)
    assert verdict.kind == "sharpen"
    assert verdict.more is None


@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
def test_full_skill_is_done(floor: float) -> None:
    assert verdicts(skilled(1.0, 0.98), 100, floor, 10)["done"] == 10


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.25, 0.5])
def test_at_the_threshold_a_wrong_verdict_is_rare(floor: float) -> None:
    """Half of the items known, the others guessed: support above the floor is 0.5, any verdict an error."""
    found = verdicts(lambda g, n, f: np.where(g.random(n) < 0.5, 1.0, f), 80, floor, 100)
    alpha_and_noise = 100 * (0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5)
    assert found["bridge"] <= alpha_and_noise
    assert found["sharpen"] + found["done"] <= alpha_and_noise


@pytest.mark.parametrize(("share", "forbidden"), [(0.2, ("sharpen", "done")), (0.8, ("bridge",))])
def test_away_from_the_threshold_no_verdict_points_the_wrong_way(share: float, forbidden: tuple[str, ...]) -> None:
    found = verdicts(skilled(share), 80, 0.25, 40)
    assert sum(found[kind] for kind in forbidden) == 0
    assert found["undecided"] < 20


# --- the estimate ---


def test_curves_are_those_of_the_formulas() -> None:
    counts = [(16, 0), (16, 3), (20, 20), (17, 9)] * 4
    estimate, _ = judge(tallies_of(counts))
    assert estimate.ks == tuple(range(1, 17))
    assert (estimate.n_min, estimate.n_max, estimate.samples) == (16, 20, 276)
    n, c = np.array(counts).T
    np.testing.assert_allclose(estimate.pass_at_k.value, mean_curve(n, c, estimate.ks), rtol=1e-13)
    np.testing.assert_allclose(estimate.floor, 1 - 0.75 ** np.arange(1, 17))
    expected = (estimate.pass_at_k.value - estimate.floor) / (1 - estimate.floor)
    np.testing.assert_allclose(estimate.above_floor.value[:10], expected[:10], atol=1e-12)
    assert np.isnan(estimate.above_floor.value[10:]).all()
    assert estimate.informative_k == 10
    for curve in (estimate.pass_at_k, estimate.above_floor):
        shown = ~np.isnan(curve.value)
        assert np.all(curve.low[shown] <= curve.value[shown])
        assert np.all(curve.high[shown] >= curve.value[shown])
    assert estimate.accuracy is not None
    assert estimate.accuracy.value == pytest.approx(np.mean(c / n))


def test_gap_counts_items_that_have_both() -> None:
    tallies = [
        Tally(f"item {i}", f"image {i}", 0.25, 8, 4, greedy_correct=None if i < 5 else i % 2 == 0) for i in range(25)
    ]
    estimate, _ = judge(tallies)
    assert estimate.greedy_items == 20
    assert estimate.acc_at_1 is not None and estimate.gap is not None and estimate.k == 4
    assert estimate.acc_at_1.value == 0.5
    reached = 1 - 1 / math.comb(8, 4)
    assert estimate.gap.value == pytest.approx(reached - 0.5)
    assert estimate.gap_above_floor == pytest.approx((reached - (1 - 0.75**4)) / 0.75**4 - (0.5 - 0.25) / 0.75)


def test_mixed_floors_read_the_mean_floor() -> None:
    closed = tallies_of([(8, 4)] * 10, 0.5)
    open_answers = [Tally(f"open {i}", f"open {i}", 0.0, 8, 0) for i in range(10)]
    estimate, verdict = judge(closed + open_answers)
    np.testing.assert_allclose(estimate.floor, (1 - 0.5 ** np.arange(1, 9)) / 2)
    assert estimate.k == 8
    assert verdict.kind == "bridge"


def test_abstentions_are_reported() -> None:
    tallies = [Tally(f"item {i}", f"image {i}", 0.0, 4, 0, abstained=3) for i in range(20)]
    estimate, verdict = judge(tallies)
    assert estimate.abstain_rate == 0.75
    assert "75 % of the samples gave no readable answer" in verdict.reason


@pytest.mark.parametrize(
    ("configured", "floor", "k", "said"),
    [
        (None, 0.5, 2, "the largest at which guessing misses 0.25"),
        (None, 0.25, 4, "the largest at which guessing misses 0.25"),
        (None, 0.0, 8, "all samples"),
        (None, 0.8, 1, "k = 1, although"),
        (3, 0.25, 3, "as configured"),
        (8, 0.5, 4, "in place of the configured 8: above it guessing misses"),
        (64, 0.0, 8, "in place of the configured 64: items have only 8 samples"),
    ],
)
def test_the_k_that_is_read(configured: int | None, floor: float, k: int, said: str) -> None:
    settings = GateSettings(k=configured, replicates=200)
    estimate, verdict = judge(tallies_of([(8, 4)] * 12, floor), settings)
    assert estimate.k == k
    assert said in estimate.k_note
    assert f"k = {k} " in verdict.reason


# --- corners ---


@pytest.mark.parametrize("tallies", [[], tallies_of([(0, 0)] * 5)])
def test_nothing_measured_is_undecided(tallies: list[Tally]) -> None:
    estimate, verdict = judge(tallies)
    assert (estimate.items, estimate.ks, estimate.support, estimate.acc_at_1) == (0, (), None, None)
    assert verdict.kind == "undecided"
    assert verdict.more == {"items": 8, "capped": False}
    json.dumps([estimate.to_dict(), verdict.to_dict()], allow_nan=False)


def test_items_without_samples_are_left_out() -> None:
    estimate, verdict = judge([*tallies_of([(8, 0)] * 20), Tally("late", "late", 0.25, 0, 0)])
    assert estimate.items == 20
    assert estimate.ks == tuple(range(1, 9))
    assert verdict.kind == "bridge"


def test_too_few_items_are_undecided_whatever_they_say() -> None:
    _, verdict = judge(tallies_of([(16, 16)] * 7, 0.0, greedy=True))
    assert (verdict.kind, verdict.more) == ("undecided", {"items": 1, "capped": False})


def test_equal_items_do_not_make_a_verdict_sure() -> None:
    """8 items all right say little at 2 options, where 7 of 8 are reached by guessing at k = 3."""
    estimate, verdict = judge(tallies_of([(16, 16)] * 8, 0.5, greedy=True))
    assert estimate.support is not None
    assert estimate.support.value == 1
    assert estimate.support.low < 0.5
    assert verdict.kind == "undecided"
    assert verdict.more is not None and verdict.more["items"] > 0


def test_one_image_decides_nothing() -> None:
    tallies = [Tally(f"item {i}", "one image", 0.25, 16, 16, greedy_correct=True) for i in range(50)]
    estimate, verdict = judge(tallies)
    assert estimate.clusters == 1
    assert verdict.kind == "undecided"


def test_none_correct_is_bridged_and_all_correct_is_done() -> None:
    assert judge(tallies_of([(16, 0)] * 30))[1].kind == "bridge"
    assert judge(tallies_of([(16, 16)] * 30, greedy=True))[1].kind == "done"


def test_support_without_greedy_completions_is_undecided() -> None:
    _, verdict = judge(tallies_of([(16, 16)] * 30))
    assert (verdict.kind, verdict.more) == ("undecided", None)
    assert "no greedy completions" in verdict.reason


def test_a_floor_that_leaves_no_room_is_refused() -> None:
    for floor in (0.97, 1.0):
        estimate, verdict = judge(tallies_of([(4, 4)] * 20, floor, greedy=True))
        assert (estimate.k, estimate.informative_k, estimate.support) == (None, None, None)
        assert verdict.kind == "undecided"
        assert "can't be read" in verdict.reason
        json.dumps([estimate.to_dict(), verdict.to_dict()], allow_nan=False)


def test_undecided_says_how_many_items_would_decide() -> None:
    """The forecast is about right: so many items of the same kind do decide."""
    tallies = tallies_of([(16, 16)] * 13 + [(16, 0)] * 7, 0.0, greedy=True)
    _, verdict = judge(tallies)
    assert verdict.kind == "undecided"
    assert verdict.more is not None and not verdict.more["capped"]
    times = math.ceil((20 + verdict.more["items"]) / 20) + 1
    assert judge(tallies_of([(16, 16)] * 13 * times + [(16, 0)] * 7 * times, 0.0, greedy=True))[1].kind != "undecided"


def test_a_truth_at_the_threshold_is_not_forecast_for_ever() -> None:
    _, verdict = judge(tallies_of([(16, 16)] * 10 + [(16, 0)] * 10, 0.0))
    assert verdict.more == {"items": 380, "capped": True}
    assert "too near" in verdict.reason


def test_the_same_seed_gives_the_same_numbers() -> None:
    tallies = tallies_of([(16, i % 17) for i in range(40)], greedy=True)
    assert measure(tallies, FAST, seed=1).to_dict() == measure(tallies, FAST, seed=1).to_dict()
    assert measure(tallies, FAST, seed=1).to_dict() != measure(tallies, FAST, seed=2).to_dict()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tallies_give_a_verdict_that_json_can_hold(data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 6),
                st.floats(0, 1),
                st.sampled_from([0.0, 0.25, 0.5, 1.0]),
                st.sampled_from([None, True, False]),
                st.integers(0, 3),
            ),
            max_size=15,
        )
    )
    tallies = [
        Tally(f"item {i}", f"image {image}", floor, n, round(share * n), greedy_correct=greedy)
        for i, (n, share, floor, greedy, image) in enumerate(rows)
    ]
    settings = GateSettings(replicates=100, min_items=data.draw(st.integers(1, 9)))
    estimate, verdict = judge(tallies, settings)
    assert verdict.kind in {"bridge", "sharpen", "done", "undecided"}
    assert verdict.reason
    stored = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
    assert len(stored["floor"]) == len(stored["ks"]) == len(stored["above_floor"]["low"])
    json.dumps(verdict.to_dict(), allow_nan=False)
    if estimate.support is not None:
        assert estimate.support.low <= estimate.support.value <= estimate.support.high


# --- settings and tallies ---


@pytest.mark.parametrize(
    "wrong", [{"tau": 0.5}, {"alpha": 0.5}, {"k": 0}, {"support_threshold": 1.0}, {"min_items": 0}]
)
def test_settings_refuse_what_they_cannot_mean(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        GateSettings(**wrong)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in GateSettings.model_fields.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"floor": 1.5}, "floor = 1.5"),
        ({"floor": float("nan")}, "floor = nan"),
        ({"n": -1}, "n = -1"),
        ({"c": 5}, "c = 5 correct and 0 abstained exceed n = 4"),
        ({"c": 3, "abstained": 2}, "exceed n = 4"),
        ({"abstained": -1}, "abstained = -1"),
        ({"votes": {"0": 5}}, "votes .* exceed the 4 samples"),
        ({"votes": {"0": -1}}, "negative vote"),
    ],
)
def test_impossible_tallies_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"item 'a': .*{message}"):
        Tally(**{"item_id": "a", "cluster": "a", "floor": 0.25, "n": 4, "c": 1, **changed})
