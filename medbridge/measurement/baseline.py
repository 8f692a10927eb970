"""The accuracy that needs no image: always giving the training split's most frequent answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from medbridge.config import RunSettings
from medbridge.data import Item
from medbridge.data.text import normalise
from medbridge.measurement.order import cluster_of
from medbridge.support import Tally, measure


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
