"""Reading stored JSON records that may hold anything: a value of the wanted kind, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from medbridge.report.view import Curve, Estimate


def number(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON's integers have no end
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """A finite number without its fraction."""
    found = number(value)
    return None if found is None else int(found)


def numbers(values: Any, size: int) -> list[float | None]:
    """A list of `size` numbers, each None where it is missing."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return (found + [None] * size)[:size]


def text(value: Any) -> str | None:
    """A string."""
    return value if isinstance(value, str) else None


def curve(record: Any, size: int) -> Curve:
    """A curve of `size` points."""
    record = record if isinstance(record, dict) else {}
    return Curve(*(numbers(record.get(name), size) for name in ("value", "low", "high")))


def estimate(record: Any) -> Estimate | None:
    """From the gate's {"value", "low", "high"} or a baseline's {"accuracy", "low", "high"}."""
    if not isinstance(record, dict):
        return None
    value = number(record.get("value", record.get("accuracy")))
    return None if value is None else Estimate(value, number(record.get("low")), number(record.get("high")))


def mapping(record: Any) -> Mapping[str, Any]:
    """A mapping; empty where there is none."""
    return record if isinstance(record, dict) else {}


def dig(record: Any, *keys: str) -> Any:
    """What nested mappings hold under the keys."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record
