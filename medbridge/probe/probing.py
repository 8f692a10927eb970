"""Linear and nearest-neighbour probes: how well a label can be read off features, wherever these come from.

A unit is one image (or the images that a question shows together), whatever number of questions is asked about it.
Probes are fitted on the training split, the regularisation and the number of neighbours are chosen on the validation
split, and everything reported is of the test split. Intervals come from the Bayesian bootstrap over clusters of units.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from medbridge.data import Item
from medbridge.data.linked import linked
from medbridge.errors import MedbridgeError
from medbridge.measurement import cluster_of
from medbridge.probe.metrics import Scored, Scores, score

Features = Callable[[Sequence[str]], NDArray[np.float32]]
"""Image files to features [files, width]."""

ANSWER = "answer"
"""The target that stands for the answer, where each image has one."""

_HELD_OUT = 5
"""One training unit in so many chooses where the data has no validation split."""


class ProbeSettings(BaseModel):
    """How probes are fitted and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strengths: tuple[float, ...] = Field(
        (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        min_length=1,
        description="Inverse regularisation strengths tried; the strongest regularisation of equals is taken.",
    )
    neighbours: tuple[int, ...] = Field(
        (1, 5, 10, 20), min_length=1, description="Numbers of neighbours tried; the largest of equals is taken."
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Error probability of each end of an interval.")
    replicates: int = Field(1000, ge=100, description="Bootstrap replicates.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
    cluster: tuple[str, ...] = Field(
        (), description="Tags whose units are not independent (a patient); none: units that share an image."
    )


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What probes found for one target.

    Attributes:
        train, validation, test: units of each split. Without a validation split, a part of the training units.
        classes: labels of the training units.
        unseen: test units whose label no training unit has; every probe is wrong on them.
        left_out: units without a label, or with different ones.
        commonest: accuracy of always giving the training split's most frequent label, and which one that is.
        linear, knn: scores of the two probes, with the chosen strength and number of neighbours.
        confidence: of every interval, two-sided.
    """

    target: str
    encoder: str
    train: int
    validation: int
    test: int
    classes: tuple[str, ...]
    unseen: int
    left_out: int
    commonest: tuple[str, float]
    linear: Scores
    strength: float
    knn: Scores
    neighbours: int
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Split:
    """Features [units, width] and labels of one split."""

    x: NDArray[np.float64]
    y: NDArray[np.str_]


def probe(
    features: Features, items: Sequence[Item], target: str, settings: ProbeSettings, *, encoder: str = ""
) -> ProbeResult:
    """Fit and judge probes for one target.

    Args:
        features: of image files; a unit of several images has their mean.
        items: of all splits.
        target: a tag, or `answer`.
        settings: how.
        encoder: its name, for the result.

    Raises:
        MedbridgeError: no item has the tag, a split is empty, the training units all have one label, or no item has a
            tag of `settings.cluster`.
    """
    for tag in settings.cluster:
        if not any(tag in item.tags for item in items):
            raise MedbridgeError(f"probe of {target!r}: no item has the tag {tag!r} to cluster by.")
    units, left_out = _units(items, target)
    train, validation, test = (units.get(split, {}) for split in ("train", "validation", "test"))
    if not validation:
        order = sorted(train, key=_drawn)
        held = set(order[: len(order) // _HELD_OUT])
        validation, train = {u: train[u] for u in order if u in held}, {u: train[u] for u in order if u not in held}
    for name, split in (("train", train), ("test", test)):
        if not split:
            raise MedbridgeError(f"probe of {target!r}: the {name} split has no image with a label. Add a source.")
    classes = sorted(set(train.values()))
    if len(classes) == 1:
        raise MedbridgeError(f"probe of {target!r}: all training images have the label {classes[0]!r}.")
    fit, choose, judge = _table(features, train, validation, test)
    common = min(Counter(fit.y.tolist()).items(), key=lambda entry: (-entry[1], entry[0]))[0]
    clusters = _clusters(items, list(test), settings.cluster)
    strength, linear = _best(lambda c: fit_linear(fit.x, fit.y, c), sorted(settings.strengths), choose)
    most = [k for k in sorted(settings.neighbours, reverse=True) if k <= len(fit.y)] or [1]
    neighbours, knn = _best(lambda k: _nearest(fit, int(k)), most, choose)

    def scores(classifier: Any) -> Scores:
        predicted, probabilities = classifier.predict(judge.x), classifier.predict_proba(judge.x)
        found = Scored(judge.y, predicted, tuple(classifier.classes_), probabilities, clusters)
        return score(found, alpha=settings.alpha, replicates=settings.replicates, seed=settings.seed)

    return ProbeResult(
        target=target, encoder=encoder, train=len(train), validation=len(validation), test=len(test),
        classes=tuple(classes), unseen=int((~np.isin(judge.y, classes)).sum()), left_out=left_out,
        commonest=(common, float((judge.y == common).mean())), linear=scores(linear), strength=float(strength),
        knn=scores(knn), neighbours=int(neighbours), confidence=1 - 2 * settings.alpha,
    )  # fmt: skip


def _drawn(images: tuple[str, ...]) -> bytes:
    """Sorts units at random, and as before where the data lies elsewhere: by the ends of their paths."""
    names = ["/".join(Path(image).parts[-2:]) for image in images]
    return hashlib.blake2b("\0".join(names).encode()).digest()


def _units(items: Sequence[Item], target: str) -> tuple[dict[str, dict[tuple[str, ...], str]], int]:
    """The label of each unit by split, and how many units have none, or several."""
    labels: dict[str, dict[tuple[str, ...], set[str]]] = {}
    known = set()
    for item in items:
        if not item.images:
            continue
        label = item.answer if target == ANSWER else item.tags.get(target, "")
        found = labels.setdefault(item.split, {}).setdefault(item.images, set())
        known |= set(item.tags)
        if label.strip():
            found.add(label.strip())
    kept = {split: {u: next(iter(y)) for u, y in units.items() if len(y) == 1} for split, units in labels.items()}
    total, whole = sum(map(len, labels.values())), sum(map(len, kept.values()))
    if whole == 0 or (target == ANSWER and whole < total / 2):
        what = "images with one answer each" if target == ANSWER else f"images with one value of the tag {target!r}"
        raise MedbridgeError(
            f"the data has {whole} {what}, of {total} images. Name a tag as the target: "
            f"{', '.join(sorted(known)) or 'there is none'}."
        )
    return kept, total - whole


def _clusters(items: Sequence[Item], units: Sequence[tuple[str, ...]], tags: Sequence[str]) -> NDArray[np.int64]:
    """The number of each unit's cluster: by its tags, or without any by the images that units share."""
    if tags:
        named = {item.images: cluster_of(item, tags) for item in items}
        units = [(named[unit],) for unit in units]
    return np.array(linked(units), dtype=np.int64)


def unit_features(
    features: Features, units: Iterable[tuple[str, ...]], fitted_on: Collection[tuple[str, ...]]
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """Features [width] of each unit, the mean over its images, standardised by those of the units `fitted_on`."""
    ordered = sorted(set(units))
    files = sorted({file for unit in ordered for file in unit})
    rows = dict(zip(files, features(files).astype(np.float64), strict=True))
    table = {unit: np.mean([rows[file] for file in unit], axis=0) for unit in ordered}
    known = np.stack([table[unit] for unit in sorted(set(fitted_on))])
    mean, spread = known.mean(0), known.std(0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    return {unit: (row - mean) / scale for unit, row in table.items()}


def fit_linear(x: NDArray[np.float64], y: ArrayLike, strength: float) -> Any:
    """Logistic regression of labels [units] on standardised features [units, width], regularised by 1 / `strength`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=500).fit(x, y)


def _table(features: Features, *splits: dict[tuple[str, ...], str]) -> list[_Split]:
    """The splits with their features, standardised by the first."""
    rows = unit_features(features, (unit for split in splits for unit in split), splits[0])
    width = len(next(iter(rows.values())))
    found = []
    for split in splits:
        x = np.array([rows[unit] for unit in split]).reshape(-1, width)
        found.append(_Split(x, np.array(list(split.values()), dtype=np.str_)))
    if found[0].x.shape[1] <= len(found[0].y):
        return found
    # Both probes see inner products with training units only: a basis of these has the same, in fewer numbers.
    basis = np.linalg.svd(found[0].x, full_matrices=False)[2].T
    return [_Split(each.x @ basis if len(each.y) else each.x, each.y) for each in found]


def _best(make: Callable[[float], Any], choices: Sequence[float], judged_by: _Split) -> tuple[float, Any]:
    """The first of the choices with the highest balanced accuracy, and its classifier."""
    best: tuple[float, float, Any] | None = None
    for choice in choices:
        classifier = make(choice)
        right = _balanced(judged_by.y, classifier.predict(judged_by.x)) if len(judged_by.y) else 0.0
        if best is None or right > best[0] + 1e-12:
            best = right, choice, classifier
    assert best is not None
    return best[1], best[2]


def _balanced(truth: NDArray[np.str_], predicted: NDArray[np.str_]) -> float:
    return float(np.mean([(predicted[truth == label] == label).mean() for label in np.unique(truth)]))


def _nearest(fit: _Split, neighbours: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute").fit(fit.x, fit.y)
