"""How many floating-point operations training takes by the model's arithmetic, and how many the device could do.

Their quotient over the seconds is the MFU (model FLOPs utilisation, arXiv 2204.02311, appendix B): activations that are
computed again in the backward pass are no progress, and don't count.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from medbridge.model.packing import PackedLayout
from medbridge.model.policy import Policy
from medbridge.model.shape import head_width, patches_of_frames, vision_depth, vision_width
from medbridge.train.parameters import is_vision

PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"B200", 2250, 1125, 75),
    (r"H200|GH200|H100 80GB HBM3|H100 SXM", 989.4, 494.7, 66.9),
    (r"H100 NVL", 835, 417.5, 60),
    (r"H100 PCIe", 756, 378, 51),
    (r"A100", 312, 156, 19.5),
    (r"L40S", 362, 183, 91.6),
    (r"L4\b", 121, 60, 30.3),
    (r"A10\b", 125, 62.5, 31.2),
    (r"RTX 4090", 165.2, 82.6, 82.6),
)
"""Name as torch gives it, and dense TFLOP/s in bfloat16, in TF32 and in float32, by NVIDIA's data sheets and white
papers (where these state them with sparsity: half of it). A GPU that isn't here is measured."""


class FlopCounter:
    """Counts the operations of a policy's forward passes over packed rows, and of the backward passes they will have.

    A multiply-add is two operations. Forward: 2 a weight and token (a patch in the vision tower, a merged patch in what
    joins it to the text model, a completion token in the output layer), and 4 a query, key and channel in attention.
    Backward: as much again for the inputs' gradients where something beneath is trained, and once more for the weights
    that are. A pass without gradient counts its forward half. Sampling is not counted. Sliding windows of text
    layers are counted as if they were wide enough, and gradients of the first layer's inputs as if they were needed.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._flops = 0.0
        self._tokens = 0
        self._costs: _Costs | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it passes are counted; nothing else changes."""
        handle = self._policy.model.base_model.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def take(self) -> tuple[float, int]:
        """Operations and tokens (prompts and completions, with a gradient) since the last call."""
        taken = self._flops, self._tokens
        self._flops, self._tokens = 0.0, 0
        return taken

    def _see(self, module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        layout = given.get("packed")
        if not isinstance(layout, PackedLayout):
            return
        if self._costs is None:  # only now: adapters are there
            self._costs = _Costs(self._policy)
        tokens = given["input_ids"].shape[-1]
        learns = torch.is_grad_enabled()
        self._flops += self._costs.of(layout, tokens, given, learns)
        self._tokens += tokens if learns else 0


class _Costs:
    """Operations of one model: weights by where they work, and what their gradients cost."""

    def __init__(self, policy: Policy) -> None:
        config = policy.model.config
        text, self._vision = config.get_text_config(), config.vision_config
        self._text_attention = 4.0 * text.num_hidden_layers * text.num_attention_heads * head_width(text)
        self._merge = getattr(self._vision, "spatial_merge_size", 1) ** 2
        head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
        self._held = dict.fromkeys(("text", "vision", "joint", "head"), 0)
        self._trained = dict(self._held)
        for name, parameter in policy.model.named_parameters():
            embeds = parameter is embedding.weight or "pos_embed" in name or "position_embedding" in name
            if parameter.ndim < 2 or (embeds and parameter is not getattr(head, "weight", None)):
                continue
            place = _place(name, is_head=parameter is getattr(head, "weight", None))
            self._held[place] += parameter.numel()
            self._trained[place] += parameter.numel() if parameter.requires_grad else 0
        # whether gradients flow back through what works there
        vision = self._trained["vision"] > 0
        joint = vision or self._trained["joint"] > 0
        text = joint or self._trained["text"] > 0
        self._flows = {"vision": vision, "joint": joint, "text": text, "head": any(self._trained.values())}

    def of(self, layout: PackedLayout, tokens: int, given: dict[str, Any], learns: bool) -> float:
        labels = int((layout.completions >= 0).sum())
        patches, seen = self._patches(given)
        units = {"text": tokens, "head": labels, "vision": patches, "joint": patches / self._merge}
        total = 0.0
        for place, count in units.items():
            each = 2 * self._held[place]
            if learns:
                each += 2 * self._trained[place] + (2 * self._held[place] if self._flows[place] else 0)
            total += each * count
        total += self._text_attention * attended_pairs(layout) * (3 if learns and self._flows["text"] else 1)
        return total + seen * (3 if learns and self._flows["vision"] else 1)

    def _patches(self, given: dict[str, Any]) -> tuple[int, float]:
        """Patches of a row's images, and the operations of attention among them, forward."""
        vision = self._vision
        sizes = patches_of_frames(vision, given)
        if not sizes:
            return 0, 0.0
        layers = vision_depth(vision)
        full = getattr(vision, "fullatt_block_indexes", None)
        whole = layers if full is None else len(full)
        window = (getattr(vision, "window_size", None) or 0) // vision.patch_size
        pairs = sum(whole * n * n + (layers - whole) * n * min(n, window**2) for n in sizes)
        return sum(sizes), 4.0 * vision_width(vision) * pairs


def attended_pairs(layout: PackedLayout) -> int:
    """Pairs of a query and a key that it sees in one layer and head, without a sliding window."""
    counts = ((part.end - part.start, part.keys) for part in layout.segments)
    return sum(queries * (keys - queries) + queries * (queries + 1) // 2 for queries, keys in counts)


def _place(name: str, *, is_head: bool) -> str:
    if is_head or "lm_head" in name:
        return "head"
    if "merger" in name or "multi_modal_projector" in name:
        return "joint"
    return "vision" if is_vision(name) else "text"


def listed_peak(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """FLOP/s that a GPU of that name is said to reach; None where it is not known."""
    column = 1 if dtype in (torch.bfloat16, torch.float16) else 2 if tf32 else 3
    for row in PEAKS:
        if re.search(row[0], name):
            return 1e12 * float(row[column])
    return None


@cache
def measured_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the best of some square matrix products on this device, the largest of which takes 20 ms or more."""
    side, best = 256, 0.0
    generator = torch.Generator(device).manual_seed(0)  # its own: training's is left alone
    while True:
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        seconds = min(_seconds_of_product(a, b) for _ in range(4))
        best = max(best, 2 * side**3 / seconds)
        if seconds >= 0.02 or side >= 16384:
            return best
        side *= 2


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return max(time.perf_counter() - began, 1e-9)


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that a device could reach in a type, and where the number is from: "listed" or "measured"."""
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = listed_peak(torch.cuda.get_device_name(device), dtype, tf32=tf32)
        if known is not None:
            return known, "listed"
    return measured_peak(device, dtype, torch.get_num_threads()), "measured"
