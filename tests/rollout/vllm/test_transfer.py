"""Weight transfer between GPUs, as far as it goes without one: the route, the messages, and what vLLM makes of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from medbridge.model import Policy
from medbridge.rollout.vllm import transfer
from medbridge.rollout.vllm.transfer import Client, Source, Transfer, choose_route, decode_handle, encode_handle
from medbridge.rollout.weights import Weights

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
HANDLE = (
    torch.Tensor, torch.Size([268435456]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, bytes(range(64)),
    268435456, 4096, False, b"counter\x00\xff", 3, b"event" * 10, True,
)  # fmt: skip


def test_the_route_follows_from_the_gpus() -> None:
    assert choose_route("GPU-a", ["GPU-a"])[0] == "ipc"
    assert choose_route("GPU-a", ["GPU-b"])[0] == "nccl"
    assert choose_route("GPU-a", ["GPU-b", "GPU-c"])[0] == "nccl"
    for trainer, workers in [("GPU-a", ["GPU-a", "GPU-b"]), (None, ["GPU-a"]), ("GPU-a", []), (None, [])]:
        route, reason = choose_route(trainer, workers)
        assert route == "folder" and reason
    assert "NCCL takes one process a GPU" in choose_route("GPU-a", ["GPU-b", "GPU-a"])[1]


def test_a_handle_survives_json() -> None:
    assert decode_handle(json.loads(json.dumps(encode_handle(HANDLE)))) == HANDLE
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names == list(transfer._HANDLE)  # torch's order is ours


def test_a_handle_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="not the handle of a plain tensor"):
        encode_handle((torch.nn.Parameter, *HANDLE[1:]))
    with pytest.raises(ValueError, match="shorter"):
        encode_handle(HANDLE[:-1])


def test_the_client_says_the_four_steps() -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    client = Client(lambda step, info: said.append((step, info)))
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    update = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]], "tensor_sizes": [8]}
    client.update_weights({**update, "ipc_handles": {"GPU-a": HANDLE}})
    client.update_weights(update)
    client.finish_weight_update("3")
    assert [step for step, _ in said] == ["init", "start", "update", "update", "finish"]
    assert said[2][1] == {**update, "ipc_handles": {"GPU-a": encode_handle(HANDLE)}}
    assert said[3][1] == update  # NCCL sends no handles
    json.dumps(said)


@pytest.mark.vllm
@needs_vllm
def test_vllm_takes_what_is_sent(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    from vllm.distributed.weight_transfer import (
        VLLMWeightSyncClient,
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    said: list[tuple[str, dict[str, Any]]] = []
    client = Client(lambda step, info: said.append((step, info)))
    assert isinstance(client, VLLMWeightSyncClient)
    policy = load_policy(trainable=True, dtype="bfloat16")
    held = Weights(policy, 1, tmp_path)
    source = Source()
    source.weights = held
    # as many names, of the same types and shapes, in the same order: vLLM's own check
    checked = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    assert checked.keys() == dict(held.tensors()).keys()
    assert {tensor.dtype for tensor in checked.values()} == {torch.bfloat16}

    for route in ("ipc", "nccl"):
        assert route in WeightTransferEngineFactory._registry and route in WeightTransferTrainerFactory._registry
        info = Transfer(route, 2, client._call).init_info(held)
        assert (info.backend, info.is_sender, info.packed) == (route, True, True)
        assert info.packed_buffer_size_bytes >= max(tensor.nbytes for tensor in checked.values())
    assert info.world_size == 3 and info.master_address == "127.0.0.1" and info.master_port > 0

    update = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]], "tensor_sizes": [8]}
    client.update_weights({**update, "ipc_handles": {"GPU-a": HANDLE}})
    received = said[-1][1]
    handles = {gpu: decode_handle(handle) for gpu, handle in received["ipc_handles"].items()}
    assert IPCWeightTransferUpdateInfo(**{**received, "ipc_handles": handles}).ipc_handles == {"GPU-a": HANDLE}
