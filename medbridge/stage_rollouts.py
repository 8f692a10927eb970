"""The rollouts of a sharpen stage: drawn by an engine, graded, kept in the ledger, from weights that are verified.

What is asked for in which step is the trainer's business (`train.groups`); this joins it with engine and ledger.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from medbridge.config import RunSettings
from medbridge.data import ImageCache, Item
from medbridge.ledger import Ledger, Stage
from medbridge.model import Policy
from medbridge.rollout import Engine, Graded, Pool, Request, Rollout, SamplingSettings
from medbridge.rollout.verify import Mismatch, verify
from medbridge.rollout.weights import Weights


class StageRollouts:
    """`train.groups.Rollouts` for one stage of a run.

    `stored`, `sample` and `store` may be called by a thread of their own: it gets its own connection to the ledger.
    """

    def __init__(
        self,
        ledger: Path,
        stage: Stage,
        engine: Engine,
        policy: Policy,
        settings: RunSettings,
        *,
        grade: Callable[[Rollout], Graded],
        probes: Sequence[Item],
        images: ImageCache,
        scratch: Path,
        seed: int,
    ) -> None:
        """`probes` are the items that each transfer of weights is checked on; `scratch` takes weights on their way."""
        self.stage = stage
        self.engine = engine
        self.policy = policy
        self.settings = settings
        self.shares_weights = engine.name == "transformers"
        self._path = ledger
        self._grade = grade
        self._probes = probes
        self._images = images
        self._scratch = scratch
        self._seed = seed
        self._own = threading.local()
        self._weights: Weights | None = None
        self._metrics: dict[str, float] = {}

    def stored(self, step: int) -> list[Graded]:
        """What an earlier process has stored for this step."""
        return self._ledger.rollouts(self.stage.stage_id, step=step)

    def sample(
        self, step: int, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Generator[list[Graded], None, None]:
        """Draw and reward completions, in whole requests and any order."""
        for batch in self.engine.generate(requests, sampling, seed=self._seed + step):
            yield [self._grade(rollout) for rollout in batch]

    def store(self, step: int, graded: Sequence[Graded]) -> None:
        self._ledger.save_rollouts(self.stage.stage_id, step, graded)

    def rest(self) -> None:
        """The engine gives accelerator memory back until it is asked again."""
        self.engine.sleep()

    def sync(self, version: int) -> None:
        """Bring the present weights to the engine, and see that it samples from them.

        Raises:
            MedbridgeError: it does not, or there is no room for the weights.
        """
        weights, older = Weights(self.policy, version, self._scratch), self._weights
        self.engine.update_weights(weights)
        self._weights = weights  # an engine that is started anew asks for them again
        if older is not None:
            older.release()
        if not self.shares_weights:
            self._metrics = self._probe(version)
        if self.settings.rl.staleness:
            weights.train_on()  # while an engine may be started anew

    def take_metrics(self) -> dict[str, float]:
        """Of the last transfer of weights: how far engine and trainer lay apart on the probe, in nats a token."""
        taken, self._metrics = self._metrics, {}
        return taken

    def close(self) -> None:
        """End the engine, and remove what was written for it."""
        self.engine.close()
        if self._weights is not None:
            self._weights.release()

    def _probe(self, version: int) -> dict[str, float]:
        """The worst of what each engine's probe shows."""
        began = time.perf_counter()
        found: list[Mismatch] = []

        def look(engine: Engine) -> None:
            found.append(
                verify(
                    engine, self.policy, self._probes, self.settings.data.prompt, self._images,
                    dtype=self.policy.compute_dtype, version=version, seed=self._seed,
                )
            )  # fmt: skip

        if isinstance(self.engine, Pool):
            self.engine.on_each(look)
        else:
            look(self.engine)
        return {
            "probe_difference": max(each.mean for each in found),
            "probe_worst": max(each.worst for each in found),
            "seconds_probing": time.perf_counter() - began,
        }

    @property
    def _ledger(self) -> Ledger:
        if not hasattr(self._own, "ledger"):
            self._own.ledger = Ledger(self._path)
        ledger: Ledger = self._own.ledger
        return ledger
