"""Safetensors files written tensor by tensor and synced to disk, with the digest of what was meant to be in them.

`safetensors.torch.save_file` wants all tensors in main memory at once, tells no digest and doesn't sync.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Stored(Protocol):
    """A tensor, or what says of itself what a tensor does and has one when it is written."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int: ...

    def element_size(self) -> int: ...

    def detach(self) -> Tensor: ...


def in_order(tensors: Mapping[str, Stored]) -> list[str]:
    """Names in the order in which they are written.

    Wide types first: each tensor is aligned to its own item size, as the format asks.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> str:
    """Write a safetensors file and sync it; the SHA-256 of its bytes in hexadecimal.

    Tensors on a GPU come to the host one at a time.
    """
    names = in_order(tensors)
    header, at = {}, 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return _write(path, len(encoded).to_bytes(8, "little") + encoded, (_bytes(tensors[name]) for name in names))


def _bytes(tensor: Stored) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one item or none may claim any stride, and then has no view as bytes
    return flat.view(torch.uint8).numpy().data


def write_bytes(path: Path, content: bytes) -> str:
    """Write a file and sync it; the SHA-256 of its bytes in hexadecimal."""
    return _write(path, content, iter(()))


def _write(path: Path, first: bytes, others: Iterator[memoryview]) -> str:
    digest = hashlib.sha256(first)
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(first)
        for part in others:
            hashed = pool.submit(digest.update, part)  # takes about as long as the writing
            file.write(part)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file with their names, each brought to a device when its turn comes."""
    with safe_open(path, framework="pt", device=str(device)) as stored:
        for name in stored.keys():  # noqa: SIM118
            yield name, stored.get_tensor(name)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, of which none is read."""
    with safe_open(path, framework="pt") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
