"""Makes a small vision-language model of a real architecture from nothing, as an ordinary Hugging Face folder.

The weights are random: such a model shows how the pipeline behaves and trains on a laptop. It knows no medicine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from medbridge.errors import MedbridgeError
from medbridge.model.settings import FromNothing

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
GEMMA_SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
    "<end_of_image>", "<image_soft_token>",
)  # fmt: skip
ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each, kept in decoded text: the answer form costs a tiny model four tokens instead of fifteen."""

# Qwen2's split of text into words: contractions, letters, single digits, punctuation, line breaks, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_QWEN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_GEMMA_CHAT_TEMPLATE = """\
{{- '<bos>' -}}
{%- for message in messages -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""


def init_model(out: Path, shape: FromNothing, texts: Iterable[str], *, seed: int) -> Path:
    """Write a randomly initialised model, tokenizer and processor to the folder `out`.

    Args:
        out: folder to create; an existing model folder is replaced as a whole.
        shape: architecture and sizes.
        texts: what the byte-level BPE tokenizer is trained on.
        seed: of the weights; the same seed, shape and texts give the same bytes.

    Returns:
        `out`, which `AutoModelForImageTextToText` and vLLM load.
    """
    gemma = shape.architecture == "gemma3"
    special = GEMMA_SPECIAL_TOKENS if gemma else QWEN_SPECIAL_TOKENS
    tokenizer = _train_tokenizer(texts, special, shape.vocab_size, gemma=gemma)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILDERS[shape.architecture](shape, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "model"
        transformers_logging.disable_progress_bar()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        replace_folder(folder, out)
    return out


def replace_folder(source: Path, target: Path) -> None:
    """Put the finished folder `source` in the place of `target`, so that no reader sees half of it."""
    if target.exists():
        if not target.is_dir():
            raise MedbridgeError(f"{target}: is a file, and a folder is to be written there. Move it away.")
        old = target.with_name(f".{target.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(source, target)
        shutil.rmtree(old)
    else:
        os.replace(source, target)


def _train_tokenizer(
    texts: Iterable[str], special: tuple[str, ...], vocab_size: int, *, gemma: bool
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(ANSWER_TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ANSWER_TAGS])
    if gemma:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
            unk_token="<unk>", chat_template=_GEMMA_CHAT_TEMPLATE,
            extra_special_tokens={
                "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            },
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=_QWEN_CHAT_TEMPLATE,
    )  # fmt: skip


def _qwen_text(shape: FromNothing, tokenizer: PreTrainedTokenizerFast, *, interleaved: bool) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "intermediate_size": 3 * shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden_size // 32,
        "num_key_value_heads": max(1, shape.hidden_size // 64),
        "head_dim": 32,
        "max_position_embeddings": 4096,
        # head dimension 32: 16 frequencies, shared out among time, height and width
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 6, 6],
            "rope_theta": 10000.0,
            **({"mrope_interleaved": True} if interleaved else {}),
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.05,
    }


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen_image_processors(shape: FromNothing) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = shape.image_size**2
    sizes: dict[str, Any] = {
        "patch_size": 7,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
    }
    return Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)


def _build_qwen2_5_vl(shape: FromNothing, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(shape, tokenizer, interleaved=False),
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_heads": shape.vision_hidden_size // 32,
            "out_hidden_size": shape.hidden_size,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [shape.vision_layers - 1],
            "initializer_range": 0.05,
        },
        **_qwen_ids(tokenizer),
    )
    image, video = _qwen_image_processors(shape)
    processor = Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=_QWEN_CHAT_TEMPLATE)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _build_qwen2_vl(shape: FromNothing, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    config = Qwen2VLConfig(
        text_config=_qwen_text(shape, tokenizer, interleaved=False),
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_hidden_size,
            "hidden_size": shape.hidden_size,
            "mlp_ratio": 2,
            "num_heads": shape.vision_hidden_size // 32,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **_qwen_ids(tokenizer),
    )
    image, video = _qwen_image_processors(shape)
    processor = Qwen2VLProcessor(image, tokenizer, video, chat_template=_QWEN_CHAT_TEMPLATE)
    return Qwen2VLForConditionalGeneration(config), processor


def _build_qwen3_vl(shape: FromNothing, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    config = Qwen3VLConfig(
        text_config=_qwen_text(shape, tokenizer, interleaved=True),
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_heads": shape.vision_hidden_size // 32,
            "out_hidden_size": shape.hidden_size,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **_qwen_ids(tokenizer),
    )
    image, _ = _qwen_image_processors(shape)
    pixels = shape.image_size**2
    video = Qwen3VLVideoProcessor(
        patch_size=7, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
    )  # fmt: skip
    processor = Qwen3VLProcessor(image, tokenizer, video, chat_template=_QWEN_CHAT_TEMPLATE)
    return Qwen3VLForConditionalGeneration(config), processor


def _build_gemma3(shape: FromNothing, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    patches = shape.image_size // 7
    image_tokens = (patches // 2) ** 2
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.hidden_size,
            "intermediate_size": 3 * shape.hidden_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.hidden_size // 32,
            "num_key_value_heads": max(1, shape.hidden_size // 64),
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "max_position_embeddings": 4096,
            "sliding_window": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_hidden_size // 32,
            "image_size": shape.image_size,
            "patch_size": 7,
            "vision_use_head": False,
        },
        mm_tokens_per_image=image_tokens,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    image = Gemma3ImageProcessor(size={"height": shape.image_size, "width": shape.image_size})
    processor = Gemma3Processor(image, tokenizer, chat_template=_GEMMA_CHAT_TEMPLATE, image_seq_length=image_tokens)
    return Gemma3ForConditionalGeneration(config), processor


_BUILDERS: dict[str, Callable[[FromNothing, PreTrainedTokenizerFast], tuple[PreTrainedModel, Any]]] = {
    "qwen2_5_vl": _build_qwen2_5_vl,
    "qwen2_vl": _build_qwen2_vl,
    "qwen3_vl": _build_qwen3_vl,
    "gemma3": _build_gemma3,
}
