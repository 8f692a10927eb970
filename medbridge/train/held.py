"""What one process holds of the parameters under training: here all of them, as the model's own tensors.

`sharding.Shards` has the same interface where a process holds a part of each.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from medbridge.model.policy import Policy
from medbridge.train.tensor_files import Stored


class Held:
    """The parameters under training, whole.

    Attributes:
        policy: computes with them.
        parameters: what the optimizer moves, by name.
        sources: the model's own parameters, by name: what a moving average stands in for.
    """

    def __init__(self, policy: Policy, trained: Mapping[str, nn.Parameter]) -> None:
        self.policy = policy
        self.parameters: dict[str, nn.Parameter] = dict(trained)
        self.sources: dict[str, nn.Parameter] = self.parameters

    def collect(self) -> None:
        """Have the parameters hold the gradients of what was computed since the last call."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of the whole gradient; the same on all ranks."""
        return nn.utils.get_total_norm(gradients)

    def publish(self) -> None:
        """Bring the present values to the policy that the trainer was given, on rank 0. All ranks call it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's."""
        return tuple(self.parameters[name].shape)

    def stored(self, name: str, tensor: Tensor) -> Stored:
        """What is to be written of a tensor that goes with a parameter: the whole of it."""
        return tensor

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a stored tensor that goes with a parameter."""
        return whole


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(parameter, DTensor)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, sharded or not, in the parameter's own memory; without a gradient."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
