"""Equal texts, options and tags of a data set as one object: most questions have them from a short list."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)

MOST = 1 << 15
"""Values that are remembered. Texts that never come again would otherwise fill the memory that others save."""


class Interner:
    """Gives back the first of equal values, as long as it is remembered; what it gives must not be changed."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Hashable] = {}
        self._tags: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {}

    def __call__(self, value: Value) -> Value:
        if len(self._values) >= MOST:
            self._values.clear()
        found = self._values.setdefault(value, value)
        assert type(found) is type(value)
        return found

    def tags(self, tags: Mapping[str, str]) -> Mapping[str, str]:
        if len(self._tags) >= MOST:
            self._tags.clear()
        return self._tags.setdefault(tuple(tags.items()), tags)
