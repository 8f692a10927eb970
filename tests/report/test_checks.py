"""What the report makes of stored checks, outlooks and changes, also where they are missing or of the wrong kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medbridge.report.checks import changes, checks, findings, losses, more, outlook
from medbridge.report.records import curve, dig, estimate, mapping, number, numbers, text, whole
from medbridge.report.view import Curve, Estimate, Measurement, StratumView

NAMES = [
    "checks", "strict", "lenient", "blank", "shuffled", "visual", "support", "acc_at_1", "kind", "items", "value",
    "low", "high", "outlook", "cover", "predicted", "ks", "pass_at_k", "forecast", "reliable_k", "k90", "efficiency",
    "gap", "changes", "lost", "gained", "forecasts", "since", "more", "samples", "capped", "bottleneck", "a",
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3)
RECORDS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=25,
)


# -- records -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, -math.inf, 10**400, [1], {"value": 1}])
def test_what_is_no_finite_number_is_none(value: Any) -> None:
    assert number(value) is None and whole(value) is None
    assert estimate({"value": value, "low": 0.0, "high": 1.0}) is None
    assert estimate({"value": 0.5, "low": value, "high": 1}) == Estimate(0.5, None, 1.0)
    assert numbers([value, 1], 3) == [None, 1.0, None]


def test_records_are_read() -> None:
    assert number(3) == 3.0 and whole(3.9) == 3 and whole(-0.5) == 0
    assert numbers([1, 2, 3], 2) == [1.0, 2.0] and numbers("12", 1) == [None]
    assert text("x") == "x" and text(1) is None
    assert estimate({"accuracy": 0.5}) == Estimate(0.5, None, None) and estimate([0.5]) is None
    assert curve({"value": [1]}, 2) == Curve([1.0, None], [None] * 2, [None] * 2)
    assert curve([], 2) == Curve([None] * 2, [None] * 2, [None] * 2)
    assert mapping({"a": 1}) == {"a": 1} and mapping([1]) == {}
    assert dig({"a": {"b": 2}}, "a", "b") == 2 and dig({"a": [1]}, "a", "b") is None and dig(None, "a") is None


@hypothesis_settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), RECORDS, max_size=6))
def test_no_record_is_too_odd(record: dict[str, Any]) -> None:
    for check in checks(record, "bridge", record):
        assert check.items == int(check.items) and not (check.changed and check.same)
    found = outlook(record)
    assert found is None or all(math.isfinite(share) for _, share in found.predicted)
    assert all(isinstance(change.stratum, str) and change.gained >= 0 for change in changes(record))
    assert all(isinstance(words, str) for words in losses(record))
    wanted = more(record)
    assert wanted is None or wanted.capped in (True, False)


# -- checks --------------------------------------------------------------------------------------------------

SUPPORT = {"items": 50, "support": {"value": 0.2, "low": 0.1, "high": 0.3}, "acc_at_1": {"value": 0.4}}


def view(**records: Any) -> Any:
    return checks({"checks": records}, "bridge", SUPPORT)


def test_the_same_numbers_change_nothing_whatever_the_verdict() -> None:
    # One look may be undecided where all looks together were sure: that isn't the reading's doing.
    (same,) = view(strict={**SUPPORT, "kind": "undecided"})
    assert same.same and not same.changed and same.reads and same.visual is None


@pytest.mark.parametrize(
    ("name", "kind", "items", "changed"),
    [
        ("strict", "undecided", 50, True),
        ("lenient", "done", 50, True),
        ("lenient", "bridge", 50, False),
        ("blank", "undecided", 32, False),  # fewer items leave doubt by themselves
        ("blank", "undecided", 50, True),
        ("shuffled", "sharpen", 32, True),
        ("shuffled", None, 32, False),
    ],
)
def test_a_verdict_changes_when_other_numbers_give_another(name: str, kind: Any, items: int, changed: bool) -> None:
    (check,) = view(**{name: {"items": items, "support": {"value": 0.6}, "kind": kind}})
    assert check.changed == changed and not check.same


def test_checks_come_in_one_order_and_unknown_ones_are_left_out() -> None:
    found = view(shuffled=SUPPORT, other=SUPPORT, blank=[], strict=SUPPORT)
    assert [check.name for check in found] == ["strict", "shuffled"]
    assert checks({}, "done", {}) == [] and checks({"checks": [1]}, "done", {}) == []


def measurement(**differs: Any) -> Measurement:
    nothing: dict[str, Any] = dict.fromkeys(Measurement.__dataclass_fields__)
    empty = {"checks": [], "floor": [], "taken_back": False, "statistic": "reached"}
    return Measurement(**{**nothing, **empty, **differs})


@pytest.mark.parametrize(
    ("lows", "seen"),
    [([], None), ([0.1], True), ([0.1, 0.2], True), ([0.1, -0.1], False), ([0.0], False), ([None], False)],
)
def test_visual_support_shows_against_every_control_or_not_at_all(lows: list[Any], seen: bool | None) -> None:
    names = ["blank", "shuffled"][: len(lows)]
    records = {n: {"visual": {"support": {"value": 0.3, "low": low}}} for n, low in zip(names, lows, strict=True)}
    one = measurement(checks=view(strict=SUPPORT, **records))
    assert one.visual_support is seen
    found = findings([StratumView("a", [one]), StratumView("never measured")])
    assert found.unseen == (None if seen is None else [] if seen else ["a"])


def test_findings_are_of_the_latest_diagnosis_of_a_model_that_stands() -> None:
    changed = view(strict={"items": 50, "kind": "done"}, blank={"items": 50, "kind": "done"})
    old, back = measurement(checks=changed), measurement(checks=[], taken_back=True)
    found = findings([StratumView("a", [old, back]), StratumView("b", [old, measurement()])])
    assert (found.reading, found.images, found.unseen) == (["a"], ["a"], None)


# -- what the gate reads, outlook, changes -------------------------------------------------------------------


def test_the_share_reached_is_the_stored_support_with_guessing_added() -> None:
    above = Curve([0.0, 0.5, None], [-0.25, 0.25, None], [0.125, 1.0, None])
    share = measurement(floor=[0.25, 0.4375, 0.5], reached=above).reached_share
    assert share == Curve([0.25, 0.625, None], [0.0625, 0.4375, None], [0.34375, 1.0, None])
    assert measurement(floor=[0.25], reached=above, statistic="pass").reached_share is None
    assert measurement(floor=[], reached=above).reached_share is None
    assert measurement(floor=[0.25], reached=Curve([None], [None], [None])).reached_share is None


def test_an_outlook_is_predicted_beyond_the_samples_only() -> None:
    found = outlook(
        {
            "efficiency": 0.5, "k90": 4, "gap": {"value": 0.1},
            "outlook": {"predicted": {"ks": [8, 16, "x", 64], "pass_at_k": [0.5, 0.6, 0.7, math.nan]}, "reliable_k": 9},
        }
    )  # fmt: skip
    assert found is not None and found.predicted == [(16, 0.6)] and found.reliable_k == 9
    assert (found.k90, found.efficiency, found.gap) == (4, 0.5, Estimate(0.1, None, None)) and found.cover is None
    assert outlook({"outlook": None, "k90": 4}) is None and outlook({}) is None


def test_changes_are_read_at_the_largest_k() -> None:
    summary = {
        "changes": {
            "a": {"items": 9, "ks": [1, 8], "pass_at_k": [{"value": 0.1}, {"value": 0.2}], "gained": ["x", "y"]}
        },
        "lost": {"a": "a lost support"},
        "forecasts": {"a": {"forecast": {"value": 0.7}, "acc_at_1": {"value": 0.6}}},
    }
    (change,) = changes(summary)
    assert (change.k, change.pass_at_k, change.gained, change.lost) == (8, Estimate(0.2, None, None), 2, 0)
    assert change.alarm and change.forecast == Estimate(0.7, None, None) and change.came_out is not None
    assert losses(summary) == ["a lost support"] and losses({}) == [] and changes({}) == []


def test_what_would_decide_is_read() -> None:
    wanted = more({"more": {"items": 12, "samples": None, "capped": True, "bottleneck": "items"}})
    assert wanted is not None and (wanted.items, wanted.samples, wanted.capped) == (12, None, True)
    assert more({"more": None}) is None and more({}) is None
