"""Whether a request's prompts leave room for an answer, asked before anything is sampled."""

from __future__ import annotations

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import Request

ORDERS_DIFFER = 32
"""Tokens by which the prompts of an item's option orders may differ in length: a line's end may join a word."""


def prompt_length(
    request: Request,
    prompter: Prompter,
    prompts: PromptSettings,
    images: ImageCache,
    longest: int,
    *,
    who: str,
    cure: str,
) -> int:
    """Tokens of the longest of a request's prompts, its images expanded (of one of them where all surely fit).

    Args:
        longest: prompt and answer together, in tokens.
        who: what takes no more than that, and `cure`: what to do, for the message.

    Raises:
        MedbridgeError: a prompt leaves no room for an answer; names the item.
    """
    found = 0
    for order in dict.fromkeys(request.permutations):
        found = max(found, prompter.length(request.item, order, prompts, images))
        if found >= longest:
            raise MedbridgeError(
                f"item {request.item.id!r}: its prompt has {found} tokens, and {who} takes {longest} with the answer. "
                f"{cure} Nothing was sampled yet."
            )
        if found + ORDERS_DIFFER < longest:
            break
    return found
