"""Sequential evidence on a stratum: what it tests, how often it errs at any number of looks, and when it is enough."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge.support import Evidence, GateSettings, StratumEvidence, Tally, item_scores, judge, measure, settle
from medbridge.support.evidence import Claim, proven
from medbridge.support.sequential import MeanTest

FAST = GateSettings(replicates=300)
K = 8


def stratum(
    correct: Sequence[int], floor: float = 0.25, hits: Sequence[bool | None] | None = None, per_image: int = 1
) -> list[Tally]:
    return [
        Tally(
            f"item {i}", f"image {i // per_image}", floor, K, int(c),
            greedy_correct=c > K / 2 if hits is None else hits[i],
        )
        for i, c in enumerate(correct)
    ]  # fmt: skip


def empty(tallies: Sequence[Tally], chosen: GateSettings = FAST, *, finite: bool = False) -> StratumEvidence:
    floors, clusters = [tally.floor for tally in tallies], [tally.cluster for tally in tallies]
    return StratumEvidence(chosen, K, floors, clusters, finite=finite)


def fed(tallies: Sequence[Tally], chosen: GateSettings = FAST) -> StratumEvidence:
    tests = empty(tallies, chosen)
    tests.add(tallies)
    return tests


def draw(
    generator: np.random.Generator, items: int, share: float, floor: float = 0.25, per_image: int = 1
) -> list[Tally]:
    known = np.repeat(generator.random(-(-items // per_image)) < share, per_image)[:items]
    return stratum(generator.binomial(K, np.where(known, 1.0, floor)), floor, known.tolist(), per_image)


# --- what is tested ---


def test_it_is_the_test_of_the_linear_form() -> None:
    tallies = draw(np.random.default_rng(0), 40, 0.3)
    scores = item_scores(tallies, FAST, K)
    support = MeanTest(-0.25 - 0.5 * 0.75, 0.75 - 0.5 * 0.75, 0.0)
    support.update(scores.top - 0.5 * scores.bottom)
    accuracy = MeanTest(0, 1, 0.8)
    accuracy.update([float(bool(tally.greedy_correct)) for tally in tallies])
    found = fed(tallies)
    assert (found.below, found.above) == pytest.approx((support.below, support.above), rel=1e-6)
    assert (found.at_target, found.short_of_target) == pytest.approx((accuracy.above, accuracy.below), rel=1e-6)


@pytest.mark.parametrize("statistic", ["reached", "pass"])
def test_extreme_items_stay_within_the_bounds(statistic: str) -> None:
    """Open answers beside multiple choice, all right or all wrong, in clusters of unlike size."""
    chosen = GateSettings(statistic=statistic)
    for correct in (0, K):
        tallies = [
            Tally(f"item {i}", f"image {i * i // 20}", floor, K, correct, greedy_correct=bool(correct))
            for i, floor in enumerate([0.0, 0.25, 0.5, 1.0] * 5)
        ]
        tests = fed(tallies, chosen)
        assert (tests.above > 1) == (correct == K)
        assert (tests.below > 1) == (correct == 0)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_batches_change_nothing(data: st.DataObject) -> None:
    tallies = draw(np.random.default_rng(data.draw(st.integers(0, 99))), 24, 0.4, per_image=2)
    whole, parts = fed(tallies), empty(tallies)
    start = 0
    while start < len(tallies):
        stop = start + 2 * data.draw(st.integers(1, 6))
        parts.add(tallies[start:stop])
        start = stop
    assert parts.evidence.to_dict() == pytest.approx(whole.evidence.to_dict(), rel=1e-9)
    assert parts.evidence.exhausted and parts.items == 24


def test_items_of_one_image_count_as_one_draw() -> None:
    generator = np.random.default_rng(0)
    alone = draw(generator, 30, 0.1)
    together = [
        Tally(f"{tally.item_id} {copy}", tally.cluster, tally.floor, K, tally.c, greedy_correct=tally.greedy_correct)
        for tally in alone
        for copy in range(4)
    ]
    assert fed(together).evidence.to_dict() == pytest.approx(fed(alone).evidence.to_dict(), rel=1e-9)


def test_items_without_a_greedy_completion_say_nothing_of_accuracy() -> None:
    tests = fed(stratum([K] * 40, hits=[None] * 40))
    assert tests.above > 1e3
    assert (tests.at_target, tests.short_of_target) == pytest.approx((1, 1))
    assert tests.settled(40) is None


def test_a_finite_pool_is_known_once_it_is_exhausted() -> None:
    tallies = stratum([K] * 7 + [0] * 3, 0.0)  # support 0.7
    sequential, finite = fed(tallies), empty(tallies, finite=True)
    assert sequential.above < 40
    finite.add(tallies)
    assert finite.above == math.inf
    json.dumps(finite.evidence.to_dict(), allow_nan=False)


# --- what is refused ---


def test_clusters_come_whole_and_once() -> None:
    tallies = stratum([1] * 6, per_image=2)
    tests = empty(tallies)
    with pytest.raises(ValueError, match="cluster 'image 0': 1 items, 2 are waited for"):
        tests.add(tallies[:1])
    tests.add(tallies[:2])
    with pytest.raises(ValueError, match="cluster 'image 0': 2 items, 0 are waited for"):
        tests.add(tallies[:2])
    with pytest.raises(ValueError, match="cluster 'other'"):
        tests.add([Tally("x", "other", 0.25, K, 1)])
    with pytest.raises(ValueError, match="n = 4 samples, k = 8"):
        tests.add([Tally("item 2", "image 1", 0.25, 4, 1), tallies[3]])
    assert (tests.items, tests.evidence.exhausted) == (2, False)
    tests.add(tallies[2:])
    tests.add([])
    assert tests.evidence.exhausted


def test_a_pool_has_items_and_room() -> None:
    with pytest.raises(ValueError, match="floors has 0 values"):
        StratumEvidence(FAST, K, [], [])
    with pytest.raises(ValueError, match="floors has 1 values and clusters 2"):
        StratumEvidence(FAST, K, [0.5], ["a", "b"])
    with pytest.raises(ValueError, match=r"guessing leaves 0.030 of the questions at k = 8"):
        StratumEvidence(FAST, K, [0.97], ["a"])
    with pytest.raises(ValueError, match="guessing leaves"):
        StratumEvidence(GateSettings(statistic="pass"), K, [0.5], ["a"])


# --- how often it errs ---


@pytest.mark.parametrize("per_image", [1, 3])
@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
def test_at_the_threshold_it_is_rarely_wrong_at_any_look(floor: float, per_image: int) -> None:
    generator = np.random.default_rng(1)
    cases, wrong, level = 60, np.zeros(2), 10.0
    for _ in range(cases):
        tallies = draw(generator, 60, 0.5, floor, per_image)
        tests, highest = empty(tallies), np.zeros(2)
        for start in range(0, 60, 6):
            tests.add(tallies[start : start + 6])
            highest = np.maximum(highest, (tests.below, tests.above))
        wrong += highest >= level
    assert max(wrong) <= cases / level + 3 * (cases / level * (1 - 1 / level)) ** 0.5


@pytest.mark.parametrize(("share", "kind"), [(0.0, "bridge"), (0.98, "done")])
def test_clear_strata_settle_early(share: float, kind: str) -> None:
    generator = np.random.default_rng(2)
    needed = []
    for _ in range(10):
        tallies = draw(generator, 200, share)
        tests = empty(tallies)
        while tests.settled(40) is None and not tests.evidence.exhausted:
            tests.add(tallies[tests.items : tests.items + 8])
        assert tests.settled(40) == kind
        needed.append(tests.items)
    assert np.mean(needed) < 200 / 3


# --- when it is enough ---


def test_sharpen_waits_until_done_is_out_of_the_question() -> None:
    lagging, near = (
        stratum([K] * 60, hits=[i % 2 == 0 for i in range(60)]),
        stratum([K] * 60, hits=[i % 5 > 0 for i in range(60)]),
    )
    assert fed(lagging).settled(40) == "sharpen"
    assert fed(near).above > 40
    assert fed(near).settled(40) is None
    assert fed(stratum([K] * 60)).settled(40) == "done"
    assert fed(stratum([0] * 60)).settled(40) == "bridge"
    # Acc@1 alone settles nothing: both halves of the claim are needed.
    odd = fed(stratum([0] * 60, hits=[True] * 60))
    assert odd.at_target > 40 > odd.evidence.claim("at_target")


def test_min_items_hold() -> None:
    chosen = GateSettings(min_items=30, error_control="none")
    tallies = stratum([0] * 60)
    tests = empty(tallies, chosen)
    tests.add(tallies[:29])
    assert tests.below > 40 and tests.settled(40) is None
    assert settle({"own": tests}, chosen) == {"own": None}
    tests.add(tallies[29:30])
    assert tests.settled(40) == settle({"own": tests}, chosen)["own"] == "bridge"


def test_what_is_proven_stays_proven() -> None:
    """Above the threshold is put on hold while Acc@1 is open, and later items can't take it back."""
    tallies = stratum([K] * 20 + [0] * 60, 0.0, hits=[i % 5 > 0 for i in range(80)])
    held, free = empty(tallies), empty(tallies)
    for tests in (held, free):
        tests.add(tallies[:20])
    assert settle({"own": held}, FAST) == {"own": None}
    reached = held.above
    for tests in (held, free):
        tests.add(tallies[20:])
    assert free.above < 1 < reached == held.above
    assert held.below == free.below


def test_evidence_is_shared_over_strata() -> None:
    """e-BH at half of alpha: the first of ten strata needs ten times as much as one stratum alone."""
    few, many = fed(stratum([0] * 9, 0.0)), fed(stratum([0] * 40, 0.0))
    assert 40 < few.below < 400 < many.below
    nothing = {f"s{i}": empty(stratum([0] * 9)) for i in range(9)}
    assert settle({"own": few, **nothing}, FAST)["own"] is None
    assert settle({"own": many, **nothing}, FAST)["own"] == "bridge"
    assert settle({"own": few}, FAST)["own"] == "bridge"
    assert settle({"own": few, **nothing}, GateSettings(error_control="none"))["own"] == "bridge"
    assert settle({"own": few, **nothing}, GateSettings(error_control="fwer"))["own"] is None
    assert settle({}, FAST) == {}


def test_the_gate_gives_the_verdict_that_was_settled() -> None:
    generator = np.random.default_rng(4)
    pools = {str(share): draw(generator, 120, share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)}
    tests = {name: empty(pool) for name, pool in pools.items()}
    settled: dict[str, str | None] = dict.fromkeys(pools)
    while open_strata := [name for name in pools if settled[name] is None and not tests[name].evidence.exhausted]:
        for name in open_strata:
            tests[name].add(pools[name][tests[name].items :][:8])
        found = settle(tests, FAST)
        assert all(found[name] == kind for name, kind in settled.items() if kind is not None)
        settled.update(found)
    estimates = {name: measure(pool[: tests[name].items], FAST, seed=0) for name, pool in pools.items()}
    verdicts = judge(estimates, FAST, {name: own.evidence for name, own in tests.items()})
    assert settled["0.0"] == "bridge" and settled["1.0"] == "done"
    assert all(verdicts[name].kind == kind for name, kind in settled.items() if kind is not None)


@pytest.mark.parametrize("claim", ["at_target", "short_of_target"])
def test_a_claim_on_accuracy_needs_support_too(claim: Claim) -> None:
    values = {"below": 0.1, "above": 100.0, "at_target": 0.1, "short_of_target": 0.1, claim: 1000.0}
    own = Evidence(**values, exhausted=False)
    assert own.claim(claim) == 100
    assert proven({"own": own}, 0.025, "fdr")["own"] == {"above", claim}
    assert proven({}, 0.025, "fdr") == {}


def test_once_support_is_above_a_greedy_completion_is_enough() -> None:
    tallies = stratum([K] * 20 + [0] * 60, 0.0, hits=[i % 5 > 0 for i in range(80)])
    bare = [replace(tally, n=0, c=0, votes={}) for tally in tallies]
    tests, whole = empty(tallies), empty(tallies)
    with pytest.raises(ValueError, match="needs as many"):
        empty(tallies).add(bare[:1])
    for own in (tests, whole):
        own.add(tallies[:20])
        assert own.needs_samples
        assert settle({"own": own}, FAST) == {"own": None} and not own.needs_samples
    tests.add(bare[20:])
    whole.add(tallies[20:])
    assert (tests.above, tests.at_target, tests.short_of_target) == (
        whole.above,
        whole.at_target,
        whole.short_of_target,
    )
    assert tests.evidence.exhausted and tests.items == 80
