"""The rule that names a cell's bottleneck, from what was measured. It measures nothing itself."""

from __future__ import annotations

from medbridge.report.view import Estimate
from medbridge.study.result import Finding, Sight

_LEAST_COVERED = 0.25
"""Share of a stratum's items that the probes must cover for a stratum to be called vision-limited."""


def find(
    verdict: str,
    sight: Sight | None,
    blank: Estimate | None,
    *,
    threshold: float,
    reason: str,
    support: str,
    accuracy: str,
) -> Finding:
    """Where the bottleneck is.

    The gate's verdict comes first: done is solved, and sharpen (support is there, Acc@1 lags) is sampling-limited.
    Where support is weak, the probes tell a tower that does not see from a language side that does not reach: surely
    below `threshold` is vision-limited, surely above it support-limited, and in between undecided. A linear probe that
    fails does not prove that nothing is seen, so that vision-limited also needs the probes to cover a fair part of the
    items.

    Args:
        verdict: of the gate: bridge, sharpen, done or undecided.
        sight: what the probes of the model's own tower found; None where none could be made.
        blank: support that the images add to grey ones.
        threshold: gain of a probe above the commonest answer from which answers count as seen.
        reason: the gate's, told where nothing is decided.
        support, accuracy: the two estimates in words.
    """
    notes = []
    if blank is not None and blank.low is not None and blank.low <= 0 and verdict in ("done", "sharpen"):
        notes.append("Grey images give no surely lower support: the answers may not be read from the image.")
    if verdict == "done":
        return Finding("solved", f"It reaches the answers ({support}) and says them first ({accuracy}).", tuple(notes))
    if verdict == "sharpen":
        return Finding(
            "sampling-limited",
            f"The answers are within reach ({support}) and not said first ({accuracy}): RL has something to sharpen.",
            tuple(notes),
        )
    if verdict != "bridge":
        return Finding("undecided", reason, tuple(notes))
    weak = f"The answers are not within reach ({support})"
    if sight is None or sight.gain is None:
        return Finding("support-limited", f"{weak}. Whether the tower sees them was not probed.", tuple(notes))
    seen = f"a linear probe of the tower gets {sight.gain} of what the commonest answer misses"
    low, high = sight.gain.low, sight.gain.high
    if low is not None and low >= threshold:
        return Finding("support-limited", f"{weak}, although {seen}: the language side lacks them.", tuple(notes))
    covered = sight.items >= _LEAST_COVERED * sight.asked
    if high is not None and high < threshold and covered:
        return Finding("vision-limited", f"{weak}, and {seen}: the tower's features do not show them.", tuple(notes))
    if not covered:
        notes.append(f"The probes cover {sight.items} of {sight.asked} items.")
    return Finding("undecided", f"{weak}; {seen}, which settles neither side.", tuple(notes))
