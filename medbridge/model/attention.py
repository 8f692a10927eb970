"""Attention over packed rows, registered with transformers: no model's code is copied or changed for it.

A forward pass that is given a layout (`packed=`) attends by it; any other is transformers' own SDPA attention. The
vision tower keeps the attention that it was loaded with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medbridge.model.packing import PackedLayout

# Neither name has "flash" in it: by that transformers tells whose masks have two dimensions.
BLOCKS = "medbridge_packed_blocks"
VARLEN = "medbridge_packed_varlen"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Have a model's text layers understand `packed=`: by FlashAttention where it was loaded with it, else by SDPA.

    For good: layers that are computed again in the backward pass look their attention up by then.
    """
    current = model.config.get_text_config()._attn_implementation
    if current not in (BLOCKS, VARLEN):
        name = VARLEN if current == "flash_attention_2" else BLOCKS
        model.set_attn_implementation({"text_config": name})


def packed_arguments(layout: PackedLayout, device: torch.device) -> dict[str, Any]:
    """What the forward pass of a packed row is given: its layout, and a mask that has transformers make none."""
    return {"packed": layout, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


def blocks_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA, a call for each block of the layout: costs the sum of the blocks' areas, not the square of the row.

    Args:
        module: the attention layer.
        query: [1, heads, T, width]; key, value: [1, key heads, T, width].
        attention_mask: read only without a layout.
        packed: the layout of the row; None is transformers' SDPA attention.
        options: what else transformers hands over: dropout, scaling, sliding_window, softcap.

    Returns:
        [1, T, heads, width], and no weights.

    Raises:
        NotImplementedError: the model caps its attention logits.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    _refuse_softcap(options)
    repeats = query.shape[1] // key.shape[1]
    window = options.get("sliding_window")
    parts = []
    for block, bias in zip(packed.blocks(window), packed.biases(window, _computed_in(query)), strict=True):
        own, prefix = slice(block.start, block.end), slice(block.prefix_start, block.prefix_end)
        alone = block.prefix_start == block.prefix_end
        keys, values = (
            states[:, :, own] if alone else torch.cat([states[:, :, prefix], states[:, :, own]], dim=2)
            for states in (key, value)
        )
        if repeats > 1 and query.is_cuda:  # whose kernels share heads of keys only where there is no mask
            keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
        attended = scaled_dot_product_attention(
            query[:, :, own], keys, values, attn_mask=bias, is_causal=bias is None,
            dropout_p=options.get("dropout", 0.0), scale=options.get("scaling"),
            enable_gqa=repeats > 1 and not query.is_cuda,
        )  # fmt: skip
        parts.append(attended.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """FlashAttention of variable length, one call for the whole row; arguments as of `blocks_attention`.

    Each completion's keys are laid out behind its prompt's, so that its queries are the last ones of a causal sequence:
    what `flash_attn_varlen_func` computes when a sequence has more keys than queries. Images whose tokens see one
    another in both directions need a mask, which it has not: such rows are computed in blocks.
    """
    if packed is None or packed.images is not None:
        return blocks_attention(module, query, key, value, attention_mask, packed, **options)
    from flash_attn import flash_attn_varlen_func

    _refuse_softcap(options)
    dtype = _computed_in(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    index, query_bounds, key_bounds = packed.varlen()
    window = options.get("sliding_window")
    attended = flash_attn_varlen_func(
        query[0].transpose(0, 1), key[0].transpose(0, 1)[index], value[0].transpose(0, 1)[index],
        cu_seqlens_q=query_bounds, cu_seqlens_k=key_bounds,
        max_seqlen_q=max(part.end - part.start for part in packed.segments),
        max_seqlen_k=max(part.keys for part in packed.segments),
        dropout_p=options.get("dropout", 0.0), softmax_scale=options.get("scaling"), causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return attended[None], None


def _computed_in(query: Tensor) -> torch.dtype:
    """The type that attention is computed in. Under autocast rotary embeddings give float32 back."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _refuse_softcap(options: dict[str, Any]) -> None:
    if options.get("softcap") is not None:
        raise NotImplementedError("this model caps its attention logits, which packed rows don't: train another one")


ALL_ATTENTION_FUNCTIONS.register(BLOCKS, blocks_attention)
ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
for _name in (BLOCKS, VARLEN):
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, sdpa_mask)
