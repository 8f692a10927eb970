"""Sizes read off a configuration, against what passes through the layers of real models made from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.model import FromNothing, ModelSettings, Policy, init_model
from medbridge.model.shape import head_width, patches_of_frames, vision_depth, vision_width

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
PROMPT = PromptSettings(answer_style="text", system="")


@pytest.fixture
def make_policy(tmp_path: Path, tiny_texts: list[str]) -> Callable[[str], Policy]:
    """A small model whose sizes all differ from one another."""

    def make(architecture: str) -> Policy:
        shape = FromNothing(
            architecture=architecture, hidden_size=128, layers=2, vision_hidden_size=96, vision_layers=3, image_size=28
        )  # fmt: skip
        return Policy.load(str(init_model(tmp_path / architecture, shape, tiny_texts, seed=0)), ModelSettings())

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tower_is_as_deep_and_wide_as_said_and_sees_as_many_patches(
    architecture: str,
    make_policy: Callable[[str], Policy],
    train_items: list[Item],
    odd_pictures: list[str],
    images: ImageCache,
) -> None:
    policy = make_policy(architecture)
    vision = policy.model.config.vision_config
    seen: list[torch.Size] = []
    for name, module in policy.model.named_modules():
        if re.search(r"vis.*\.(blocks|layers)\.\d+$", name):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    one = train_items[0]
    shown = [odd_pictures, *([path] for path in odd_pictures), []]
    items = [dataclasses.replace(one, id=str(at), images=tuple(paths)) for at, paths in enumerate(shown)]
    together, *alone, none = (policy.encode(item, [permutation(one, 0, 0)], PROMPT, images)[0] for item in items)
    for prompt in (together, *alone):
        seen.clear()
        policy.packed_hidden(policy.pack([prompt], [[5]]))
        assert len(seen) == vision_depth(vision) == 3
        assert {shape[-1] for shape in seen} == {vision_width(vision)} == {96}
        assert {shape[:-1].numel() for shape in seen} == {sum(patches_of_frames(vision, prompt.vision))}
    each = [patches_of_frames(vision, prompt.vision) for prompt in alone]
    assert [len(counts) for counts in each] == [1, 1, 1]
    assert patches_of_frames(vision, together.vision) == [count for counts in each for count in counts]
    assert patches_of_frames(vision, none.vision) == []


def test_each_frame_of_a_video_counts(make_policy: Callable[[str], Policy]) -> None:
    given = {"pixel_values": torch.zeros(64, 294), "image_grid_thw": torch.tensor([[2, 4, 6], [1, 2, 8]])}
    assert patches_of_frames(make_policy("qwen2_5_vl").model.config.vision_config, given) == [24, 24, 16]


@pytest.mark.parametrize(
    ("architecture", "width"), [*((name, None) for name in ARCHITECTURES), ("qwen3_vl", 48), ("gemma3", 48)]
)
def test_heads_are_as_wide_as_their_projections(
    architecture: str, width: int | None, model_folder: Callable[[str], Path]
) -> None:
    """Also where their width is no share of the model's, which Qwen2-VL and Qwen2.5-VL can't have."""
    config = AutoConfig.from_pretrained(model_folder(architecture))
    text = config.get_text_config()
    if width is not None:
        text.head_dim = width
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    keys = {
        module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"language_model.*\.k_proj$", name)
    }
    assert keys == {text.num_key_value_heads * head_width(text)}
