"""How verdicts change when answers are read otherwise, or when the images are not there. It changes no verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from medbridge.config import RunSettings
from medbridge.data import Item
from medbridge.data.controls import blank, shuffled
from medbridge.data.readings import ReadingName, regrade
from medbridge.ledger import Ledger, Stage
from medbridge.measurement.changes import shared_scores
from medbridge.measurement.counting import count, tally_items
from medbridge.measurement.sampling import Sampler
from medbridge.progress import Reporter
from medbridge.rollout import Engine
from medbridge.support import Evidence, Tally, judge, measure
from medbridge.support.change import visual_support

Control = Literal["blank", "shuffled"]
Strata = Mapping[str, Sequence[Item]]


def measured_items(ledger: Ledger, stage: Stage, strata: Strata) -> dict[str, list[Item]]:
    """The items of each stratum that a measuring stage has tallies of, in the order of `strata`."""
    tallied = {tally.item_id for tally in ledger.tallies(stage.stage_id)}
    return {name: [item for item in items if item.id in tallied] for name, items in strata.items()}


def read_otherwise(ledger: Ledger, stage: Stage, strata: Strata, settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Stratum -> reading ("strict", "lenient") -> verdict, support and Acc@1 of the same completions read so.

    Each is judged by one look at all its items.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in strata}
    by_id = {item.id: item for items in strata.values() for item in items}
    stored = ledger.rollouts(stage.stage_id, item_ids=list(by_id))
    readings: tuple[ReadingName, ...] = ("strict", "lenient")
    for reading in readings:
        outcomes: dict[str, dict[int, Any]] = {}
        for graded in stored:
            rollout = graded.rollout
            outcomes.setdefault(rollout.item_id, {})[rollout.sample] = regrade(
                by_id[rollout.item_id], rollout.permutation, rollout.text, graded.outcome, settings.data.prompt, reading
            )
        tallies = {name: count(outcomes, items, settings.diagnosis.cluster) for name, items in strata.items()}
        for name, entry in _judged(tallies, settings).items():
            found[name][reading] = entry
    return found


def control_items(
    kind: Control, ledger: Ledger, stage: Stage, strata: Strata, settings: RunSettings, folder: Path
) -> dict[str, list[Item]]:
    """The items that a control measures, with the images that the model is to see in place of theirs.

    Other images come from the same stratum. Items without images, or without others to exchange with, are left out.
    """
    sampled = ledger.sampled(stage.stage_id)
    most = settings.diagnosis.control_items
    few = {name: [item for item in items if item.id in sampled][:most] for name, items in strata.items()}
    if kind == "blank":
        return {name: blank(items, folder).items for name, items in few.items()}
    return {name: shuffled(items, settings.seed).items for name, items in few.items()}


def run_control(
    ledger: Ledger,
    control: Stage,
    stage: Stage,
    engine: Engine,
    strata: Strata,
    shown: Strata,
    settings: RunSettings,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """Measure the items `shown` in the stage `control`; stratum -> its verdict, and support real minus control."""
    by_id = {item.id: item for items in strata.values() for item in items}
    everything = [item for items in shown.values() for item in items]
    sampler = Sampler(ledger, control, engine, settings, samples=settings.diagnosis.samples)
    with reporter.task(f"control: {control.strata[0]} images", len(everything), "items") as meter:
        sampler.complete([by_id[item.id] for item in everything], meter, shown=everything)
    tallies = {}
    for name, items in shown.items():
        own = [by_id[item.id] for item in items]  # tallied with the clusters of the real images
        if own:
            tallies[name] = tally_items(ledger, control.stage_id, own, settings.diagnosis.cluster)
            ledger.save_tallies(control.stage_id, tallies[name])
    found = _judged(tallies, settings)
    for name, counted in tallies.items():
        own = [by_id[tally.item_id] for tally in counted]
        real = tally_items(ledger, stage.stage_id, own, settings.diagnosis.cluster)
        found[name]["visual"] = _visual(real, counted, settings)
    return found


def _judged(tallies: Mapping[str, Sequence[Tally]], settings: RunSettings) -> dict[str, dict[str, Any]]:
    estimates = {name: measure(own, settings.gate, seed=settings.seed) for name, own in tallies.items()}
    # at the level of the verdicts' own last look
    evidence: dict[str, Evidence] | None = {} if settings.diagnosis.sequential else None
    return {
        name: {
            "kind": verdict.kind,
            "items": estimates[name].items,
            "support": None if (support := estimates[name].support) is None else support.to_dict(),
            "acc_at_1": None if (accuracy := estimates[name].acc_at_1) is None else accuracy.to_dict(),
            "abstain_rate": estimates[name].abstain_rate,
        }
        for name, verdict in judge(estimates, settings.gate, evidence).items()
    }


def _visual(real: Sequence[Tally], control: Sequence[Tally], settings: RunSettings) -> dict[str, Any] | None:
    """Support and Acc@1 of the real images minus the control's, on the same items."""
    most, scores = shared_scores(real, control, settings.gate)
    if scores is None:
        return None
    change = visual_support(
        real, control, scores=scores, ks=[most], alpha=settings.gate.alpha,
        replicates=settings.gate.replicates, seed=settings.seed,
    )  # fmt: skip
    whole = change.to_dict()
    return {name: whole[name] for name in ("items", "support", "acc_at_1", "confidence")}
