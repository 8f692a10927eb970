"""Paired changes on simulated models whose truth is known: false alarms, power, signs, and items left out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, false_discovery_control, fisher_exact

from medbridge.support import Tally, pass_at_k
from medbridge.support.change import Change, Shift, compare, losses, visual_support

K = 4


def scores(tallies: Sequence[Tally]) -> tuple[np.ndarray, np.ndarray]:
    """Pass@4 above what guessing reaches."""
    n, c, floors = (np.array([getattr(tally, name) for tally in tallies]) for name in ("n", "c", "floor"))
    guess = 1 - (1 - floors) ** K
    return pass_at_k(n, c, [K])[:, 0] - guess, 1 - guess


def change(before: Sequence[Tally], after: Sequence[Tally], **options: Any) -> Change:
    arguments: dict[str, Any] = {
        "scores": scores, "ks": (1, 4), "alpha": 0.05, "replicates": 400, "seed": 0, **options,
    }  # fmt: skip
    return compare(before, after, **arguments)


def tally(number: int, c: int, n: int = 16, *, greedy: bool | None = None, floor: float = 0.0, **more: Any) -> Tally:
    return Tally(f"item {number:04}", more.get("cluster", f"image {number}"), floor, n, c, greedy_correct=greedy)


def sample(generator: np.random.Generator, chance: np.ndarray, *, n: int = 16, per_image: int = 1) -> list[Tally]:
    right = generator.binomial(n, chance)
    greedy = generator.random(len(chance)) < chance
    return [
        tally(i, int(right[i]), n, greedy=bool(greedy[i]), cluster=f"image {i // per_image}")
        for i in range(len(chance))
    ]


def signs(shift: Shift) -> tuple[float, ...]:
    return -shift.value, -shift.high, -shift.low, shift.p_gain, shift.p_loss


# -- alarms and power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["easy and hard", "all uncertain", "by image"])
def test_no_change_raises_at_most_alpha_alarms(spread: str) -> None:
    alpha, cases = 0.1, 200
    generator = np.random.default_rng(7)
    alarms = named = 0
    for seed in range(cases):
        if spread == "easy and hard":
            chance = generator.beta(0.3, 0.3, 40)
        elif spread == "all uncertain":
            chance = np.full(40, 0.1)
        else:
            chance = generator.beta(0.3, 0.3, 14).repeat(3)
        per_image = 3 if spread == "by image" else 1
        before, after = (sample(generator, chance, per_image=per_image) for _ in range(2))
        found = change(before, after, alpha=alpha, ks=(1,), seed=seed)
        alarms += found.support.p_loss <= alpha
        named += bool(found.gained)
    # three standard errors of 200 cases above alpha
    limit = cases * alpha + 3 * math.sqrt(cases * alpha * (1 - alpha))
    assert alarms <= limit
    assert named <= limit


def test_a_real_loss_is_found_and_its_items_are_named() -> None:
    generator = np.random.default_rng(3)
    for seed in range(10):
        chance = np.full(100, 0.7)
        after = np.where(np.arange(100) < 30, 0.0, chance)
        found = change(sample(generator, chance), sample(generator, after), seed=seed)
        assert found.support.value == pytest.approx(-0.3, abs=0.06)
        assert found.support.high < 0
        assert found.support.p_loss < 0.01 < 0.9 < found.support.p_gain
        lost = {int(name.split()[1]) for name in found.lost}
        assert lost >= set(range(30))
        assert len(lost - set(range(30))) <= 6
        assert not found.gained
        assert found.vanished.count == 30
        assert found.vanished.p_value < 1e-6


def test_the_interval_covers_a_true_change() -> None:
    generator = np.random.default_rng(11)
    # the mean change over all items there could be: of min(p, 0.2) on half of them
    truth = -0.5 * float(np.minimum(np.random.default_rng(0).beta(0.5, 0.5, 500_000), 0.2).mean())
    missed = np.zeros(2)
    for seed in range(200):
        chance = generator.beta(0.5, 0.5, 30)
        after = np.clip(chance - 0.2 * (generator.random(30) < 0.5), 0, 1)
        found = change(sample(generator, chance), sample(generator, after), ks=(1,), alpha=0.1, seed=seed)
        missed += [found.pass_at_k[0].low > truth, found.pass_at_k[0].high < truth]
    assert (missed <= 200 * 0.1 + 3 * math.sqrt(200 * 0.09)).all()


def test_pairs_beat_separate_means() -> None:
    """Easy and hard items side by side: their spread must not widen the interval of the difference."""
    chance = np.array([0.0, 1.0] * 50)
    found = change(sample(np.random.default_rng(0), chance), sample(np.random.default_rng(1), chance))
    assert found.support.value == 0
    assert found.support.high - found.support.low < 0.08
    assert found.support.p_loss > 0.5


def test_p_values_and_ends_agree() -> None:
    generator = np.random.default_rng(5)
    seen = set()
    for seed in range(60):
        chance = generator.beta(0.5, 0.5, 25)
        after = np.clip(chance + generator.choice([-0.2, -0.1, 0.0, 0.2]), 0, 1)
        tolerated = float(generator.choice([0.0, 0.05]))
        found = change(
            sample(generator, chance), sample(generator, after), replicates=399, seed=seed, tolerated=tolerated
        )
        for shift in (found.support, *found.pass_at_k, found.acc_at_1, *(found.gap or ())):
            assert shift is not None
            assert (shift.p_loss <= 0.05) == (shift.high < -tolerated)
            assert (shift.p_gain <= 0.05) == (shift.low > tolerated)
            seen.add((shift.p_loss <= 0.05, shift.p_gain <= 0.05))
    assert seen == {(True, False), (False, True), (False, False)}


def test_a_tolerated_loss_raises_no_alarm() -> None:
    before = [tally(i, 16) for i in range(200)]
    after = [tally(i, 0 if i < 30 else 16) for i in range(200)]
    strict, lax = (change(before, after, tolerated=loss) for loss in (0.0, 0.2))
    assert strict.support.p_loss < 0.01
    assert lax.support.p_loss > 0.5
    assert strict.support.value == lax.support.value == pytest.approx(-0.15)
    assert lax.tolerated == 0.2


# -- values --------------------------------------------------------------------------------------------------


def test_values_by_hand() -> None:
    before = [tally(0, 0, 4, greedy=False), tally(1, 4, 4, greedy=True), tally(2, 2, 4, greedy=True)]
    after = [tally(0, 1, 4, greedy=True), tally(1, 4, 4, greedy=True), tally(2, 0, 4, greedy=False)]
    found = change(before, after, ks=(1, 2))
    assert found.items == 3
    assert found.unpaired == 0
    assert found.confidence == pytest.approx(0.9)
    assert found.ks == (1, 2)
    assert found.pass_at_k[0].value == pytest.approx((1 / 4 + 0 - 2 / 4) / 3)
    assert found.pass_at_k[1].value == pytest.approx((1 / 2 + 0 - 5 / 6) / 3)
    assert found.acc_at_1 is not None and found.acc_at_1.value == 0
    assert found.gap is not None
    assert found.gap[1].value == pytest.approx(((1 / 2 - 1) + 0 + (-5 / 6 + 1)) / 3)
    assert (found.appeared.count, found.vanished.count) == (1, 1)
    assert found.support.value == pytest.approx((1 + 0 - 1) / 3)


def test_a_gap_can_move_by_two() -> None:
    """From greedy right and never sampled right to the opposite: the interval must reach what is possible."""
    before = [tally(i, 0, 4, greedy=True) for i in range(20)]
    after = [tally(i, 4, 4, greedy=False) for i in range(20)]
    (gap,) = change(before, after, ks=(2,)).gap or ()
    assert gap.value == 2
    assert 1.2 < gap.low < gap.high == pytest.approx(2)


def test_support_is_a_ratio_over_the_room_above_guessing() -> None:
    before = [tally(0, 0, floor=0.5), tally(1, 0)]
    after = [tally(0, 16, floor=0.5), tally(1, 0)]
    room = 1 - (1 - 0.5**K)
    assert change(before, after).support.value == pytest.approx(1 / (room + 1))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_exchanging_the_two_changes_every_sign(data: st.DataObject) -> None:
    def draw(number: int, floor: float) -> Tally:
        n = data.draw(st.sampled_from([1, 4, 9]))
        return tally(
            number, data.draw(st.integers(0, n)), n, floor=floor,
            greedy=data.draw(st.sampled_from([None, True, False])), cluster=f"image {number // 2}",
        )  # fmt: skip

    floors = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=1, max_size=9))
    before, after = ([draw(i, floor) for i, floor in enumerate(floors)] for _ in range(2))
    options: dict[str, Any] = {"replicates": 150, "tolerated": data.draw(st.sampled_from([0.0, 0.1]))}
    forth, back = change(before, after, **options), change(after, before, **options)
    pairs = [(forth.support, back.support), *zip(forth.pass_at_k, back.pass_at_k, strict=True)]
    assert (forth.acc_at_1 is None) == (back.acc_at_1 is None) == (forth.gap is None)
    if forth.acc_at_1 is not None and back.acc_at_1 is not None:
        pairs += [(forth.acc_at_1, back.acc_at_1), *zip(forth.gap or (), back.gap or (), strict=True)]
    for one, other in pairs:
        assert one.items == other.items
        values = (one.value, one.low, one.high, one.p_loss, one.p_gain)
        np.testing.assert_allclose(values, signs(other), atol=1e-12)
    assert (forth.gained, forth.lost) == (back.lost, back.gained)
    assert (forth.appeared, forth.vanished) == (back.vanished, back.appeared)


def test_the_order_of_the_tallies_does_not_matter() -> None:
    generator = np.random.default_rng(2)
    before, after = (sample(generator, generator.random(20), per_image=2) for _ in range(2))
    assert change(before, after) == change(before[::-1], after[3:] + after[:3])


def test_items_of_one_image_count_as_one_draw() -> None:
    apart = [[tally(i, c) for i in range(40)] for c in (16, 12)]
    together = [[tally(i, c, cluster=f"image {i // 10}") for i in range(40)] for c in (16, 12)]
    one, other = change(*apart, ks=(1,)).pass_at_k[0], change(*together, ks=(1,)).pass_at_k[0]
    assert one.value == other.value == -0.25
    assert other.high - other.low > 3 * (one.high - one.low)


# -- what is left out ----------------------------------------------------------------------------------------


def test_unpaired_and_unsampled_items_are_dropped_and_counted() -> None:
    before = [tally(0, 4), tally(1, 4), tally(2, 4), tally(3, 0, 0)]
    after = [tally(1, 4), tally(2, 0, 0), tally(3, 4), tally(4, 4), tally(5, 4)]
    found = change(before, after)
    assert (found.items, found.unpaired) == (1, 5)
    assert found.support.value == 0


def test_no_greedy() -> None:
    found = change([tally(0, 3), tally(1, 5)], [tally(0, 4), tally(1, 5)])
    assert found.acc_at_1 is None
    assert found.gap is None
    assert found.pass_at_k[0].value == pytest.approx(1 / 32)


def test_greedy_in_part() -> None:
    before = [tally(0, 4, greedy=True), tally(1, 4), tally(2, 4, greedy=True)]
    after = [tally(0, 4, greedy=False), tally(1, 4, greedy=True), tally(2, 4, greedy=True)]
    found = change(before, after)
    assert found.acc_at_1 is not None and found.acc_at_1.items == 2
    assert found.acc_at_1.value == -0.5
    assert found.gap is not None and found.gap[0].items == 2 and found.gap[0].value == 0.5
    # the width is that of two items, not of three
    alone = change([before[0], before[2]], [after[0], after[2]])
    assert alone.acc_at_1 == found.acc_at_1


def test_ragged_samples() -> None:
    before = [tally(0, 1, 2), tally(1, 4, 16), tally(2, 0, 5)]
    after = [tally(0, 2, 16), tally(1, 16, 16), tally(2, 5, 5)]
    found = change(before, after, ks=(1, 4, 8, 20))
    assert [shift.items for shift in found.pass_at_k] == [3, 2, 1, 0]
    assert found.support.items == 2
    assert found.pass_at_k[2].value == pytest.approx(1 - float(pass_at_k([16], [4], [8])[0, 0]))
    assert math.isnan(found.pass_at_k[3].value) and math.isnan(found.pass_at_k[3].p_loss)
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_nothing_scored() -> None:
    def silent(tallies: Sequence[Tally]) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(tallies), np.nan), np.ones(len(tallies))

    found = change([tally(0, 3)], [tally(0, 4)], scores=silent)
    assert math.isnan(found.support.value)
    assert found.support.items == 0
    assert losses({"a": found}, 0.05) == {}


def test_no_ks() -> None:
    found = change([tally(0, 3, greedy=True)], [tally(0, 4, greedy=True)], ks=())
    assert found.pass_at_k == ()
    assert found.gap == ()


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ([], [], {}, "no item in common: 0 items before and 0 after"),
        ([tally(0, 1)], [tally(1, 1)], {}, "no item in common"),
        ([tally(0, 0, 0)], [tally(0, 1)], {}, "no item in common"),
        ([tally(0, 1), tally(0, 1)], [tally(0, 1)], {}, "before: item 'item 0000' is there twice"),
        ([tally(0, 1)], [tally(0, 1), tally(0, 2)], {}, "after: item 'item 0000' is there twice"),
        ([tally(0, 1)], [tally(0, 1, floor=0.5)], {}, "floor = 0.0 before and 0.5 after"),
        ([tally(0, 1)], [tally(0, 1, cluster="x")], {}, "cluster = 'image 0' before and 'x' after"),
        ([tally(0, 1)], [tally(0, 1)], {"alpha": 0.5}, "alpha = 0.5"),
        ([tally(0, 1)], [tally(0, 1)], {"alpha": math.nan}, "alpha = nan"),
        ([tally(0, 1)], [tally(0, 1)], {"tolerated": -0.1}, "tolerated = -0.1"),
        ([tally(0, 1)], [tally(0, 1)], {"ks": (1, 0)}, r"ks\[1\]"),
        ([tally(0, 1)], [tally(0, 1)], {"scores": lambda t: ([1.0, 2.0], [1.0])}, "scores gave shapes"),
        ([tally(0, 1, 8)], [tally(0, 1)], {"scores": lambda t: ([0.0], [t[0].n])}, "1 - guess = 8.0 before and 16.0"),
    ],
)
def test_refusals(before: list[Tally], after: list[Tally], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(before, after, **options)


# -- items gained and lost -----------------------------------------------------------------------------------


def test_named_items_are_those_of_fisher_and_benjamini_hochberg() -> None:
    generator = np.random.default_rng(9)
    for floor in (0.0, 0.25):
        before, after = [], []
        for i in range(60):
            n, m = (int(size) for size in generator.integers(1, 24, 2))
            before.append(tally(i, int(generator.integers(0, n + 1)), n, floor=floor))
            after.append(tally(i, int(generator.integers(0, m + 1)), m, floor=floor))
        p_values = []
        for old, new in zip(before, after, strict=True):
            table = [[new.c, new.n - new.c], [old.c, old.n - old.c]]
            fisher = fisher_exact(table, alternative="greater").pvalue
            p_values.append(min(1, max(fisher, binom.sf(new.c - 1, new.n, floor))))
        wanted = {old.item_id for old, p in zip(before, false_discovery_control(p_values), strict=True) if p <= 0.1}
        assert set(change(before, after, alpha=0.1).gained) == wanted
        assert wanted


def test_rising_to_what_guessing_gives_is_no_gain() -> None:
    before = [tally(i, 0, floor=0.5) for i in range(10)]
    assert len(change(before, [tally(i, 16, floor=0.5) for i in range(10)]).gained) == 10
    assert change(before, [tally(i, 8, floor=0.5) for i in range(10)]).gained == ()
    # nor is falling from there a loss
    assert change([tally(i, 8, floor=0.5) for i in range(10)], before).lost == ()


def test_crossings_are_those_of_shuffled_samples() -> None:
    """All ways to deal an item's samples out over the two measurements, counted one by one."""
    sizes = [(3, 3), (2, 4), (4, 2)]
    totals = [1, 2, 2]
    chances = []
    for (n, m), total in zip(sizes, totals, strict=True):
        deals = list(itertools.combinations(range(n + m), total))
        chances.append(sum(all(place >= n for place in deal) for deal in deals) / len(deals))
    before = [tally(i, 0, n) for i, (n, _) in enumerate(sizes)]
    after = [tally(i, total, m) for i, ((_, m), total) in enumerate(zip(sizes, totals, strict=True))]
    # an item that stays at nothing, one always right: neither can cross
    before += [tally(3, 0), tally(4, 16)]
    after += [tally(3, 0), tally(4, 16)]
    found = change(before, after, ks=(1,), scores=lambda t: (np.zeros(len(t)), np.ones(len(t))))
    assert found.appeared.count == 3
    assert found.appeared.expected == pytest.approx(sum(chances))
    assert found.appeared.p_value == pytest.approx(math.prod(chances))
    assert found.vanished.count == 0
    assert found.vanished.p_value == 1


def test_noise_makes_crossings_and_their_expectation_says_so() -> None:
    generator = np.random.default_rng(4)
    chance = np.full(300, 0.05)
    found = change(sample(generator, chance), sample(generator, chance))
    assert found.appeared.count > 30
    assert found.appeared.expected == pytest.approx(found.appeared.count, rel=0.3)
    assert found.appeared.p_value > 0.05
    assert found.gained == ()


def test_many_samples() -> None:
    found = change([tally(0, 0, 100_000)], [tally(0, 60_000, 100_000)], ks=(1,))
    assert found.gained == ("item 0000",)
    assert found.appeared.p_value < 1e-12


# -- controls and strata -------------------------------------------------------------------------------------


def test_visual_support_is_real_minus_control() -> None:
    real = [tally(i, 16 if i < 20 else 0, greedy=i < 20) for i in range(30)]
    blank = [tally(i, 16 if i < 5 else 0, greedy=i < 5) for i in range(30)]
    found = visual_support(real, blank, scores=scores, ks=(1,), alpha=0.05, replicates=400, seed=0)
    assert found.support.value == pytest.approx(0.5)
    assert found.support.p_gain < 0.01
    assert found.gained == tuple(f"item {i:04}" for i in range(5, 20))


def test_losses_are_those_of_holm() -> None:
    base = change([tally(i, 8) for i in range(9)], [tally(i, 8) for i in range(9)])

    def with_p(p_loss: float) -> Change:
        return replace(base, support=replace(base.support, p_loss=p_loss))

    p_values = {"a": 0.02, "b": 0.9, "c": 0.012, "d": 0.03, "none": math.nan}
    changes = {name: with_p(p_loss) for name, p_loss in p_values.items()}
    # 0.012 <= 0.05 / 4, but 0.02 > 0.05 / 3
    assert list(losses(changes, 0.05)) == ["c"]
    changes["b"] = with_p(0.001)
    # 0.001 <= 0.05 / 4, 0.012 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.03 <= 0.05
    assert list(losses(changes, 0.05)) == ["a", "b", "c", "d"]
    assert losses({}, 0.05) == {}
    with pytest.raises(ValueError, match="alpha = 1"):
        losses(changes, 1)


def test_no_loss_in_any_of_many_strata() -> None:
    """The probability of any alarm over eight strata without a change stays at alpha."""
    generator = np.random.default_rng(12)
    alarms = 0
    for seed in range(60):
        changes = {}
        for name in "abcdefgh":
            chance = generator.beta(0.4, 0.4, 20)
            before, after = (sample(generator, chance, n=8) for _ in range(2))
            changes[name] = change(before, after, ks=(), seed=seed, replicates=200)
        alarms += bool(losses(changes, 0.1))
    assert alarms <= 60 * 0.1 + 3 * math.sqrt(60 * 0.09)
