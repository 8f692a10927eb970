"""What every rollout engine takes and gives back. The engines themselves live in their own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from medbridge.data.answers import Outcome
from medbridge.data.items import Item, Permutation

if TYPE_CHECKING:
    from medbridge.rollout.weights import Weights

GREEDY = -1
"""Sample index of the one greedy completion of an item (Acc@1); sampled completions count from 0."""

Phase = Literal["start", "sampling", "weights", "sleep"]
"""What an engine is doing, as its watchdog names it."""


class SamplingSettings(BaseModel):
    """How completions are drawn. Nothing is inherited from a model's generation config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(0.7, gt=0, le=10, description="Softmax temperature of sampled completions.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus mass kept when sampling; 1 keeps all tokens.")
    max_new_tokens: int = Field(
        1024, ge=1, description="Longest completion in tokens; a longer one is cut and counted as truncated."
    )
    stop: tuple[str, ...] = Field(
        (), description="Texts that end a completion, beside the model's end-of-turn tokens; cut from its text."
    )


@dataclass(frozen=True, slots=True)
class Request:
    """The completions wanted of one item.

    `samples` are sample indices (`GREEDY` for the greedy one); `permutations` gives the option order of each.
    """

    item: Item
    samples: tuple[int, ...]
    permutations: tuple[Permutation, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion.

    `logprobs` (float32, one a token) are those of the distribution that the tokens were drawn from: at the sampling
    temperature, without banned tokens, and renormalised over the nucleus where there is one. The greedy completion's
    are those at temperature 1, uncut. `images` is how many images the engine gave to the model; None where it can't
    tell.
    `weights` is the version of the weights that drew it (`Engine.update_weights`); 0 before the first.
    """

    item_id: str
    sample: int
    permutation: Permutation
    text: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    images: int | None = None
    weights: int = 0


@dataclass(frozen=True, slots=True)
class Graded:
    """A rollout with what was read from it, and its reward where it was sampled for training."""

    rollout: Rollout
    outcome: Outcome
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made. Those of the caches are tokens; 0 of 0 where an engine has no such cache.

    Attributes:
        prompt_tokens, completion_tokens: of all rollouts so far, a prompt once per sample.
        prefix_hits, prefix_queries: prompt tokens found in the prefix cache, of those looked up.
        image_hits, image_queries: images found processed already, of those looked up.
        restarts: times that the engine was started anew after a failure.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    image_hits: int = 0
    image_queries: int = 0
    restarts: int = 0

    def __add__(self, other: EngineStats) -> EngineStats:
        return EngineStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class EngineFailure(Exception):
    """An engine that cannot go on as it is: started anew, it may. What it had not yielded is lost.

    A request that can never work (a prompt that is too long) is a MedbridgeError instead.
    """

    def __init__(self, phase: Phase, kind: Literal["died", "hung", "out of memory"], detail: str) -> None:
        """`detail` is one line: exit status, signal, seconds waited, or the engine's own last words."""
        super().__init__(f"{kind} while in phase {phase!r}: {detail}")
        self.phase = phase
        self.kind = kind
        self.detail = detail


class Engine(Protocol):
    """Draws completions.

    Made without starting anything. `start` may take minutes. After an `EngineFailure`, `close` and `start` give an
    engine with the model's first weights, ready for `update_weights`. Used by one thread at a time.
    """

    name: str

    def start(self) -> None:
        """Get ready to sample: processes, weights, caches. Nothing happens where that is done already."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        """Yield rollouts as they finish: in whole requests, in any order, their samples in the request's order.

        What is drawn for a sample depends on the weights, `seed`, the item's id and the sample's index only
        (up to floating-point differences between batch shapes).

        Raises:
            MedbridgeError: before anything is sampled, for a prompt that leaves no room for an answer; names its item.
            EngineFailure: the engine died, hung or ran out of memory.
        """
        ...

    def update_weights(self, weights: Weights) -> None:
        """Sample from these weights from now on; what was cached of the old ones is dropped.

        Raises:
            EngineFailure: as for `generate`.
        """
        ...

    def sleep(self) -> None:
        """Give accelerator memory back while a trainer needs it; the next call of any kind wakes the engine up."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """End its processes. Calling it again does nothing."""
        ...
