"""Drawing tokens: nucleus sampling from explicit uniforms, so that a draw repeats whatever the batch.

Also where a stop text ends a completion. Nothing here runs a model.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, item_id: str, sample: int, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) that depend on the seed, the item and the sample only (float64, Philox)."""
    digest = hashlib.blake2b(f"{seed}|{item_id}|{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64))).random(count)


def draw(logits: Tensor, temperature: Tensor, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function at `uniform`.

    Args:
        logits: [rows, vocabulary].
        temperature: [rows]; 0 takes the most likely token, and its log-probability at temperature 1.
        top_p: nucleus mass; tokens are kept, most likely first, until their mass reaches it.
        uniform: [rows] in [0, 1).

    Returns:
        token ids int64 [rows] and their log-probabilities float32 [rows] in the distribution that they were drawn from:
        at the temperature, and renormalised over the nucleus. Those at temperature 0 are uncut.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    probabilities = logprobs.exp()
    if top_p < 1:
        descending = probabilities.sort(dim=-1, descending=True).values
        before = descending.cumsum(-1) - descending  # mass of the likelier tokens
        smallest = torch.where(before < top_p, descending, torch.inf).amin(-1, keepdim=True)
        probabilities = torch.where(probabilities >= smallest, probabilities, 0.0)
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    # the first token whose cumulative mass exceeds the target; it has mass of its own
    sampled = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    token = torch.where(greedy, logits.argmax(-1), sampled)
    chosen = logprobs.gather(-1, token[:, None])[:, 0]
    if top_p < 1:
        renormalised = (chosen - cumulative[:, -1].log()).float().clamp_max(0.0)
        chosen = torch.where(greedy, chosen, renormalised)
    return token, chosen


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts; all of it where there is none."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def tokens_to_stop(ids: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> int | None:
    """How many of a completion's tokens it takes until their text holds a stop text; None: it holds none."""

    def said(count: int) -> bool:
        text = decode(ids[:count])
        return any(end in text for end in stop)

    return bisect_left(range(len(ids)), True, key=said) if said(len(ids)) else None
