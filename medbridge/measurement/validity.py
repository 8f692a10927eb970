"""Whether a stratum's completions can be trusted: the facts that `support.guard` checks, counted from the ledger."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from medbridge.config import RunSettings
from medbridge.data import Item
from medbridge.ledger import Ledger, Stage
from medbridge.measurement.sampling import measurement_request
from medbridge.rollout import GREEDY, Graded
from medbridge.support.guard import Facts, Invalid, check, item_repeats, one_order_chance, total_repeats

NO_VERDICT = "No verdict: the measurement can't be trusted."
"""How the reason begins where a stratum gets no verdict."""


def no_verdict(problems: Sequence[Invalid]) -> str:
    """The reason of a stratum that gets no verdict, in words."""
    return " ".join([NO_VERDICT, *(problem.reason for problem in problems)])


def invalid_strata(
    ledger: Ledger, stage: Stage, chosen: Mapping[str, Sequence[Item]], settings: RunSettings
) -> dict[str, str]:
    """The strata whose measurement gives no verdict, each with the reasons in words."""
    found = {}
    for name, items in chosen.items():
        problems = check(gather(ledger, stage, items, settings), settings.guard) if items else []
        if problems:
            found[name] = no_verdict(problems)
    return found


def gather(ledger: Ledger, stage: Stage, items: Sequence[Item], settings: RunSettings) -> Facts:
    """Count the facts of one stratum from its stored completions."""
    stored: dict[str, list[Graded]] = defaultdict(list)
    answered = set()  # greedily; an item that has this and nothing else was asked for nothing else
    for entry in ledger.rollouts(stage.stage_id, item_ids=[item.id for item in items]):
        if entry.rollout.sample == GREEDY:
            answered.add(entry.rollout.item_id)
        else:
            stored[entry.rollout.item_id].append(entry)
    items = [item for item in items if item.id in stored or item.id not in answered]
    every = [entry for item in items for entry in stored[item.id]]
    samples = settings.diagnosis.samples
    fed = [entry.rollout.images for entry in every]
    orders = {item.id: [entry.rollout.permutation for entry in stored[item.id]] for item in items}
    chances = [one_order_chance(len(item.options or ()), len(orders[item.id])) for item in items]
    return Facts(
        items=len(items),
        samples=samples,
        miscounted=sum(len(stored[item.id]) != samples for item in items),
        images_asked=sum(len(item.images) * len(stored[item.id]) for item in items),
        images_fed=None if None in fed else sum(count or 0 for count in fed),
        longest=max((len(entry.rollout.token_ids) for entry in every), default=0),
        max_new_tokens=settings.rollout.max_new_tokens,
        truncated=_share(entry.rollout.finish_reason == "length" for entry in every),
        abstained=_share(entry.outcome.status == "abstain" for entry in every),
        correct=_share(entry.outcome.status == "correct" for entry in every),
        misordered=sum(_misordered(item, stored[item.id], samples, settings.seed) for item in items),
        one_order=sum(
            len(set(orders[item.id])) == 1 for item, chance in zip(items, chances, strict=True) if chance > 0
        ),
        one_order_expected=math.fsum(chances),
        repeats=total_repeats(
            item_repeats(
                [entry.rollout.token_ids for entry in stored[item.id]],
                [entry.rollout.logprobs for entry in stored[item.id]],
                orders[item.id],
            )
            for item in items
        ),
    )


def _misordered(item: Item, stored: Sequence[Graded], samples: int, seed: int) -> int:
    request = measurement_request(item, samples, seed)
    asked = dict(zip(request.samples, request.permutations, strict=True))
    return sum(asked.get(entry.rollout.sample) != entry.rollout.permutation for entry in stored)


def _share(events: Any) -> float:
    counted = [bool(event) for event in events]
    return sum(counted) / len(counted) if counted else 0.0
