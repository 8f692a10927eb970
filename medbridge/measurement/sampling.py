"""Drawing the completions of a measuring stage into its ledger, from where an earlier process stopped."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from medbridge.config import RunSettings
from medbridge.data import Item, grade, permutation
from medbridge.ledger import Ledger, Stage
from medbridge.progress import Meter
from medbridge.rollout import GREEDY, Engine, Graded, Request


class Sampler:
    """Completes a stage's rollouts for items; each batch of the engine is one transaction."""

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
        self._tokens, self._seconds = 0, 0.0

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
        by_id = {item.id: item for item in missing}
        began = time.perf_counter()
        for batch in self.engine.generate(requests, self.settings.rollout, seed=self.settings.seed):
            graded = [
                Graded(
                    rollout,
                    grade(by_id[rollout.item_id], rollout.permutation, rollout.text, self.settings.data.prompt),
                )
                for rollout in batch
            ]
            self.ledger.save_rollouts(self.stage.stage_id, 0, graded)
            self._tokens += sum(len(rollout.token_ids) for rollout in batch)
            rate = self._tokens / (self._seconds + time.perf_counter() - began)
            meter.advance(len({rollout.item_id for rollout in batch}), f"{rate:,.0f} tokens/s")
        self._seconds += time.perf_counter() - began
        self._done |= by_id.keys()


def measurement_request(item: Item, samples: int, seed: int, *, greedy: bool = True) -> Request:
    """One greedy completion, where wanted, and `samples` sampled ones, each under its own option order."""
    numbers = (*((GREEDY,) if greedy else ()), *range(samples))
    return Request(item, numbers, tuple(permutation(item, seed, number) for number in numbers))


def summarise_sampling(ledger: Ledger, stage: Stage) -> dict[str, float]:
    """Totals of a stage's rollouts, for its summary."""
    return {"seconds": time.time() - stage.started, **ledger.sampling_totals(stage.stage_id)}
