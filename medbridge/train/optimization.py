"""What both stages stand on: trainable parameters, AdamW with its schedule, exact checkpoints, data order."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medbridge.errors import MedbridgeError
from medbridge.model.policy import ModelSettings, Policy


class OptimizerSettings(BaseModel):
    """AdamW and its schedule; the part that bridging and sharpening share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="Learning rate after the warm-up: constant, or a cosine down to a tenth."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient average.")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's decay of the squared-gradient average.")
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    checkpoint_every: int = Field(
        50, ge=1, description="Steps between checkpoints: what a killed stage has to train again at most."
    )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` (counted from 1) of `steps`."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class Trainable:
    """The parameters under training with their optimizer, schedule and checkpoints; `finish` merges adapters."""

    def __init__(
        self, policy: Policy, model: ModelSettings, settings: OptimizerSettings, steps: int, *, seed: int
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.steps = steps
        self.seed = seed
        self._adapted: Any = None
        network: nn.Module = policy.model
        if model.lora is not None:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=model.lora.rank, lora_alpha=model.lora.alpha, lora_dropout=model.lora.dropout,
                target_modules=model.lora.targets,
            )  # fmt: skip
            torch.manual_seed(seed)  # a stage that begins again begins with the same adapters
            try:
                self._adapted = get_peft_model(policy.model, lora)
            except ValueError as error:
                raise MedbridgeError(f"model.lora.targets fits no module of {policy.path!r}: {error}") from error
            network = self._adapted
        if model.freeze_vision:
            for name, parameter in network.named_parameters():
                if "visual." in name or "vision_tower." in name:
                    parameter.requires_grad_(False)
        if model.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
            policy.model.enable_input_require_grads()
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay, fused=policy.device.type == "cuda",
        )  # fmt: skip
        policy.model.train()

    def begin(self, step: int) -> None:
        """Seed a step's dropout, so that a step taken again after a kill is the same."""
        torch.manual_seed(self.seed + step)

    def step(self, step: int) -> dict[str, float]:
        """Clip, update, clear the gradients. A non-finite gradient stops the stage before it spoils the weights."""
        rate = self.settings.rate(step, self.steps)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_gradient_norm))
        if not math.isfinite(norm):
            raise MedbridgeError(
                f"step {step}: the gradient norm is {norm}; the weights were left as they were. Start "
                "another run from this run's last model (--model) with a lower learning rate or model.dtype float32."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"gradient_norm": norm, "learning_rate": rate}

    def finish(self) -> None:
        """Merge adapters into the weights and leave training mode."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()
            self._adapted = None
        self.policy.model.eval()

    # -- checkpoints ---------------------------------------------------------------------------------------

    def save(self, folder: Path, step: int, extra: dict[str, Any] | None = None) -> None:
        """Write trainable parameters and optimizer state to `folder/step-N`, then drop all but the last two."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"step-{step:06d}"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            part = Path(temporary) / target.name
            part.mkdir()
            save_file(tensors, part / "state.safetensors", metadata={"step": str(step)})
            (part / "state.json").write_text(json.dumps({"step": step, **(extra or {})}))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)

    def restore(self, folder: Path) -> int:
        """Load the latest checkpoint under `folder`; returns its step, or 0 where there is none."""
        found = checkpoints(folder)
        if not found:
            return 0
        path = found[-1] / "state.safetensors"
        try:
            with safe_open(path, framework="pt", device=str(self.policy.device)) as stored:
                names = {name.split("/", 1)[1] for name in stored.keys()}  # noqa: SIM118
                if names != set(self.parameters):
                    raise MedbridgeError(
                        f"{path}: holds other parameters than this stage trains (for example "
                        f"{sorted(names ^ set(self.parameters))[0]!r}). Set model.lora and model.freeze_vision as "
                        "they were, or start a new run."
                    )
                for key in stored.keys():  # noqa: SIM118
                    kind, name = key.split("/", 1)
                    parameter = self.parameters[name]
                    if kind == "parameter":
                        with torch.no_grad():
                            parameter.copy_(stored.get_tensor(key))
                    else:
                        self.optimizer.state[parameter][kind] = stored.get_tensor(key)
                return int(stored.metadata()["step"])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise MedbridgeError(
                f"{path}: checkpoint can't be read ({error}). Delete the folder {found[-1].name}: the stage then "
                "resumes from the checkpoint before it."
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


class Shuffle:
    """An endless stream of indices, a fresh permutation each epoch, that can start at any position."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (index, epoch) for the positions [start, start + size)."""
        for position in range(start, start + size):
            epoch, offset = divmod(position, self.count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            yield int(self._order[offset]), epoch
