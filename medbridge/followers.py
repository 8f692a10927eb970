"""What the ranks other than 0 do in a run that torchrun has started: wait, and train with rank 0 when a stage does.

They see no run folder but its checkpoints, which they read: no lock, no database, no engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medbridge.config import RunSettings
from medbridge.data import ImageCache
from medbridge.model import Policy
from medbridge.train import SftSettings, Supervision, train_rl, train_sft
from medbridge.train.ranks import Ranks


def training(kind: str, settings: RunSettings, model: str, seed: int, checkpoints: Path, **more: Any) -> dict[str, Any]:
    """What rank 0 tells the others about a stage that is about to train: `kind` is sft or rl.

    `more`: `sft`, the settings of supervised training as JSON has them; `mixed`, whether that goes with RL.
    """
    dumped = settings.model_dump(mode="json")
    place = {"model": model, "seed": seed, "checkpoints": str(checkpoints.resolve())}
    return {"kind": kind, "settings": dumped, **place, **more}


def follow(ranks: Ranks) -> None:
    """Train with rank 0 as often as it says so.

    Raises:
        MedbridgeError: rank 0 has ended in the midst of it.
    """
    while (told := ranks.share(_nothing)) is not None:
        _train(told, ranks)


def _train(told: dict[str, Any], ranks: Ranks) -> None:
    settings = RunSettings.model_validate(told["settings"])
    policy = Policy.load(told["model"], settings.model, trainable=True)
    common: dict[str, Any] = {
        "model": settings.model, "prompts": settings.data.prompt, "seed": told["seed"],
        "images": ImageCache(settings.data.image_cache_mb << 20), "checkpoints": Path(told["checkpoints"]),
        "on_start": _nothing, "on_step": _nothing, "say": _nothing, "ranks": ranks,
    }  # fmt: skip
    if told["kind"] == "sft":
        train_sft(policy, Unseen(), None, SftSettings.model_validate(told["sft"]), **common)
        return
    supervision = Supervision(Unseen(), None, settings.sft) if told["mixed"] else None
    train_rl(
        policy, [], settings.rl, Unseen(), rollout=settings.rollout, supervised=supervision,
        diagnosed_k=told["diagnosed_k"], **common,
    )  # fmt: skip


class Unseen:
    """Stands for examples and rollouts that rank 0 has: nothing of it is asked here."""

    shares_weights = False

    def __len__(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is rank 0's: it is shared, and not called here")


def _nothing(*_: Any) -> None:
    """Is not called: what ranks other than 0 give to `Ranks.share` and to callbacks."""
