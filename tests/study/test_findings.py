"""The rule that names a bottleneck."""

from __future__ import annotations

import pytest

from medbridge.report.view import Estimate
from medbridge.study.findings import find
from medbridge.study.result import Finding, Sight


def sight(value: float, low: float, high: float, items: int = 50, asked: int = 60) -> Sight:
    return Sight(items, asked, 3, 0.7, 0.6, Estimate(value, low, high))


def found(verdict: str, seen: Sight | None = None, blank: Estimate | None = None) -> Finding:
    return find(
        verdict, seen, blank, threshold=0.2, reason="the gate's reason", support="support 0.1", accuracy="Acc@1 0.2"
    )


@pytest.mark.parametrize(
    ("verdict", "seen", "kind"),
    [
        ("done", None, "solved"),
        ("done", sight(0.0, -0.1, 0.1), "solved"),
        ("sharpen", sight(0.0, -0.1, 0.1), "sampling-limited"),
        ("undecided", sight(0.9, 0.8, 1.0), "undecided"),
        ("bridge", None, "support-limited"),
        ("bridge", sight(0.5, 0.3, 0.7), "support-limited"),
        ("bridge", sight(0.2, 0.2, 0.3), "support-limited"),
        ("bridge", sight(0.0, -0.2, 0.19), "vision-limited"),
        ("bridge", sight(0.1, -0.2, 0.2), "undecided"),
        ("bridge", sight(0.0, -0.2, 0.1, items=10), "undecided"),  # the probes cover a sixth of the items
        ("bridge", Sight(9, 9, 1, 1.0, 1.0, None), "support-limited"),  # the commonest answer is always right
    ],
)
def test_kinds(verdict: str, seen: Sight | None, kind: str) -> None:
    assert found(verdict, seen).kind == kind


def test_what_is_not_known_is_said() -> None:
    assert "not probed" in found("bridge").words
    assert found("undecided").words == "the gate's reason"
    assert found("bridge", sight(0.0, -0.2, 0.1, items=10)).notes == ("The probes cover 10 of 60 items.",)


def test_support_that_grey_images_give_too() -> None:
    assert found("done", blank=Estimate(0.0, -0.1, 0.1)).notes
    assert not found("done", blank=Estimate(0.3, 0.1, 0.5)).notes
    assert not found("bridge", blank=Estimate(0.0, -0.1, 0.1)).notes
