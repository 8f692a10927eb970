"""Drawing the completions of a measuring stage into its ledger, from where an earlier process stopped."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict

from medbridge.config import RunSettings
from medbridge.data import Item, grade, permutation
from medbridge.ledger import Ledger, Stage
from medbridge.progress import Meter
from medbridge.rollout import GREEDY, Engine, Graded, Request, Rollout


class Sampler:
    """Completes a stage's rollouts for items.

    What an engine yields is stored at once, in one transaction. Engines that finish items faster than they are stored
    yield several together (`rollout.pool`), so that storing never holds them up, and a kill loses nothing that was
    waiting for company.
    """

    def __init__(
        self, ledger: Ledger, stage: Stage, engine: Engine, settings: RunSettings, *, samples: int, greedy: bool = True
    ) -> None:
        """`samples` completions are drawn per item, and one greedy one where `greedy`."""
        self.ledger = ledger
        self.stage = stage
        self.engine = engine
        self.settings = settings
        self.samples = samples
        self.greedy = greedy
        self._done = ledger.asked(stage.stage_id)
        self._work = _Work(ledger, stage, engine)

    def complete(
        self,
        items: Sequence[Item],
        meter: Meter,
        *,
        shown: Sequence[Item] | None = None,
        greedy_only: Collection[str] = (),
    ) -> None:
        """Sample what is missing of `items`.

        Args:
            shown: the same items with the images that the model is to see.
            greedy_only: ids of items of which the greedy completion is enough.
        """
        asked = {item.id: item for item in (shown or items)}
        missing = [item for item in items if item.id not in self._done]
        meter.advance(len(items) - len(missing))
        requests = [
            measurement_request(
                asked[item.id], 0 if item.id in greedy_only else self.samples, self.settings.seed, greedy=self.greedy
            )
            for item in missing
        ]
        if not requests:
            return
        by_id = {item.id: item for item in missing}
        self.engine.start()  # which is not the speed of sampling
        self._work.begin()
        try:
            for batch in self.engine.generate(requests, self.settings.rollout, seed=self.settings.seed):
                graded = [
                    Graded(
                        rollout,
                        grade(by_id[rollout.item_id], rollout.permutation, rollout.text, self.settings.data.prompt),
                    )
                    for rollout in batch
                ]
                self.ledger.save_rollouts(self.stage.stage_id, 0, graded)
                finished = {rollout.item_id for rollout in batch}
                self._done |= finished
                self._work.add(batch)
                meter.advance(len(finished), self._work.note())
        finally:
            self._work.keep()


class _Work:
    """Seconds, items and tokens of a stage's sampling, and its engines' counts, over all processes that took part."""

    def __init__(self, ledger: Ledger, stage: Stage, engine: Engine) -> None:
        self._ledger = ledger
        self._key = _work_key(stage)
        self._engine = engine
        self._totals: dict[str, float] = ledger.meta(self._key) or {}
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._at, self._counts = time.perf_counter(), asdict(self._engine.stats())

    def add(self, batch: Sequence[Rollout]) -> None:
        """Count what was done since the last call; `batch` was stored."""
        at, counts = time.perf_counter(), asdict(self._engine.stats())
        new = {name: count - self._counts[name] for name, count in counts.items()}
        new["seconds"] = at - self._at
        new["items"] = len({rollout.item_id for rollout in batch})
        new["tokens"] = sum(len(rollout.token_ids) for rollout in batch)
        self._totals = {name: self._totals.get(name, 0) + value for name, value in new.items()}
        self._at, self._counts = at, counts

    def keep(self) -> None:
        """Store the totals."""
        self.add(())
        self._ledger.set_meta(self._key, self._totals)

    def note(self) -> str:
        """In a few words, for the screen."""
        speeds = _speeds(self._totals)
        hits = {"prefix cache": "prefix_hit_rate", "image cache": "image_hit_rate"}
        shown = [f"{name} {speeds[key]:.0%}" for name, key in hits.items() if key in speeds]
        return ", ".join([f"{speeds['tokens_per_second']:,.0f} tokens/s", *shown])


def measurement_request(item: Item, samples: int, seed: int, *, greedy: bool = True) -> Request:
    """One greedy completion, where wanted, and `samples` sampled ones, each under its own option order."""
    numbers = (*((GREEDY,) if greedy else ()), *range(samples))
    return Request(item, numbers, tuple(permutation(item, seed, number) for number in numbers))


def summarise_sampling(ledger: Ledger, stage: Stage) -> dict[str, float]:
    """Totals of a stage's rollouts, for its summary.

    `seconds` are those since the stage was begun, `sampling_seconds` those in which it sampled. The speeds are over the
    latter; the hit rates (of prompt tokens, and of images) are there where the engine has such a cache.
    """
    work = ledger.meta(_work_key(stage)) or {}
    return {"seconds": time.time() - stage.started, **ledger.sampling_totals(stage.stage_id), **_speeds(work)}


def _work_key(stage: Stage) -> str:
    return f"sampling of stage {stage.stage_id}"


def _speeds(work: Mapping[str, float]) -> dict[str, float]:
    if not work:
        return {}
    seconds = max(work["seconds"], 1e-9)
    found = {
        "sampling_seconds": work["seconds"],
        "tokens_per_second": work["tokens"] / seconds,
        "items_per_second": work["items"] / seconds,
        "restarts": work["restarts"],
    }
    for cache in ("prefix", "image"):
        if work[f"{cache}_queries"]:
            found[f"{cache}_hit_rate"] = work[f"{cache}_hits"] / work[f"{cache}_queries"]
    return found
