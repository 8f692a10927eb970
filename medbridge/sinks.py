"""Where training metrics go beside the run's ledger: TensorBoard files and Weights & Biases. Neither is needed."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from medbridge.config import RunSettings
from medbridge.errors import MedbridgeError
from medbridge.ledger import Stage


class Sink(Protocol):
    """Takes the metrics of one step after the other."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    settings: RunSettings, folder: Path, stage: Stage, *, first_step: int, say: Callable[[str], None]
) -> list[Sink]:
    """Those that the settings ask for, in the run's folder; steps from `first_step` on are logged anew.

    `say` is told where to look at them, if that is elsewhere.

    Raises:
        MedbridgeError: one is asked for by name, and its package is missing.
    """
    name = f"{stage.stage_id:02d}-{stage.kind}"
    sinks: list[Sink] = []
    if settings.tensorboard is True or (settings.tensorboard == "auto" and find_spec("tensorboard") is not None):
        sinks.append(TensorBoard(folder / "tensorboard" / name, first_step))
    if settings.wandb is not None:
        sinks.append(WeightsAndBiases(settings, folder, name, say))
    return sinks


class TensorBoard:
    """Event files of one stage."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Steps from `first_step` on that an earlier process wrote are hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MedbridgeError(
                "tensorboard is true, and the package is not installed: pip install 'medbridge[train]', or set it to "
                "auto."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run for one stage, taken up again by its name where the stage is."""

    def __init__(self, settings: RunSettings, folder: Path, name: str, say: Callable[[str], None]) -> None:
        if find_spec("wandb") is None:
            raise MedbridgeError(
                f"wandb is {settings.wandb!r}, and the package is not installed: pip install wandb, or set it to null."
            )
        wandb: Any = importlib.import_module("wandb")
        # W&B keeps what it had of a step that is taken again: to the bit the same
        self._run: Any = wandb.init(
            project=settings.wandb, name=f"{settings.name} {name}", group=settings.name, id=_run_id(folder, name),
            resume="allow", dir=str(folder), config=settings.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),  # the terminal shows a live table
        )  # fmt: skip
        if not self._run.offline:
            say(f"W&B: {self._run.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path, name: str) -> str:
    """The same for a stage of a run folder each time, and another for one that only has the same name."""
    digest = hashlib.blake2b(f"{folder.resolve()}|{name}".encode("utf-8", "surrogateescape"), digest_size=6)
    return f"{name}-{digest.hexdigest()}"
