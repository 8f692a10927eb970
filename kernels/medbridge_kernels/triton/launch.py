"""How each kernel is launched: tile, threads and device. What the kernels compute stands beside them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

WARP = 64 if torch.version.hip else 32
"""Threads of a warp, AMD's or NVIDIA's."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Elements that a program takes at a time, and its threads."""

    tile: int
    threads: int

    def warps(self) -> int:
        """As many warps as make these threads."""
        return max(1, self.threads // WARP)


# Chosen by arithmetic and by the registers in docs/triton-kernels.md, not yet measured on a GPU.
LAUNCHES = {
    # Two 16-byte loads in flight per thread and so few registers that an SM holds its 2,048 threads: 64 KB in flight,
    # where an H100 needs about 20 KB an SM to fill its memory. Larger tiles only leave more in the masked rest.
    ("sweep", 2): Launch(4096, 256),
    ("sweep", 4): Launch(2048, 256),
    # The same loads, and as many stores.
    ("sweep_backward", 2): Launch(4096, 256),
    ("sweep_backward", 4): Launch(2048, 256),
    # Groups mostly have 8 to 64 rewards: one warp, without barriers.
    ("group_advantages", 8): Launch(64, 32),
    # A batch is split into this many rewards a program, which a later kernel reads as one value each.
    ("batch_moments", 8): Launch(1024, 256),
    # Sequences mostly have 100 to 10,000 tokens. One a thread: with two, or with 512 threads, a dozen sums and what the
    # sequence shares don't always fit the registers.
    ("policy_terms", 4): Launch(256, 256),
    # One program for each sum adds up what the sequences left, mostly less than a thousand.
    ("policy_sums", 4): Launch(1024, 256),
}


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which needs not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
