"""One measurement: item by item until each stratum is settled, or all items at one look; then the verdicts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from medbridge.config import RunSettings
from medbridge.data import Item
from medbridge.ledger import Ledger, Stage, VerdictRow
from medbridge.measurement.counting import tally_items
from medbridge.measurement.order import cluster_of, whole_clusters
from medbridge.measurement.outlook import outlook
from medbridge.measurement.sampling import Sampler
from medbridge.measurement.validity import invalid_strata
from medbridge.progress import Meter, Reporter
from medbridge.rollout import Engine, Pool
from medbridge.support import StratumEvidence, gate_k, judge, measure, settle


def run_measurement(
    ledger: Ledger,
    stage: Stage,
    engine: Engine,
    strata: Mapping[str, Sequence[Item]],
    settings: RunSettings,
    reporter: Reporter,
    *,
    limit: int | None = None,
    sequential: bool = False,
    at_least: Collection[str] = (),
) -> list[VerdictRow]:
    """Sample, grade and judge each stratum; writes rollouts and tallies batch by batch and resumes from them.

    Args:
        strata: items of each stratum in the order of `by_stratum`.
        limit: most items per stratum.
        sequential: stop a stratum as soon as its verdict is settled; without it all items are measured.
        at_least: ids of items that are measured in any case.
    """
    pools = {name: list(items)[:limit] for name, items in strata.items()}
    sampler = Sampler(ledger, stage, engine, settings, samples=settings.diagnosis.samples)
    with reporter.task(f"{stage.kind}: sampling", sum(map(len, pools.values())), "items") as meter:
        if sequential:
            progress = {name: _Stratum(pool, settings, set(at_least)) for name, pool in pools.items()}
            _until_settled(progress, sampler, settings, meter, engines=_engines(ledger, stage, engine))
            chosen = {name: stratum.taken for name, stratum in progress.items()}
            evidence = {name: stratum.tests.evidence for name, stratum in progress.items() if stratum.tests}
            gates = {name: stratum.gate for name, stratum in progress.items()}
        else:
            sampler.complete([*chain.from_iterable(pools.values())], meter)
            chosen, evidence = pools, None
            gates = dict.fromkeys(pools, settings.gate)
    everything = [*chain.from_iterable(chosen.values())]
    counted = tally_items(ledger, stage.stage_id, everything, settings.diagnosis.cluster)
    tallies = {tally.item_id: tally for tally in counted}
    ledger.save_tallies(stage.stage_id, tallies.values())
    own = {name: [tallies[item.id] for item in items] for name, items in chosen.items()}
    estimates = {name: measure(held, gates[name], seed=settings.seed) for name, held in own.items()}
    # A stratum that gets no verdict is none of the family that is looked at last. Its evidence stays in, so that what
    # was settled beside it while sampling stays settled.
    invalid = invalid_strata(ledger, stage, chosen, settings)
    valid = {name: estimate for name, estimate in estimates.items() if name not in invalid}
    verdicts = judge(valid, settings.gate, evidence)
    for name, why in invalid.items():
        alone = judge({name: estimates[name]}, settings.gate)[name]
        verdicts[name] = replace(alone, kind="undecided", reason=why, more=None)
    support = {name: {**estimates[name].to_dict(), "outlook": outlook(own[name], settings)} for name in own}
    return [
        VerdictRow(name, verdict.kind, verdict.reason, verdict.to_dict(), support[name])
        for name, verdict in sorted(verdicts.items())
    ]


class _Stratum:
    """A stratum while it is being measured: whole clusters in random order, and what they have shown so far."""

    def __init__(self, pool: Sequence[Item], settings: RunSettings, at_least: set[str]) -> None:
        self.settings = settings
        self.clusters = list(whole_clusters(pool, settings.diagnosis.cluster))
        needed = [
            number for number, cluster in enumerate(self.clusters) if any(item.id in at_least for item in cluster)
        ]
        self.must = max(needed, default=-1) + 1
        self.taken: list[Item] = []
        self._next = 0
        floors = [item.floor for item in pool]
        k, *_ = gate_k(floors, settings.diagnosis.samples, settings.gate)
        clusters = [cluster_of(item, settings.diagnosis.cluster) for item in pool]
        # the k of the whole pool, also where the items drawn so far would give another
        self.gate = settings.gate if settings.gate.statistic == "reached" else settings.gate.model_copy(update={"k": k})
        self.tests = (
            None if k is None else StratumEvidence(settings.gate, k, floors, clusters, finite=settings.diagnosis.finite)
        )

    @property
    def exhausted(self) -> bool:
        return self._next == len(self.clusters)

    @property
    def left(self) -> int:
        """Items that were not taken yet."""
        return sum(map(len, self.clusters[self._next :]))

    def draw(self, least: int) -> list[Item]:
        """The next clusters, of `least` items or a few more."""
        drawn: list[Item] = []
        while not self.exhausted and (len(drawn) < least or self._next < self.must):
            drawn += self.clusters[self._next]
            self._next += 1
        self.taken += drawn
        return drawn


def _until_settled(
    strata: Mapping[str, _Stratum], sampler: Sampler, settings: RunSettings, meter: Meter, *, engines: int
) -> None:
    """Sample all open strata a look further, until each is settled or has no more items.

    A look takes `items_per_look` items of each stratum, and of all together as many for each engine: few open strata
    would leave most engines idle. The evidence holds whenever one looks, as long as that depends on nothing that is
    seen later; here it depends on what was open before.
    """
    open_strata = {name for name, stratum in strata.items() if not stratum.exhausted}
    while open_strata:
        least = settings.diagnosis.items_per_look * math.ceil(engines / len(open_strata))
        drawn = {name: strata[name].draw(least) for name in sorted(open_strata)}
        # where only Acc@1 is open, one greedy completion an item is all that helps
        enough = [name for name in drawn if (tests := strata[name].tests) is not None and not tests.needs_samples]
        greedy_only = {item.id for name in enough for item in drawn[name]}
        sampler.complete([*chain.from_iterable(drawn.values())], meter, greedy_only=greedy_only)
        tested = {name: stratum.tests for name, stratum in strata.items() if stratum.tests}
        for name in tested.keys() & drawn.keys():
            tested[name].add(
                tally_items(sampler.ledger, sampler.stage.stage_id, drawn[name], settings.diagnosis.cluster)
            )
        settled = settle(tested, settings.gate)
        open_strata = {name for name in open_strata if settled.get(name) is None and not strata[name].exhausted}
        done = sum(len(stratum.taken) for stratum in strata.values())
        meter.reach(done, done + sum(strata[name].left for name in open_strata))


def _engines(ledger: Ledger, stage: Stage, engine: Engine) -> int:
    """How many engines the looks are made for: those that the stage was begun with, so that a resumed one looks again
    at the items that it looked at.
    """
    key = f"engines of stage {stage.stage_id}"
    if ledger.meta(key) is None:
        ledger.set_meta(key, len(engine.members) if isinstance(engine, Pool) else 1)
    return int(ledger.meta(key))
