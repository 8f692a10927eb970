"""Prompts, targets and permutations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbridge.data import Item, PromptSettings, build_prompt, permutation, target_completion
from medbridge.errors import MedbridgeError

MakeItem = Callable[..., Item]


def numbered(options: int, item_id: str = "d/test/1") -> Item:
    names = tuple(f"option {number}" for number in range(options))
    return Item(item_id, "d", "test", "q", names[0], names, ("/a.png",), {}, 1 / options)


@given(options=st.integers(2, 12), seed=st.integers(), sample=st.integers(), item_id=st.text(min_size=1))
def test_permutation_orders_the_options(options: int, seed: int, sample: int, item_id: str) -> None:
    assert sorted(permutation(numbered(options, item_id), seed, sample)) == list(range(options))


@pytest.mark.parametrize("options", [2, 3, 4])
def test_all_orders_are_equally_likely(options: int) -> None:
    draws = 4800
    counts = Counter(permutation(numbered(options), 0, sample) for sample in range(draws))
    expected = draws / {2: 2, 3: 6, 4: 24}[options]
    assert len(counts) == draws / expected
    # Six standard deviations of a multinomial count; the draws are fixed, so this can't fail by chance.
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


def test_a_fixed_position_is_no_better_than_guessing() -> None:
    """Always answering A must have the Pass@k of guessing: successes binomial, not spread evenly."""
    misses = sum(
        all(permutation(numbered(4, f"d/test/{number}"), 0, sample)[0] != 0 for sample in range(4))
        for number in range(2000)
    )
    assert abs(misses / 2000 - 0.75**4) < 0.04  # balanced orders would give 0


def test_permutation_depends_on_item_seed_and_sample_only() -> None:
    item = numbered(4)
    assert permutation(item, 7, -1) == permutation(numbered(4), 7, -1)
    # Frozen: a change would silently break the repetition of a stored run.
    assert [permutation(item, 0, sample) for sample in (-1, 0, 1)] == [
        (3, 2, 1, 0),
        (2, 1, 0, 3),
        (2, 0, 3, 1),
    ]
    assert len({permutation(numbered(4, f"d/test/{n}"), 0, 0) for n in range(50)}) > 10


def test_open_question_has_the_empty_permutation(make_item: MakeItem) -> None:
    item = make_item(options=None, floor=0.0)
    assert permutation(item, 0, 3) == ()
    with pytest.raises(MedbridgeError, match="must be empty"):
        build_prompt(item, (0, 1), PromptSettings())


@pytest.mark.parametrize("order", [(), (0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4)])
def test_wrong_permutation_is_refused(make_item: MakeItem, order: tuple[int, ...]) -> None:
    with pytest.raises(MedbridgeError, match="does not order"):
        target_completion(make_item(), order, PromptSettings())


def test_prompt_in_letter_style(make_item: MakeItem) -> None:
    messages = build_prompt(make_item(images=("/a.png", "/b.png")), (2, 1, 0, 3), PromptSettings(system="Be brief."))
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "What is seen?\nA) Mass\nB) Effusion\nC) Edema\nD) Nodule"},
            ],
        },
    ]


def test_prompt_in_text_style_without_system(make_item: MakeItem) -> None:
    settings = PromptSettings(answer_style="text", system="")
    (message,) = build_prompt(make_item(), (0, 1, 2, 3), settings)
    assert message["content"][-1]["text"] == "What is seen?\n- Edema\n- Effusion\n- Mass\n- Nodule"


def test_permutations_share_everything_before_the_options(make_item: MakeItem) -> None:
    one, two = (build_prompt(make_item(), order, PromptSettings()) for order in ((0, 1, 2, 3), (3, 2, 1, 0)))
    assert one[0] == two[0] and one[1]["content"][:-1] == two[1]["content"][:-1]
    first, second = one[1]["content"][-1]["text"], two[1]["content"][-1]["text"]
    assert first != second and first.split("\nA)")[0] == second.split("\nA)")[0] == "What is seen?"


@pytest.mark.parametrize(
    ("changes", "style", "expected"),
    [
        ({}, "letter", "<answer>A</answer>"),
        ({}, "text", "<answer>Effusion</answer>"),
        ({"trace": "Fluid."}, "letter", "<think>Fluid.</think><answer>A</answer>"),
        ({"options": None, "floor": 0.0}, "letter", "<answer>Effusion</answer>"),
    ],
)
def test_target(make_item: MakeItem, changes: dict[str, Any], style: Any, expected: str) -> None:
    item = make_item(**changes)
    order = () if item.options is None else (1, 0, 2, 3)
    assert target_completion(item, order, PromptSettings(answer_style=style)) == expected


def test_settings_refuse_unknown_keys() -> None:
    with pytest.raises(ValueError, match="answer_sytle"):
        PromptSettings.model_validate({"answer_sytle": "text"})
