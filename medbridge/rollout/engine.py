"""What every rollout engine takes and gives back. The engines themselves live in their own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from medbridge.data.answers import Outcome
from medbridge.data.items import Item, Permutation

GREEDY = -1
"""Sample index of the one greedy completion of an item (Acc@1); sampled completions count from 0."""


class SamplingSettings(BaseModel):
    """How completions are drawn. Nothing is inherited from a model's generation config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(0.7, gt=0, le=10, description="Softmax temperature of sampled completions.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus mass kept when sampling; 1 keeps all tokens.")
    max_new_tokens: int = Field(
        1024, ge=1, description="Longest completion in tokens; a longer one is cut and counted as truncated."
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

    `logprobs` (float32, one a token) are those of the policy at the sampling temperature *before* the nucleus
    cut (temperature 1 for the greedy completion), so that a trainer can recompute them from the logits. `images` is
    how many images the engine gave to the model; None where it can't tell.
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


@dataclass(frozen=True, slots=True)
class Graded:
    """A rollout with what was read from it, and its reward where it was sampled for training."""

    rollout: Rollout
    outcome: Outcome
    reward: float | None = None


class Engine(Protocol):
    """Draws completions. One batch in, its rollouts out, in the order of the requests and their samples."""

    name: str

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        """Yield the rollouts of successive batches of whole requests.

        What is drawn for a sample depends on the weights, `seed`, the item's id and the sample's index only
        (up to floating-point differences between batch shapes).
        """
        ...
