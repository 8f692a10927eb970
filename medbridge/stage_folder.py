"""The stages of a run as its ledger has them: begun, found again, what they train, where their files are.

What a stage does is decided in `stages` and `pipeline`; here it does nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from medbridge.config import RunSettings
from medbridge.engines import Engines
from medbridge.errors import MedbridgeError
from medbridge.ledger import TRAINING, Stage, VerdictRow
from medbridge.progress import Reporter
from medbridge.rollout import Engine
from medbridge.run_folder import RunFolder

Method = Literal["bridge", "sharpen"]
METHODS: tuple[Method, ...] = ("bridge", "sharpen")

_SECTIONS = {"format": ["sft"], "bridge": ["sft"], "sharpen": ["rl"], "mixed": ["sft", "rl"], "route": ["routing"]}
"""Sections of the settings that a stage's plan records; of the others it is what measurements depend on."""


class StageFolder(RunFolder):
    """A run's folder with its stages, and the engine that is held from one to the next."""

    def __init__(self, folder: Path, settings: RunSettings, *, base_dir: Path, reporter: Reporter) -> None:
        """As `RunFolder`."""
        super().__init__(folder, settings, base_dir=base_dir, reporter=reporter)
        self.engines = Engines(settings, self.images, folder / "logs", reporter.say)
        try:
            self.engines.choice()  # what isn't installed is said now, and not after hours of training
        except MedbridgeError:
            self.close()
            raise

    def close(self) -> None:
        self.engines.release()
        super().close()

    def _begin(
        self, round: int, kind: str, model: str, strata: Sequence[str], more: Mapping[str, Any] | None = None
    ) -> Stage:
        """`more` is put on record beside the settings."""
        sections = _SECTIONS.get(kind, ["diagnosis", "gate", "guard"])
        plan = self.settings.model_dump(mode="json", include=set(sections)) | dict(more or {})
        return self.ledger.begin_stage(round=round, kind=kind, model=model, strata=strata, plan=plan)

    def _stage_of(self, round: int, kinds: Sequence[str], stratum: str | None = None) -> Stage | None:
        return next(
            (
                stage
                for stage in self.ledger.stages()
                if stage.round == round and stage.kind in kinds and (stratum is None or stratum in stage.strata)
            ),
            None,
        )

    def _trained_in(self, round: int) -> Stage | None:
        """The training stage of a round, finished or not."""
        return self._stage_of(round, TRAINING)

    def _last_round(self) -> int:
        return max((stage.round for stage in self.ledger.stages()), default=0)

    def _taken_back(self, trained: Stage) -> bool:
        """Whether the diagnosis after a training stage went back to the model before it."""
        after = self._stage_of(trained.round + 1, ("diagnose",))
        return after is not None and bool(after.summary.get("lost"))

    def _standing(self, round: int) -> Stage:
        """The diagnosis that a round goes on from: its own, or an earlier one where sharpening was taken back."""
        stage = self._stage_of(round, ("diagnose",))
        assert stage is not None
        return self._standing(round - 1) if stage.summary.get("lost") else stage

    def _standing_verdicts(self, round: int) -> dict[str, VerdictRow]:
        """The verdicts that a round goes on from; none where its model was not diagnosed here."""
        measured = self._stage_of(round, ("diagnose",))
        return {} if measured is None else self.ledger.verdicts(self._standing(round).stage_id)

    def _seed(self, stage: Stage) -> int:
        return self.settings.seed + 1000 * stage.stage_id

    def _checkpoints(self, stage: Stage) -> Path:
        return self.folder / "checkpoints" / f"{stage.stage_id:02d}-{stage.kind}"

    def _result_folder(self, stage: Stage) -> Path:
        return self.folder / "models" / f"{stage.stage_id:02d}-{stage.kind}"

    def _adapter_folder(self, stage: Stage) -> Path:
        """Beside the result, whose weights have them merged."""
        return self.folder / "models" / f"{stage.stage_id:02d}-{stage.kind}-adapter"

    def _engine(self, model: str) -> Engine:
        return self.engines.of(self._path(model))

    def _path(self, model: str) -> str:
        return model_path(self.folder, model)

    def _relative(self, folder: Path) -> str:
        return folder.relative_to(self.folder).as_posix()


def model_path(run: Path, model: str) -> str:
    """Where a model of a run's ledger lies: one that it made in its folder, any other where its name says."""
    inside = run / model
    return str(inside) if model.startswith("models/") and inside.is_dir() else model


def strata_by_method(stage: Stage) -> dict[Method, tuple[str, ...]]:
    """The strata that a training stage bridges, and those that it sharpens."""
    if stage.kind == "mixed":
        chosen = stage.plan["strata"]
        return {"bridge": tuple(chosen["bridge"]), "sharpen": tuple(chosen["sharpen"])}
    return {method: stage.strata if method == stage.kind else () for method in METHODS}


def result_of(stage: Stage) -> str:
    """The model that a finished training stage made."""
    assert stage.result_model is not None
    return stage.result_model
