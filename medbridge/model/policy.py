"""A loaded vision-language model with what rollouts and training both need of it.

Encoding of prompts (image and text once per item, option orders cheaply), positions, and logits at completion tokens.
It neither samples nor trains. What needs no weights stands in `prompter`.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from medbridge.data.images import ImageCache
from medbridge.data.items import Item, Permutation
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import liger
from medbridge.model.allocator import give_freed_memory_back, keep_freed_memory
from medbridge.model.attention import packed_arguments, use_packed_attention
from medbridge.model.encoded import EncodedPrompt
from medbridge.model.initialise import replace_folder
from medbridge.model.packing import PackedBatch, merge_vision, pack, plan
from medbridge.model.prompter import Prompter
from medbridge.model.settings import ModelSettings
from medbridge.model.shape import patches_of_frames, vision_depth, vision_width

BANNED_LOGIT = -1e9
"""Logit of a token that must not be sampled. Finite, so that p * log p stays 0 and not NaN in the entropy."""


@dataclass(slots=True, eq=False)
class _Head:
    """What all option orders of an item share: everything up to the images' last token, and the images."""

    ids: Tensor
    type_ids: Tensor | None
    positions: Tensor
    next_position: int
    vision: dict[str, Tensor]
    tail_is_plain: bool
    prompts: dict[Permutation, EncodedPrompt] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Memory of the images and of all prompts kept so far."""
        texts = sum(prompt.ids.nbytes + prompt.positions.nbytes for prompt in self.prompts.values())
        return texts + sum(tensor.nbytes for tensor in self.vision.values())


@dataclass(frozen=True, slots=True, eq=False)
class CompletionBatch:
    """Padded prompt + completion rows, and where the logits of the completion tokens stand.

    Shapes: input_ids, attention_mask, type_ids [B, T]; positions [3 or 1, B, T]; rows, columns, labels,
    sequence_ids [N] for the N completion tokens: the logits at (rows, columns) predict `labels`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    type_ids: Tensor | None
    positions: Tensor
    vision: Mapping[str, Tensor]
    rows: Tensor
    columns: Tensor
    labels: Tensor

    @property
    def sequence_ids(self) -> Tensor:
        return self.rows


class OutputLayer(NamedTuple):
    """The linear output layer: weight [vocabulary, width], bias [vocabulary], soft cap and tokens never sampled."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    banned_ids: Tensor | None


class Policy(Prompter):
    """A model with its processor, and the few things about them that the rest of medbridge asks."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        path: str,
        compute_dtype: torch.dtype,
        stored_dtype: torch.dtype | None = None,
        cache_mb: int = 512,
    ) -> None:
        """`stored_dtype` is the type of the weights on disk, in which `save` writes them; None: the compute type."""
        super().__init__(processor, model.config, model.generation_config, path=path)
        self.model = model
        self.compute_dtype = compute_dtype
        self.stored_dtype = stored_dtype or compute_dtype
        self.device = next(model.parameters()).device
        text_config = model.config.get_text_config()
        self._softcap = getattr(text_config, "final_logit_softcapping", None)
        layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
        self.full_attention = layer_types == {"full_attention"}
        self.uses_mrope = hasattr(model.base_model, "get_rope_index")
        self._type_key = "mm_token_type_ids" if self.uses_mrope else "token_type_ids"
        # by id and images: a control asks the same question of other images
        self._cache: OrderedDict[tuple[str, tuple[str, ...]], _Head] = OrderedDict()
        self._cache_bytes = 0
        self._cache_budget = cache_mb << 20

    # -- loading and saving --------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str, settings: ModelSettings, *, trainable: bool = False) -> Policy:  # type: ignore[override]
        """Load any Hugging Face image-text-to-text model.

        Args:
            path: folder or model id.
            settings: device, compute type, attention. `path` in the settings is not read.
            trainable: hold whole-model weights in float32 (AdamW's small steps vanish in bfloat16) and compute
                in the compute type; without it weights are held in the compute type.

        Raises:
            MedbridgeError: where the model or its processor cannot be loaded.
        """
        device = pick_device(settings.device)
        fused = liger.wanted(settings.liger, device, trainable=trainable)
        if device.type == "cpu":
            torch.set_flush_denormal(True)  # small models' gradients hold many, and a CPU adds them 100 times slower
            if trainable and settings.gradient_checkpointing:
                give_freed_memory_back()
            elif trainable:
                keep_freed_memory()
        compute = pick_dtype(settings.dtype, device)
        held = torch.float32 if trainable and settings.lora is None else compute
        attention = _pick_attention(settings.attention, device)
        transformers_logging.disable_progress_bar()
        try:
            model, info = AutoModelForImageTextToText.from_pretrained(
                path, dtype=held, attn_implementation=attention, trust_remote_code=False, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
            stored = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype or compute
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise MedbridgeError(
                f"model {path!r} can't be loaded: {error}\n"
                "Give a folder or id of an image-text-to-text model that transformers knows (model.path), with "
                "its processor files beside the weights."
            ) from error
        if info["missing_keys"]:
            raise MedbridgeError(
                f"model {path!r}: its files lack {len(info['missing_keys'])} of its weights (for example "
                f"{min(info['missing_keys'])!r}), which would stay random. Get the whole model, or correct its "
                "config.json."
            )
        model.to(device)
        if fused:
            liger.use_liger(model)
        return cls(model, processor, path=path, compute_dtype=compute, stored_dtype=stored)

    def save(self, out: Path) -> Path:
        """Write model and processor to `out` as a Hugging Face folder (atomically); adapters are not written."""
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / "model"
            # float32 masters go back to the type that the model came in
            weights = {
                name: tensor.to(self.stored_dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self.model.state_dict().items()
            }
            transformers_logging.disable_progress_bar()
            self.model.save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)
            _declare_dtype(folder / "config.json", str(self.stored_dtype).removeprefix("torch."))
            replace_folder(folder, out)
        return out

    # -- encoding ------------------------------------------------------------------------------------------

    def encode(
        self, item: Item, orders: Sequence[Permutation], settings: PromptSettings, images: ImageCache
    ) -> list[EncodedPrompt]:
        """Encode an item's prompt under several option orders; its images are processed once and kept.

        Raises:
            MedbridgeError: the processor refuses the item, or its prompt leaves the model no room for an answer.
        """
        key = (item.id, item.images)
        head = self._cache.pop(key, None)
        if head is None:
            head = self._encode_head(item, orders[0], settings, images)
        else:
            self._cache_bytes -= head.nbytes()
        for order in orders:
            if order not in head.prompts:
                head.prompts[order] = self._encode_order(item, order, settings, images, head)
        encoded = [head.prompts[order] for order in orders]
        self._cache[key] = head  # last: most recently used
        self._cache_bytes += head.nbytes()
        while self._cache_bytes > self._cache_budget:
            self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes()
        return encoded

    def _process(
        self, item: Item, order: Permutation, settings: PromptSettings, images: ImageCache
    ) -> tuple[str, Tensor, Tensor | None, dict[str, Tensor]]:
        text = self.render(item, order, settings)
        pictures = [images.get(path) for path in item.images]
        try:
            encoded = self.processor(
                text=[text], images=[pictures] if pictures else None, return_tensors="pt",
                **({"add_special_tokens": False} if self._starts_with_bos(text) else {}),
            )  # fmt: skip
        except (ValueError, IndexError, TypeError) as error:
            raise MedbridgeError(
                f"item {item.id!r}: the processor of {self.path!r} refuses its prompt or images: {error}"
            ) from error
        ids = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask", None)
        types = encoded.pop(self._type_key, None)
        vision = {key: value for key, value in encoded.items() if isinstance(value, Tensor)}
        return text, ids, None if types is None else types[0].long(), vision

    def _tail_ids(self, text: str) -> Tensor | None:
        """Ids of what follows the last image placeholder of a rendered prompt; None where it shows no images."""
        markers = {getattr(self.processor, name, None) for name in ("image_token", "boi_token")}
        cut = max((text.rfind(mark) + len(mark) for mark in markers if mark and mark in text), default=0)
        if cut == 0:
            return None
        return torch.tensor(self.tokenizer(text[cut:], add_special_tokens=False)["input_ids"])

    def _encode_head(self, item: Item, order: Permutation, settings: PromptSettings, images: ImageCache) -> _Head:
        text, ids, types, vision = self._process(item, order, settings, images)
        if len(ids) >= self.context:
            raise MedbridgeError(
                f"item {item.id!r}: its prompt has {len(ids)} tokens, and {self.path!r} takes {self.context} with the "
                "answer. Give smaller images, or leave the item out."
            )
        positions, next_position = self._positions(ids, types, vision)
        tail = self._tail_ids(text) if item.images else None
        # Tokenizing the text after the images by itself is right only where it gives back the same ids.
        plain = tail is not None and 0 < len(tail) < len(ids) and torch.equal(ids[-len(tail) :], tail)
        prompt = EncodedPrompt(ids, types, positions, next_position, vision, text)
        cut = len(ids) - (len(tail) if plain and tail is not None else 0)
        return _Head(
            ids=ids[:cut], type_ids=None if types is None else types[:cut], positions=positions[:, :cut],
            next_position=int(positions[:, :cut].max()) + 1, vision=vision, tail_is_plain=plain,
            prompts={order: prompt},
        )  # fmt: skip

    def _encode_order(
        self, item: Item, order: Permutation, settings: PromptSettings, images: ImageCache, head: _Head
    ) -> EncodedPrompt:
        if not head.tail_is_plain:
            text, ids, types, _ = self._process(item, order, settings, images)
            positions, next_position = self._positions(ids, types, head.vision)
            return EncodedPrompt(ids, types, positions, next_position, head.vision, text)
        text = self.render(item, order, settings)
        tail = self._tail_ids(text)
        assert tail is not None
        steps = torch.arange(len(tail)) + head.next_position
        return EncodedPrompt(
            ids=torch.cat([head.ids, tail]),
            type_ids=None if head.type_ids is None else torch.cat([head.type_ids, torch.zeros_like(tail)]),
            positions=torch.cat([head.positions, steps.expand(head.positions.shape[0], -1)], dim=1),
            next_position=head.next_position + len(tail),
            vision=head.vision,
            text=text,
        )

    def _positions(self, ids: Tensor, types: Tensor | None, vision: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        if not self.uses_mrope or not vision:
            rows = 3 if self.uses_mrope else 1
            return torch.arange(len(ids)).expand(rows, -1), len(ids)
        positions, _ = self.model.base_model.get_rope_index(
            ids[None],
            mm_token_type_ids=None if types is None else types[None],
            **{key: value for key, value in vision.items() if key.endswith("grid_thw")},
        )
        return positions[:, 0], int(positions.max()) + 1

    # -- running -------------------------------------------------------------------------------------------

    def positions_argument(self, positions: Tensor) -> Tensor:
        """Positions [3 or 1, B, T] in the shape that the model's forward takes."""
        return positions if self.uses_mrope else positions[0]

    def type_argument(self, type_ids: Tensor | None) -> dict[str, Tensor]:
        return {} if type_ids is None else {self._type_key: type_ids}

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes in the compute type where weights are held in float32."""
        held = next(self.model.parameters()).dtype
        if held == self.compute_dtype or self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def collate(self, prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[int]]) -> CompletionBatch:
        """Right-pad prompt + completion rows into one batch on the model's device."""
        lengths = [len(prompt.ids) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
        batch, longest = len(lengths), max(lengths)
        axes = prompts[0].positions.shape[0]
        input_ids = torch.full((batch, longest), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros(batch, longest, dtype=torch.long)
        positions = torch.zeros(axes, batch, longest, dtype=torch.long)
        types = torch.zeros_like(mask) if prompts[0].type_ids is not None else None
        rows, columns, labels = [], [], []
        for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
            start, end = len(prompt.ids), lengths[row]
            input_ids[row, :start] = prompt.ids
            input_ids[row, start:end] = torch.as_tensor(ids)
            mask[row, :end] = 1
            positions[:, row, :start] = prompt.positions
            positions[:, row, start:end] = torch.arange(len(ids)) + prompt.next_position
            if types is not None and prompt.type_ids is not None:
                types[row, :start] = prompt.type_ids
            rows.append(torch.full((len(ids),), row))
            columns.append(torch.arange(start - 1, end - 1))
            labels.append(input_ids[row, start:end])
        to = self.device
        return CompletionBatch(
            input_ids=input_ids.to(to), attention_mask=mask.to(to), positions=positions.to(to),
            type_ids=None if types is None else types.to(to), vision=merge_vision(prompts, to),
            rows=torch.cat(rows).to(to), columns=torch.cat(columns).to(to), labels=torch.cat(labels).to(to),
        )  # fmt: skip

    def completion_hidden(self, batch: CompletionBatch) -> Tensor:
        """Hidden states [N, width] that predict `batch.labels`, before the output layer."""
        with self.autocast():
            hidden = self.model.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                position_ids=self.positions_argument(batch.positions), use_cache=False,
                **self.type_argument(batch.type_ids), **batch.vision,
            ).last_hidden_state  # fmt: skip
            return hidden[batch.rows, batch.columns]

    def plan(
        self, prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[int]], *, tokens: int, most: int | None
    ) -> list[list[int]]:
        """Share completions out to micro-batches of at most `tokens`, images at their cost, and of at most `most`.

        Returns their numbers, a list for each micro-batch in the order that `pack` wants; see `packing.plan`.
        """
        costs = [self.image_tokens(prompt) for prompt in prompts]
        return plan(prompts, completions, tokens=tokens, most=most, image_tokens=costs)

    def pack(self, prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[int]]) -> PackedBatch:
        """One row without padding on the model's device; neighbours with the same prompt object share it."""
        bidirectional = self._type_key == "token_type_ids"
        return pack(prompts, completions, self.device, bidirectional_images=bidirectional)

    def packed_hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states [N, width] that predict `batch.labels`, before the output layer."""
        use_packed_attention(self.model)
        with self.autocast():
            hidden = self.model.base_model(
                input_ids=batch.input_ids, position_ids=self.positions_argument(batch.positions), use_cache=False,
                **packed_arguments(batch.layout, self.device), **self.type_argument(batch.type_ids), **batch.vision,
            ).last_hidden_state  # fmt: skip
            # index_select, for its backward adds up in one order, where a prompt's last token has several completions
            return hidden[0].index_select(0, batch.columns)

    def image_tokens(self, prompt: EncodedPrompt) -> float:
        """What a prompt's images cost in the vision tower, as text tokens of the same activation memory.

        A patch (before patches are merged to tokens) counts as layers x width of the tower over the text model's.
        """
        patches = self.patches(prompt.vision)
        if not patches:
            return 0.0
        vision, text = self.model.config.vision_config, self.model.config.get_text_config()
        tower = vision_depth(vision) * vision_width(vision)
        return patches * tower / (text.num_hidden_layers * text.hidden_size)

    def patches(self, vision: Mapping[str, Tensor]) -> int:
        """How many patches the images of a prompt or of a batch have, before they are merged to tokens."""
        return sum(patches_of_frames(self.model.config.vision_config, vision))

    def completion_logits(self, batch: CompletionBatch) -> Tensor:
        """Logits [N, vocabulary] that predict `batch.labels`; banned tokens hold `BANNED_LOGIT`.

        Only these rows go through the output layer: prompt tokens cost no logits.
        """
        hidden = self.completion_hidden(batch)
        with self.autocast():
            return self.head(hidden)

    def output_layer(self) -> OutputLayer | None:
        """What `head` computes, for losses that make no logits; None where it is more than a linear layer."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return None
        banned = torch.tensor(self.banned, dtype=torch.long, device=self.device) if self.banned else None
        return OutputLayer(head.weight, head.bias, self._softcap, banned)

    def head(self, hidden: Tensor) -> Tensor:
        """Output layer, soft cap and banned tokens: logits [..., vocabulary]."""
        logits = self.model.get_output_embeddings()(hidden)
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        if self.banned:
            banned = torch.tensor(self.banned, device=logits.device)
            logits = logits.index_fill(-1, banned, BANNED_LOGIT)
        return logits


def _declare_dtype(path: Path, dtype: str) -> None:
    """Have a configuration name the type that its weights are stored in, not the one they were held in."""
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict) and "dtype" in section:
            section["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")


def pick_device(wanted: str) -> torch.device:
    """The device that `ModelSettings.device` means on this machine.

    Raises:
        MedbridgeError: cuda is asked for and there is none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MedbridgeError("model.device is cuda, and torch sees no CUDA GPU. Use auto or cpu.")
    return torch.device(wanted)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The compute type that `ModelSettings.dtype` means on a device."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def _pick_attention(wanted: str, device: torch.device) -> str:
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"
