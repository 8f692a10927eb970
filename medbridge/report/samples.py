"""Which items and completions a report shows, and how much of each text: by fixed rules, never by eye."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medbridge.ledger import Ledger
from medbridge.report.view import Completion, Piece, Sample, StageView, StratumView
from medbridge.rollout.engine import GREEDY, Graded
from medbridge.support.tallies import Tally

_SAMPLES_IN_ALL = 48
"""Sample items over all strata: they fill most of the file."""

_SAMPLES_PER_STRATUM = 4

_COMPLETIONS_PER_ITEM = 4

_SMALLEST_GAP = 40
"""Characters that are worth leaving out: the note that says so is not shorter."""


def choose_samples(
    ledger: Ledger,
    stages: Sequence[StageView],
    tallies: Mapping[int, Sequence[Tally]],
    items: Mapping[str, Mapping[str, Any]],
    strata: Sequence[StratumView],
) -> str | None:
    """Give each stratum a few items of the latest finished measurement; returns that stage's title."""
    measuring = [stage for stage in stages if tallies.get(stage.stage_id)]
    if not measuring:
        return None
    stage = measuring[-1]
    by_stratum: dict[str, list[Tally]] = defaultdict(list)
    for tally in tallies[stage.stage_id]:
        if tally.item_id in items:
            by_stratum[items[tally.item_id]["stratum"]].append(tally)
    each = max(1, min(_SAMPLES_PER_STRATUM, _SAMPLES_IN_ALL // max(1, len(by_stratum))))
    for stratum in strata:
        chosen = _varied(by_stratum.get(stratum.name, []), each)
        if not chosen:
            continue
        stored: dict[str, list[Graded]] = defaultdict(list)
        for entry in ledger.rollouts(stage.stage_id, item_ids=[tally.item_id for tally in chosen]):
            stored[entry.rollout.item_id].append(entry)
        stratum.samples = [_sample(tally, items[tally.item_id], stored[tally.item_id]) for tally in chosen]
    return stage.title


def _varied(tallies: Iterable[Tally], count: int) -> list[Tally]:
    """Up to `count` items: in turn one answered right, one wrong, one without a readable answer.

    Among these, a hash of the id decides: it spreads the choice over the data, and repeats.
    """

    def rank(tally: Tally) -> bytes:
        return hashlib.blake2b(tally.item_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    def fate(tally: Tally) -> int:
        if tally.abstained * 2 > tally.n or (tally.abstained and tally.c + tally.abstained == tally.n):
            return 2
        right = tally.greedy_correct if tally.greedy_correct is not None else 2 * tally.c > tally.n
        return 0 if right else 1

    queues: list[list[Tally]] = [[], [], []]
    for tally in sorted(tallies, key=rank):
        queues[fate(tally)].append(tally)
    chosen: list[Tally] = []
    while len(chosen) < count and any(queues):
        chosen.extend(queue.pop(0) for queue in queues if queue)
    return chosen[:count]


def _sample(tally: Tally, record: Mapping[str, Any], stored: Sequence[Graded]) -> Sample:
    options = record["options"]
    ordered = sorted(stored, key=lambda entry: entry.rollout.sample)
    chosen = [entry for entry in ordered if entry.rollout.sample == GREEDY][:1]
    sampled = [entry for entry in ordered if entry.rollout.sample != GREEDY]
    for status in ("correct", "wrong", "abstain"):
        chosen.extend([entry for entry in sampled if entry.outcome.status == status][:1])
    return Sample(
        item_id=record["item_id"],
        question=record["question"],
        answer=record["answer"],
        options=options,
        images=list(record["images"] or ()),
        n=tally.n,
        correct=tally.c,
        abstained=tally.abstained,
        completions=[_completion(entry, options) for entry in chosen[:_COMPLETIONS_PER_ITEM]],
    )


def _completion(entry: Graded, options: Sequence[str] | None) -> Completion:
    rollout, outcome = entry.rollout, entry.outcome
    known = options or ()
    chosen = None
    if outcome.option is not None and 0 <= outcome.option < len(known):
        chosen = known[outcome.option]
    return Completion(
        label="greedy" if rollout.sample == GREEDY else f"sample {rollout.sample + 1}",
        status=outcome.status,
        read=outcome.answer,
        chosen=chosen,
        text=rollout.text,
        span=outcome.span,
        well_formed=outcome.well_formed,
        truncated=rollout.finish_reason == "length",
        shown_order=[known[index] for index in rollout.permutation if 0 <= index < len(known)],
        tokens=len(rollout.token_ids),
    )


def excerpt(text: str, span: tuple[int, int] | None, limit: int) -> list[Piece]:
    """A text of at most about `limit` characters: its beginning, the span that was read, and its end.

    A span that doesn't lie in the text is ignored. What is left out is said in a piece of its own.
    """
    inside = span is not None and 0 <= span[0] < span[1] <= len(text)
    start, stop = span if span is not None and inside else (len(text), len(text))
    if len(text) <= limit:
        keep = [(0, len(text))]
    else:
        third = limit // 3
        # Of a span longer than what may be shown, its beginning is kept.
        around = (max(0, start - third // 2), min(len(text), stop + third // 2, start + limit))
        keep = [(0, third), around, (len(text) - third, len(text))]
    pieces: list[Piece] = []
    done = 0
    for begin, end in keep:
        if begin - done > _SMALLEST_GAP:
            pieces.append(Piece("gap", f"{begin - done:,} characters left out"))
        else:
            begin = done
        for kind, a, b in (
            ("text", begin, min(end, start)),
            ("mark", max(begin, start), min(end, stop)),
            ("text", max(begin, stop), end),
        ):
            if b > a:
                pieces.append(Piece(kind, text[a:b]))
        done = max(done, end)
    return pieces
