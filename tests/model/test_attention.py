"""Packed rows give the log-probabilities and gradients of one plain forward pass after the other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.model import LoraSettings, Policy
from medbridge.model.attention import BLOCKS, VARLEN, blocks_attention
from medbridge.model.encoded import EncodedPrompt
from medbridge.train.parameters import add_adapters

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
PROMPT = PromptSettings(answer_style="text", system="")


@pytest.fixture
def exact(load_policy: Callable[..., Policy], changed_model: Callable[..., Path]) -> Callable[..., Policy]:
    """A policy in float64 with weights so large that attention matters; Gemma has a short window, then none."""

    def make(architecture: str, **text: Any) -> Policy:
        if architecture == "gemma3":
            text = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], **text}
        folder = changed_model(architecture, {"config.json": {"text_config": text}})
        loaded = load_policy(path=folder)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.1 if "norm" in name else 0.15) * noise)
        return Policy(loaded.model.double(), loaded.processor, path=loaded.path, compute_dtype=torch.float64)

    return make


@pytest.fixture
def groups(train_items: list[Item], odd_pictures: list[str], images: ImageCache) -> Callable[[Policy], Any]:
    """Prompts and completions of groups of 7, 2 and 1: several odd images, one image, none; ragged completions."""

    def make(policy: Policy, longest: int = 60) -> tuple[list[EncodedPrompt], list[list[int]]]:
        one = train_items[0]
        items = [
            dataclasses.replace(one, id=f"kinds/train/{name}", images=tuple(paths))
            for name, paths in (("several", odd_pictures), ("one", one.images), ("none", ()))
        ]
        generator = torch.Generator().manual_seed(1)
        prompts, completions = [], []
        for item, size in zip(items, (7, 2, 1), strict=True):
            [prompt] = policy.encode(item, [(2, 0, 1)], PROMPT, images)
            for _ in range(size):
                length = int(torch.randint(1, longest, (1,), generator=generator))
                prompts.append(prompt)
                completions.append(torch.randint(5, 200, (length,), generator=generator).tolist())
        return prompts, completions

    return make


def logprobs(policy: Policy, hidden: Tensor, labels: Tensor) -> Tensor:
    return policy.head(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def backward(policy: Policy, found: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum of the log-probabilities with weights of both signs."""
    weights = torch.randn(len(found), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (weights * found).sum().backward()
    named = policy.model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return gradients


def plain(policy: Policy, prompts: Sequence[EncodedPrompt], completions: Sequence[list[int]]) -> Tensor:
    """One row after the other through transformers' own SDPA attention; no mask, no padding, prompt repeated."""
    found = []
    for prompt, ids in zip(prompts, completions, strict=True):
        batch = policy.collate([prompt], [ids])
        found.append(logprobs(policy, policy.completion_hidden(batch), batch.labels))
    return torch.cat(found)


def packed(policy: Policy, prompts: Sequence[EncodedPrompt], completions: Sequence[list[int]]) -> Tensor:
    batch = policy.pack(prompts, completions)
    return logprobs(policy, policy.packed_hidden(batch), batch.labels)


def assert_same(found: Tensor, expected: Tensor, gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Norms and rotations are computed in float32 by transformers: that is where gradients differ."""
    assert float((found - expected).detach().abs().max()) <= 1e-10
    assert gradients.keys() == reference.keys()
    whole = float(torch.stack([value.norm() for value in reference.values()]).norm())
    for name, value in reference.items():
        assert float((gradients[name] - value).norm()) <= 1e-6 * max(float(value.norm()), 1e-3 * whole), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("longest", [6, 60])
def test_a_packed_row_equals_plain_forward_passes(
    architecture: str, longest: int, exact: Callable[..., Policy], groups: Callable[..., Any]
) -> None:
    policy = exact(architecture)
    policy.model.train()
    rows = groups(policy, longest)
    expected = plain(policy, *rows)
    reference = backward(policy, expected)
    found = packed(policy, *rows)
    assert_same(found, expected, backward(policy, found), reference)
    assert float(expected.detach().std()) > 0.3  # a model that attends to something


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", ["checkpointing", "adapters", "both"])
def test_with_gradient_checkpointing_and_adapters(
    architecture: str, way: str, exact: Callable[..., Policy], groups: Callable[..., Any]
) -> None:
    policy = exact(architecture)
    if way != "checkpointing":
        add_adapters(policy, LoraSettings(rank=4), seed=0)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:  # zeros: nothing would reach the other half
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    policy.model.train()
    rows = groups(policy)
    expected = plain(policy, *rows)
    reference = backward(policy, expected)
    assert reference and all(("lora" in name) == (way != "checkpointing") for name in reference)
    if way != "adapters":
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.enable_input_require_grads()
    found = packed(policy, *rows)
    assert_same(found, expected, backward(policy, found), reference)


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "gemma3"])
def test_splitting_a_row_changes_nothing(
    architecture: str, exact: Callable[..., Policy], groups: Callable[..., Any]
) -> None:
    policy = exact(architecture)
    prompts, completions = groups(policy)
    expected = plain(policy, prompts, completions)
    offsets = torch.tensor([len(ids) for ids in completions]).cumsum(0)
    for tokens in (1, 150, 300, 10_000):
        parts = policy.plan(prompts, completions, tokens=tokens, most=None)
        assert (len(parts) == 1) == (tokens == 10_000)
        for part in parts:
            found = packed(policy, [prompts[row] for row in part], [completions[row] for row in part])
            wanted = [expected[offsets[row] - len(completions[row]) : offsets[row]] for row in part]
            torch.testing.assert_close(found, torch.cat(wanted), atol=1e-10, rtol=0)


def test_rows_that_are_not_packed_and_the_tower_are_as_before(
    exact: Callable[..., Policy], groups: Callable[..., Any]
) -> None:
    policy = exact("gemma3")
    prompts, completions = groups(policy)
    batch = policy.collate(prompts, completions)
    before = policy.completion_hidden(batch)
    packed(policy, prompts, completions)
    assert policy.model.config.get_text_config()._attn_implementation == BLOCKS
    assert policy.model.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(policy.completion_hidden(batch), before)


def test_the_attention_is_not_written_to_disk(
    load_policy: Callable[..., Policy], groups: Callable[..., Any], tmp_path: Path
) -> None:
    policy = load_policy(trainable=True)
    rows = groups(policy)
    packed(policy, *rows)
    folder = policy.save(tmp_path / "saved")
    assert "medbridge" not in (folder / "config.json").read_text()
    assert load_policy(path=folder).model.config.get_text_config()._attn_implementation == "sdpa"


def test_an_image_is_encoded_once_for_its_group(exact: Callable[..., Policy], groups: Callable[..., Any]) -> None:
    policy = exact("qwen2_5_vl")
    prompts, completions = groups(policy)
    seen = []
    handle = policy.model.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    packed(policy, prompts, completions)
    handle.remove()
    assert seen == [len(prompts[0].vision["pixel_values"]) + len(prompts[7].vision["pixel_values"])]


def test_images_cost_what_their_tower_takes(load_policy: Callable[..., Policy], groups: Callable[..., Any]) -> None:
    """Layers x width of the tower over those of the text model, a patch; nothing without an image."""
    for architecture in ARCHITECTURES:
        policy = load_policy(architecture)
        prompts, _ = groups(policy)
        pixels = prompts[7].vision["pixel_values"]
        patches = len(pixels) if pixels.ndim == 2 else (28 // policy.model.config.vision_config.patch_size) ** 2
        assert policy.image_tokens(prompts[7]) == patches * (1 * 32) / (2 * 64)  # the shape of the tests' models
        assert policy.image_tokens(prompts[9]) == 0


# -- variable length -----------------------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What FlashAttention's documentation says of it, in plain torch: causal, aligned to the bottom right corner."""
    assert causal and dropout_p == 0
    parts = []
    for at in range(len(cu_seqlens_q) - 1):
        own, keys = (slice(*bounds[at : at + 2].tolist()) for bounds in (cu_seqlens_q, cu_seqlens_k))
        queries, held = own.stop - own.start, keys.stop - keys.start
        assert queries <= max_seqlen_q and held <= max_seqlen_k
        places = torch.arange(queries)[:, None] + held - queries
        mask = torch.arange(held) <= places
        if window_size[0] >= 0:
            mask &= torch.arange(held) >= places - window_size[0]
        repeats = q.shape[1] // k.shape[1]
        key, value = (states[keys].repeat_interleave(repeats, dim=1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[own], key) * softmax_scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(parts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layout_for_variable_length_kernels(
    architecture: str, exact: Callable[..., Policy], groups: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself needs a GPU: here a plain function stands for it, by its documentation."""
    called: list[int] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        called.append(1)
        return flash_attn_varlen_func(*args, **options)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=counted))
    policy = exact(architecture)
    prompts, completions = groups(policy)
    textual = [row for row, prompt in enumerate(prompts) if prompt.images == 0]
    for rows in (range(len(prompts)), textual):
        chosen = [prompts[row] for row in rows], [completions[row] for row in rows]
        expected = plain(policy, *chosen)
        policy.model.set_attn_implementation({"text_config": VARLEN})
        called.clear()
        found = packed(policy, *chosen)
        assert len(called) == (0 if architecture == "gemma3" and rows is not textual else 2)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_capped_attention_logits_are_refused(exact: Callable[..., Policy], groups: Callable[..., Any]) -> None:
    policy = exact("qwen2_5_vl")
    batch = policy.pack(*groups(policy))
    states = torch.zeros(1, 2, batch.input_ids.shape[1], 8)
    with pytest.raises(NotImplementedError, match="caps its attention logits"):
        blocks_attention(policy.model, states, states, states, None, batch.layout, softcap=30.0)
