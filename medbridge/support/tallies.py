"""Counts per item: all that the gate sees of the rollouts. How a completion is read is decided in data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tally:
    """The outcomes of one item.

    Attributes:
        item_id: id of the item.
        cluster: items that share it (an image, a patient) aren't independent and are resampled together.
        floor: probability that one guess is right, 0 to 1.
        n: samples drawn.
        c: samples that were correct.
        abstained: samples without a readable answer; they are never correct.
        greedy_correct: whether the greedy completion was correct; None when there was none.
        votes: samples per answer read (canonical option index as text, or the open answer), abstentions left
            out. It may be empty.

    Raises:
        ValueError: counts that can't be, with the item, the field and the value.
    """

    item_id: str
    cluster: str
    floor: float
    n: int
    c: int
    abstained: int = 0
    greedy_correct: bool | None = None
    votes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse impossible counts here, so that nothing downstream has to check them again."""
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"item {self.item_id!r}: floor = {self.floor}, must be from 0 to 1")
        for name, value in (("n", self.n), ("c", self.c), ("abstained", self.abstained)):
            if value < 0:
                raise ValueError(f"item {self.item_id!r}: {name} = {value}, must be at least 0")
        if self.c + self.abstained > self.n:
            raise ValueError(
                f"item {self.item_id!r}: c = {self.c} correct and {self.abstained} abstained "
                f"exceed n = {self.n} samples"
            )
        if any(count < 0 for count in self.votes.values()):
            raise ValueError(f"item {self.item_id!r}: negative vote in {dict(self.votes)}")
        if sum(self.votes.values()) > self.n - self.abstained:
            raise ValueError(
                f"item {self.item_id!r}: votes {dict(self.votes)} exceed the "
                f"{self.n - self.abstained} samples with an answer"
            )
