"""Requests as the draws that vLLM's process is asked for, and its answers as rollouts. Nothing is sent here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from medbridge.data.items import Permutation
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import GREEDY, EngineFailure, Request, Rollout, SamplingSettings
from medbridge.rollout.sampling import cut_at_stop, tokens_to_stop
from medbridge.rollout.vllm.wire import Message


@dataclass(slots=True)
class Opened:
    """A request whose rollouts are not all there."""

    request: Request
    rollouts: list[Rollout | None] = field(init=False)

    def __post_init__(self) -> None:
        self.rollouts = [None] * len(self.request.samples)


@dataclass(frozen=True, slots=True)
class Draw:
    """Samples of one request that one prompt answers, by their positions there; no seeds: the greedy completion."""

    opened: Opened
    positions: list[int]
    permutation: Permutation
    seeds: list[int]


def split(opened: Opened, seed: int) -> Iterator[Draw]:
    """One draw for each option order, the greedy sample by itself."""
    request = opened.request
    groups: dict[tuple[bool, Permutation], list[int]] = {}
    for position, (sample, order) in enumerate(zip(request.samples, request.permutations, strict=True)):
        groups.setdefault((sample == GREEDY, order), []).append(position)
    for (greedy, order), positions in groups.items():
        if greedy:
            yield from (Draw(opened, [position], order, []) for position in positions)
        else:
            seeds = [sample_seed(seed, request.item.id, request.samples[position]) for position in positions]
            yield Draw(opened, positions, order, seeds)


def sample_seed(seed: int, item_id: str, sample: int) -> int:
    """Seed of one sample's draw, that the run's seed, the item and the sample's index decide."""
    digest = hashlib.blake2b(f"{seed}|{item_id}|{sample}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def how(sampling: SamplingSettings, prompter: Prompter) -> Message:
    """What all draws of a call have in common."""
    return Message(
        "sampling",
        {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
            "stop": list(sampling.stop), "stop_ids": prompter.stop_ids, "banned": prompter.banned,
        },
    )  # fmt: skip


def ask(number: int, draw: Draw, prompter: Prompter, prompts: PromptSettings) -> Message:
    """A draw as a message; its answer comes under its number."""
    item = draw.opened.request.item
    ids = np.array(prompter.prompt_ids(item, draw.permutation, prompts), np.int32)
    return Message("draw", {"draw": number, "images": item.images, "seeds": draw.seeds}, (ids.tobytes(),))


def read(answer: Message, draw: Draw, prompter: Prompter, stop: tuple[str, ...]) -> list[Rollout]:
    """The rollouts of a finished draw; they are put into their request as well.

    Raises:
        MedbridgeError: log-probabilities that are no numbers.
        EngineFailure: vLLM gave a completion up.
    """
    ids, logprobs = np.frombuffer(answer.blobs[0], np.int32), np.frombuffer(answer.blobs[1], np.float32)
    request = draw.opened.request
    if not np.isfinite(logprobs).all():
        raise MedbridgeError(
            f"item {request.item.id!r}: vLLM gives a token that it drew no finite log-probability. The weights hold "
            "NaN or infinity, or the type that it computes in is too narrow for them."
        )
    ends = np.cumsum(answer["lengths"]).tolist()
    rollouts = []
    for position, start, end, reason in zip(draw.positions, [0, *ends], ends, answer["reasons"], strict=False):
        if reason not in ("stop", "length"):
            raise EngineFailure("sampling", "died", f"vLLM gave up a completion of item {request.item.id!r} ({reason})")
        completion = _completion(ids[start:end], logprobs[start:end], reason, prompter, stop)
        rollout = Rollout(
            item_id=request.item.id, sample=request.samples[position], permutation=draw.permutation, **completion,
            prompt_tokens=answer["prompt_tokens"], images=answer["images"], weights=answer["version"],
        )  # fmt: skip
        draw.opened.rollouts[position] = rollout
        rollouts.append(rollout)
    return rollouts


def _completion(
    ids: np.ndarray,
    logprobs: np.ndarray,
    reason: Literal["stop", "length"],
    prompter: Prompter,
    stop: tuple[str, ...],
) -> dict[str, Any]:
    closed = bool(len(ids)) and int(ids[-1]) in prompter.stop_ids
    said = ids[: len(ids) - closed].tolist()
    end = tokens_to_stop(said, stop, prompter.decode) if stop else None
    if end is not None:  # the same token ends it on every engine
        ids, logprobs, said, reason = ids[:end], logprobs[:end], said[:end], "stop"
    text = cut_at_stop(prompter.decode(said), stop)
    return {"text": text, "token_ids": ids.copy(), "logprobs": logprobs.copy(), "finish_reason": reason}
