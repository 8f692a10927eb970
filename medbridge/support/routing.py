"""Which training items a stage can use: those without support are bridged, those that are right at times are
sharpened, and those that are always right are left out but for a small anchor.

It reads tallies of training items; the caller sees to it that none is from the validation or test split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medbridge.support.spectra import (
    DEFAULT_MARGIN,
    above_floor_values,
    default_grid,
    posterior_weights,
    spectrum,
)
from medbridge.support.tallies import Tally

Floats = NDArray[np.float64]

_PRIOR_ITEMS = 20
"""Weight of the Jeffreys prior beside the items' own spectrum. It carries the posterior where items are few, and
keeps the spectrum's gaps open where they are many: the spectrum has atoms, and p between two of them is possible."""

_ROUNDING = 1e-9
"""n f carries rounding: 9 samples at f = 1/3 are guessed right 3 times."""

_USES = ("bridge", "sharpen", "anchor", "left_out")


class RoutingSettings(BaseModel):
    """How training items are divided between the stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(
        0,
        ge=0,
        description="Completions sampled per training item before a stage to route it. 0: no routing, every stage "
        "uses all of its items.",
    )
    margin: float = Field(
        DEFAULT_MARGIN,
        gt=0,
        le=0.5,
        description="Share of the room above its guessing floor by which an item's probability of a right answer "
        "must exceed the floor to count as supported, and within which of 1 it counts as always right.",
    )
    confidence: float = Field(
        0.8,
        gt=0.5,
        lt=1,
        description="Posterior probability of being always right that an item needs to be left out. Between "
        "bridge and sharpen the likelier one is taken.",
    )
    anchor_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of the items that are always right that stay in training, against forgetting.",
    )


@dataclass(frozen=True, slots=True)
class Routes:
    """Item ids by use, in the order of the tallies. Every id is in exactly one.

    Attributes:
        bridge: without support: supervised fine-tuning.
        sharpen: supported but not always right: RL.
        anchor: always right, kept against forgetting.
        left_out: always right, not used.
    """

    bridge: tuple[str, ...]
    sharpen: tuple[str, ...]
    anchor: tuple[str, ...]
    left_out: tuple[str, ...]


def route(tallies: Sequence[Tally], settings: RoutingSettings, *, seed: int) -> Routes:
    """Divide training items by the posterior of their probability p of a right answer.

    The prior is empirical: the spectrum of these very items, together with a Jeffreys prior worth 20 items
    (evenly spread in arcsin sqrt p). With f the floor and m the margin, an item is

    - bridged if it was right no more often than guessing (c <= n f): what the other items can do is no evidence
      that this one is within reach;
    - otherwise always right if ``P(p >= 1 - m (1 - f) | c) >= confidence``;
    - otherwise bridged if ``P(p >= f + m (1 - f) | c) < 1/2``, and sharpened if not.

    With equal n and floor, an item with more right answers is never sent to a lower one of the three. An item
    without samples has the prior for its posterior.

    Args:
        tallies: one per item.
        settings: of the routing.
        seed: of the anchor; whether an item is one depends on this and on its id only.

    Raises:
        ValueError: an item id that occurs twice.
    """
    repeated = [item_id for item_id, count in Counter(tally.item_id for tally in tallies).items() if count > 1]
    if repeated:
        raise ValueError(f"item {repeated[0]!r} has more than one tally")
    use = _uses(tallies, settings, seed)
    return Routes(
        **{name: tuple(t.item_id for t, own in zip(tallies, use, strict=True) if own == name) for name in _USES}
    )


def _uses(tallies: Sequence[Tally], settings: RoutingSettings, seed: int) -> list[str]:
    n = np.array([tally.n for tally in tallies], dtype=np.int64)
    c = np.array([tally.c for tally in tallies], dtype=np.int64)
    floors = np.array([tally.floor for tally in tallies], dtype=np.float64)
    grid = default_grid(floors)
    posterior = posterior_weights(n, c, grid, _prior(n, c, grid))
    supported = (posterior * above_floor_values(grid, floors, settings.margin)).sum(axis=1)
    top = 1 - settings.margin * (1 - floors)
    always_right = (posterior * (grid >= top[:, None])).sum(axis=1)
    guessed = (n > 0) & (floors < 1) & (c <= n * floors + _ROUNDING)
    left = ~guessed & (always_right >= settings.confidence)
    reached = ~guessed & (supported >= 0.5)
    uses = []
    for tally, sure, likely in zip(tallies, left, reached, strict=True):
        if sure:
            anchored = hashed_fraction("anchor", seed, tally.item_id) < settings.anchor_share
            uses.append("anchor" if anchored else "left_out")
        else:
            uses.append("sharpen" if likely else "bridge")
    return uses


def _prior(n: NDArray[np.int64], c: NDArray[np.int64], grid: Floats) -> Floats:
    jeffreys = np.isin(grid, default_grid()) / default_grid().size
    items = int((n > 0).sum())
    if not items:
        return jeffreys
    own = spectrum(n, c, grid=grid).weights
    return (items * own + _PRIOR_ITEMS * jeffreys) / (items + _PRIOR_ITEMS)


def hashed_fraction(purpose: str, seed: int, item_id: str) -> float:
    """A number in [0, 1) that depends on the arguments only."""
    digest = hashlib.blake2b(f"{purpose}|{seed}|{item_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
