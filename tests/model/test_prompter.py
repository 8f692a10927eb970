"""Prompts without the weights: the same ids, lengths and special tokens as the loaded model has."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import Policy, Prompter

PROMPT = PromptSettings(answer_style="text", system="")


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_is_what_the_loaded_model_says(
    architecture: str,
    load_policy: Callable[..., Policy],
    train_items: list[Item],
    odd_pictures: list[str],
    images: ImageCache,
) -> None:
    policy = load_policy(architecture)
    prompter = Prompter.load(policy.path)
    for name in ("banned", "stop_ids", "vocab_size", "context", "image_token_id"):
        assert getattr(prompter, name) == getattr(policy, name), name
    shown: list[tuple[str, ...]] = [train_items[0].images, (), tuple(odd_pictures), (odd_pictures[1],) * 2]
    for number, paths in enumerate(shown):
        item = dataclasses.replace(train_items[0], id=f"length/train/{number}", images=paths)
        orders = [(0, 1, 2), (2, 0, 1)]
        for order, encoded in zip(orders, policy.encode(item, orders, PROMPT, images), strict=True):
            assert prompter.length(item, order, PROMPT, images) == len(encoded.ids)
            assert prompter.render(item, order, PROMPT) == encoded.text
            unexpanded = prompter.prompt_ids(item, order, PROMPT)
            if not paths:
                assert unexpanded == encoded.ids.tolist()
            assert unexpanded.count(prompter.image_token_id) <= len(paths)
    text = "the answer is bright"
    assert prompter.decode(prompter.completion_ids(text)) == policy.decode(policy.completion_ids(text))
    assert prompter.completion_ids(text)[-1] == prompter.stop_ids[0]


def test_refuses_what_makes_no_prompts(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"its processor can't be loaded"):
        Prompter.load(str(tmp_path / "missing"))
    bare = tmp_path / "bare"
    shutil.copytree(load_policy().path, bare)
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(MedbridgeError, match="no chat template"):
        Prompter.load(str(bare))
