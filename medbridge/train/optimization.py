"""What both stages stand on: the parameters under training with AdamW, schedule and exact checkpoints; data order."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.model.settings import ModelSettings
from medbridge.train.checkpoints import Checkpoint, Checkpoints, checkpoints, give_parts
from medbridge.train.ema import Ema
from medbridge.train.generators import generator_states, restore_generators, seed_generators
from medbridge.train.parameters import add_adapters, make_optimizer, trained_parameters
from medbridge.train.ranks import Ranks
from medbridge.train.settings import OptimizerSettings
from medbridge.train.tensor_files import Stored

_RANK_SEEDS = 1_000_003  # further apart than a stage has steps

__all__ = ["OptimizerSettings", "Shuffle", "Trainable", "checkpoints"]


class Trainable:
    """The parameters under training with their optimizer, schedule and checkpoints; `finish` merges adapters.

    With several ranks each makes one and calls the same methods in the same order.

    Attributes:
        policy: computes with what is trained. On several ranks it is another than the one given: that one, on rank 0,
            has the present weights after `publish`.
        parameters: what is trained, by name in the model; this rank's part of each.
        extra: what the caller saved with the checkpoint that `restore` loaded; empty without one.
        average: the moving average of the parameters, once `keep_average` was called.
    """

    def __init__(
        self,
        policy: Policy,
        model: ModelSettings,
        settings: OptimizerSettings,
        steps: int,
        *,
        seed: int,
        say: Callable[[str], None] = warnings.warn,
        ranks: Ranks | None = None,
    ) -> None:
        """`say` is told of skipped steps and of damaged checkpoints.

        Raises:
            MedbridgeError: an optimizer that can't train a part of each parameter.
        """
        self.ranks = ranks or Ranks()
        if self.ranks.count > 1 and settings.optimizer != "adamw":
            raise MedbridgeError(
                f"optimizer is {settings.optimizer}, whose states can't be shared out to {self.ranks.count} processes. "
                "Set adamw: sharded, its states take as much less memory."
            )
        self.settings = settings
        self.steps = steps
        self.seed = seed
        self.say = say
        self.extra: dict[str, Any] = {}
        self.average: Ema | None = None
        self._average_every = 1
        self._skipped = 0  # in a row
        self._last_checkpoint: Path | None = None
        self._adapted = None if model.lora is None else add_adapters(policy, model.lora, seed)
        network: nn.Module = policy.model if self._adapted is None else self._adapted
        self._given = policy
        self._held = self.ranks.hold(policy, trained_parameters(network, model))
        self.policy = self._held.policy
        self.parameters = self._held.parameters
        if model.gradient_checkpointing:
            self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = make_optimizer(self.parameters, settings, self.policy.device)
        self.policy.model.train()

    def keep_average(self, decay: float, every: int = 1) -> Ema:
        """From now on move an average with each update of each `every`th step.

        Before `restore`, which takes up the stored one.
        """
        self.average = Ema(self._held.sources, decay)
        self._average_every = every
        return self.average

    def begin(self, step: int) -> None:
        """Seed a step's dropout, so that a step taken again after a kill is the same; each rank has its own."""
        seed_generators(self.seed + step + self.ranks.rank * _RANK_SEEDS)

    def step(self, step: int, loss: float | None = None) -> dict[str, float]:
        """Clip, update, move the average, clear the gradients; returns the metrics of the update.

        `loss` is that of all ranks, the same on each.

        An update whose gradient, or `loss` where it is given, is not finite changes nothing: metric `skipped` is 1.

        Raises:
            MedbridgeError: the last of `max_skipped_steps` such updates in a row.
        """
        factor = self.settings.factor(step, self.steps)
        self._held.collect()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        total = self._held.norm(gradients)
        norm = float(total)
        skips = not (math.isfinite(norm) and (loss is None or math.isfinite(loss)))
        if not skips:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.max_gradient_norm, total)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            self.optimizer.step()
            if self.average is not None and step % self._average_every == 0:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skips(step, norm, loss, skips)
        return {
            "gradient_norm": norm,
            "learning_rate": self.settings.learning_rate * factor,
            "skipped": float(skips),
        }

    def _count_skips(self, step: int, norm: float, loss: float | None, skips: bool) -> None:
        if not skips:
            self._skipped = 0
            return
        self._skipped += 1
        found = f"step {step}: the gradient norm is {norm}" + ("" if loss is None else f" at a loss of {loss}")
        if self._skipped < self.settings.max_skipped_steps:
            self.say(
                f"{found}; the update is skipped ({self._skipped} in a row, {self.settings.max_skipped_steps} stop)"
            )
            return
        last = f"the last whole checkpoint is {self._last_checkpoint}" if self._last_checkpoint else "none was saved"
        raise MedbridgeError(
            f"{found}, and {self._skipped} updates in a row were not finite (max_skipped_steps). The weights were "
            f"left as they were; {last}. Start another run from this run's last model (--model) with a lower learning "
            "rate or model.dtype float32."
        )

    def finish(self) -> None:
        """Bring the weights to the policy that was given, merge adapters into them, and leave training mode."""
        self.publish()
        if self._adapted is not None and self.ranks.leads:  # those of the others are sharded
            self._adapted.merge_and_unload()
            self._adapted = None
        self._given.model.eval()

    def publish(self) -> None:
        """See that the policy that was given has the weights as they are now, on rank 0; on one rank it always has."""
        self._held.publish()

    # -- checkpoints ---------------------------------------------------------------------------------------

    def save(self, folder: Path, step: int, extra: dict[str, Any] | None = None, *, score: float | None = None) -> Path:
        """Write all that the steps after `step` depend on to `folder/step-N`; returns that folder.

        The newest `keep_checkpoints` stay, and the one with the highest `score`. `extra` is the caller's own state, as
        JSON: `restore` gives it back.

        Raises:
            MedbridgeError: the disk is full; the older checkpoints are as they were.
            ValueError: `extra` has a key `step` or `trainer`, which are taken; a score that is not finite.
        """
        if extra and {"step", "trainer"} & extra.keys():
            raise ValueError(f"the keys step and trainer of a checkpoint's state are taken: {sorted(extra)}")
        moments: dict[str, Stored] = {}
        numbers: dict[str, float] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    moments[f"{key}/{name}"] = self._held.stored(name, value)
                else:
                    numbers[f"{key}/{name}"] = value
        stored = self._held.stored
        weights = {name: stored(name, tensor) for name, tensor in self.parameters.items()}
        tensors: dict[str, dict[str, Stored]] = {"weights": weights, "optimizer": moments}
        if self.average is not None:
            tensors["average"] = {name: stored(name, tensor) for name, tensor in self.average.averages.items()}
        trainer = {
            "optimizer": self.settings.optimizer,
            "optimizer_numbers": numbers,
            "skipped": self._skipped,
            "generators": self.ranks.gather(generator_states(self.policy.device)),
        }
        store = Checkpoints(folder, keep=self.settings.keep_checkpoints, say=self.say)
        if not self.ranks.leads:
            give_parts(tensors)
        state = {**(extra or {}), "trainer": trainer}
        self._last_checkpoint = Path(self.ranks.share(lambda: str(store.save(step, tensors, state, score))))
        return self._last_checkpoint

    def restore(self, folder: Path) -> int:
        """Load the newest whole checkpoint under `folder`; returns its step, or 0 where there is none.

        Newer ones that are damaged are set aside, and `say` is told of them.

        Raises:
            MedbridgeError: the checkpoint is of other parameters, of another optimizer, or lacks an average.
        """
        store = Checkpoints(folder, keep=self.settings.keep_checkpoints, say=self.say)
        named = self.ranks.share(lambda: _named(store.newest()))  # damage is dealt with by one
        if named is None:
            return 0
        found = Checkpoint(Path(named[0]), named[1], named[2])
        state = found.state()
        trainer = state.pop("trainer")
        self._refuse_others(found, trainer["optimizer"])
        device = self.policy.device
        with torch.no_grad():
            for name, tensor in found.tensors("weights", device):
                self.parameters[name].copy_(self._held.part(name, tensor))
        for key, value in itertools.chain(found.tensors("optimizer", device), trainer["optimizer_numbers"].items()):
            kind, name = key.split("/", 1)
            part = self._held.part(name, value) if isinstance(value, Tensor) else value
            self.optimizer.state[self.parameters[name]][kind] = part
        if self.average is not None:
            averages = found.tensors("average", torch.device("cpu"))
            self.average.load({name: self._held.part(name, tensor) for name, tensor in averages})
        self.extra = {key: value for key, value in state.items() if key != "step"}
        self._skipped = trainer["skipped"]
        self._last_checkpoint = found.folder
        generators = trainer["generators"]
        if self.ranks.rank < len(generators):  # one that wasn't there is seeded by the next step
            restore_generators(generators[self.ranks.rank], self.policy.device)
        self.publish()
        return found.step

    def _refuse_others(self, found: Checkpoint, optimizer: str) -> None:
        """Refuse a checkpoint that was saved under other settings than these, before anything of it is loaded."""
        own = {(name, self._held.shape(name)) for name in self.parameters}
        others = own ^ set(found.shapes("weights").items())
        if others:
            raise MedbridgeError(
                f"{found.folder}: holds other parameters than this stage trains (for example {min(others)[0]!r}). Set "
                "model.lora and model.freeze_vision as they were, or start a new run."
            )
        if optimizer != self.settings.optimizer:
            raise MedbridgeError(
                f"{found.folder}: was saved with optimizer {optimizer}. Set it again, or start a new run."
            )
        averaged = bool(found.shapes("average"))
        if averaged != (self.average is not None):
            raise MedbridgeError(
                f"{found.folder}: {'holds a' if averaged else 'lacks the'} moving average of the weights that this "
                f"stage {'does not keep' if averaged else 'keeps'}. Set what it is for as it was, or start a new run."
            )


def _named(found: Checkpoint | None) -> list[Any] | None:
    """A checkpoint as ranks tell each other."""
    return None if found is None else [str(found.folder), found.step, found.score]


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
