"""Routing of training items: every item once, by evidence, the same way each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medbridge.support import Tally
from medbridge.support.routing import Routes, RoutingSettings, route

ROUTES = ("bridge", "sharpen", "anchor", "left_out")
DEFAULT = RoutingSettings()


def tallies_of(counts: list[tuple[int, int]], floor: float = 0.25) -> list[Tally]:
    return [Tally(f"item {i}", "a", floor, n, c) for i, (n, c) in enumerate(counts)]


def place_of(routes: Routes, item_id: str) -> str:
    places = [name for name in ROUTES if item_id in getattr(routes, name)]
    assert len(places) == 1
    return places[0]


@st.composite
def any_tallies(draw: st.DrawFn) -> list[Tally]:
    rows = draw(
        st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1), st.sampled_from([0.0, 0.2, 0.5, 1.0])), max_size=40)
    )
    return [Tally(f"item {i}", "a", floor, n, round(share * n)) for i, (n, share, floor) in enumerate(rows)]


@settings(max_examples=80, deadline=None)
@given(any_tallies(), st.floats(0.01, 0.5), st.floats(0.51, 0.99), st.floats(0, 1), st.integers(0, 3))
def test_every_item_has_one_route_and_keeps_its_order(
    tallies: list[Tally], margin: float, confidence: float, share: float, seed: int
) -> None:
    chosen = RoutingSettings(margin=margin, confidence=confidence, anchor_share=share)
    routes = route(tallies, chosen, seed=seed)
    ids = [tally.item_id for tally in tallies]
    assert sorted(item for name in ROUTES for item in getattr(routes, name)) == sorted(ids)
    for name in ROUTES:
        own = getattr(routes, name)
        assert list(own) == [item for item in ids if item in own]
    assert route(tallies, chosen, seed=seed) == routes


@settings(max_examples=60, deadline=None)
@given(any_tallies())
def test_more_right_answers_never_lead_down(tallies: list[Tally]) -> None:
    routes = route(tallies, DEFAULT, seed=0)
    rank = {"bridge": 0, "sharpen": 1, "anchor": 2, "left_out": 2}
    seen = [(tally.n, tally.floor, tally.c, rank[place_of(routes, tally.item_id)]) for tally in tallies]
    for n, floor, c, place in seen:
        assert all(place <= other[3] for other in seen if other[:2] == (n, floor) and c <= other[2])
        assert place == 0 or c > n * floor or n == 0 or floor == 1


@settings(max_examples=40, deadline=None)
@given(any_tallies())
def test_the_order_of_the_tallies_does_not_matter(tallies: list[Tally]) -> None:
    forward, backward = (route(own, DEFAULT, seed=0) for own in (tallies, tallies[::-1]))
    for name in ROUTES:
        assert set(getattr(forward, name)) == set(getattr(backward, name))


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.25, 0.5])
@pytest.mark.parametrize("others", [[], [(8, 8)] * 50, [(8, 0)] * 50, [(8, c) for c in range(9)] * 20])
def test_always_wrong_is_bridged(floor: float, others: list[tuple[int, int]]) -> None:
    assert place_of(route(tallies_of([(8, 0), *others], floor), DEFAULT, seed=0), "item 0") == "bridge"


@pytest.mark.parametrize("others", [[], [(64, 64)] * 50, [(64, 0)] * 50, [(64, c) for c in range(65)]])
def test_always_right_is_left_out_but_for_anchors(others: list[tuple[int, int]]) -> None:
    tallies = tallies_of([(64, 64), *others])
    assert place_of(route(tallies, RoutingSettings(anchor_share=0), seed=0), "item 0") == "left_out"
    assert place_of(route(tallies, RoutingSettings(anchor_share=1), seed=0), "item 0") == "anchor"


def test_a_single_right_sample_is_not_enough_to_be_left_out() -> None:
    assert route(tallies_of([(1, 1)]), DEFAULT, seed=0).sharpen == ("item 0",)


@pytest.mark.parametrize("options", [2, 4])
@pytest.mark.parametrize("others", ["none", "guessed", "half known", "spread"])
def test_right_as_often_as_guessing_is_bridged(options: int, others: str) -> None:
    """n = 8, 2 options too, in any company."""
    generator = np.random.default_rng(0)
    p = {
        "none": np.empty(0),
        "guessed": np.full(200, 1 / options),
        "half known": np.where(np.arange(200) < 100, 1 / options, 0.95),
        "spread": generator.beta(1, 1, 200),
    }[others]
    counts = [(8, 8 // options), *((8, int(c)) for c in generator.binomial(8, p))]
    assert place_of(route(tallies_of(counts, 1 / options), DEFAULT, seed=0), "item 0") == "bridge"


def test_right_at_times_is_sharpened() -> None:
    for floor, c in ((0.0, 3), (0.25, 5), (0.5, 7)):
        assert place_of(route(tallies_of([(8, c)], floor), DEFAULT, seed=0), "item 0") == "sharpen"


def test_known_truths_go_where_they_belong() -> None:
    generator = np.random.default_rng(0)
    p = np.repeat([0.25, 0.6, 1.0], 200)
    routes = route(tallies_of([(16, int(c)) for c in generator.binomial(16, p)]), DEFAULT, seed=0)
    guessed, skilled, known = ({f"item {i}" for i in range(start, start + 200)} for start in (0, 200, 400))
    assert len(guessed & set(routes.bridge)) > 160
    assert len(skilled & set(routes.sharpen)) > 160
    assert known <= set(routes.anchor) | set(routes.left_out)


def test_anchors_depend_on_seed_and_id_only() -> None:
    tallies = tallies_of([(64, 64)] * 2000)
    chosen = RoutingSettings(anchor_share=0.1)
    anchors = set(route(tallies, chosen, seed=0).anchor)
    assert 140 < len(anchors) < 260
    fewer = set(route(tallies[:500], chosen, seed=0).anchor)
    assert fewer == {item for item in anchors if int(item.split()[1]) < 500}
    assert set(route(tallies, chosen, seed=1).anchor) != anchors


def test_nothing_to_route() -> None:
    assert route([], DEFAULT, seed=0) == Routes((), (), (), ())
    routes = route(tallies_of([(0, 0)] * 3), DEFAULT, seed=0)
    assert sum(len(getattr(routes, name)) for name in ROUTES) == 3


def test_an_item_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="item 'item 0' has more than one tally"):
        route([*tallies_of([(4, 1)]), *tallies_of([(4, 2)])], DEFAULT, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"samples": -1}, {"margin": 0.0}, {"margin": 0.6}, {"confidence": 0.5}, {"anchor_share": 1.1}, {"threshold": 1}],
)
def test_settings_refuse_what_they_cannot_mean(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        RoutingSettings(**wrong)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in RoutingSettings.model_fields.values())
