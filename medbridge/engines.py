"""The rollout engines of a run: one at a time, kept as long as the next stage samples from the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from medbridge.config import RunSettings
from medbridge.data import ImageCache
from medbridge.errors import MedbridgeError
from medbridge.model import Policy, Prompter, pick_device, pick_dtype
from medbridge.rollout import Engine
from medbridge.rollout.choose import Choice, choose, make_engine


class Engines:
    """Makes them as the settings say, and ends them."""

    def __init__(self, settings: RunSettings, images: ImageCache, log_dir: Path, say: Callable[[str], None]) -> None:
        """`log_dir` takes what engines in other processes write; `say` is told which engine it is, and of failures."""
        self.settings = settings
        self.images = images
        self.log_dir = log_dir
        self.say = say
        self._held: tuple[str, Engine] | None = None
        self._said = ""

    def choice(self) -> Choice:
        """Which engine the settings mean on this machine.

        Raises:
            MedbridgeError: one that isn't there, or that can't do what `rl` asks for.
        """
        rl = self.settings.rl
        device = pick_device(self.settings.model.device).type
        choice = choose(self.settings.rollout, device="cuda" if device == "cuda" else "cpu")
        if choice.engine == "transformers" and (rl.staleness or rl.sync_every > 1):
            raise MedbridgeError(
                f"rl.staleness is {rl.staleness} and rl.sync_every {rl.sync_every}, and rollouts come from the "
                "transformers engine, which samples from the very weights that are trained: it can't keep older ones. "
                "Set them to 0 and 1, or rollout.engine to vllm."
            )
        return choice

    def of(self, path: str) -> Engine:
        """An engine that samples from the model in a folder (or of an id): the one held, if it is of that model."""
        if self._held is None or self._held[0] != path:
            self.release()
            self._held = path, self._make(path, None)
        return self._held[1]

    def of_policy(self, policy: Policy) -> Engine:
        """An engine for a model that is about to be trained, and is there already. The caller closes it."""
        self.release()
        return self._make(policy.path, policy)

    def release(self) -> None:
        """End the engine that is held, if any: its memory is wanted."""
        if self._held is not None:
            self._held[1].close()
            self._held = None

    def _make(self, path: str, policy: Policy | None) -> Engine:
        settings = self.settings
        choice, lora = self.choice(), settings.model.lora
        rank = lora.rank if lora is not None and policy is not None else 0  # a policy that is given is to be trained
        if choice.why != self._said:
            self._said = choice.why
            self.say(choice.why)
        if policy is None and choice.engine == "transformers":
            policy = Policy.load(path, settings.model)
        half = pick_dtype(settings.model.dtype, pick_device(settings.model.device)) == torch.bfloat16
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if half else "float32"
        return make_engine(
            choice, settings.rollout, policy or Prompter.load(path), settings.data.prompt, self.images, model=path,
            dtype=dtype, seed=settings.seed, log_dir=self.log_dir, say=self.say,
            adapter_rank=rank,
        )  # fmt: skip
