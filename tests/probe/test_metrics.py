"""Scores against scikit-learn's, and how often their intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medbridge.probe.metrics import Scored, area, score


def drawn(seed: int, units: int, classes: int, skill: float) -> Scored:
    generator = np.random.default_rng(seed)
    truth = np.arange(units) % classes
    generator.shuffle(truth)
    logits = generator.normal(size=(units, classes)).round(1)  # with ties
    logits[np.arange(units), truth] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = tuple("abcdefg"[:classes])
    return Scored(np.array(names)[truth], np.array(names)[logits.argmax(1)], names, probabilities.round(9))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    found = drawn(1, 90, classes, 0.7)
    scores = score(found, alpha=0.05, replicates=200, seed=0)
    assert scores.accuracy.value == pytest.approx((found.truth == found.predicted).mean())
    assert scores.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(found.truth, found.predicted))
    expected = (
        roc_auc_score(found.truth == found.classes[1], found.probabilities[:, 1])
        if classes == 2
        else roc_auc_score(
            found.truth, found.probabilities / found.probabilities.sum(1, keepdims=True), multi_class="ovr"
        )
    )
    assert scores.auc is not None and scores.auc.value == pytest.approx(expected)
    for interval in (scores.accuracy, scores.balanced_accuracy, scores.auc):
        assert 0 <= interval.low < interval.value < interval.high <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.floats(0.1, 3)), min_size=2, max_size=30))
def test_the_area_under_weights(rows: list[tuple[int, bool, float]]) -> None:
    scores, positive, weights = (np.array(column) for column in zip(*rows, strict=True))
    if positive.all() or not positive.any():
        return
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    assert area(scores.astype(float), positive, weights[None])[0] == pytest.approx(expected)


def test_units_that_are_all_right_have_an_interval() -> None:
    found = drawn(2, 12, 2, 50.0)
    scores = score(found, alpha=0.05, replicates=500, seed=0)
    for interval in (scores.accuracy, scores.balanced_accuracy, scores.auc):
        assert interval is not None and interval.value == interval.high == 1 and interval.low < 0.9


def test_intervals_hold_as_often_as_they_say() -> None:
    """The accuracy of a coin with p = 0.8 on 40 units, 300 times: each end is missed at most about 1 time in 20."""
    below = above = 0
    for seed in range(300):
        hits = np.random.default_rng(seed).random(40) < 0.8
        truth = np.array(["a", "b"])[np.arange(40) % 2]
        wrong = np.array(["b", "a"])[np.arange(40) % 2]
        found = Scored(truth, np.where(hits, truth, wrong), ("a", "b"), np.full((40, 2), 0.5))
        interval = score(found, alpha=0.05, replicates=300, seed=seed).accuracy
        below += interval.high < 0.8
        above += interval.low > 0.8
    assert below <= 25 and above <= 25


def test_intervals_of_clusters() -> None:
    """Ten patients with eight equal images each: as wide as ten images, and not as eighty."""
    hits = np.arange(10) % 5 > 0
    truth = np.array(["a", "b"])[np.arange(10) % 2]
    wrong = np.array(["b", "a"])[np.arange(10) % 2]

    def width(times: int, clusters: np.ndarray | None) -> float:
        repeated = [np.repeat(values, times) for values in (truth, np.where(hits, truth, wrong))]
        found = Scored(*repeated, ("a", "b"), np.full((10 * times, 2), 0.5), clusters)
        interval = score(found, alpha=0.05, replicates=4000, seed=0).accuracy
        assert interval.value == pytest.approx(0.8)
        return interval.high - interval.low

    alone = width(1, None)
    assert width(8, np.repeat(np.arange(10), 8)) == pytest.approx(alone, rel=0.02)
    assert width(8, None) < 0.6 * alone


def test_a_label_that_the_classifier_does_not_know() -> None:
    found = Scored(np.array(["a", "c"]), np.array(["a", "b"]), ("a", "b"), np.array([[0.9, 0.1], [0.4, 0.6]]))
    scores = score(found, alpha=0.05, replicates=100, seed=0)
    assert scores.accuracy.value == scores.balanced_accuracy.value == 0.5
    assert scores.auc is not None  # of "a" alone


def test_one_label() -> None:
    found = Scored(np.array(["a", "a"]), np.array(["a", "b"]), ("a", "b"), np.full((2, 2), 0.5))
    assert score(found, alpha=0.05, replicates=100, seed=0).auc is None
