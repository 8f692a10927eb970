"""The validity guard: each refusal with its sentence, and a repeat check that only broken samplers fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medbridge.support.guard import (
    Facts,
    GuardSettings,
    Repeats,
    check,
    item_repeats,
    one_order_chance,
    total_repeats,
)

SOUND = Facts(
    items=50, samples=16, miscounted=0, images_asked=800, images_fed=800, longest=100, max_new_tokens=100,
    truncated=0.1, abstained=0.2, correct=0.4, misordered=0, one_order=0, one_order_expected=0.01,
    repeats=Repeats(items=50, identical=3, samples=800, distinct=500, known=50),
)  # fmt: skip
DEFAULT = GuardSettings()
ALARM = -math.log(DEFAULT.false_alarm)


def reasons(**changes: Any) -> list[tuple[str, str]]:
    return [(found.kind, found.reason) for found in check(replace(SOUND, **changes), DEFAULT)]


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_sound_measurement_passes() -> None:
    assert reasons() == []
    assert reasons(images_fed=None) == []
    assert reasons(truncated=0.3, abstained=0.5) == []
    assert reasons(truncated=math.nan, abstained=math.nan, correct=math.nan) == []


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"miscounted": 2}, "samples", ("2 of 50 items", "the 16 samples")),
        ({"images_fed": 0}, "images", ("given 0 images", "show 800")),
        ({"images_fed": 1600}, "images", ("given 1600 images",)),
        ({"longest": 101}, "length", ("101 tokens", "the 100 asked for")),
        ({"truncated": 0.31}, "truncated", ("31%", "at 100 tokens", "30%", "raise `max_new_tokens`")),
        ({"abstained": 0.75}, "abstained", ("75%", "50%")),
        ({"misordered": 5}, "option_order", ("5 samples",)),
        ({"one_order": 50}, "option_order", ("50 items", "give 0.01")),
    ],
)
def test_refusals(changes: dict[str, Any], kind: str, words: tuple[str, ...]) -> None:
    found = reasons(**changes)
    assert [one for one, _ in found] == [kind]
    assert all(word in found[0][1] for word in words)
    assert found[0][1].endswith(".") and "\n" not in found[0][1]


def test_several_at_once_causes_first() -> None:
    found = reasons(abstained=1.0, truncated=1.0, images_fed=0, misordered=1, one_order=50)
    assert [kind for kind, _ in found] == ["images", "option_order", "truncated", "abstained"]


@pytest.mark.parametrize("name", ["max_abstained", "max_truncated", "false_alarm"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValidationError):
        GuardSettings(**{name: value})


def test_settings_are_described() -> None:
    assert all(field.description for field in GuardSettings.model_fields.values())
    with pytest.raises(ValidationError):
        GuardSettings(max_truncatd=0.5)  # type: ignore[call-arg]


# -- option orders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "samples"), [(2, 2), (2, 4), (3, 3), (4, 2)])
def test_the_chance_of_one_order_counted(options: int, samples: int) -> None:
    orders = list(itertools.permutations(range(options)))
    same = sum(len(set(drawn)) == 1 for drawn in itertools.product(orders, repeat=samples))
    assert one_order_chance(options, samples) == pytest.approx(same / len(orders) ** samples)


def test_no_order_to_speak_of() -> None:
    assert one_order_chance(1, 16) == one_order_chance(4, 1) == one_order_chance(0, 0) == 0
    assert one_order_chance(26, 10_000) == 0


def test_few_samples_make_one_order_likely() -> None:
    """Two options and two samples: half of the items, and no alarm about it."""
    generator = np.random.default_rng(0)
    for items in (1, 3, 40, 1000):
        expected = items * one_order_chance(2, 2)
        for _ in range(200):
            assert not reasons(one_order=int(generator.binomial(items, 0.5)), one_order_expected=expected)
    assert reasons(one_order=1000, one_order_expected=500.0)
    assert not reasons(one_order=8, one_order_expected=4.0)  # too few items to tell
    assert reasons(one_order=1, one_order_expected=0.0)


# -- repeats: simulated samplers -----------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, np.ndarray], int]
"""The token that a sampler takes from a distribution [vocabulary]."""


def cut(chances: np.ndarray, top_p: float) -> np.ndarray:
    """The distribution that nucleus sampling draws from."""
    order = np.argsort(-chances)
    kept = order[: int((np.cumsum(chances[order]) - chances[order] < top_p).sum())]
    out = np.zeros_like(chances)
    out[kept] = chances[kept] / chances[kept].sum()
    return out


def honest(generator: np.random.Generator, chances: np.ndarray) -> int:
    return int(generator.choice(len(chances), p=chances))


def greedy(_: np.random.Generator, chances: np.ndarray) -> int:
    return int(chances.argmax())


def completions(
    generator: np.random.Generator,
    draw: Draw,
    *,
    tokens: int,
    sharpness: float,
    samples: int = 8,
    prompts: Sequence[int] | None = None,
    top_p: float = 0.9,
) -> Repeats:
    """Repeats of one item of a random model: an independent distribution per prompt and place.

    Recorded are the probabilities after the nucleus cut, which a sampler of another kind doesn't follow.
    """
    tables = generator.dirichlet(np.full(6, 1 / sharpness), (samples, tokens))
    seeds = prompts if prompts is not None else [0] * samples
    ids, logprobs = [], []
    for seed in seeds:
        kept = [cut(tables[seed, place], top_p) for place in range(tokens)]
        taken = [draw(generator, chances) for chances in kept]
        ids.append(taken)
        logprobs.append(np.log([chances[token] for chances, token in zip(kept, taken, strict=True)]).astype(np.float32))
    return item_repeats(ids, logprobs, prompts)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("sharpness", [1.0, 10.0, 100.0])
def test_honest_samples_rarely_look_suspicious(sharpness: float, top_p: float) -> None:
    """Evidence against a sound sampler exceeds 1 / alpha with probability at most alpha, at any confidence."""
    generator = np.random.default_rng(int(10 * sharpness))
    strata = [
        total_repeats(
            completions(
                generator, honest, tokens=tokens, sharpness=sharpness, top_p=top_p, samples=6,
                prompts=None if shared else generator.integers(0, 3, 6).tolist(),
            )
            for tokens, shared in itertools.product((1, 2), (True, False))
        ).log_evidence
        for _ in range(150)
    ]  # fmt: skip
    for alpha in (0.5, 0.1):
        assert np.mean(np.array(strata) > -math.log(alpha)) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 150)
    assert max(strata) < ALARM


def test_the_mean_wealth_is_at_most_one_exactly() -> None:
    """Every triple of samples of a one-token model, weighed by its probability under nucleus sampling."""
    for chances, top_p in [((0.6, 0.3, 0.1), 1.0), ((0.6, 0.3, 0.1), 0.85), ((0.95, 0.04, 0.01), 0.9)]:
        kept = cut(np.array(chances), top_p)
        for prompts in ([0, 0, 0], [0, 1, 0], None):
            mean = 0.0
            for drawn in itertools.product(np.flatnonzero(kept), repeat=3):
                weight = math.prod(kept[token] for token in drawn)
                found = item_repeats([[t] for t in drawn], [[math.log(kept[t])] for t in drawn], prompts)
                mean += weight * math.exp(found.log_evidence)
            assert mean <= 1 + 1e-12
            assert mean > 1 - 1e-4  # up to what is allowed for rounding: nothing is lost to a bound


def test_a_confident_model_is_not_accused() -> None:
    """Most items identical, honestly: the product of their own probabilities would fall below any level."""
    generator = np.random.default_rng(1)
    found, product = Repeats(), 0.0
    for _ in range(400):
        right = generator.random(16) < 0.97
        logprobs = np.log(np.where(right, 0.97, 0.03))[:, None]
        one = item_repeats(right[:, None].astype(int), list(logprobs))
        product += one.identical * 15 * math.log(0.97)
        found = total_repeats([found, one])
    assert found.identical > 200
    assert product < -ALARM
    assert found.log_evidence < 5
    assert not reasons(items=400, repeats=found)


@pytest.mark.parametrize("sharpness", [1.0, 5.0])
def test_greedy_in_place_of_sampling_is_found(sharpness: float) -> None:
    generator = np.random.default_rng(2)
    found = total_repeats(completions(generator, greedy, tokens=3, sharpness=sharpness) for _ in range(30))
    assert found.identical == found.items == 30
    (kind, reason) = reasons(items=30, samples=8, repeats=found)[0]
    assert kind == "repeats"
    assert "30 of 30 items have 8 identical samples (30 different completions among 240)" in reason
    assert "probability at most 1e-" in reason and "top_k" in reason


def test_the_probability_is_rounded_up() -> None:
    wealth = (14.0,) * 6  # exp(-14) = 8.3e-7
    assert "at most 1e-6:" in reasons(repeats=replace(SOUND.repeats, log_wealth=wealth))[0][1]
    assert not reasons(repeats=replace(SOUND.repeats, log_wealth=(13.8,) * 6))


def test_a_hidden_repeat_under_changing_prompts_is_found() -> None:
    """Greedy says something else under each option order, but the same under the same one."""
    generator = np.random.default_rng(3)
    prompts = [[0, 1, 2, 3, 4, 0, 5, 2], [7, 1, 2, 3, 3, 0, 5, 4]]
    broken, sound = (
        total_repeats(
            completions(generator, draw, tokens=12, sharpness=1.0, prompts=prompts[item % 2]) for item in range(20)
        )
        for draw in (greedy, honest)
    )
    assert broken.identical == sound.identical == 0
    assert broken.log_evidence > ALARM
    assert sound.log_evidence < 3


def test_every_seed_used_twice_is_found() -> None:
    generator = np.random.default_rng(4)
    items = []
    for _ in range(5):
        texts = generator.integers(0, 50, (8, 6)).repeat(2, axis=0)
        items.append(item_repeats(texts, np.full((16, 6), math.log(1 / 50))))
    found = total_repeats(items)
    assert (found.identical, found.distinct, found.samples) == (0, 40, 80)
    assert found.log_evidence > ALARM


def test_the_most_likely_token_alone_in_the_nucleus_proves_nothing() -> None:
    """Where the nucleus holds one token, nucleus sampling itself is greedy, and its probability is 1."""
    one = item_repeats([[5, 6]] * 16, [[0.0, 0.0]] * 16)
    assert one.identical == 1
    assert abs(total_repeats([one] * 1000).log_evidence) < ALARM


# -- repeats: corners ----------------------------------------------------------------------------------------


def test_without_log_probabilities() -> None:
    same, mixed = item_repeats([[1], [1]], None), item_repeats([[1], [2]], None)
    assert same == Repeats(items=1, identical=1, samples=2, distinct=1)
    every, most = total_repeats([same] * 20), total_repeats([*[same] * 20, mixed])
    found = reasons(samples=2, repeats=every)
    assert found[0][0] == "repeats" and "no log-probabilities" in found[0][1]
    assert not reasons(repeats=every, correct=1.0)
    assert not reasons(repeats=most)
    assert not reasons(repeats=Repeats())


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_unknown(unknown: float) -> None:
    assert item_repeats([[1], [1]], [[unknown], [unknown]]) == item_repeats([[1], [1]], None)
    part = item_repeats([[1, 2], [1, 2]], [[-1.0, unknown], [-1.0, unknown]])
    assert part.known == 1
    assert part.log_wealth == pytest.approx(item_repeats([[1], [1]], [[-1.0], [-1.0]]).log_wealth)


def test_few_or_empty_samples() -> None:
    assert item_repeats([], None) == item_repeats([[1]], [[-1.0]]) == Repeats() == total_repeats([])
    assert item_repeats([[], []], [[], []]).identical == 1
    assert item_repeats([[], [3]], [[], [-1.0]]).distinct == 2


def test_dtypes_do_not_matter() -> None:
    wide = item_repeats(np.array([[1, 2]] * 3), np.full((3, 2), -1.0))
    narrow = item_repeats(
        [np.array([1, 2], np.int32), np.array([1, 2], np.int16), [1, 2]], np.full((3, 2), -1, np.float32)
    )
    assert wide == narrow
    strided = item_repeats(np.array([[1, 9, 2, 9]] * 3)[:, ::2], np.full((3, 4), -1.0)[:, ::2])
    assert strided == wide


def test_prefixes_are_not_repeats() -> None:
    assert item_repeats([[1, 2], [1], [1, 2, 3]], None).distinct == 3


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_wealth_by_its_definition(ids: list[list[int]], random: Any) -> None:
    logprobs = [[-3 * random.random() for _ in one] for one in ids]
    prompts = [random.randrange(2) for _ in ids]
    wealth = np.ones(6)
    for j in range(1, len(ids)):
        earlier = [i for i in range(j) if prompts[i] == prompts[j]] or list(range(j))
        share = sum(ids[i] == ids[j] for i in earlier) / len(earlier)
        bound = math.prod(min(1, math.exp(value + 1e-5)) for value in logprobs[j])
        wealth *= 1 - np.array([0.001, 0.01, 0.1, 0.5, 0.9, 1]) * (1 - share / bound)
    found = item_repeats(ids, logprobs, prompts)
    if any(ids):
        np.testing.assert_allclose(np.exp(found.log_wealth), wealth, rtol=1e-9, atol=1e-12)
        with np.errstate(divide="ignore"):
            assert found.log_evidence == pytest.approx(np.log(wealth.mean()), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], [1]], [[-1.0]]), "logprobs has 1 entries for 2 samples"),
        (([[1], [1]], None, [1, 2, 3]), "prompts has 3 entries for 2 samples"),
        (([[1], [1, 2]], [[-1.0], [-1.0]]), r"sample 1: \(1,\) log-probabilities for \(2,\) tokens"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        item_repeats(*arguments)


def test_ten_thousand_rollouts_of_a_thousand_tokens() -> None:
    """No loop over tokens: this takes about a second, and minutes with one."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 9, (16, 1000))
    logprobs = np.full((16, 1000), -0.5, np.float32)
    found = total_repeats(item_repeats(ids, logprobs) for _ in range(625))
    assert (found.samples, found.distinct) == (10_000, 10_000)
