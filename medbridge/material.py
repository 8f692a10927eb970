"""Which training items a stage gets: of its strata, reserved or not, routed by what the model makes of them, held out.

It trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from medbridge.data import Item, grade, permutation
from medbridge.errors import MedbridgeError
from medbridge.ledger import Stage
from medbridge.measurement import Sampler, cluster_of, summarise_sampling, tally_items
from medbridge.rollout import Graded, Request
from medbridge.stage_folder import Method, StageFolder
from medbridge.support.routing import hashed_fraction, route
from medbridge.train import Example
from medbridge.train.examples import Accepted, Answers
from medbridge.train.rewards import reward
from medbridge.train.sft import Examples


class Material(StageFolder):
    """A run's folder with what its training stages are made of."""

    def training_items(self, strata: Sequence[str], *, reserved: bool) -> tuple[list[Item], list[Item]]:
        """Training items of the strata, and of all others: those reserved for sharpening, or the rest.

        Raises:
            MedbridgeError: a stratum without any.
        """
        train = self._train_split(reserved=reserved)
        known = {item.stratum(self.strata_keys) for item in train}
        for name in strata:
            if name not in known:
                shares = ["rl.reserved_share"] if self.settings.rl.reserved_share else []
                shares += ["held_out.share"] if self.settings.held_out.share else []
                left = f" ({' and '.join(shares)} may have left none of it here)" if shares else ""
                raise MedbridgeError(
                    f"no training items of stratum {name!r}; training strata are: {', '.join(sorted(known)) or 'none'}."
                    f"{left}"
                )
        chosen = [item for item in train if item.stratum(self.strata_keys) in strata]
        self.ledger.add_items(chosen, self.strata_keys)
        return chosen, [item for item in train if item.stratum(self.strata_keys) not in strata]

    def _train_split(self, *, reserved: bool) -> list[Item]:
        """The training items that sharpening uses (`reserved`), or those that bridging does; none that is held out."""
        share = self.settings.rl.reserved_share
        out = self._held_out_ids
        return [
            item
            for item in self.items.split("train")
            if item.id not in out
            and (share == 0 or (hashed_fraction("reserve", self.settings.seed, item.id) < share) == reserved)
        ]

    def held_out_items(self, strata: Sequence[str]) -> list[Item]:
        """The held-out training items of these strata that a stage asks at its checkpoints, in an order by hash."""
        out, settings = self._held_out_ids, self.settings
        chosen = [
            item for item in self.items.split("train") if item.id in out and item.stratum(self.strata_keys) in strata
        ]
        chosen.sort(key=lambda item: hashed_fraction("held out, asked", settings.seed, item.id))
        return chosen[: settings.held_out.max_items]

    @cached_property
    def _held_out_ids(self) -> frozenset[str]:
        """Whole clusters of the training split: an item whose image is trained on is not held out.

        Whether one is depends on its smallest item id, and so not on where the data lies.
        """
        settings = self.settings
        if not settings.held_out.share:
            return frozenset()
        clusters: dict[str, list[str]] = {}
        for item in self.items.split("train"):
            clusters.setdefault(cluster_of(item, settings.diagnosis.cluster), []).append(item.id)
        return frozenset(
            item_id
            for members in clusters.values()
            if hashed_fraction("held out", settings.seed, min(members)) < settings.held_out.share
            for item_id in members
        )

    # -- what a stage does with them -----------------------------------------------------------------------

    def bridged_items(self, strata: Sequence[str]) -> tuple[list[Item], list[Item]]:
        """Items of weak strata that have what is to be imitated, and those of the other strata, for replay.

        Raises:
            MedbridgeError: there are none.
        """
        items, others = self.training_items(strata, reserved=False)
        if self.settings.sft.source == "traces":
            items = [item for item in items if item.trace]
            if not items:
                raise MedbridgeError("sft.source is traces, and no training item has one. Use auto or answers.")
        return items, others

    def examples(self, stage: Stage, items: Sequence[Item], strata: Sequence[str]) -> Examples:
        """What bridging imitates: given answers or traces, or the model's own right answers."""
        if self.settings.sft.source == "rejection":
            return Accepted(self._rejection_sample(stage, items, strata))
        return self.answers(items)

    def answers(self, items: Sequence[Item]) -> Answers:
        settings = self.settings
        traces = settings.sft.source != "answers"
        return Answers(items, settings.data.prompt, seed=settings.seed, traces=traces)

    def _rejection_sample(self, stage: Stage, items: Sequence[Item], strata: Sequence[str]) -> list[Example]:
        """The model's own correct, well-formed completions of training items, each different one once."""
        settings = self.settings
        done = {entry.rollout.item_id for entry in self.ledger.rollouts(stage.stage_id, step=0)}
        numbers = tuple(range(settings.sft.rejection_samples))
        requests = [
            Request(item, numbers, tuple(permutation(item, settings.seed, number) for number in numbers))
            for item in items
            if item.id not in done
        ]
        by_id = {item.id: item for item in items}
        if requests:
            engine = self._engine(stage.model)
            with self.reporter.task(f"{stage.kind}: sampling own answers", len(requests), "items") as meter:
                for batch in engine.generate(requests, settings.rollout, seed=self._seed(stage)):
                    self.ledger.save_rollouts(stage.stage_id, 0, [self.graded(rollout, by_id) for rollout in batch])
                    meter.advance(len({rollout.item_id for rollout in batch}))
        accepted = {
            (entry.rollout.item_id, entry.rollout.permutation, entry.rollout.text)
            for entry in self.ledger.rollouts(stage.stage_id, step=0)
            if entry.outcome.status == "correct" and entry.outcome.well_formed
        }
        if not accepted:
            raise MedbridgeError(
                "sft.source is rejection, and the model gave no correct, well-formed answer to any training item of "
                f"{', '.join(strata)}: there is nothing to imitate. Start another run with "
                "sft.source auto, or with more sft.rejection_samples."
            )
        return [Example(by_id[item_id], order, text) for item_id, order, text in sorted(accepted)]

    def graded(self, rollout: Any, by_id: Mapping[str, Item], format_weight: float | None = None) -> Graded:
        """A completion with its outcome, and with its reward where `format_weight` is given."""
        outcome = grade(by_id[rollout.item_id], rollout.permutation, rollout.text, self.settings.data.prompt)
        return Graded(rollout, outcome, None if format_weight is None else reward(outcome, format_weight))

    def routed(self, round: int, kind: Method, model: str, strata: Sequence[str], items: list[Item]) -> list[Item]:
        """The training items that a stage of this kind can use, by what the model makes of them now."""
        settings = self.settings.routing
        if settings.samples == 0:
            return items
        wanted_for = (kind, *strata)
        begun = [s for s in self.ledger.stages() if s.round == round and s.kind == "route" and s.strata == wanted_for]
        stage = begun[0] if begun else self._begin(round, "route", model, wanted_for)
        if stage.status == "running":
            sampler = Sampler(
                self.ledger,
                stage,
                self._engine(stage.model),
                self.settings,
                samples=settings.samples,
                greedy=False,
            )
            with self.reporter.task(f"route: sampling for {kind}", len(items), "items") as meter:
                sampler.complete(items, meter)
            tallies = tally_items(self.ledger, stage.stage_id, items, self.settings.diagnosis.cluster)
            self.ledger.save_tallies(stage.stage_id, tallies)
        routes = route(self.ledger.tallies(stage.stage_id), settings, seed=self.settings.seed)
        chosen = routes.bridge if kind == "bridge" else routes.sharpen
        if stage.status == "running":
            counted = {name: len(getattr(routes, name)) for name in ("bridge", "sharpen", "anchor", "left_out")}
            summary = {**summarise_sampling(self.ledger, stage), "routes": counted}
            self.ledger.finish_stage(stage.stage_id, result_model=None, summary=summary)
        if not chosen:
            self.reporter.say(f"routing: none of {len(items)} training items is one to {kind}; all of them are used")
            return items
        wanted = {*chosen, *routes.anchor}
        return [item for item in items if item.id in wanted]
