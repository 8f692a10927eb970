"""Open answers compared beyond equality: shared words (token F1), and quantities with their units."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from medbridge.data.text import normalise

_ARTICLES = frozenset({"a", "an", "the"})

_WORDS = {
    word: float(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
    )
}

_SCALES: dict[str, tuple[str, float]] = {
    **{name: ("length", scale) for scale, names in (
        (1e-9, "nm"), (1e-6, "um µm μm micron microns"), (1e-3, "mm millimeter millimeters millimetre millimetres"),
        (1e-2, "cm centimeter centimeters centimetre centimetres"), (1.0, "m meter meters metre metres"),
    ) for name in names.split()},
    **{name: ("mass", scale) for scale, names in (
        (1e-9, "ng"), (1e-6, "ug µg μg mcg"), (1e-3, "mg"), (1.0, "g gram grams"), (1e3, "kg kilogram kilograms"),
    ) for name in names.split()},
    **{name: ("volume", scale) for scale, names in (
        (1e-6, "ul µl μl"), (1e-3, "ml cc"), (1e-2, "cl"), (1e-1, "dl"), (1.0, "l liter liters litre litres"),
    ) for name in names.split()},
    **{name: ("time", scale) for scale, names in (
        (1e-3, "ms"), (1.0, "s sec second seconds"), (60.0, "min mins minute minutes"), (3600.0, "h hr hrs hour hours"),
        (86400.0, "d day days"), (604800.0, "week weeks"), (2629800.0, "month months"), (31557600.0, "year years"),
    ) for name in names.split()},
    **{name: ("share", 1e-2) for name in ("%", "percent")},
    **{name: (name, 1.0) for name in ("mmhg", "bpm", "hz", "hu", "kpa")},
}  # fmt: skip
"""Unit -> its dimension, and how much of the dimension's own unit it is."""

_NUMBER = re.compile(r"(?<![\w.,])([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+)(?![\d])\s*(%|[a-zA-Zµμ]+)?")


def token_f1(read: str, right: str) -> float:
    """F1 of the words of two answers, 0 to 1: case, punctuation and articles don't count, repeats do.

    Two answers without any word are equal (1), one without is not (0).
    """
    one, other = (Counter(w for w in normalise(text).split() if w not in _ARTICLES) for text in (read, right))
    if not one or not other:
        return float(one == other)
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total())


def quantity(text: str) -> tuple[float, str | None] | None:
    """The one number that a text holds, in the own unit of its dimension, and that dimension (None: no unit is known).

    Thousands may have commas. A text of several different numbers, or of none, holds no quantity.
    """
    found = {_scaled(match[1], match[2]) for match in _numbers(text)}
    if not found:
        found = {(_WORDS[word], None) for word in normalise(text).split() if word in _WORDS}
    return next(iter(found)) if len(found) == 1 else None


def is_quantity(text: str) -> bool:
    """Whether a text is one quantity and no more: a number or number word, with a known unit or without one."""
    match = _NUMBER.fullmatch(_bare(text))
    if match is None:
        return normalise(text) in _WORDS
    return match[2] is None or match[2].lower() in _SCALES


def equal_quantities(read: str, right: str, tolerance: float) -> bool:
    """Whether both texts are quantities and no more, and the same one (as in `same_quantity`)."""
    return is_quantity(right) and is_quantity(read) and same_quantity(read, right, tolerance) is True


def same_quantity(read: str, right: str, tolerance: float = 0.01) -> bool | None:
    """Whether an answer gives the right quantity, within a relative tolerance; None where the right one is none.

    An answer without a unit is taken in the right one's. Other dimensions are wrong.
    """
    expected = quantity(right)
    if expected is None:
        return None
    found = quantity(read)
    if found is None:
        return False
    value, dimension = found
    if dimension is None and expected[1] is not None:
        match = next(_numbers(right))
        value *= _SCALES[(match[2] or "").lower()][1]
    elif dimension != expected[1]:
        return False
    # 5 cm is 50 mm only up to the last bits of the scales
    return math.isclose(value, expected[0], rel_tol=max(tolerance, 1e-9), abs_tol=0.0 if expected[0] else tolerance)


_HEDGE = re.compile(r"(?:about|approximately|approx\.?|around|circa|ca\.|roughly|~|≈|=)\s*", re.IGNORECASE)


def _bare(text: str) -> str:
    """A text without what may stand around a quantity and says nothing of it."""
    stripped = text.replace("\u2212", "-").strip().rstrip(".!").strip()
    hedge = _HEDGE.match(stripped)
    return stripped if hedge is None else stripped[hedge.end() :]


def _numbers(text: str) -> Iterator[re.Match[str]]:
    return _NUMBER.finditer(text.replace("\u2212", "-"))


def _scaled(number: str, unit: str | None) -> tuple[float, str | None]:
    value = float(number.replace(",", ""))
    known = _SCALES.get((unit or "").lower())
    return (value, None) if known is None else (value * known[1], known[0])
