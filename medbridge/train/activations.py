"""What a forward pass keeps for its backward pass, in bytes, told from a model's shape alone.

Counted after transformers' own layers (Qwen-VL and Gemma 3; other families are taken to be like them) and our packed
attention. Nothing is run: the model may be one without weights, on torch's meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medbridge.model.packing import PackedBatch
from medbridge.model.shape import head_width, vision_width

_EXACT = 4
"""Bytes of what stays in float32 whatever the model computes in: the residual stream, norms."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A packed row, as far as memory depends on it.

    Attributes:
        tokens: of the row.
        predicted: those of completions.
        copied: keys that attention lays out anew, those of a prompt once for each block of its completions.
        masked: elements of all attention masks.
        patches: of all images.
    """

    tokens: int
    predicted: int
    copied: int
    masked: int
    patches: int

    @classmethod
    def of(cls, batch: PackedBatch, patches: int) -> MicroBatch:
        """Of a row that is there."""
        blocks = batch.layout.blocks(None)
        return cls(
            tokens=batch.input_ids.shape[1],
            predicted=len(batch.labels),
            copied=sum(
                block.end - block.start + block.prefix_end - block.prefix_start
                for block in blocks
                if block.prefix_end > block.prefix_start
            ),
            masked=sum(0 if block.mask is None else block.mask.numel() for block in blocks),
            patches=patches,
        )

    @classmethod
    def within(cls, tokens: int) -> MicroBatch:
        """The largest of a budget: nothing but completions that share short prompts.

        A budget counts images as the text tokens whose activations take as much, so that they need no place of theirs.
        """
        return cls(tokens, tokens, 2 * tokens, 384 * tokens, 0)


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of a micro-batch.

    Attributes:
        text, vision: kept until the backward pass reaches it.
        transient: beside them, while one layer is computed again or backward.
    """

    text: int
    vision: int
    transient: int


def activations(
    model: nn.Module, batch: MicroBatch, *, computed_in: torch.dtype, checkpointing: bool, adapters: bool
) -> Activations:
    """Of a forward pass of `model`, which shows by `requires_grad` what is trained.

    Args:
        model: transformers' model, with or without weights.
        batch: what it computes.
        computed_in: type of matrix products.
        checkpointing: layers keep their input alone.
        adapters: the layers' own weights are frozen, and adapters beside them are trained.
    """
    config: Any = model.config
    text = config.get_text_config()
    layers, blocks = _layers(model, vision=False), _layers(model, vision=True)
    size = computed_in.itemsize
    own = batch.tokens * _text_layer(text, layers[0], batch, size, adapters)
    stream = batch.tokens * text.hidden_size * _EXACT
    # embeddings, the last norm's input and output; rotary embeddings; masks as truth values and as what is added
    ends = 3 * stream + 2 * batch.tokens * head_width(text) * _EXACT + batch.masked * (1 + size)
    kept = len(layers) * (stream if checkpointing else own) + ends
    backward = 5 * batch.tokens * text.intermediate_size * size  # gradients of the gated layer, and temporaries
    transient = backward + (own if checkpointing else 0)
    if not batch.patches or not any(parameter.requires_grad for block in blocks for parameter in block.parameters()):
        return Activations(int(kept), 0, int(transient))
    vision = config.vision_config
    width = vision_width(vision)
    one = batch.patches * _vision_layer(vision, blocks[0], size, adapters)
    row = batch.patches * width * _EXACT
    ends = batch.patches * (2 * width * _EXACT + 4 * width * size)  # patches embedded; norm and layers of the merger
    tower = len(blocks) * (row if checkpointing else one) + ends
    return Activations(int(kept), int(tower), int(max(transient, one if checkpointing else 0)))


def cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of so many tokens in all layers."""
    text = config.get_text_config()
    return int(2 * tokens * text.num_hidden_layers * text.num_key_value_heads * head_width(text) * dtype.itemsize)


def _text_layer(text: Any, layer: nn.Module, batch: MicroBatch, size: int, adapters: bool) -> float:
    """Bytes a token: norms (input and, where the scale is trained, what it scales); inputs of linear layers; queries,
    keys, values and what attention gives; the four tensors of the gated layer.
    """
    width, head = text.hidden_size, head_width(text)
    query, key = text.num_attention_heads * head, text.num_key_value_heads * head
    each = 1 if adapters else 2
    norms = sum("norm" in name for name, _ in layer.named_children())
    heads = (query + key) * each if any("q_norm" in name for name, _ in layer.named_modules()) else 0
    exact = norms * width * each + heads
    computed = 2 * width + 3 * query + 2 * key * (1 + batch.copied / batch.tokens) + 4 * text.intermediate_size
    return exact * _EXACT + computed * size


def _vision_layer(vision: Any, block: nn.Module, size: int, adapters: bool) -> float:
    """Bytes a patch: as `_text_layer`. LayerNorm keeps its input alone; a fused projection is kept as a whole."""
    width = vision_width(vision)
    inner = next(module.out_features for name, module in block.named_modules() if _is_first_linear(name, module))
    names = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    scaled = any("RMSNorm" in type(module).__name__ for module in block.modules()) and not adapters
    attention = 7 if "qkv" in names else 4
    gated = 4 if "gate_proj" in names else 3 if "quick" in str(getattr(vision, "hidden_act", "")) else 2
    return 2 * width * (2 if scaled else 1) * _EXACT + ((2 + attention) * width + gated * inner) * size


def _is_first_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("gate_proj", "fc1", "linear_fc1")


def _layers(model: nn.Module, *, vision: bool) -> list[nn.Module]:
    """The layers of the text model or of the vision tower: the longest list of modules there."""
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        tower = "visual" in name or "vision" in name
        if isinstance(module, nn.ModuleList) and tower == vision and len(module) > len(found):
            found = list(module)
    return found
