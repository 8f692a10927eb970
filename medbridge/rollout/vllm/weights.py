"""New weights inside vLLM: what runs in its workers, and the calls that its owner makes. Writing them is the trainer's.

Imported in vLLM's processes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from medbridge.errors import MedbridgeError
from medbridge.rollout.vllm.transfer import decode_handle
from medbridge.rollout.weights import check_folder

EXTENSION = f"{__name__}.WeightsExtension"
"""For vLLM's `worker_extension_cls`."""


class WeightsExtension:
    """Methods that vLLM's workers get beside their own (a mix-in: `self` is the worker)."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    start_weight_update: Any
    update_weights: Any
    _medbridge_tied: list[nn.Module]

    @torch.no_grad()
    def medbridge_load(self, files: list[str]) -> list[str]:
        """Read all weights anew from safetensors files; gives the layers that did not get all of theirs.

        As vLLM's own `reload_weights`, which says nothing of what it lacked, and forgets a tied output layer.
        """
        model = self.model_runner.get_model()
        tied = tied_heads(model)
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            try:
                model.load_weights(_read(files))
                lacking = incomplete_layers(model, tied)
            finally:
                finalize_layerwise_reload(model, self.model_config)
            prepack(tied)
        self.model_runner.reset_lora_state()
        return lacking

    def medbridge_start(self) -> None:
        """vLLM's `start_weight_update`; notes the tied output layers, which can't be told from others after it."""
        self._medbridge_tied = tied_heads(self.model_runner.get_model())
        self.start_weight_update()

    def medbridge_update(self, update_info: dict[str, Any]) -> None:
        """vLLM's `update_weights` for a message of `transfer.Client`."""
        handles = update_info.get("ipc_handles")
        decoded = {} if handles is None else {"ipc_handles": {gpu: decode_handle(h) for gpu, h in handles.items()}}
        self.update_weights({**update_info, **decoded})

    def medbridge_lacking(self) -> list[str]:
        """Between the last update and its end: the layers that did not get all of their weights."""
        return incomplete_layers(self.model_runner.get_model(), self._medbridge_tied)


def load(engine: Any, folder: Path, version: int) -> None:
    """Have an idle vLLM engine sample from the weights in `folder` from now on; `engine` is an `LLM` or `LLMEngine`.

    Raises:
        MedbridgeError: the folder is torn or another version's, and nothing was loaded; or it lacks some of the
            weights, and the engine must not be used any more.
    """
    files = [str(file) for file in check_folder(folder, version)]
    lacking = sorted({name for names in engine.collective_rpc("medbridge_load", args=(files,)) for name in names})
    if lacking:
        raise MedbridgeError(
            f"{folder}: weights of version {version} lack those of {len(lacking)} of vLLM's layers (for example "
            f"{lacking[0]!r}): it now holds neither these nor the ones before. Is this the model it was started with?"
        )
    reset_caches(engine)


def load_adapter(engine: Any, folder: Path, version: int) -> LoRARequest:
    """Have an idle vLLM engine load the adapters in `folder`; requests that carry what this gives are drawn by them.

    The engine was made with `enable_lora` and holds the weights beneath them. `version` counts from 1.

    Raises:
        MedbridgeError: vLLM can't load them.
    """
    request = LoRARequest(f"weights-{version}", version, str(folder))
    try:
        getattr(engine, "llm_engine", engine).add_lora(request)
    except Exception as error:  # whatever type vLLM's processes pass on
        raise MedbridgeError(f"{folder}: vLLM can't load the adapters of version {version}: {error}") from error
    reset_caches(engine)
    return request


def transfer(engine: Any, step: str, info: dict[str, Any]) -> None:
    """One step of a weight transfer from a trainer's GPU, as `transfer.Transfer` asks for it; the engine is idle.

    The engine was started with the route as its weight-transfer backend. It has not run on a GPU yet.

    Raises:
        MedbridgeError: after the last step, some layers lack weights: the engine must not be used any more.
    """
    if step == "init":
        engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})
    elif step == "start":
        engine.collective_rpc("medbridge_start")
    elif step == "update":
        engine.collective_rpc("medbridge_update", kwargs={"update_info": info})
    else:
        lacking = sorted({name for names in engine.collective_rpc("medbridge_lacking") for name in names})
        engine.collective_rpc("finish_weight_update")
        if lacking:
            raise MedbridgeError(f"The trainer sent no weights for {len(lacking)} layers, such as {lacking[0]!r}.")
        reset_caches(engine)


def reset_caches(engine: Any) -> None:
    """Drop all that an idle engine has computed with older weights: encoded images, processed images, prefixes.

    The encoder cache is kept in two places. A worker forgets at a reload what the scheduler still counts on, and the
    next request with a known image would kill the engine; this makes both forget.
    """
    engine = getattr(engine, "llm_engine", engine)
    engine.reset_encoder_cache()
    engine.reset_mm_cache()
    if not engine.reset_prefix_cache():
        raise MedbridgeError("vLLM's prefix cache can't be cleared while it samples: the weights came too early.")


def _read(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)


def tied_heads(model: nn.Module) -> list[nn.Module]:
    """Output layers whose weight is the embedding's too; a checkpoint holds it once, under the embedding's name."""
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    return [m for m in model.modules() if isinstance(m, ParallelLMHead) and id(m.weight) in embeddings]


def prepack(tied: list[nn.Module]) -> None:
    """Have tied output layers compute with the weights that stand in them.

    On a CPU a layer multiplies by a packed copy of its weight, made after loading. vLLM makes it anew for layers that
    loaded something; a tied output layer loads nothing, since its weight comes through the embedding, and would go on
    with the old copy. Elsewhere there is no copy, and this does nothing.
    """
    for head in tied:
        method: Any = head.quant_method
        method.process_weights_after_loading(head)


def incomplete_layers(model: nn.Module, tied: list[nn.Module]) -> list[str]:
    """Layers that got none or only some of their weights, between `load_weights` and the end of a reload.

    vLLM leaves the former as they were, and fills the gaps of the latter with whatever the memory held.
    """
    lacking = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if info.can_load() and layer not in tied and info.load_numel < _elements(layer):
            lacking.append(name)
    return lacking


def _elements(layer: nn.Module) -> int:
    """How many numbers a checkpoint has for a layer: its vocabulary without the rows that fill it up."""
    if isinstance(layer, VocabParallelEmbedding):
        rows = layer.shard_indices.num_org_elements + layer.shard_indices.num_added_elements
        return int(rows * layer.embedding_dim)
    return sum(p.numel() for p in layer._parameters.values() if p is not None)
