"""From stored outcomes to tallies: the counts per item that all statistics start from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from medbridge.data import Item
from medbridge.data.answers import Outcome
from medbridge.data.text import normalise
from medbridge.ledger import Ledger
from medbridge.measurement.order import cluster_of
from medbridge.rollout import GREEDY
from medbridge.support import Tally

Outcomes = Mapping[str, Mapping[int, Outcome]]
"""Item id -> sample -> what was read from that completion."""


def stored_outcomes(
    ledger: Ledger, stage_id: int, item_ids: Sequence[str] | None = None
) -> dict[str, dict[int, Outcome]]:
    """The outcomes of a stage, or of some of its items, by item and sample."""
    found: dict[str, dict[int, Outcome]] = defaultdict(dict)
    for item_id, sample, outcome in ledger.outcomes(stage_id, item_ids):
        found[item_id][sample] = outcome
    return found


def tally_items(ledger: Ledger, stage_id: int, items: Iterable[Item], cluster: Sequence[str]) -> list[Tally]:
    """Count the stored outcomes of a measuring stage per item, in the order of `items`."""
    chosen = list(items)
    return count(stored_outcomes(ledger, stage_id, [item.id for item in chosen]), chosen, cluster)


def count(outcomes: Outcomes, items: Iterable[Item], cluster: Sequence[str]) -> list[Tally]:
    """One tally per item, in the order of `items`; an item without outcomes has n = 0."""
    return [_tally(item, outcomes.get(item.id, {}), cluster) for item in items]


def _tally(item: Item, outcomes: Mapping[int, Outcome], cluster: Sequence[str]) -> Tally:
    sampled = [outcome for sample, outcome in outcomes.items() if sample != GREEDY]
    greedy = outcomes.get(GREEDY)
    votes = Counter(
        str(outcome.option) if outcome.option is not None else normalise(outcome.answer or "")
        for outcome in sampled
        if outcome.status != "abstain"
    )
    return Tally(
        item_id=item.id,
        cluster=cluster_of(item, cluster),
        floor=item.floor,
        n=len(sampled),
        c=sum(outcome.status == "correct" for outcome in sampled),
        abstained=sum(outcome.status == "abstain" for outcome in sampled),
        greedy_correct=None if greedy is None else greedy.status == "correct",
        votes=votes,
    )
