"""Runs a study: has its models trained where it trains its own, measures each, probes each, and names bottlenecks.

Everything stands in one run folder and its ledger, so that a study that was cut off goes on, and cells that are
measured are reused. Each model has a round of its own: the chain base, bridge, sharpen from 0 on, models trained on
single strata and models that were there already behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medbridge.data import Item
from medbridge.data.answers import Status
from medbridge.errors import MedbridgeError
from medbridge.files import replace_text
from medbridge.ledger import TRAINING, Stage
from medbridge.measurement import NO_VERDICT, cluster_of, compare_stages
from medbridge.model import Prompter
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.report.collect import collect
from medbridge.report.view import Estimate, Measurement
from medbridge.study.answers import choose_answers
from medbridge.study.encoders import features_of, open_for
from medbridge.study.findings import find
from medbridge.study.page import Question, render
from medbridge.study.result import Cell, ChangeCell, ModelRow, Sight, StudyResult
from medbridge.study.settings import StudyConfig
from medbridge.study.sight import Asked, look
from medbridge.study.weights import refuse_changed
from medbridge.support.tallies import Tally

_BEHIND_CHAIN = 100
"""Rounds from here on belong to models beside the chain: two for each, training and measurement."""

RESULT, PAGE = "study.json", "study.html"


def run_study(config: StudyConfig, folder: Path, *, base_dir: Path, cache_dir: Path, reporter: Reporter) -> StudyResult:
    """Run a study to its end, or on from where it was cut off; its result is written to `study.json` and `study.html`.

    Args:
        config: of the study.
        folder: run folder.
        base_dir: folder that relative paths start from.
        cache_dir: where features are kept.
        reporter: where progress is shown.

    Raises:
        MedbridgeError: a stratum or model that is named is not there, or the settings changed since the study began.
    """
    study = Study(folder, config, base_dir=base_dir, cache_dir=cache_dir, reporter=reporter)
    try:
        study.ledger.set_meta("study", {"finished": False})
        study.refuse_unopenable()
        rows = study.models()
        for row in rows:
            study.measure(row)
        study.engines.release()  # the probes need the memory
        result = study.result(rows)
        page = render(result, study.questions(rows))
        study.ledger.set_meta("study", {"finished": True})
    finally:
        study.close()
    replace_text(folder / RESULT, json.dumps(result.to_dict(), indent=1) + "\n")
    replace_text(folder / PAGE, page)
    return result


class Study(Run):
    """A run in which every stratum is trained whatever its verdict, and several models are measured."""

    def __init__(
        self, folder: Path, config: StudyConfig, *, base_dir: Path, cache_dir: Path, reporter: Reporter
    ) -> None:
        super().__init__(folder, config.run_settings(), base_dir=base_dir, reporter=reporter)
        self.study = config.study
        self._cache = cache_dir
        self._rounds: dict[str, int] = {}
        try:
            self.measured: dict[str, list[Item]] = self._split(config.diagnosis.split)
            self._refuse_unknown_strata()
        except BaseException:
            self.close()
            raise

    # -- models ------------------------------------------------------------------------------------------------

    def refuse_unopenable(self) -> None:
        """Open what the study names, before hours of sampling go to the models in front of a name that is mistyped."""
        for name, model in self.study.models.items():
            with self._blamed_on(name):
                Prompter.load(self._beside(model.path))
        sight = self.study.sight
        if sight is not None and sight.beside is not None and self.ledger.meta(f"sights of {sight.beside}") is None:
            open_for(sight.beside, sight, self.settings.model)

    def models(self) -> list[ModelRow]:
        """The models of the study, trained first where they are not there."""
        if self.study.models:
            return self._named()
        base = self.base_model()
        rows = [self._row("base", base, 0)]
        model, every = base, self._trainable()
        self._refuse_another_chain()
        for number, stage in enumerate(self.study.train):
            train = self.bridge if stage == "bridge" else self.sharpen
            self.measure(rows[-1])  # a stage may route items by the measurement before it
            model = train(number, model, every)
            name = {"bridge": "after SFT", "sharpen": "after RL"}[stage]
            if any(row.name == name for row in rows):
                name = f"{name} {number + 1}"
            rows.append(self._row(name, model, number + 1, parent=rows[-1].name, trained_on=tuple(every)))
        for strata in self.study.transfer:
            known = [s.round for s in self.ledger.stages() if s.kind == "bridge" and s.round >= _BEHIND_CHAIN
                     and (s.model, sorted(s.strata)) == (base, sorted(strata))]  # fmt: skip
            round = known[0] if known else self._free_round()
            model = self.bridge(round, base, sorted(strata))
            name = f"SFT on {', '.join(sorted(strata))}"
            rows.append(self._row(name, model, round + 1, parent="base", trained_on=tuple(sorted(strata)), chain=False))
        return rows

    def _named(self) -> list[ModelRow]:
        rows = []
        for name, model in self.study.models.items():
            path = self._beside(model.path)
            rows.append(ModelRow(name, path, model.parent, tuple(model.trained_on)))
            self._rounds[name] = self._round_of(path)
            if Path(path).is_dir():
                refuse_changed(self.ledger, Path(path), f"study.models.{name}.path")
        return rows

    def _beside(self, path: str) -> str:
        """A folder as it is seen from the configuration; otherwise a Hugging Face id."""
        folder = self.base_dir / path
        return str(folder.resolve()) if folder.is_dir() else path

    @contextmanager
    def _blamed_on(self, name: str) -> Iterator[None]:
        """An error that arises is told as that of the model."""
        try:
            yield
        except MedbridgeError as error:
            if name in self.study.models:
                raise MedbridgeError(f"study.models.{name}: {error}") from error
            raise

    def _trainable(self) -> list[str]:
        """The strata that have training items; the others are measured alone."""
        there = self._with_training_items()
        bare = sorted(set(self.measured) - there)
        if bare and self.study.train:
            self.reporter.say(f"no training items of {', '.join(bare)}: measured, and not trained on")
        return sorted(set(self.measured) & there)

    def _with_training_items(self) -> set[str]:
        return {item.stratum(self.strata_keys) for item in self.items.split("train")}

    def _refuse_another_chain(self) -> None:
        """Refuse stages that an earlier call trained otherwise: their measurements would pass for the new models'."""
        for stage in self.ledger.stages():
            if stage.kind in TRAINING and stage.round < _BEHIND_CHAIN:
                wanted = self.study.train[stage.round] if stage.round < len(self.study.train) else stage.kind
                if stage.kind != wanted:
                    raise MedbridgeError(
                        f"study.train: stage {stage.round + 1} of this run folder is {stage.kind!r}, not {wanted!r}. "
                        "Name another folder with --run, or go back to what it was."
                    )

    def _row(self, name: str, path: str, round: int, **more: Any) -> ModelRow:
        self._rounds[name] = round
        return ModelRow(name, path, **more)

    def _round_of(self, path: str) -> int:
        """The round in which a model was measured, or the next that is free."""
        known = [stage.round for stage in self.ledger.stages() if (stage.kind, stage.model) == ("diagnose", path)]
        return known[0] if known else self._free_round()

    def _free_round(self) -> int:
        taken = [_BEHIND_CHAIN - 2, *(stage.round for stage in self.ledger.stages()), *self._rounds.values()]
        return 2 * (max(taken) // 2 + 1)

    def _refuse_unknown_strata(self) -> None:
        named = [name for group in self.study.transfer for name in group]
        named += [name for model in self.study.models.values() for name in model.trained_on]
        bare = {name for group in self.study.transfer for name in group} & set(
            self.measured
        ) - self._with_training_items()
        if bare:
            raise MedbridgeError(f"study.transfer names {sorted(bare)[0]!r}, which has no training items.")
        for name in named:
            if name not in self.measured:
                raise MedbridgeError(
                    f"the study names the stratum {name!r}, and the {self.settings.diagnosis.split} split has: "
                    f"{', '.join(sorted(self.measured))}. Correct study.transfer or trained_on."
                )

    # -- measuring ---------------------------------------------------------------------------------------------

    def measure(self, row: ModelRow) -> None:
        """Sample and judge a model, where that was not done."""
        with self._blamed_on(row.name):
            self.diagnose(self._rounds[row.name], row.path)
        self._measurement(row)

    def _measurement(self, row: ModelRow) -> Stage:
        round = self._rounds[row.name]
        stage = next(s for s in self.ledger.stages() if s.kind == "diagnose" and s.round == round)
        if stage.model != row.path:
            raise MedbridgeError(
                f"{row.name}: what this run folder measured is {stage.model} and not {row.path}. Name another folder "
                "with --run."
            )
        return stage

    def result(self, rows: Sequence[ModelRow]) -> StudyResult:
        """All cells, from the ledger and the probes."""
        view = collect(self.folder, samples=False)
        measurements: dict[tuple[int, str], Measurement] = {
            (m.stage_id, stratum.name): m for stratum in view.strata for m in stratum.measured
        }
        cells, changes = [], []
        for row in rows:
            stage = self._measurement(row)
            sights = self._sights(row.path, stage)
            tallies = self._tallies(stage)
            for stratum in sorted(self.measured):
                found = measurements.get((stage.stage_id, stratum))
                if found is not None:
                    cells.append(self._cell(row, stratum, found, sights.get(stratum), tallies[stratum]))
            if row.parent is not None:
                before = next(other for other in rows if other.name == row.parent)
                changes += self._changes(row, before, stage, measurements)
        encoder = None if self.study.sight is None else self.study.sight.beside
        gate = self.settings.gate
        return StudyResult(
            name=self.settings.name, confidence=1 - 2 * gate.alpha, threshold=gate.support_threshold,
            sight_threshold=self._seen_from, split=self.settings.diagnosis.split,
            models=tuple(rows), strata=tuple(sorted(self.measured)), cells=tuple(cells), changes=tuple(changes),
            beside={} if encoder is None else self._sights(encoder, self._measurement(rows[0])), encoder=encoder,
        )  # fmt: skip

    def _cell(
        self, row: ModelRow, stratum: str, found: Measurement, sight: Sight | None, tallies: Sequence[Tally]
    ) -> Cell:
        blank = next((check.visual for check in found.checks if check.name == "blank"), None)
        finding = find(
            found.kind, sight, blank, threshold=self._seen_from, reason=found.reason,
            support=f"support {found.support or 'unknown'}", accuracy=f"Acc@1 {found.acc_at_1 or 'unknown'}",
        )  # fmt: skip
        return Cell(
            model=row.name, stratum=stratum, verdict=found.kind, reason=found.reason, items=found.items,
            clusters=len({tally.cluster for tally in tallies}), samples=found.n_min, k=found.k, support=found.support,
            acc_at_1=found.acc_at_1,
            ks=tuple(found.ks), pass_at_k=tuple(found.pass_at_k.value), floors=tuple(found.floor),
            blank=blank, sight=sight, spectrum=self._spectrum(tallies), finding=finding,
        )  # fmt: skip

    @property
    def _seen_from(self) -> float:
        return 0.0 if self.study.sight is None else self.study.sight.threshold

    def _tallies(self, stage: Stage) -> dict[str, list[Tally]]:
        """The items of each stratum that were sampled."""
        stratum_of = {item.id: name for name, items in self.measured.items() for item in items}
        found: dict[str, list[Tally]] = {name: [] for name in self.measured}
        for tally in self.ledger.tallies(stage.stage_id):
            if tally.n and tally.item_id in stratum_of:
                found[stratum_of[tally.item_id]].append(tally)
        return found

    def _spectrum(self, tallies: Sequence[Tally]) -> tuple[int, ...]:
        """A bin for each number of right samples: of any other width, some would hold more numbers than others."""
        bins = [0] * (self.settings.diagnosis.samples + 1)
        for tally in tallies:
            bins[round((len(bins) - 1) * tally.c / tally.n)] += 1
        return tuple(bins)

    def _changes(
        self, row: ModelRow, before: ModelRow, stage: Stage, measurements: Mapping[tuple[int, str], Measurement]
    ) -> list[ChangeCell]:
        earlier = self._measurement(before)
        told = compare_stages(self.ledger, earlier, stage, self.measured, self.settings)

        def trusted(name: str) -> bool:
            both = [measurements.get((one.stage_id, name)) for one in (earlier, stage)]
            return not any(found is not None and found.reason.startswith(NO_VERDICT) for found in both)

        return [
            ChangeCell(
                model=row.name,
                parent=before.name,
                stratum=name,
                trained=name in row.trained_on,
                items=int(change["items"]),
                support=_stored(change["support"]),
                acc_at_1=_stored(change["acc_at_1"]),
                gained=len(change["gained"]),
                lost=len(change["lost"]),
                trusted=trusted(name),
            )
            for name, change in told["changes"].items()
        ]

    # -- probing -----------------------------------------------------------------------------------------------

    def _sights(self, encoder: str, measured: Stage) -> dict[str, Sight | None]:
        settings = self.study.sight
        if settings is None:
            return {}
        path = self._path(encoder) if (self.folder / encoder).is_dir() else encoder
        known = {tally.item_id for tally in self.ledger.tallies(measured.stage_id) if tally.n}
        asked = {name: [item for item in items if item.id in known] for name, items in self.measured.items()}
        key, features = features_of(path, settings, self.settings.model, self._cache, self.reporter)
        gate = self.settings.gate
        wanted = Asked(
            self.items.split("train"), self._validation(), asked,
            cluster=lambda item: cluster_of(item, self.settings.diagnosis.cluster), min_images=settings.min_images,
            alpha=gate.alpha, replicates=gate.replicates, seed=self.settings.seed,
        )  # fmt: skip
        name, digest = f"sights of {path}", wanted.key(key)
        kept = self.ledger.meta(name)
        if kept is None or kept["key"] != digest:
            found = look(features, wanted)
            kept = {"key": digest, "sights": {stratum: sight and asdict(sight) for stratum, sight in found.items()}}
            self.ledger.set_meta(name, kept)
        return {stratum: sight and Sight.from_dict(sight) for stratum, sight in kept["sights"].items()}

    def _validation(self) -> list[Item]:
        """What chooses the probes' regularisation: never what is measured."""
        return [] if self.settings.diagnosis.split == "validation" else self.items.split("validation")

    # -- questions ---------------------------------------------------------------------------------------------

    def questions(self, rows: Sequence[ModelRow]) -> list[Question]:
        """The measured questions, with how each model's samples came out and what some of them were."""
        counts: dict[str, dict[str, tuple[int, int, Status | None]]] = {}
        stages = [self._measurement(row).stage_id for row in rows]
        for row, stage in zip(rows, stages, strict=True):
            greedy = self.ledger.greedy_statuses(stage)
            for tally in self.ledger.tallies(stage):
                if tally.n:
                    counts.setdefault(tally.item_id, {})[row.name] = (tally.c, tally.n, greedy.get(tally.item_id))
        asked = {name: [item for item in items if item.id in counts] for name, items in self.measured.items()}
        answers = choose_answers(self.ledger, stages, {n: [item.id for item in items] for n, items in asked.items()})
        return [
            Question(
                item.id,
                stratum,
                item.question,
                item.answer,
                item.options,
                item.images,
                counts[item.id],
                answers.get(item.id),
            )
            for stratum, items in sorted(asked.items())
            for item in items
        ]


def _stored(record: Mapping[str, Any] | None) -> Estimate | None:
    if record is None or record["value"] is None:
        return None
    return Estimate(record["value"], record["low"], record["high"])
