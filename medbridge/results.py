"""What a training stage leaves behind: the weights of its last step or of a better checkpoint, adapters beside them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings, Policy
from medbridge.model.initialise import replace_folder
from medbridge.rollout.weights import Weights
from medbridge.train.checkpoints import Checkpoint, best_checkpoint
from medbridge.train.parameters import add_adapters, trained_parameters


def better_checkpoint(folder: Path, last: float) -> Checkpoint | None:
    """The best whole checkpoint, where it is at least as good as the last weights: of equals the earliest is kept."""
    best = best_checkpoint(folder)
    return best if best is not None and best.score is not None and best.score >= last else None


def restored(checkpoint: Checkpoint, base: str, model: ModelSettings, adapter: Path) -> Policy:
    """The stage's base model with the weights of a checkpoint, adapters merged, and written to `adapter` before.

    Raises:
        MedbridgeError: the checkpoint is of other parameters than these settings train.
    """
    policy = Policy.load(base, model, trainable=True)
    adapted = None if model.lora is None else add_adapters(policy, model.lora, 0)
    parameters = trained_parameters(policy.model if adapted is None else adapted, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != checkpoint.shapes("weights"):
        raise MedbridgeError(
            f"{checkpoint.folder}: holds other parameters than this stage trains. Set model.lora and "
            "model.freeze_vision as they were, or start a new run."
        )
    with torch.no_grad():
        for name, tensor in checkpoint.tensors("weights", policy.device):
            parameters[name].copy_(tensor)
    if adapted is not None:
        save_adapter(policy, adapter)
        adapted.merge_and_unload()
    policy.model.eval()
    return policy


def save_adapter(policy: Policy, out: Path) -> None:
    """Write a policy's adapters to a folder as PEFT does (atomically); they are not merged yet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        weights = Weights(policy, 0, Path(temporary))
        folder = shutil.copytree(weights.adapter_folder(), Path(temporary) / "adapter")
        weights.release()
        replace_folder(folder, out)
