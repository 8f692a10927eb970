"""Evidence on one stratum while its items come in, valid at every look: when may sampling stop?

It neither samples nor stores. The tests are e-values (see sequential): one of 1 / alpha arises by chance with
probability at most alpha, however often one looks (Ville 1939).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medbridge.support.estimate import item_scores, score_bounds
from medbridge.support.floors import support_above_floor
from medbridge.support.sequential import MeanTest
from medbridge.support.settings import ErrorControl, GateSettings
from medbridge.support.strata import reject_e
from medbridge.support.tallies import Tally

Floats = NDArray[np.float64]

Claim = Literal["below", "above", "at_target", "short_of_target"]
Settled = Literal["bridge", "done", "sharpen"]

SEQUENTIAL_SHARE = 0.5
"""Share of alpha that sequential evidence may use up; the rest is for the one look at exhausted strata."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the items so far say of a stratum, as e-values.

    Attributes:
        below: against support at or above the threshold.
        above: against support at or below it.
        at_target: against Acc@1 at or below its target.
        short_of_target: against Acc@1 at or above it.
        exhausted: whether all clusters have been seen.
    """

    below: float
    above: float
    at_target: float
    short_of_target: float
    exhausted: bool

    def claim(self, name: Claim) -> float:
        """The e-value of a claim. What is said of Acc@1 also claims that support is above the threshold, and an
        error in either part is an error: the smaller one counts.
        """
        value: float = getattr(self, name)
        return min(value, self.above) if name in ("at_target", "short_of_target") else value

    def to_dict(self) -> dict[str, float | bool]:
        """As JSON values under the same names; infinity as the largest number that JSON can hold."""
        return {name: min(value, sys.float_info.max) for name, value in asdict(self).items()}


class StratumEvidence:
    """Tests of support against the threshold and of Acc@1 against its target, fed with whole clusters.

    Support is a ratio, ``sum(top) / sum(bottom)``; it is below tau exactly where the mean of
    ``z = top - tau bottom`` is below 0. A cluster counts by its sum of z over the largest cluster's size, which
    keeps it within the bounds of a single item. Clusters must come in random order.

    Args:
        settings: of the gate.
        k: the k at which support is read; every item needs as many samples.
        floors: guessing floor of each item of the pool, [items].
        clusters: its cluster, [items].
        finite: claim something of the items of this pool only, not of others like them. Evidence then grows
            beyond bounds as the pool is exhausted.

    Raises:
        ValueError: no items, lengths that differ, or guessing leaves too little room to see support.

    Attributes:
        items: seen so far.
    """

    def __init__(
        self,
        settings: GateSettings,
        k: int,
        floors: Sequence[float],
        clusters: Sequence[str],
        *,
        finite: bool = False,
    ) -> None:
        if not len(floors) or len(floors) != len(clusters):
            raise ValueError(f"floors has {len(floors)} values and clusters {len(clusters)}: one for each item needed")
        low, room = (bound[:, 0] for bound in score_bounds(np.asarray(floors, float), (k,), settings.statistic))
        guessed = 1 - float(room.mean())
        if np.isnan(support_above_floor(guessed, guessed, settings.min_informative)):
            raise ValueError(
                f"guessing leaves {room.mean():.3f} of the questions at k = {k}, and less than "
                f"{settings.min_informative:g} is no room to see support"
            )
        self._settings, self._k = settings, k
        self.items = 0
        self._waiting = Counter(clusters)
        self._largest = max(self._waiting.values())
        population = len(self._waiting) if finite else None
        threshold, target = settings.support_threshold, settings.accuracy_target
        self._support = MeanTest(
            float((low - threshold * room).min()), float((room - threshold * room).max()), 0.0, population
        )
        self._accuracy = MeanTest(-target, 1 - target, 0.0, population)
        self._held: dict[Claim, float] = {}

    def add(self, tallies: Iterable[Tally]) -> None:
        """Take in the items of whole clusters, clusters in the order in which they were drawn.

        Items without a greedy completion say nothing of Acc@1. Once support is on hold above the threshold
        (`needs_samples` is false), items need no samples: all that is open is Acc@1.

        Raises:
            ValueError: an item with fewer than k samples where they are needed, or a cluster that is not whole, was
                added before or isn't of this pool.
        """
        batch = list(tallies)
        sizes = Counter(tally.cluster for tally in batch)
        for cluster, size in sizes.items():
            if size != self._waiting[cluster]:
                raise ValueError(
                    f"cluster {cluster!r}: {size} items, {self._waiting[cluster]} are waited for; each cluster "
                    "must be added whole and once"
                )
        if not batch:
            return
        target = self._settings.accuracy_target
        short = [0.0 if tally.greedy_correct is None else tally.greedy_correct - target for tally in batch]
        if self.needs_samples or all(tally.n >= self._k for tally in batch):
            scores = item_scores(batch, self._settings, self._k)
            self._support.update(self._by_cluster(scores.top - self._settings.support_threshold * scores.bottom, batch))
        self._accuracy.update(self._by_cluster(np.array(short), batch))
        for cluster in sizes:
            del self._waiting[cluster]
        self.items += len(batch)

    @property
    def needs_samples(self) -> bool:
        """Whether support is still open, or too few items were sampled for a verdict; otherwise a greedy completion per
        item is all that can settle anything.
        """
        return "above" not in self._held or self.items < self._settings.min_items

    def _by_cluster(self, values: Floats, batch: Sequence[Tally]) -> Floats:
        number = {cluster: i for i, cluster in enumerate(dict.fromkeys(tally.cluster for tally in batch))}
        own = [number[tally.cluster] for tally in batch]
        return np.bincount(own, weights=values, minlength=len(number)) / self._largest

    @property
    def evidence(self) -> Evidence:
        """The e-values as they stand; those on hold as they stood then."""
        now: dict[Claim, float] = {
            "below": self._support.below,
            "above": self._support.above,
            "at_target": self._accuracy.above,
            "short_of_target": self._accuracy.below,
        }
        return Evidence(**(now | self._held), exhausted=not self._waiting)

    @property
    def below(self) -> float:
        """E-value against support at or above the threshold."""
        return self.evidence.below

    @property
    def above(self) -> float:
        """E-value against support at or below the threshold."""
        return self.evidence.above

    @property
    def at_target(self) -> float:
        """E-value against Acc@1 at or below its target."""
        return self.evidence.at_target

    @property
    def short_of_target(self) -> float:
        """E-value against Acc@1 at or above its target."""
        return self.evidence.short_of_target

    def hold(self, claims: Iterable[Claim]) -> None:
        """Stop the e-values of these claims where they stand, so that what is proven stays proven while the
        stratum is sampled on. An e-value may stop at any time.
        """
        now = self.evidence
        for claim in claims:
            parts: tuple[Claim, ...] = (claim, "above") if claim in ("at_target", "short_of_target") else (claim,)
            self._held |= {part: getattr(now, part) for part in parts}

    def settled(self, level: float) -> Settled | None:
        """The verdict that evidence of this level settles, such as 1 / alpha; None while sampling should go on.

        bridge and done need their own evidence. sharpen needs it too, for support above the threshold *and* for
        Acc@1 short of its target: as long as done is possible, sampling goes on, although a stratum with support
        that is never surely done ends up as sharpen.
        """
        now = self.evidence
        return self.verdict({claim for claim in CLAIMS if now.claim(claim) >= level})

    def verdict(self, claims: Iterable[Claim]) -> Settled | None:
        """The verdict that follows from proven claims; None where none does, and below `min_items` items."""
        known = set(claims)
        if self.items < self._settings.min_items or {"below", "above"} <= known:
            return None
        verdicts: dict[Claim, Settled] = {"below": "bridge", "at_target": "done", "short_of_target": "sharpen"}
        return next((verdict for claim, verdict in verdicts.items() if claim in known), None)


CLAIMS: tuple[Claim, ...] = ("below", "above", "at_target", "short_of_target")


def proven(evidence: Mapping[str, Evidence], alpha: float, control: ErrorControl) -> dict[str, frozenset[Claim]]:
    """The claims that the evidence proves for each stratum, each claim's error limited over all strata.

    With "fdr" by the e-BH procedure (Wang and Ramdas, arXiv 2009.02824), for which strata may depend on each
    other in any way.
    """
    masks = {
        claim: reject_e(np.array([own.claim(claim) for own in evidence.values()]), alpha, control) for claim in CLAIMS
    }
    return {name: frozenset(c for c in CLAIMS if masks[c][i]) for i, name in enumerate(evidence)}


def settle(strata: Mapping[str, StratumEvidence], settings: GateSettings) -> dict[str, Settled | None]:
    """One look at all strata: which are settled, with the error controlled over strata at any number of looks.

    What is proven is put on hold, so that a later look can't take it back. All strata belong in here at each
    look, settled or not.
    """
    found = proven(
        {name: stratum.evidence for name, stratum in strata.items()},
        SEQUENTIAL_SHARE * settings.alpha,
        settings.error_control,
    )
    for name, claims in found.items():
        strata[name].hold(claims)
    return {name: strata[name].verdict(claims) for name, claims in found.items()}
