"""What the policy computes as a reference: its present weights give way for a while to those of another model.

Nothing is held twice but the parameters under training, and with adapters not even these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from medbridge.model.policy import Policy
from medbridge.train.ema import Ema

Reference = Callable[[], AbstractContextManager[None]]
"""A context in which the policy's model has the weights of the reference."""


@contextmanager
def computing_as(policy: Policy, reference: Reference) -> Iterator[None]:
    """Within it the policy computes as the reference, without dropout and without a graph."""
    training = policy.model.training
    policy.model.eval()
    try:
        with torch.no_grad(), reference():
            yield
    finally:
        policy.model.train(training)


def first_model(policy: Policy) -> Reference:
    """The policy as it is now, before anything is trained or restored. Adapters must have been added.

    With adapters it is the model without them. Else what is trained is copied, in float32.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in policy.model.modules() if isinstance(module, BaseTunerLayer)]
    if layers:
        return lambda: _without(layers)
    trained = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    return Ema(trained, 0.0).in_place  # an average that never moves


@contextmanager
def _without(layers: list[Any]) -> Iterator[None]:
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        for parameter in trained:  # sharded modules take from their first forward pass what is trained, for good
            parameter.requires_grad_(True)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
