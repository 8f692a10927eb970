"""Which completions a study's page holds: by fixed rules, within a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from medbridge.study.answers import Answers, choose_answers, json_text

SAID: list[tuple[int, str, str, str | None]] = [
    (-1, "wrong", "<answer>No</answer>", "No"),
    (0, "wrong", "<answer>No</answer>", "No"),
    (1, "abstain", "what?", None),
    (2, "correct", "<answer>Yes</answer>", "Yes"),
    (3, "correct", "surely <answer>Yes</answer>", "Yes"),
    (4, "wrong", "No again", "No"),
]


def ids(count: int, stratum: str = "s") -> list[str]:
    return [f"d/test/{stratum}{n}" for n in range(count)]


def size(found: dict[str, Answers]) -> int:
    return sum(len(json_text(answers.records).encode()) for answers in found.values())


def test_the_greedy_one_and_the_first_of_each_status(answered: Callable[..., Any]) -> None:
    ledger, stages = answered({"a": SAID}, {"a": SAID[:2]})
    assert choose_answers(ledger, stages, {"s": ["a"]}) == {
        "a": Answers(
            [
                [
                    [-1, 1, 1, 0, "<answer>", ["No"], "</answer>"],
                    [2, 0, 0, 0, "<answer>", ["Yes"], "</answer>"],
                    [0, 1, 1, 0, "<answer>", ["No"], "</answer>"],
                    [1, 2, None, 1, "what?"],
                ],
                [[-1, 1, 1, 0, "<answer>", ["No"], "</answer>"], [0, 1, 1, 0, "<answer>", ["No"], "</answer>"]],
            ],
            whole=True,
        )
    }
    assert ledger.greedy_statuses(stages[0]) == {"a": "wrong"}
    assert ledger.greedy_statuses(99) == {}


def test_without_a_greedy_completion(answered: Callable[..., Any]) -> None:
    ledger, stages = answered({"a": SAID[1:3], "b": []})
    found = choose_answers(ledger, stages, {"s": ["a", "b"]})
    assert [record[0] for record in found["a"].records[0]] == [0, 1]
    assert found["b"] == Answers([[]], whole=True)


def test_every_stratum_first_then_the_greedy_ones_of_all(answered: Callable[..., Any]) -> None:
    strata = {"big": ids(60, "big"), "small": ids(6, "small")}
    every = {name: SAID for names in strata.values() for name in names}
    ledger, stages = answered(every, every)
    whole = choose_answers(ledger, stages, strata)
    assert set(whole) == set(every) and all(answers.whole for answers in whole.values())
    total = size(whole)
    for share in (0.9, 0.5, 0.2, 0.05):
        found = choose_answers(ledger, stages, strata, budget=int(share * total))
        assert 0 < size(found) <= share * total
        kinds = [answers.whole for answers in found.values()]
        for name in strata:
            assert any(item_id in found and found[item_id].whole for item_id in strata[name])
        if share >= 0.5:  # the greedy completions of all fit
            assert set(found) == set(every) and 0 < sum(kinds) < len(every)
        for item_id, answers in found.items():
            for records in answers.records:
                assert len(records) == (4 if answers.whole else 1) and records[0][0] == -1
            assert answers.whole is False or answers == whole[item_id]
    assert choose_answers(ledger, stages, strata, budget=10) == {}


def test_the_choice_repeats_and_does_not_hang_on_the_order(answered: Callable[..., Any]) -> None:
    names = ids(300)
    ledger, stages = answered({name: SAID for name in names})
    budget = 6_000
    found = choose_answers(ledger, stages, {"s": names}, budget=budget)
    assert 10 < len(found) < 300
    assert choose_answers(ledger, stages, {"s": names[::-1]}, budget=budget) == found


@pytest.mark.parametrize("read", [None, "x" * 1000, "the END"])
def test_long_completions_are_cut_around_what_was_read(answered: Callable[..., Any], read: str | None) -> None:
    text = "start " + "a" * 4000 + (read or "") + "b" * 5000 + " stop"
    ledger, stages = answered({"a": [(-1, "correct" if read else "abstain", text, read)]})
    (record,) = choose_answers(ledger, stages, {"s": ["a"]})["a"].records[0]
    *_, told, _, first = record[:5]
    pieces = record[4:]
    assert first.startswith("start ") and pieces[-1].endswith(" stop")
    assert any(isinstance(piece, dict) and "left out" in piece["gap"] for piece in pieces)
    assert len(json_text(record)) < 2000
    if read is None:
        assert told is None
    else:
        assert told == read[:200]
        assert "".join(piece[0] for piece in pieces if isinstance(piece, list)) == read[:600]


def test_texts_that_would_break_a_page(answered: Callable[..., Any]) -> None:
    text = "</script><!--<script>\u202eabc\x00\ud800\u2028 &amp; \\u003c"
    ledger, stages = answered({"a": [(-1, "wrong", text, "abc")]})
    found = choose_answers(ledger, stages, {"s": ["a"]})["a"].records
    written = json_text(found)
    assert "<" not in written and "\u202e" not in written
    assert json.loads(written) == found
    said = "".join(piece if isinstance(piece, str) else piece[0] for piece in found[0][0][4:])
    assert said == "</script><!--<script>\ufffdabc\ufffd?\u2028 &amp; \\u003c"
