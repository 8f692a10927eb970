"""An exponential moving average of the parameters under training, that can stand in for them as a reference policy.

When it moves, and what it is a reference for, is decided by who holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from medbridge.errors import MedbridgeError
from medbridge.train.held import is_sharded, local_part


class Ema:
    """ref = d ref + (1 - d) policy after each update, held in float32, beside the parameters and on their devices.

    Computed as ref + (1 - d) (policy - ref): one rounding of ref, and a policy that stands still is not left by a
    bit. What float32 can't hold is a movement below half a unit in the last place of ref, so that ref stays within
    about 2^-24 / (1 - d) relative of a policy that no longer moves, instead of reaching it.

    Under adapters only these are parameters: the average is that of the two factors, not that of their product. Of
    sharded parameters each rank averages its own part.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Begin at the parameters as they are now.

        Raises:
            ValueError: `decay` outside of [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average lies in [0, 1), not at {decay}")
        self.decay = decay
        self._parameters = dict(parameters)
        self.averages = {name: local_part(p).to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its parameter, once."""
        newest = [local_part(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), newest, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model computes with the averages. Nothing is copied where parameters are float32 and whole.

        For forward passes without gradient. A graph that was recorded before may be open where parameters are whole,
        and must not run backward within it. Nothing may be updated, saved or drawn from the parameters meanwhile.
        """
        own = {name: _set(p, self.averages[name].to(p.dtype)) for name, p in self._parameters.items()}
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                _set(parameter, own[name])

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over stored averages (float32, shaped as the parameters), bit for bit.

        Raises:
            MedbridgeError: other names, shapes or types than this average holds.
        """
        if {name: (t.shape, t.dtype) for name, t in averages.items()} != {
            name: (t.shape, t.dtype) for name, t in self.averages.items()
        }:
            raise MedbridgeError(
                "the stored moving average is one of other parameters than this stage trains. Set what it trains "
                "(model.lora, model.freeze_vision) as it was, or start a new run."
            )
        for name, tensor in averages.items():
            self.averages[name].copy_(tensor)


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> Tensor:
    """Give a parameter, or this rank's part of it, another value; returns the one it had."""
    part = local_part(parameter)
    if not is_sharded(parameter):
        before = parameter.data
        parameter.data = value
        return before
    before = part.clone()  # FSDP gathers from memory of its own, whose content is what counts
    part.copy_(value)
    return before
