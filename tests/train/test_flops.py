"""Counted operations against those that torch itself counts, kernel by kernel, in a real forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.model import ModelSettings, Policy
from medbridge.model.packing import PackedBatch
from medbridge.train.flops import FlopCounter, attended_pairs, listed_peak, measured_peak, peak
from medbridge.train.parameters import add_adapters, trained_parameters

PROMPT = PromptSettings(answer_style="text", system="")
ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")


def pack(policy: Policy, items: list[Item], images: ImageCache, completions: list[int]) -> PackedBatch:
    """A row of a group for each item, with completions of these lengths."""
    encoded = [policy.encode(item, [permutation(item, 0, 0)], PROMPT, images)[0] for item in items]
    prompts = [prompt for prompt in encoded for _ in completions]
    return policy.pack(prompts, [list(range(5, 5 + length)) for length in completions] * len(items))


def pass_over(policy: Policy, batch: PackedBatch, *, backward: bool) -> tuple[float, float]:
    """Forward and backward pass; what torch counts in it: in linear layers, and in attention."""
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        logits = policy.head(policy.packed_hidden(batch))
        if backward:
            logits.sum().backward()
    kinds = {str(operator): count for operator, count in counted.get_flop_counts()["Global"].items()}
    attention = kinds.get("aten.bmm", 0)
    return float(sum(kinds.values()) - attention), float(attention)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("setting", ["whole", "frozen vision", "lora", "forward only"])
def test_operations_are_those_that_torch_counts(
    architecture: str, setting: str, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    lora: dict[str, Any] = {"lora": {"rank": 4}} if setting == "lora" else {}
    model = ModelSettings(freeze_vision=setting == "frozen vision", **lora)
    policy = load_policy(architecture, trainable=True)
    network = policy.model if model.lora is None else add_adapters(policy, model.lora, 0)
    trained_parameters(network, model)
    counter = FlopCounter(policy)
    learns = setting != "forward only"
    batch = pack(policy, train_items[:1], images, [160])
    with counter.counting(), torch.set_grad_enabled(learns):
        linear, attention = pass_over(policy, batch, backward=learns)
    ours, tokens = counter.take()
    length = batch.input_ids.shape[-1]
    # of a causal square this way of attention computes both halves; under adapters nothing needs the gradient of the
    # first layer's inputs, and that is one layer of two here
    expected = linear + attention * (length + 1) / (2 * length)
    assert expected * 0.999 <= ours <= expected * (1.03 if setting == "lora" else 1.01)
    assert tokens == (length if learns else 0)
    assert counter.take() == (0.0, 0)
    with torch.set_grad_enabled(learns):
        pass_over(policy, batch, backward=False)
    assert counter.take() == (0.0, 0)  # not within it


def test_pairs_are_those_that_the_masks_let_through(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    layout = pack(load_policy(), train_items[:3], images, [40, 1, 90, 7]).layout
    seen = 0
    for block in layout.blocks(None):
        queries = block.end - block.start
        seen += queries * (queries + 1) // 2 if block.mask is None else int(block.mask.sum())
    assert attended_pairs(layout) == seen


def test_a_forward_pass_that_is_no_training_is_not_counted(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy()
    prompt = policy.encode(train_items[0], [permutation(train_items[0], 0, 0)], PROMPT, images)[0]
    counter = FlopCounter(policy)
    with counter.counting():
        policy.completion_hidden(policy.collate([prompt], [[5, 6]]))
    assert counter.take() == (0.0, 0)


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4), ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756), ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362), ("NVIDIA L4", torch.bfloat16, 121), ("NVIDIA A10", torch.bfloat16, 125),
    ],
)  # fmt: skip
def test_listed_peaks(name: str, dtype: torch.dtype, tera: float) -> None:
    assert listed_peak(name, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "Tesla T4", "NVIDIA L40", "AMD Instinct MI300X"])
def test_a_gpu_that_is_not_listed_is_none_of_the_listed_ones(name: str) -> None:
    assert listed_peak(name, torch.bfloat16) is None


def test_tf32_counts_where_it_is_on() -> None:
    assert listed_peak("NVIDIA H200", torch.float32, tf32=True) == pytest.approx(494.7e12)


def test_a_cpu_is_measured_once() -> None:
    first = peak(torch.device("cpu"), torch.float32)
    assert first[1] == "measured" and first[0] > 1e8
    assert peak(torch.device("cpu"), torch.float32) == first
    assert measured_peak.cache_info().hits >= 1
