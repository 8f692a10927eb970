"""Measuring one model on one split: which items, their completions (resumed where they were cut off), the verdicts.

Statistics are in `support`, sampling in `rollout`; this file joins them through the ledger.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from medbridge.config import RunSettings
from medbridge.data import Item, grade, permutation
from medbridge.data.answers import Outcome, normalise
from medbridge.ledger import Ledger, Stage, VerdictRow
from medbridge.progress import Reporter
from medbridge.rollout import GREEDY, Engine, Graded, Request
from medbridge.support import Tally, Verdict, decide, measure


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a measuring stage found, per stratum."""

    stage: Stage
    verdicts: Mapping[str, VerdictRow]


def run_measurement(
    ledger: Ledger,
    stage: Stage,
    engine: Engine,
    strata: Mapping[str, Sequence[Item]],
    settings: RunSettings,
    reporter: Reporter,
    *,
    widen: bool,
) -> list[VerdictRow]:
    """Sample, grade and judge each stratum; writes rollouts and tallies batch by batch and resumes from them.

    Args:
        strata: items of each stratum in the order in which they are drawn on.
        widen: begin with `diagnosis.items_per_stratum` items, and double while a stratum is undecided and has
            more; without it all given items are measured.
    """
    most = settings.diagnosis.max_items_per_stratum
    pools = {name: list(items)[: most if widen else None] for name, items in strata.items()}
    counts = {
        name: min(len(pool), settings.diagnosis.items_per_stratum if widen else len(pool))
        for name, pool in pools.items()
    }
    # Looking again after widening is another chance to err: the looks that may come share alpha.
    looks = max((_looks(counts[name], len(pool)) for name, pool in pools.items()), default=1)
    gate = settings.gate.model_copy(update={"alpha": settings.gate.alpha / looks})
    while True:
        chosen = [item for name, pool in pools.items() for item in pool[: counts[name]]]
        _sample(ledger, stage, engine, chosen, settings, reporter)
        tallies = {
            tally.item_id: tally for tally in tally_items(ledger, stage.stage_id, chosen, settings.diagnosis.cluster)
        }
        ledger.save_tallies(stage.stage_id, tallies.values())
        rows, judged = [], {}
        for name, pool in pools.items():
            own = [tallies[item.id] for item in pool[: counts[name]]]
            estimate = measure(own, gate, seed=settings.seed)
            verdict = decide(estimate, gate)
            judged[name] = verdict
            rows.append(VerdictRow(name, verdict.kind, verdict.reason, verdict.to_dict(), estimate.to_dict()))
        wider = {name: _wider(judged[name], counts[name], len(pool)) for name, pool in pools.items()}
        if not widen or wider == counts:
            return rows
        counts = wider


def _widened(count: int, available: int) -> int:
    """Twice the items, or all where fewer than half as many again would be left for another look."""
    return available if 3 * count >= available else 2 * count


def _wider(verdict: Verdict, count: int, available: int) -> int:
    return _widened(count, available) if verdict.kind == "undecided" else count


def _looks(count: int, available: int) -> int:
    """How many looks at a stratum widening can come to."""
    looks = 1
    while count < available:
        count, looks = _widened(count, available), looks + 1
    return looks


def _sample(
    ledger: Ledger, stage: Stage, engine: Engine, items: Sequence[Item], settings: RunSettings, reporter: Reporter
) -> None:
    """Complete the stage's rollouts for `items`; each batch of the engine is one transaction."""
    done = ledger.sampled(stage.stage_id)
    missing = [item for item in items if item.id not in done]
    if not missing:
        return
    samples = settings.diagnosis.samples
    requests = [measurement_request(item, samples, settings.seed) for item in missing]
    by_id = {item.id: item for item in missing}
    tokens, began = 0, time.perf_counter()
    with reporter.task(f"{stage.kind}: sampling", len(missing), "items") as meter:
        for batch in engine.generate(requests, settings.rollout, seed=settings.seed):
            graded = [
                Graded(rollout, grade(by_id[rollout.item_id], rollout.permutation, rollout.text, settings.data.prompt))
                for rollout in batch
            ]
            ledger.save_rollouts(stage.stage_id, 0, graded)
            tokens += sum(len(rollout.token_ids) for rollout in batch)
            rate = tokens / (time.perf_counter() - began)
            meter.advance(len({rollout.item_id for rollout in batch}), f"{rate:,.0f} tokens/s")


def measurement_request(item: Item, samples: int, seed: int) -> Request:
    """One greedy completion and `samples` sampled ones, each under its own option order."""
    numbers = (GREEDY, *range(samples))
    return Request(item, numbers, tuple(permutation(item, seed, number) for number in numbers))


def cluster_of(item: Item, tags: Sequence[str]) -> str:
    """What makes items dependent: the values of `tags`, or without any the images that an item shows."""
    if tags:
        return " | ".join(f"{tag}={item.tags.get(tag, item.id)}" for tag in tags)
    return " | ".join(item.images) or item.id


def tally_items(ledger: Ledger, stage_id: int, items: Iterable[Item], cluster: Sequence[str]) -> list[Tally]:
    """Count the stored outcomes of a measuring stage per item, in the order of `items`."""
    greedy: dict[str, bool] = {}
    sampled: dict[str, list[Outcome]] = defaultdict(list)
    for item_id, sample, outcome in ledger.outcomes(stage_id):
        if sample == GREEDY:
            greedy[item_id] = outcome.status == "correct"
        else:
            sampled[item_id].append(outcome)
    tallies = []
    for item in items:
        outcomes = sampled[item.id]
        votes = Counter(
            str(outcome.option) if outcome.option is not None else normalise(outcome.answer or "")
            for outcome in outcomes
            if outcome.status != "abstain"
        )
        tallies.append(
            Tally(
                item_id=item.id,
                cluster=cluster_of(item, cluster),
                floor=item.floor,
                n=len(outcomes),
                c=sum(outcome.status == "correct" for outcome in outcomes),
                abstained=sum(outcome.status == "abstain" for outcome in outcomes),
                greedy_correct=greedy.get(item.id),
                votes=votes,
            )
        )
    return tallies


def summarise_sampling(ledger: Ledger, stage: Stage) -> dict[str, float]:
    """Totals of a stage's rollouts, for its summary."""
    return {"seconds": time.time() - stage.started, **ledger.sampling_totals(stage.stage_id)}


def by_stratum(items: Iterable[Item], keys: Sequence[str], seed: int) -> dict[str, list[Item]]:
    """Items of each stratum in a seeded order, so that a prefix is a random sample; strata sorted by name."""
    strata: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        strata[item.stratum(keys)].append(item)

    def rank(item: Item) -> bytes:
        return hashlib.blake2b(f"{seed}|{item.id}".encode(), digest_size=8).digest()

    return {name: sorted(strata[name], key=rank) for name in sorted(strata)}


def frequent_answer_baseline(
    train: Sequence[Item], test: Mapping[str, Sequence[Item]], settings: RunSettings
) -> dict[str, dict[str, float]]:
    """Accuracy, per stratum, of always giving the training split's most frequent answer for the kind of question.

    A kind that training never shows gets the most frequent answer of all. Intervals are those of Acc@1.
    """
    keys = settings.diagnosis.kind_of_question or settings.data.strata

    def kind(item: Item) -> tuple[str, ...]:
        return tuple(item.tags.get(key, "") for key in keys)

    answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for item in train:
        answers[kind(item)][normalise(item.answer)] += 1
        answers[()][normalise(item.answer)] += 1
    found = {}
    for name, items in test.items():
        tallies = []
        for item in items:
            counted = answers.get(kind(item)) or answers[()]
            # ties go to the answer that sorts first, so that the figure repeats
            guess = min(counted, key=lambda answer: (-counted[answer], answer)) if counted else ""
            hit = normalise(item.answer) == guess
            tallies.append(
                Tally(
                    item.id, cluster_of(item, settings.diagnosis.cluster), item.floor, 1, int(hit),
                    greedy_correct=hit,
                )
            )  # fmt: skip
        accuracy = measure(tallies, settings.gate, seed=settings.seed).acc_at_1
        if accuracy is not None:
            found[name] = {
                "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high, "items": len(items),
            }  # fmt: skip
    return found
