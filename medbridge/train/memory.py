"""How much memory a training stage will take, told before its first step from the model's shape and the settings.

It needs no weights: a 32 B model on 8 GPUs is planned on a laptop. Nothing is allocated or trained here. On a CPU it
tells what is in use: without gradient checkpointing the C library may keep half as much again of what was freed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from medbridge.errors import MedbridgeError
from medbridge.model.policy import pick_device, pick_dtype
from medbridge.model.settings import LoraSettings, ModelSettings
from medbridge.train.activations import MicroBatch, activations
from medbridge.train.engine_memory import EngineMemory, Sampling, engine_memory
from medbridge.train.parameters import is_vision
from medbridge_kernels.linear import DEFAULT_BUDGET

if TYPE_CHECKING:
    from medbridge.train.rl_settings import RlSettings
    from medbridge.train.settings import SftSettings

GIB = 1 << 30
_MASTER = 4
"""Bytes of a trained weight, of its gradient, of each of AdamW's two states and of its average: float32."""
_LIBRARIES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""What libraries keep to themselves: measured on a CPU; on a GPU an allowance for context, workspaces and NCCL."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
        held: all the time, by what it is.
        phases: beside that, in each phase of a step: one after the other.
        available: what there is; None where nobody knows.
        remedies: settings that would make it fit, each with the peak that it leads to; none where it fits.
    """

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    available: int | None = None
    remedies: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """What is held, and the largest of the phases."""
        return sum(self.held.values()) + max(sum(phase.values()) for phase in self.phases.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available

    @property
    def hopeless(self) -> bool:
        """Whether what is held all the time is more than there is, whatever a micro-batch takes."""
        return self.available is not None and sum(self.held.values()) > self.available

    def table(self) -> str:
        """A line for each part, in GiB."""
        rows = [("held", name, size) for name, size in self.held.items()]
        rows += [(phase, name, size) for phase, parts in self.phases.items() for name, size in parts.items()]
        lines = [f"  {where:<10} {name:<34} {size / GIB:>9.2f}" for where, name, size in rows if size]
        lines.append(f"  {'peak':<10} {'what is held, the largest phase':<34} {self.peak / GIB:>9.2f}")
        if self.available is not None:
            lines.append(f"  {'available':<45} {self.available / GIB:>9.2f}")
        lines += [f"  {name}: peak {size / GIB:.2f}" for name, size in self.remedies.items()]
        return "\n".join(["memory of a device in GiB", *lines])

    def require(self) -> None:
        """Refuse to start what can't end well.

        Raises:
            MedbridgeError: it doesn't fit; with the table, and the settings that would mend it.
        """
        if not self.fits:
            mended = "Settings that would:" if self.remedies else "No single setting would: give it more or larger GPUs"
            raise MedbridgeError(f"training does not fit in memory. {mended}\n{self.table()}")


def plan_memory(
    config: Any,
    model: ModelSettings,
    settings: RlSettings | SftSettings,
    *,
    device: torch.device | None = None,
    available: int | None = None,
    ranks: int = 1,
    micro_batch: MicroBatch | None = None,
    longest_row: int = 0,
    micro_batches: int = 2,
    sampling: Sampling | None = None,
) -> MemoryPlan:
    """The memory that a stage takes on each device.

    Args:
        config: transformers' configuration of the model, or the folder or id that it is read from.
        model, settings: of the stage.
        device: what it trains on, which need not be there; None is what the settings mean on this machine.
        available: bytes of a device, `device_memory` of this one; what doesn't fit is then told how it would.
        ranks: how many share weights, gradients, states and averages out among them.
        micro_batch: what is in memory at once; None is as much as the settings allow.
        longest_row: tokens of the longest row (prompt, completion, cost of its images), which may exceed that.
        micro_batches: of an update. Before a second one there are gradients already.
        sampling: what is sampled on the same device while it trains; None is nothing.

    Raises:
        MedbridgeError: the configuration can't be read.
    """
    network = empty_model(config)
    batch = micro_batch or MicroBatch.within(max(settings.micro_batch_tokens, longest_row))
    device = device or pick_device(model.device)
    engines = EngineMemory(0, {})
    if sampling is not None:
        computed_in = pick_dtype(model.dtype, device)
        engines = engine_memory(network, sampling, computed_in=computed_in, device=device, available=available)
    plan = _plan(network, model, settings, batch, device, ranks, micro_batches, engines)
    if available is None:
        return plan
    remedies = {}
    found = MemoryPlan(plan.held, plan.phases, available)
    if not found.fits:
        for name, other_model, other_settings in _changes(model, settings, device):
            smaller = MicroBatch.within(max(other_settings.micro_batch_tokens, longest_row))
            other = _plan(network, other_model, other_settings, smaller, device, ranks, micro_batches, engines)
            if other.peak <= available:
                remedies[name] = other.peak
    return MemoryPlan(plan.held, plan.phases, available, remedies)


def empty_model(config: Any) -> nn.Module:
    """transformers' model without weights.

    Raises:
        MedbridgeError: there is no configuration of that name.
    """
    if isinstance(config, str | Path):
        try:
            config = AutoConfig.from_pretrained(config, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise MedbridgeError(f"model {str(config)!r}: its config.json can't be read: {error}") from error
    with torch.device("meta"):
        network: nn.Module = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return network


def device_memory(device: torch.device) -> int:
    """Bytes that this process can have in all: of a GPU what is free or ours, of a CPU what is free, and ours."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def _plan(
    network: nn.Module,
    model: ModelSettings,
    settings: RlSettings | SftSettings,
    batch: MicroBatch,
    device: torch.device,
    ranks: int,
    micro_batches: int,
    engines: EngineMemory,
) -> MemoryPlan:
    computed_in = pick_dtype(model.dtype, device)
    size = computed_in.itemsize
    weights = sum(parameter.numel() for parameter in network.parameters())
    trained = _mark_trained(network, model)
    head = network.get_output_embeddings().weight  # type: ignore[operator]
    own_type = _MASTER if model.lora is None else size
    held = {
        "weights": weights * own_type,
        "adapters": trained * _MASTER if model.lora else 0,
        "optimizer": trained * (2 if settings.optimizer == "adamw_8bit" else 2 * _MASTER),
        "moving average": trained * _MASTER if getattr(settings, "keeps_average", False) else 0,
        "reference": trained * _MASTER if _copies_reference(model, settings) else 0,
    }
    held = {name: of // ranks for name, of in held.items()}
    held |= {
        "whole weights, on the first rank": 0 if ranks == 1 else weights * own_type,
        "rollout engines": engines.training,
        "libraries": _LIBRARIES[device.type],
    }
    gradients = trained * _MASTER // ranks
    kept = activations(
        network, batch, computed_in=computed_in, checkpointing=model.gradient_checkpointing,
        adapters=model.lora is not None,
    )  # fmt: skip
    running = {
        "activations of the text model": kept.text,
        "activations of the vision tower": kept.vision,
        "weights cast to the compute type": 0 if own_type == size else weights * size,
        "weights gathered from other ranks": 0 if ranks == 1 else _gathered(network) * own_type,
    }
    by_head = head.numel() * _MASTER if head.requires_grad else 0
    budget = DEFAULT_BUDGET[device.type]
    loss = {
        "logits of a chunk": min(budget, batch.predicted * len(head) * size),
        "hidden states of completions": 3 * batch.predicted * head.shape[1] * _MASTER,
        "gradient of the output layer": by_head,
    }
    before = gradients if micro_batches > 1 else 0
    phases = {
        "loss": {**running, **loss, "gradients": before},
        "backward": {**running, "a layer at work": kept.transient, "gradients": max(before, by_head)},
        "update": {"gradients": gradients},
        "sampling": engines.sampling,
    }
    return MemoryPlan(held, phases)


def _copies_reference(model: ModelSettings, settings: RlSettings | SftSettings) -> bool:
    """Whether the stage's first model is kept beside the present one; with adapters it is the model without them."""
    return (
        model.lora is None
        and getattr(settings, "kl_coefficient", 0.0) > 0
        and getattr(settings, "kl_reference", "") == "first"
    )


def _mark_trained(network: nn.Module, model: ModelSettings) -> int:
    """Set `requires_grad` as training does; the number of trained parameters, those of adapters where they are."""
    adapters = 0
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(model.lora is None and not (model.freeze_vision and is_vision(name)))
    if model.lora is None:
        return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and _is_target(name, model.lora.targets):
            adapters += model.lora.rank * (module.in_features + module.out_features)
            module.weight.requires_grad_(True)  # a sign that gradients come this way
    return adapters


def _is_target(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _gathered(network: nn.Module) -> int:
    """Parameters that a rank has whole while it computes: two decoder layers, and all that is not in such a layer."""
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in network.get_decoder().layers]  # type: ignore[operator]
    whole = sum(parameter.numel() for parameter in network.parameters())
    return whole - sum(layers) + 2 * max(layers)


def _changes(
    model: ModelSettings, settings: RlSettings | SftSettings, device: torch.device
) -> Iterator[tuple[str, ModelSettings, RlSettings | SftSettings]]:
    """Settings that take less memory, alone and then together, the mildest first."""
    recomputed = model.model_copy(update={"gradient_checkpointing": True})
    small = max(1, settings.micro_batch_tokens // 4)
    smaller = settings.model_copy(update={"micro_batch_tokens": small})
    eight = smaller.model_copy(update={"optimizer": "adamw_8bit"})
    adapted = recomputed.model_copy(update={"lora": model.lora or LoraSettings()})
    frozen = recomputed.model_copy(update={"freeze_vision": True})
    yield f"micro_batch_tokens: {small}", model, smaller
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", recomputed, settings
        yield f"model.gradient_checkpointing: true, micro_batch_tokens: {small}", recomputed, smaller
    if settings.optimizer == "adamw" and device.type == "cuda":
        yield (
            "optimizer: adamw_8bit, with both of these",
            recomputed,
            eight.model_copy(update={"micro_batch_tokens": small}),
        )
    if not model.freeze_vision and model.lora is None:
        yield "model.freeze_vision: true, with checkpointing and the small micro-batch", frozen, smaller
    if model.lora is None:
        yield "model.lora: {}, with checkpointing and the small micro-batch", adapted, smaller
