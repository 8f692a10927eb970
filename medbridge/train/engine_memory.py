"""What rollout engines take of the trainer's devices: while it trains, and while they sample for it.

`memory` adds it up with what training takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from medbridge.train.activations import cache_bytes

if TYPE_CHECKING:
    from medbridge.rollout.settings import EngineName, RolloutSettings

_GIB = 1 << 30
_LOGITS = 5
"""Tensors of [completions, vocabulary] in float32 that drawing a token holds at its height: the logits, divided by the
temperature, sorted with their places (int64, which counts twice)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is sampled while a stage trains.

    Attributes:
        engine, settings: by what; never "auto".
        engines: how many are started here, of those that hold a model of their own.
        completions: of a step at most, those of its held-out items included.
        prompt_tokens: of the longest prompt.
    """

    engine: EngineName
    settings: RolloutSettings
    engines: int
    completions: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of each device: kept while it trains, and beside that while it samples, by what it is."""

    training: int
    sampling: Mapping[str, int]


def engine_memory(
    network: nn.Module, plan: Sampling, *, computed_in: torch.dtype, device: torch.device, available: int | None
) -> EngineMemory:
    """The memory that engines take of a device.

    vLLM takes its share of a GPU whatever the model needs, and on a CPU a copy of the weights and its cache.

    Args:
        network: transformers' model, with or without weights.
        plan: what is sampled.
        computed_in: the type of weights and cache.
        device: of the trainer.
        available: its bytes; None: unknown, and a share of it counts as nothing.
    """
    settings = plan.settings
    if plan.engine == "transformers":
        rows = min(settings.batch_size, plan.completions)
        tokens = rows * (plan.prompt_tokens + settings.max_new_tokens)
        vocabulary = len(network.get_output_embeddings().weight)  # type: ignore[operator]
        cache = cache_bytes(network.config, tokens, computed_in)
        layers = len(network.get_decoder().layers)  # type: ignore[operator]
        layer = cache // layers  # laid out anew while the old one stands
        logits = _LOGITS * rows * vocabulary * 4
        return EngineMemory(0, {"key-value cache": cache + layer, "logits of a token": logits})
    if not plan.engines:
        return EngineMemory(0, {})
    if device.type == "cuda":
        share = int(settings.vllm.gpu_memory * (available or 0))
        sleeps = settings.vllm.sleep
        return EngineMemory(0 if sleeps else share, {"vLLM's weights and key-value cache": share if sleeps else 0})
    weights = sum(parameter.numel() for parameter in network.parameters()) * computed_in.itemsize
    return EngineMemory(plan.engines * (weights + int(settings.vllm.kv_cache_gb * _GIB)), {})
