"""Shared words and quantities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbridge.data.open_answers import equal_quantities, is_quantity, quantity, same_quantity, token_f1

WORDS = st.lists(st.sampled_from("left right upper lobe of lung liver".split()), max_size=6).map(" ".join)  # noqa: SIM905


@pytest.mark.parametrize(
    ("read", "right", "f1"),
    [
        ("The left lung.", "left lung", 1.0),
        ("left lung", "right lung", 0.5),
        ("left", "left upper lobe", 0.5),
        ("liver", "lung", 0.0),
        ("", "lung", 0.0),
        ("", "", 1.0),
        ("lung lung", "lung", 2 / 3),
    ],
)
def test_token_f1(read: str, right: str, f1: float) -> None:
    assert token_f1(read, right) == pytest.approx(f1)


@given(WORDS, WORDS)
def test_token_f1_is_symmetric_and_within_bounds(one: str, other: str) -> None:
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1 == token_f1(one, one)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1.5 cm", (0.015, "length")), ("15mm", (0.015, "length")), ("about 3", (3.0, None)), ("three", (3.0, None)),
        ("3,500 g", (3500.0, "mass")), ("12 %", (0.12, "share")), ("-0.5", (-0.5, None)), ("\u22122", (-2.0, None)),
        ("120 mmHg", (120.0, "mmhg")), ("4 masses", (4.0, None)), ("2 and 2", (2.0, None)), ("2 or 3", None),
        ("none", None), ("", None), ("T4", None), (".5 l", (0.5, "volume")),
    ],
)  # fmt: skip
def test_quantities(text: str, found: tuple[float, str | None] | None) -> None:
    got = quantity(text)
    assert got is None if found is None else got == (pytest.approx(found[0]), found[1])


@pytest.mark.parametrize(
    ("read", "right", "same"),
    [
        ("15 mm", "1.5 cm", True), ("about 1.5 centimetres", "15 mm", True), ("1.5", "1.5 cm", True),
        ("1.5 g", "1.5 cm", False), ("15 cm", "1.5 cm", False), ("1.505 cm", "1.5 cm", True),
        ("1.6 cm", "1.5 cm", False),
        ("two", "2", True), ("2 days", "48 hours", True), ("50 %", "0.5", False), ("0", "0", True), ("0.5", "0", False),
        ("liver", "2", False), ("2", "liver", None),
    ],
)  # fmt: skip
def test_same_quantity(read: str, right: str, same: bool | None) -> None:
    assert same_quantity(read, right) is same


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("5 cm", True), ("5", True), ("about 5 cm.", True), ("two", True), ("~ 12 %", True), ("\u22122", True),
        ("5 x 3 cm", False), ("2 nodules", False), ("5 cm mass", False), ("T2", False), ("", False), ("liver", False),
        ("about", False), ("5 or 6", False),
    ],
)  # fmt: skip
def test_texts_that_are_a_quantity_and_no_more(text: str, whole: bool) -> None:
    assert is_quantity(text) is whole
    assert equal_quantities(text, text, 0.0) is whole


@given(st.floats(1e-6, 1e6), st.sampled_from(["", " mm", " kg", " ml", " h", " %", " bpm"]))
def test_a_number_is_itself_in_any_notation(value: float, unit: str) -> None:
    written = f"{value:.9f}{unit}"
    assert same_quantity(written, written, tolerance=1e-6) is True
    assert same_quantity(f"{2 * value:.9f}{unit}", written, tolerance=0.4) is False


@given(st.text(max_size=60))
def test_any_text_is_read(text: str) -> None:
    quantity(text)
    token_f1(text, "lung")
