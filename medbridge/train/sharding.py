"""A policy whose model is sharded over ranks with FSDP2, so that each holds a part of every parameter.

Each decoder layer is gathered when it computes. All else (embeddings, output layer, vision tower) is one group that is
gathered for a whole pass: the loss reads the output layer outside of any module, and a pass without images, which
skips the vision tower, must take part in the same collectives as one with them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from medbridge.model.policy import Policy
from medbridge.train.held import Held, local_part
from medbridge.train.parameters import is_vision

if TYPE_CHECKING:
    from medbridge.train.parallel import Processes


class Shards(Held):
    """This rank's part of each parameter under training: its rows, counted along the first axis.

    They are plain tensors in FSDP's own memory, so that what works on parameters (AdamW, clipping) need know nothing of
    ranks. On rank 0 the policy that was given stays as it is beside them, whole, and what is published goes there:
    engines, probes and exports see an ordinary model.
    """

    def __init__(self, policy: Policy, trained: Mapping[str, nn.Parameter], ranks: Processes, mesh: DeviceMesh) -> None:
        self._ranks = ranks
        self._whole = dict(trained) if ranks.leads else {}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        model: Any = copy.deepcopy(policy.model) if ranks.leads else policy.model
        self._images = _shard(model, mesh)
        own = Policy(
            model, policy.processor, path=policy.path, compute_dtype=policy.compute_dtype,
            stored_dtype=policy.stored_dtype,
        )  # fmt: skip
        sources = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(own, {})
        self.sources = dict(zip(trained, sources, strict=True))
        self.parameters = {name: nn.Parameter(local_part(source)) for name, source in self.sources.items()}

    def collect(self) -> None:
        """Take the gradients over from FSDP.

        The vision tower has none where no rank has seen an image, as on one rank: there AdamW leaves it as it is, and
        of zeros its momentum would make a step.
        """
        images = self._ranks.largest(self._images.take()) > 0
        for name, source in self.sources.items():
            gradient, source.grad = source.grad, None
            kept = gradient is not None and (images or not is_vision(name))
            self.parameters[name].grad = local_part(gradient) if gradient is not None and kept else None

    def norm(self, gradients: list[Tensor]) -> Tensor:
        own = float(nn.utils.get_total_norm(gradients))
        (squares,) = self._ranks.total(own * own)
        like = next(iter(self.parameters.values()))
        return torch.tensor(math.sqrt(squares) if squares >= 0 else squares, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def publish(self) -> None:
        for name, parameter in self.parameters.items():
            whole = self._ranks.whole(parameter.detach(), self._shapes[name])
            if whole is not None:
                self._whole[name].copy_(whole)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored(self, name: str, tensor: Tensor) -> _Gathered | Tensor:
        """The whole tensor, which comes together when it is written; all ranks must write the same in one order."""
        return tensor if tensor.ndim == 0 else _Gathered(tensor, self._shapes[name], self._ranks)

    def part(self, name: str, whole: Tensor) -> Tensor:
        if whole.ndim == 0:
            return whole
        start, end = rows_of(self._ranks.rank, self._ranks.count, len(whole))
        return whole[start:end].clone()


class _Gathered:
    """A tensor that lies in parts on all ranks, and is put together on rank 0 when its content is asked for."""

    def __init__(self, part: Tensor, shape: tuple[int, ...], ranks: Processes) -> None:
        self.dtype = part.dtype
        self.shape = torch.Size(shape)
        self.nbytes = self.shape.numel() * part.element_size()
        self._part = part
        self._ranks = ranks

    def element_size(self) -> int:
        return self._part.element_size()

    def detach(self) -> Tensor:
        whole = self._ranks.whole(self._part.detach(), tuple(self.shape))
        return self._part if whole is None else whole


def rows_of(rank: int, count: int, rows: int) -> tuple[int, int]:
    """The rows [start, end) of a tensor that a rank holds, as FSDP deals them: equal shares, the last ones short."""
    share = -(-rows // count)
    return min(rank * share, rows), min((rank + 1) * share, rows)


class _Images:
    """Whether this rank's model was shown an image since that was asked last."""

    def __init__(self) -> None:
        self.shown = False

    def take(self) -> float:
        taken, self.shown = self.shown, False
        return float(taken)


def _shard(model: Any, mesh: DeviceMesh) -> _Images:
    """Shard a model in place; gradients are sums over ranks, for losses divide by counts of all ranks."""
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)  # a rank without images, or without work, adds zeros
    images = _Images()
    base = model.base_model
    model.hidden_states = base.forward
    register_fsdp_forward_method(model, "hidden_states")

    def forward(**inputs: Any) -> Any:
        model.reshard()  # after a pass without gradient the root is still as it was gathered then
        images.shown |= inputs.get("pixel_values") is not None
        return model.hidden_states(**inputs)

    base.forward = forward  # the output layer is gathered with it, and stays so to the end of the backward pass
    model.unshard()  # the first time FSDP lays out its memory
    model.reshard()
    return images
