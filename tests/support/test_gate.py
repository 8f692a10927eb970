"""The verdicts: on simulated models whose truth is known, on several strata at once, on the corners of the input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medbridge.support import (
    Evidence,
    GateSettings,
    Measured,
    SupportEstimate,
    Tally,
    Verdict,
    decide,
    judge,
    measure,
)

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


def skilled_or_wrong(share: float) -> Truth:
    return lambda generator, items, _: np.where(generator.random(items) < share, 0.98, 0.02)


def verdicts(truth: Truth, items: int, floor: float, cases: int, settings: GateSettings = FAST) -> Counter[str]:
    generator = np.random.default_rng(items)
    tallies = (simulate(generator, truth, items, floor) for _ in range(cases))
    return Counter(decide(measure(own, settings, seed=case), settings).kind for case, own in enumerate(tallies))


def tallies_of(counts: list[tuple[int, int]], floor: float = 0.25, greedy: bool | None = None) -> list[Tally]:
    return [Tally(f"item {i}", f"image {i}", floor, n, c, greedy_correct=greedy) for i, (n, c) in enumerate(counts)]


def judged(tallies: list[Tally], settings: GateSettings = FAST) -> tuple[SupportEstimate, Verdict]:
    estimate = measure(tallies, settings, seed=0)
    return estimate, decide(estimate, settings)


PATTERN = measure(tallies_of([(4, 4)] * 30 + [(4, 0)] * 30, 0.0, greedy=True), FAST, seed=0)


def estimate_with(p_below: float = 0.5, p_above: float = 0.5, p_done: float = 0.5, **more: object) -> SupportEstimate:
    """An estimate whose interval is narrow, so that only the p-values decide."""
    value = 0.3 if p_below < p_above else 0.7
    support = Measured(value, value - 0.15, value + 0.15)
    chosen = {"items": 60, "support": support, "p_below": p_below, "p_above": p_above, "p_done": p_done, **more}
    return replace(PATTERN, **chosen)


# --- known truths ---


@pytest.mark.parametrize("items", [40, 200])
@pytest.mark.parametrize("options", [2, 3, 4, 5])
def test_guessing_is_bridged_and_never_sharpened(options: int, items: int) -> None:
    found = verdicts(guessing, items, 1 / options, 40)
    assert found["bridge"] >= 36
    assert found["sharpen"] == found["done"] == 0


@pytest.mark.parametrize("options", [2, 4])
def test_always_the_same_position_is_guessing(options: int) -> None:
    """Options in an independent order each time: whatever position is preferred, it is right at the floor."""
    generator = np.random.default_rng(0)
    shown = generator.permuted(np.tile(np.arange(options), (100 * 16, 1)), axis=1)[:, 0].reshape(100, 16)
    estimate, verdict = judged(tallies_of([(16, int((row == 0).sum())) for row in shown], 1 / options))
    assert verdict.kind == "bridge"
    assert estimate.support is not None
    assert estimate.support.low < 0 < estimate.support.high


def test_always_the_same_answer_is_guessing() -> None:
    """Right on half of the items of 2 options whatever the image, and wrong on the others at every k."""
    found = verdicts(skilled_or_wrong(0.5), 100, 1 / 2, 20)
    assert found["bridge"] >= 18
    assert found["sharpen"] == found["done"] == 0


@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
def test_weak_but_broad_support_with_a_low_greedy_accuracy_is_sharpened(floor: float) -> None:
    def truth(generator: np.random.Generator, items: int, floor: float) -> np.ndarray:
        return np.full(items, floor + 0.6 * (1 - floor) if floor else 0.3)

    generator = np.random.default_rng(0)
    tallies = simulate(generator, truth, 150, floor)
    lagging = [Tally(t.item_id, t.cluster, t.floor, t.n, t.c, greedy_correct=i % 2 == 0) for i, t in enumerate(tallies)]
    _, verdict = judged(lagging)
    assert verdict.kind == "sharpen"
    assert verdict.more is None


@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
def test_full_skill_is_done(floor: float) -> None:
    assert verdicts(skilled(1.0, 0.98), 100, floor, 10)["done"] == 10


@pytest.mark.parametrize(("floor", "statistic"), [(0.0, "reached"), (0.2, "reached"), (0.5, "reached"), (0.25, "pass")])
def test_at_the_threshold_a_wrong_verdict_is_rare(floor: float, statistic: str) -> None:
    """Half of the items known, the others guessed: support above the floor is 0.5, any verdict an error."""
    chosen = GateSettings(replicates=400, statistic=statistic)
    found = verdicts(lambda g, n, f: np.where(g.random(n) < 0.5, 1.0, f), 80, floor, 100, chosen)
    alpha_and_noise = 100 * (0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5)
    assert found["bridge"] <= alpha_and_noise
    assert found["sharpen"] + found["done"] <= alpha_and_noise


@pytest.mark.parametrize(("share", "forbidden"), [(0.2, ("sharpen", "done")), (0.8, ("bridge",))])
def test_away_from_the_threshold_no_verdict_points_the_wrong_way(share: float, forbidden: tuple[str, ...]) -> None:
    found = verdicts(skilled(share), 80, 0.25, 40)
    assert sum(found[kind] for kind in forbidden) == 0
    assert found["undecided"] < 20


# --- several strata ---


def test_one_stratum_among_many_needs_more() -> None:
    """p = 0.03 is enough for one, and for none of ten; among nine that are sure it is enough again under fdr."""
    alone = estimate_with(p_below=0.03)
    unsure = {f"s{i}": estimate_with(p_below=0.4) for i in range(9)}
    sure = {f"s{i}": estimate_with(p_below=0.001) for i in range(9)}

    def kind(others: dict[str, SupportEstimate], **chosen: object) -> Verdict:
        return judge({"own": alone, **others}, GateSettings(pool_below=0, **chosen))["own"]

    assert decide(alone, FAST).kind == "bridge"
    assert kind(unsure, error_control="none").kind == kind(sure).kind == "bridge"
    assert kind(unsure).kind == kind(sure, error_control="none", alpha=0.02).kind == "undecided"
    assert kind(sure, error_control="fwer").kind == "bridge"  # Holm: the last of ten is held to alpha alone
    held = kind(unsure)
    assert "below the threshold 0.5 by itself" in held.reason
    assert "the share of wrong verdicts over 10 strata held at 0.05" in held.reason
    assert held.more is not None and held.more["items"] > 0
    assert "the probability of any wrong verdict" in kind(unsure, error_control="fwer").reason


def test_strata_that_cannot_be_read_do_not_count() -> None:
    few, none = measure(tallies_of([(4, 4)] * 3), FAST, seed=0), measure([], FAST, seed=0)
    found = judge({"own": estimate_with(p_below=0.03), "few": few, "none": none}, FAST)
    assert [found[name].kind for name in ("own", "few", "none")] == ["bridge", "undecided", "undecided"]
    assert list(found) == ["own", "few", "none"]
    assert judge({}, FAST) == {}


def test_done_is_controlled_like_the_sides() -> None:
    one = estimate_with(p_above=0.001, p_done=0.03)
    others = {f"s{i}": estimate_with(p_above=0.001, p_done=0.5) for i in range(9)}
    assert decide(one, FAST).kind == "done"
    assert judge({"own": one, **others}, FAST)["own"].kind == "sharpen"
    assert decide(estimate_with(p_above=0.5, p_done=0.001), FAST).kind == "undecided"


@pytest.mark.parametrize("above", [0.0, 0.3])
def test_the_false_discovery_rate_over_strata(above: float) -> None:
    """Of 12 strata 8 guess (support 0), the others are at the threshold or `above` it: wrong bridges are few.

    The bound is for what the strata say by themselves; pooled verdicts are right on average over strata.
    """
    generator = np.random.default_rng(7)
    chosen = GateSettings(replicates=300, alpha=0.1, pool_below=0)
    shares = [0.0] * 8 + [0.5 + above] * 4
    wrong, given = [], 0
    for case in range(25):
        estimates = {
            str(i): measure(simulate(generator, skilled(share, 1.0), 30, 0.25, samples=4), chosen, seed=case)
            for i, share in enumerate(shares)
        }
        kinds = [verdict.kind for verdict in judge(estimates, chosen).values()]
        bridged = [i for i, kind in enumerate(kinds) if kind == "bridge"]
        given += len(bridged)
        wrong.append(sum(i >= 8 for i in bridged) / max(1, len(bridged)))
    assert given > 7 * 25
    assert np.mean(wrong) <= 0.1 * 4 / 12 + 3 * np.std(wrong) / 25**0.5


# --- pooling ---


def strata_alike(own: SupportEstimate, count: int = 30) -> dict[str, SupportEstimate]:
    """A stratum beside many that are alike, and that no p-value proves anything of."""
    other = replace(estimate_with(p_below=0.3), support=Measured(0.2, 0.15, 0.25), standard_error=0.03)
    return {"own": own, **{f"s{i}": other for i in range(count)}}


SMALL = replace(
    estimate_with(p_below=0.04), items=20, support=Measured(0.35, 0.05, 0.65), standard_error=0.18, greedy_items=20
)


def test_a_small_stratum_borrows_from_the_others() -> None:
    """By itself it is sure, among 31 it isn't; that the others are alike makes up for their number, and no more."""
    assert decide(SMALL, FAST).kind == "bridge"
    verdict = judge(strata_alike(SMALL), FAST)["own"]
    assert (verdict.kind, verdict.pooled) == ("bridge", True)
    unsure = judge(strata_alike(replace(SMALL, p_below=0.06)), FAST)["own"]
    assert (unsure.kind, unsure.pooled) == ("undecided", False)
    assert "undecided by itself. Pooled with the other 30 strata" in verdict.reason
    assert verdict.to_dict()["pooled"] is True


@pytest.mark.parametrize(
    ("change", "count", "chosen"),
    [
        ({"items": 50}, 30, {}),  # large enough to speak for itself
        ({}, 1, {}),  # too few strata to know their spread
        ({}, 30, {"pool_below": 0}),
        ({"items": 7}, 30, {}),  # fewer than min_items
    ],
)
def test_when_nothing_is_borrowed(change: dict, count: int, chosen: dict) -> None:
    verdict = judge(strata_alike(replace(SMALL, **change), count), GateSettings(**chosen))["own"]
    assert (verdict.kind, verdict.pooled) == ("undecided", False)


def test_a_pooled_stratum_above_the_threshold() -> None:
    other = replace(estimate_with(p_above=0.3), support=Measured(0.9, 0.85, 0.95), standard_error=0.03)
    small = replace(SMALL, support=Measured(0.7, 0.4, 1.0), p_below=0.9, p_above=0.04)
    for p_done, kind in ((0.01, "done"), (0.5, "sharpen")):
        strata = {"own": replace(small, p_done=p_done), **{f"s{i}": other for i in range(30)}}
        found = judge(strata, FAST)["own"]
        assert (found.kind, found.pooled) == (kind, True)
    silent = {"own": replace(small, acc_at_1=None, p_done=math.nan), **{f"s{i}": other for i in range(30)}}
    assert judge(silent, FAST)["own"].kind == "undecided"


# --- sequential evidence ---


def evidence(exhausted: bool = False, **values: float) -> Evidence:
    return Evidence(
        **{"below": 0.1, "above": 0.1, "at_target": 0.1, "short_of_target": 0.1, **values}, exhausted=exhausted
    )


def test_sequential_evidence_gives_the_verdict() -> None:
    unsure = estimate_with(p_below=0.3)
    found = {
        "bridge": evidence(below=50),
        "sharpen": evidence(above=50, short_of_target=50),
        "done": evidence(above=50, at_target=50),
        "undecided": evidence(below=30),  # half of alpha: 40 is needed
    }
    for kind, own in found.items():
        verdict = judge({"own": unsure}, FAST, {"own": own})["own"]
        assert verdict.kind == kind
        assert ("once the evidence was sure" in verdict.reason) == (kind != "undecided")
        assert verdict.evidence["e_below"] == own.below
        json.dumps(verdict.to_dict(), allow_nan=False)
    exhausted = judge({"own": unsure}, FAST, {"own": evidence(exhausted=True, below=50)})["own"]
    assert exhausted.kind == "bridge" and "once the evidence was sure" not in exhausted.reason
    both = judge({"own": unsure}, FAST, {"own": evidence(below=50, above=50)})["own"]
    assert both.kind == "undecided"
    assert judge({"own": unsure}, FAST, {"own": evidence(below=math.inf)})["own"].kind == "bridge"


def test_what_was_stopped_early_has_no_second_look_and_what_was_exhausted_half_of_alpha() -> None:
    sure = estimate_with(p_below=0.001)
    assert judge({"own": sure}, FAST, {"own": evidence()})["own"].kind == "undecided"
    assert judge({"own": sure}, FAST, {"own": evidence(exhausted=True)})["own"].kind == "bridge"
    assert judge({"own": sure}, FAST, {})["own"].kind == "bridge"
    late = estimate_with(p_below=0.03)
    assert judge({"own": late}, FAST, {"own": evidence(exhausted=True)})["own"].kind == "undecided"
    assert judge({"own": late}, FAST)["own"].kind == "bridge"


def test_evidence_is_controlled_over_strata() -> None:
    strata = {f"s{i}": estimate_with() for i in range(10)}
    alone = {name: evidence(below=300.0 if name == "s0" else 1.0) for name in strata}
    assert judge(strata, FAST, alone)["s0"].kind == "undecided"  # e-BH: 10 / 0.025 = 400 is needed
    together = {name: evidence(below=300.0 if name != "s9" else 1.0) for name in strata}
    kinds = {name: verdict.kind for name, verdict in judge(strata, FAST, together).items()}
    assert kinds == {name: "bridge" if name != "s9" else "undecided" for name in strata}


# --- corners ---


@pytest.mark.parametrize("tallies", [[], tallies_of([(0, 0)] * 5)])
def test_nothing_measured_is_undecided(tallies: list[Tally]) -> None:
    _, verdict = judged(tallies)
    assert verdict.kind == "undecided"
    assert verdict.more == {"items": 8, "samples": None, "capped": False, "bottleneck": "items"}
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_items_without_samples_are_left_out() -> None:
    estimate, verdict = judged([*tallies_of([(8, 0)] * 20), Tally("late", "late", 0.25, 0, 0)])
    assert estimate.items == 20
    assert estimate.ks == tuple(range(1, 9))
    assert verdict.kind == "bridge"


def test_too_few_items_are_undecided_whatever_they_say() -> None:
    estimate, verdict = judged(tallies_of([(16, 16)] * 7, 0.0, greedy=True))
    assert verdict.kind == "undecided"
    assert verdict.more is not None and verdict.more["items"] == 1
    proven = judge({"own": estimate}, FAST, {"own": evidence(above=1e9, at_target=1e9)})["own"]
    assert proven.kind == "undecided"


def test_equal_items_do_not_make_a_verdict_sure() -> None:
    """8 items all right say little at 2 options, where a guesser is right on 4 of them."""
    estimate, verdict = judged(tallies_of([(16, 16)] * 8, 0.5, greedy=True))
    assert estimate.support is not None
    assert estimate.support.value == 1
    assert estimate.support.low < 0.5
    assert verdict.kind == "undecided"
    assert verdict.more is not None and verdict.more["items"] > 0


def test_one_image_decides_nothing() -> None:
    tallies = [Tally(f"item {i}", "one image", 0.25, 16, 16, greedy_correct=True) for i in range(50)]
    estimate, verdict = judged(tallies)
    assert estimate.clusters == 1
    assert verdict.kind == "undecided"


def test_none_correct_is_bridged_and_all_correct_is_done() -> None:
    assert judged(tallies_of([(16, 0)] * 30))[1].kind == "bridge"
    assert judged(tallies_of([(16, 16)] * 30, greedy=True))[1].kind == "done"


def test_support_without_greedy_completions_is_undecided() -> None:
    _, verdict = judged(tallies_of([(16, 16)] * 30))
    assert (verdict.kind, verdict.more) == ("undecided", None)
    assert "no greedy completions" in verdict.reason


def test_a_floor_that_leaves_no_room_is_refused() -> None:
    for floor in (0.97, 1.0):
        _, verdict = judged(tallies_of([(4, 4)] * 20, floor, greedy=True))
        assert (verdict.kind, verdict.more) == ("undecided", None)
        assert "can't be read" in verdict.reason
        json.dumps(verdict.to_dict(), allow_nan=False)


def test_mixed_floors_are_judged_together() -> None:
    closed = tallies_of([(8, 4)] * 10, 0.5)
    answers = [Tally(f"open {i}", f"open {i}", 0.0, 8, 0) for i in range(10)]
    assert judged(closed + answers)[1].kind == "bridge"


def test_a_reason_says_what_was_read() -> None:
    _, verdict = judged(tallies_of([(16, 0)] * 30))
    assert verdict.statistic == "reached"
    assert verdict.reason.startswith("Support above the guessing floor at k = 16 is -0.33 (90 % interval ")
    assert "0.00 of the items are reached where guessing reaches 0.25; 30 items)" in verdict.reason
    _, verdict = judged(tallies_of([(16, 0)] * 30), GateSettings(statistic="pass", replicates=200))
    assert verdict.statistic == "pass"
    assert "at k = 4 is" in verdict.reason and "Pass@4 0.00 where guessing gives 0.68" in verdict.reason


def test_abstentions_are_reported() -> None:
    tallies = [Tally(f"item {i}", f"image {i}", 0.0, 4, 0, abstained=3) for i in range(20)]
    estimate, verdict = judged(tallies)
    assert estimate.abstain_rate == 0.75
    assert "75 % of the samples gave no readable answer" in verdict.reason


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tallies_give_verdicts_that_json_can_hold(data: st.DataObject) -> None:
    rows = st.lists(
        st.tuples(
            st.integers(0, 6),
            st.floats(0, 1),
            st.sampled_from([0.0, 0.25, 0.5, 1.0]),
            st.sampled_from([None, True, False]),
            st.integers(0, 3),
        ),
        max_size=15,
    )
    chosen = GateSettings(
        replicates=100,
        min_items=data.draw(st.integers(1, 9)),
        error_control=data.draw(st.sampled_from(["fdr", "fwer", "none"])),
    )
    estimates = {}
    for stratum in range(data.draw(st.integers(1, 5))):
        tallies = [
            Tally(f"item {i}", f"image {image}", floor, n, round(share * n), greedy_correct=greedy)
            for i, (n, share, floor, greedy, image) in enumerate(data.draw(rows))
        ]
        estimates[str(stratum)] = measure(tallies, chosen, seed=0)
    for verdict in judge(estimates, chosen).values():
        assert verdict.kind in {"bridge", "sharpen", "done", "undecided"}
        assert verdict.reason
        json.dumps(verdict.to_dict(), allow_nan=False)


# --- settings and tallies ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 0.5}, {"alpha": 0.5}, {"k": 0}, {"support_threshold": 1.0}, {"min_items": 0}, {"statistic": "mean"},
        {"error_control": "bonferroni"}, {"pool_below": -1},
    ],
)  # fmt: skip
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


def test_many_large_strata_do_not_pull_a_small_one_across() -> None:
    """Pooling may relax the correction for the number of strata; it may not replace a stratum's own evidence."""
    generator = np.random.default_rng(3)

    def stratum(items: int, share: float) -> list[Tally]:
        reached = generator.random(items) < share
        return [Tally(f"i{n}", f"i{n}", 0.0, 16, 16 * bool(hit), greedy_correct=False) for n, hit in enumerate(reached)]

    settings, wrong = GateSettings(replicates=300), 0
    for _ in range(60):
        pools = {f"large {n}": stratum(200, 0.4) for n in range(10)} | {"small": stratum(20, 0.5)}
        estimates = {name: measure(pool, settings, seed=0) for name, pool in pools.items()}
        wrong += judge(estimates, settings)["small"].kind == "bridge"
    assert wrong <= 7  # 0.05 of 60 is 3; without its own p-value about 20


def test_levels_that_no_replicate_can_reach_are_said() -> None:
    pool = [Tally(f"i{n}", f"i{n}", 0.0, 8, 0, greedy_correct=False) for n in range(100)]
    settings = GateSettings(replicates=200, error_control="fwer")
    estimate = measure(pool, settings, seed=0)
    verdicts = judge({f"s{n}": estimate for n in range(40)}, settings)
    assert {verdict.kind for verdict in verdicts.values()} == {"undecided"}
    assert "set gate.replicates to 800 or more" in verdicts["s0"].reason and verdicts["s0"].more is None
    assert judge({f"s{n}": measure(pool, GateSettings(replicates=900, error_control="fwer"), seed=0) for n in range(3)},
                 GateSettings(replicates=900, error_control="fwer"))["s0"].kind == "bridge"  # fmt: skip
