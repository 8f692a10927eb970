"""Whether an encoder's features give the answers: a linear probe for each question that many images were asked.

A question such as "Is there a tumour in the liver?" is put to many images, so that its answer can be read off features
by logistic regression; questions asked of few images are left out and counted. The most frequent answer to the same
question is what a probe must beat: it needs no image at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medbridge.data import Item
from medbridge.probe.probing import Features, fit_linear, unit_features
from medbridge.report.view import Estimate
from medbridge.study.result import Sight
from medbridge.support.intervals import bootstrap_ratio

METHOD = 1
"""Part of what a result is kept under: to be raised when `look` finds something else in the same data."""

_Key = tuple[str, str, tuple[str, ...] | None]
"""A question: its data set, its words, and its options."""

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation strengths that are tried."""

_HELD_OUT = 5
"""One training image in so many chooses the regularisation where the data has no validation split."""


@dataclass(frozen=True, slots=True)
class _Answered:
    """One measured item: whether the probe and the commonest answer are right."""

    item: Item
    right: bool
    common: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """What an encoder's features are asked for: all that `look` depends on but the features.

    Attributes:
        train: items that the probes are fitted on; `validation` chooses one regularisation for all questions (without
            it, a part of the training images).
        measured: items by stratum.
        cluster: what measured items are resampled by.
        min_images: training images that a question needs.
        alpha: error probability of each end of an interval.
        replicates, seed: of the bootstrap.
    """

    train: Sequence[Item]
    validation: Sequence[Item]
    measured: Mapping[str, Sequence[Item]]
    cluster: Callable[[Item], str]
    min_images: int
    alpha: float
    replicates: int
    seed: int

    def key(self, encoder_key: str) -> str:
        """Hexadecimal digest of all that `look` depends on: where it is the same, so is what `look` finds.

        `encoder_key`, with the image files' sizes and times, stands for the features.
        """
        settings = [METHOD, encoder_key, self.min_images, self.alpha, self.replicates, self.seed]
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        strata = ((f"of {name}", items) for name, items in self.measured.items())
        for name, items in (("train", self.train), ("validation", self.validation), *strata):
            for item in items:
                files = [_state(image) for image in item.images]
                digest.update(json.dumps([name, item.to_json(), self.cluster(item), files]).encode())
        return digest.hexdigest()


def look(features: Features, wanted: Asked) -> dict[str, Sight | None]:
    """The sight of each measured stratum; None where no question has enough training images.

    `features` are of image files; an item's are the mean over its images.
    """
    train, validation, measured = wanted.train, wanted.validation, wanted.measured
    groups = _by_question(train)
    kept = {
        question: items
        for question, items in groups.items()
        if len({item.images for item in items}) >= wanted.min_images
    }
    asked = [item for items in measured.values() for item in items if _question(item) in kept]
    if not asked:
        return {name: None for name in measured}
    chosen_by = [item for item in validation if _question(item) in kept]
    held: dict[_Key, list[Item]] = {}
    if not chosen_by:
        held = {question: items[::_HELD_OUT] for question, items in kept.items()}
        chosen_by = [item for items in held.values() for item in items]
    fitted_on: dict[_Key, list[Item]] = {}
    for question, own in kept.items():
        apart = {item.images for item in held.get(question, ())}
        fitted_on[question] = [item for item in own if item.images not in apart]
    known = {item.images for items in fitted_on.values() for item in items}
    units = {item.images for items in (*kept.values(), chosen_by, asked) for item in items}
    table = unit_features(features, units, known)
    strength = _choose(table, fitted_on, chosen_by)
    answers = {id(entry.item): entry for entry in _answer(table, kept, asked, strength)}
    found = {}
    for name, items in measured.items():
        entries = [answers[id(item)] for item in items if id(item) in answers]
        found[name] = _sight(entries, len(items), wanted) if entries else None
    return found


def _state(file: str) -> tuple[int, int] | None:
    """Size and time of a file, without reading it; None where it is missing, which `look` will say."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _question(item: Item) -> _Key:
    words = re.sub(r"\W+", " ", item.question).strip().casefold()
    return item.dataset, words, item.options


def _by_question(items: Sequence[Item]) -> dict[_Key, list[Item]]:
    groups = defaultdict(list)
    for item in items:
        if item.images:
            groups[_question(item)].append(item)
    return groups


def _choose(
    table: Mapping[tuple[str, ...], NDArray[np.float64]],
    fitted_on: Mapping[_Key, Sequence[Item]],
    judged_by: Sequence[Item],
) -> float:
    """The strength with most right answers, the weakest of equals."""
    right = [sum(entry.right for entry in _answer(table, fitted_on, judged_by, c)) for c in _STRENGTHS]
    return _STRENGTHS[int(np.argmax(right))]


def _answer(
    table: Mapping[tuple[str, ...], NDArray[np.float64]],
    fitted_on: Mapping[_Key, Sequence[Item]],
    asked: Sequence[Item],
    strength: float,
) -> list[_Answered]:
    found = []
    for question, items in _by_question(asked).items():
        known = fitted_on.get(question, ())
        if not known:
            continue
        answers = [_normal(item.answer) for item in known]
        common = min(Counter(answers).items(), key=lambda entry: (-entry[1], entry[0]))[0]
        if len(set(answers)) == 1:
            predicted = [common] * len(items)
        else:
            probe = fit_linear(np.stack([table[item.images] for item in known]), answers, strength)
            predicted = list(probe.predict(np.stack([table[item.images] for item in items])))
        found += [
            _Answered(item, guess == _normal(item.answer), common == _normal(item.answer))
            for item, guess in zip(items, predicted, strict=True)
        ]
    return found


def _normal(answer: str) -> str:
    return " ".join(answer.casefold().split())


def _sight(entries: Sequence[_Answered], asked: int, wanted: Asked) -> Sight:
    right = np.array([entry.right for entry in entries], dtype=np.float64)
    common = np.array([entry.common for entry in entries], dtype=np.float64)
    gain = None
    if common.mean() < 1:
        top, bottom = (right - common)[:, None], (1 - common)[:, None]
        missed = float(bottom.mean())
        ends = bootstrap_ratio(
            top, bottom, bounds=(missed - 1.0, missed), clusters=[wanted.cluster(entry.item) for entry in entries],
            alpha=wanted.alpha, replicates=wanted.replicates, seed=wanted.seed,
        )  # fmt: skip
        gain = Estimate(float(ends.value[0]), float(ends.low[0]), float(ends.high[0]))
    return Sight(
        items=len(entries), asked=asked, questions=len({_question(entry.item) for entry in entries}),
        accuracy=float(right.mean()), commonest=float(common.mean()), gain=gain,
    )  # fmt: skip
