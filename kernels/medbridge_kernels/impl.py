"""The back ends by name, and which of them there are for a tensor.

"reference" is plain torch and runs everywhere. "native" is the C++ extension, for CPU tensors. "triton" is for NVIDIA
and AMD GPUs; on CPU tensors it runs where TRITON_INTERPRET=1 asks for Triton's interpreter.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from medbridge_kernels import native, triton

Impl = Literal["auto", "triton", "native", "reference"]
Chosen = Literal["triton", "native", "reference"]

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of logits and hidden states that native and triton take: they compute in float32."""
_warned: set[str] = set()


def choose(impl: Impl, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FAST_DTYPES) -> Chosen:
    """The back end to use for `impl` on a tensor like this; `dtypes` are those that the fast back ends take.

    "auto" takes triton on a GPU and native on a CPU, and the reference for other dtypes and devices. Where the fast one
    is missing it warns once and takes the reference.

    Raises:
        NotImplementedError: a back end that isn't installed, or that doesn't serve the device or dtype.
        ValueError: no back end's name.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl = {impl!r}, must be one of {', '.join(get_args(Impl))}")
    if impl == "reference":
        return "reference"
    if impl == "auto":
        if tensor.dtype not in dtypes or tensor.device.type not in ("cpu", "cuda"):
            return "reference"
        fast: Literal["native", "triton"] = "native" if tensor.device.type == "cpu" else "triton"
        reason = missing(fast, tensor, dtypes)
        if reason is None:
            return fast
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"medbridge_kernels uses its slow reference: {reason}", RuntimeWarning, stacklevel=3)
        return "reference"
    reason = missing(impl, tensor, dtypes)
    if reason is not None:
        raise NotImplementedError(f"impl={impl!r} isn't available: {reason}")
    return impl


def missing(impl: Literal["native", "triton"], tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why `impl` can't serve a tensor of this device and dtype; None where it can."""
    if tensor.dtype not in dtypes:
        return f"it takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {tensor.dtype}"
    if impl == "native":
        if tensor.device.type != "cpu":
            return f"it serves CPU tensors, got one on {tensor.device}"
        return native.why_missing()
    if tensor.device.type != "cuda" and not triton.interpreted():
        return f"it serves GPU tensors (and CPU tensors under TRITON_INTERPRET=1), got one on {tensor.device}"
    return triton.why_missing()
