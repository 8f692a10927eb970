"""Equal values become one object, and what is remembered stays small."""

from __future__ import annotations

from medbridge.data.interning import MOST, Interner


def text(number: int) -> str:
    return f"text {number}"


def test_equal_values_are_one_object() -> None:
    one = Interner()
    for make in (text, lambda number: (text(number), "b"), lambda number: number / 7):
        first, other = one(make(1)), one(make(2))
        assert one(make(1)) is first and one(make(2)) is other and first != other
    assert one(None) is None
    tags = one.tags({"modality": text(1)})
    assert one.tags({"modality": text(1)}) is tags == {"modality": "text 1"}
    assert one.tags({"modality": text(2)}) == {"modality": "text 2"} and one.tags({}) == {}


def test_what_never_comes_again_is_forgotten() -> None:
    one = Interner()
    first = one(text(0))
    for number in range(1, MOST - 1):
        assert one(text(number)) == text(number)
    assert one(text(0)) is first
    assert one(text(MOST)) == text(MOST) and one(text(0)) is not first
