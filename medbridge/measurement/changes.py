"""What a training stage changed: two measurements of the same items, compared stratum by stratum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from medbridge.config import RunSettings
from medbridge.data import Item
from medbridge.ledger import Ledger, Stage
from medbridge.measurement.order import cluster_of
from medbridge.support import GateSettings, Tally, gate_k, item_scores
from medbridge.support.change import Change, Scores, compare, losses


def compare_stages(
    ledger: Ledger, before: Stage, after: Stage, strata: Mapping[str, Sequence[Item]], settings: RunSettings
) -> dict[str, Any]:
    """The change of each stratum from one measuring stage to another, for the later one's summary.

    Returns:
        "since": the earlier stage's id; "changes": `Change.to_dict` by stratum; "lost": the strata whose support fell
        significantly, with the numbers in words.
    """
    stratum_of = {item.id: name for name, items in strata.items() for item in items}
    # by the data as it lies now: images may have moved between the two stages
    cluster = {item.id: cluster_of(item, settings.diagnosis.cluster) for items in strata.values() for item in items}
    held: dict[str, tuple[list[Tally], list[Tally]]] = defaultdict(lambda: ([], []))
    for place, stage in enumerate((before, after)):
        for tally in ledger.tallies(stage.stage_id):
            if tally.item_id in stratum_of and tally.n:
                moved = replace(tally, cluster=cluster[tally.item_id])
                held[stratum_of[tally.item_id]][place].append(moved)
    changes = {}
    for name, (old, new) in sorted(held.items()):
        if {tally.item_id for tally in old} & {tally.item_id for tally in new}:
            change = _compare(old, new, settings)
            if change is not None:
                changes[name] = change
    lost = losses(changes, settings.gate.alpha)
    return {
        "since": before.stage_id,
        "changes": {name: change.to_dict() for name, change in changes.items()},
        "lost": {name: _in_words(name, change) for name, change in lost.items()},
    }


def _compare(before: Sequence[Tally], after: Sequence[Tally], settings: RunSettings) -> Change | None:
    """None where support can't be read."""
    most, scores = shared_scores(before, after, settings.gate)
    if scores is None:
        return None
    return compare(
        before, after, scores=scores, ks=sorted({1, most}), alpha=settings.gate.alpha,
        replicates=settings.gate.replicates, seed=settings.seed, tolerated=settings.diagnosis.tolerated_loss,
    )  # fmt: skip


def shared_scores(one: Sequence[Tally], other: Sequence[Tally], gate: GateSettings) -> tuple[int, Scores | None]:
    """The samples that every item has in both measurements, and the gate's statistic of an item at the k that the gate
    reads with so many, as `compare` wants it; None where it can't be read.
    """
    most = min(tally.n for tally in (*one, *other))
    k, *_ = gate_k([tally.floor for tally in one], most, gate)
    if k is None:
        return most, None

    def scores(tallies: Sequence[Tally]) -> tuple[Any, Any]:
        found = item_scores(tallies, gate, k)
        return found.top, found.bottom

    return most, scores


def _in_words(name: str, change: Change) -> str:
    shift = change.support
    return (
        f"{name} lost support: {shift.value:+.2f} ({100 * change.confidence:.0f} % interval {shift.low:+.2f} to "
        f"{shift.high:+.2f}) on the same {change.items} items"
    )
