"""Greedy accuracy of a model in training on items that are held out of it. It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from medbridge.config import RunSettings
from medbridge.data import ImageCache, Item, grade, permutation
from medbridge.model import Policy
from medbridge.rollout import GREEDY, Request, TransformersEngine


class HeldOut:
    """Asks a policy as it is now, on the transformers engine.

    That one has the weights after any step, the last one too, while an engine of another process may be sampling the
    next step's completions from older ones.
    """

    def __init__(self, policy: Policy, items: Sequence[Item], settings: RunSettings, images: ImageCache) -> None:
        self._settings = settings
        self._items = {item.id: item for item in items}
        self._engine = TransformersEngine(
            policy, settings.data.prompt, images, batch_size=settings.rollout.batch_size
        )  # fmt: skip

    def __call__(self, step: int) -> float:
        """Acc@1 after a step. An answer that can't be read is not right."""
        requests = [
            Request(item, (GREEDY,), (permutation(item, self._settings.seed, 0),)) for item in self._items.values()
        ]
        right = 0
        for rollouts in self._engine.generate(requests, self._settings.rollout, seed=self._settings.seed):
            for rollout in rollouts:
                item = self._items[rollout.item_id]
                outcome = grade(item, rollout.permutation, rollout.text, self._settings.data.prompt)
                right += outcome.status == "correct"
        return right / len(self._items)
