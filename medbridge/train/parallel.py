"""Several processes that train one model together: collectives over torch.distributed, started by torchrun.

Tensors go over NCCL on GPUs and gloo on CPUs. Messages go over a gloo group of their own, in which a rank may wait for
hours while rank 0 samples: if rank 0 ends meanwhile, its connection closes and the waiting ends with an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy, pick_device
from medbridge.train.held import Held
from medbridge.train.messages import decode, encode
from medbridge.train.ranks import Ranks

_PATIENCE = timedelta(days=7)
"""How long a rank waits for a message: rank 0 may measure and sample for long. Torchrun ends all when one dies."""


class Processes(Ranks):
    """`Ranks` for several processes. Made by `joined`."""

    def __init__(self, mesh: DeviceMesh, messages: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self._mesh = mesh
        self._messages = messages

    def share(self, make: Callable[..., Any], *inputs: Any) -> Any:
        if not self.leads:
            answer = decode(self._receive())
            if "error" in answer:
                raise MedbridgeError(f"rank 0 has ended: {answer['error']}")
            return answer["value"]
        try:
            value = make(*inputs)
            content = encode({"value": value})
        except BaseException as error:
            self._send(encode({"error": f"{type(error).__name__}: {error}"}))
            raise
        self._send(content)
        return value

    def gather(self, value: Any) -> list[Any]:
        content = encode(value)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
        self._collective(lambda: dist.all_gather(sizes, torch.tensor([len(content)]), group=self._messages))
        most = max(int(size) for size in sizes)
        found = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.count)]
        own = torch.frombuffer(bytearray(content.ljust(most)), dtype=torch.uint8)
        self._collective(lambda: dist.all_gather(found, own, group=self._messages))
        return [decode(each[: int(size)].numpy().tobytes()) for each, size in zip(found, sizes, strict=True)]

    def hold(self, policy: Policy, trained: dict[str, nn.Parameter]) -> Held:
        from medbridge.train.sharding import Shards

        if policy.device.type != self._mesh.device_type:
            raise MedbridgeError(
                f"model.device is {policy.device.type}, and the processes that torchrun has started are to train on "
                f"{self._mesh.device_type}. Set model.device to auto, or hide the GPUs (CUDA_VISIBLE_DEVICES=)."
            )
        return Shards(policy, trained, self, self._mesh)

    def whole(self, part: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """The tensor of which each rank holds its rows, on rank 0; None on the others."""
        share = -(-shape[0] // self.count)
        padded = part.new_zeros((share, *shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.count)] if self.leads else None
        self._collective(lambda: dist.gather(padded, parts, dst=0))
        return torch.cat(parts)[: shape[0]] if parts is not None else None

    def leave(self) -> None:
        """Let go of the messages' group: its threads end with the last reference to it.

        One of them that is slow to drop the tensors of the last message would do so while the interpreter ends, want
        its lock, and abort the process behind all that it has done or said.
        """
        if dist.is_initialized():
            dist.destroy_process_group(self._messages)
        del self._mesh, self._messages

    def _send(self, content: bytes) -> None:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._collective(lambda: dist.broadcast(torch.tensor([len(data)]), src=0, group=self._messages))
        self._collective(lambda: dist.broadcast(data, src=0, group=self._messages))

    def _receive(self) -> bytes:
        size = torch.zeros(1, dtype=torch.long)
        self._collective(lambda: dist.broadcast(size, src=0, group=self._messages))
        data = torch.empty(int(size), dtype=torch.uint8)
        self._collective(lambda: dist.broadcast(data, src=0, group=self._messages))
        return data.numpy().tobytes()

    def _collective(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:  # gloo's: the other end is gone
            raise MedbridgeError(
                f"rank {self.rank} of {self.count}: another rank has ended ({str(error).splitlines()[0]}). Its own "
                "message says why. The run can be resumed: start it again as it was started."
            ) from error


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started, for as long as they train; one where this process is alone.

    Each has the GPU of its LOCAL_RANK, or where there is none a share of the CPUs.

    Raises:
        MedbridgeError: this machine has fewer GPUs than processes.
    """
    if not launched():
        yield Ranks()
        return
    device = pick_device("auto").type
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise MedbridgeError(
                f"torchrun has started process {local + 1} of this machine, which has {torch.cuda.device_count()} "
                "GPUs. Give --nproc-per-node as many as there are."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    ranks = Processes(mesh, dist.new_group(backend="gloo", timeout=_PATIENCE))
    try:
        yield ranks
        ranks.gather(None)  # none closes a connection on which another still waits
        dist.destroy_process_group()  # not behind an error: it would wait for what the others will never do
    finally:
        ranks.leave()
