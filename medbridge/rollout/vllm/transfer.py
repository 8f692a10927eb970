"""The trainer's side of vLLM's weight transfer: weights go from GPU to GPU, without a disk between.

vLLM's own trainer engines do it (`vllm.distributed.weight_transfer`, 0.32); this picks the one that fits, gives it the
weights, and carries what it says to the engine's process as plain data. `weights.transfer` takes it there. Written from
vLLM's sources and tested as far as that goes without a GPU: it has not run on a GPU yet.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from medbridge.rollout.weights import Weights

Route = Literal["ipc", "nccl", "folder"]
Call = Callable[[str, dict[str, Any]], None]

_BUFFER_BYTES = 256 << 20
"""What a transfer holds beside the weights, unless one matrix alone is larger."""

_HANDLE = (
    "tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype", "storage_device",
    "storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad", "ref_counter_handle",
    "ref_counter_offset", "event_handle", "event_sync_required",
)  # fmt: skip
"""Arguments of torch's `rebuild_cuda_tensor`, in order: what a CUDA IPC handle is made of."""

_BYTES = ("storage_handle", "ref_counter_handle", "event_handle")


def choose_route(trainer: str | None, workers: Sequence[str]) -> tuple[Route, str]:
    """How weights reach an engine, and why so. vLLM is started with the first two as its weight-transfer backend.

    Args:
        trainer: UUID of the GPU that the policy is on; None on a CPU.
        workers: UUIDs of the GPUs of the engine's workers; empty on a CPU.
    """
    if trainer is None or not workers:
        return "folder", "trainer and engine are not both on a GPU"
    if list(workers) == [trainer]:
        return "ipc", "the engine shares the trainer's GPU"
    if trainer not in workers:
        return "nccl", "the engine has GPUs of its own"
    return "folder", (
        "the engine has the trainer's GPU and others: IPC reaches the trainer's alone, and NCCL takes one process a GPU"
    )


class Transfer:
    """Sends versions of a policy's weights to one engine, in place."""

    def __init__(
        self, route: Literal["ipc", "nccl"], workers: int, call: Callable[[str, dict[str, Any]], None]
    ) -> None:
        """`call(step, info)` has the engine's process do `weights.transfer(engine, step, info)` and waits for it; with
        nccl it is called from a second thread while this one sends. `workers` is the engine's number of GPUs.
        """
        self.route = route
        self.workers = workers
        self._client = Client(call)
        self._source = Source()
        self._engine: Any = None

    def send(self, weights: Weights) -> None:
        """Have the engine hold these weights. The first call also makes the connection."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self._source.weights = weights
        if self._engine is None:
            self._engine = WeightTransferTrainerFactory.trainer_init(
                self.init_info(weights), client=self._client, source=self._source
            )
        self._engine.send_weights()

    def init_info(self, weights: Weights) -> Any:
        """What vLLM's trainer engine is made from."""
        largest = max(tensor.nbytes for _, tensor in weights.tensors())
        options = {"rank": 0, "packed": True, "packed_buffer_size_bytes": max(_BUFFER_BYTES, largest)}
        if self.route == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(**options)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address="127.0.0.1", master_port=_free_port(), world_size=1 + self.workers, **options
        )

    def close(self) -> None:
        """Release the connection; the engine's own end goes with its process."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


class Source:
    """The weights as vLLM's trainer engines ask for them (its `WeightSource`)."""

    weights: Weights

    def metadata(self) -> list[Any]:
        """Name, type and shape of what iterating gives, in order."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights.tensors()


class Client:
    """What vLLM's trainer engines ask of the engine (its `VLLMWeightSyncClient`), as steps and plain data."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init", init_info)

    def start_weight_update(self) -> None:
        self._call("start", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.get("ipc_handles")
        encoded = {} if handles is None else {"ipc_handles": {gpu: encode_handle(h) for gpu, h in handles.items()}}
        self._call("update", {**update_info, **encoded})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        del weight_version  # rollouts carry ours
        self._call("finish", {})


def encode_handle(handle: Sequence[Any]) -> dict[str, Any]:
    """A CUDA IPC handle, as torch's `reduce_tensor` makes it, as JSON: vLLM would pickle it."""
    fields = dict(zip(_HANDLE, handle, strict=True))
    if fields.pop("tensor_cls") is not Tensor or fields.pop("storage_cls") is not torch.storage.TypedStorage:
        raise TypeError(f"not the handle of a plain tensor: {handle[0]} on {handle[4]}")
    fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    for name in _BYTES:
        fields[name] = base64.b64encode(fields[name]).decode()
    return fields | {"tensor_size": list(fields["tensor_size"]), "tensor_stride": list(fields["tensor_stride"])}


def decode_handle(fields: dict[str, Any]) -> tuple[Any, ...]:
    """The inverse of `encode_handle`."""
    handle = fields | {name: base64.b64decode(fields[name]) for name in _BYTES}
    handle |= {
        "tensor_cls": Tensor, "storage_cls": torch.storage.TypedStorage, "dtype": getattr(torch, fields["dtype"]),
        "tensor_size": torch.Size(fields["tensor_size"]), "tensor_stride": tuple(fields["tensor_stride"]),
    }  # fmt: skip
    return tuple(handle[name] for name in _HANDLE)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
