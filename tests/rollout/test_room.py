"""Prompts that leave no room for an answer are refused, whatever their option order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import Policy
from medbridge.rollout import Request
from medbridge.rollout.room import ORDERS_DIFFER, prompt_length

PROMPT = PromptSettings(answer_style="text", system="")
ORDERS = ((0, 1, 2), (2, 1, 0))


def test_over_long_prompts_are_refused(
    load_policy: Callable[..., Policy], images: ImageCache, train_items: list[Item]
) -> None:
    policy = load_policy()
    request = Request(replace(train_items[0], id="x"), (0, 1), ORDERS)
    longest = max(policy.length(request.item, order, PROMPT, images) for order in ORDERS)

    def length(limit: int) -> int:
        return prompt_length(request, policy, PROMPT, images, limit, who="the cat", cure="Feed it.")

    assert length(longest + 1) == longest
    message = f"item 'x': its prompt has {longest} tokens, and the cat takes {longest} with the answer. Feed it."
    with pytest.raises(MedbridgeError, match=message):
        length(longest)


def test_one_order_is_measured_where_all_surely_fit(
    load_policy: Callable[..., Policy],
    images: ImageCache,
    train_items: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load_policy()
    asked: list[tuple[int, ...]] = []
    lengths = {ORDERS[0]: 100, ORDERS[1]: 100 + ORDERS_DIFFER}
    monkeypatch.setattr(policy, "length", lambda item, order, *_: asked.append(order) or lengths[order])
    request = Request(train_items[0], (0, 1, 2), (ORDERS[0], ORDERS[1], ORDERS[0]))

    def length(limit: int) -> int:
        return prompt_length(request, policy, PROMPT, images, limit, who="it", cure="")

    assert length(101 + ORDERS_DIFFER) == 100 and asked == [ORDERS[0]]
    with pytest.raises(MedbridgeError, match=f"its prompt has {100 + ORDERS_DIFFER} tokens"):
        length(100 + ORDERS_DIFFER)
