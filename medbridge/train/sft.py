"""Bridging: supervised fine-tuning on completion tokens, where the model lacks support."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch.nn import functional as F

from medbridge.data.images import ImageCache
from medbridge.data.items import Item, Permutation
from medbridge.data.prompts import PromptSettings
from medbridge.model.policy import ModelSettings, Policy
from medbridge.train.optimization import OptimizerSettings, Shuffle, Trainable

OnStep = Callable[[int, dict[str, float], list[str]], None]
"""Called after each optimizer step with the step (from 1), its metrics and the ids of its items."""


class SftSettings(OptimizerSettings):
    """How a bridge stage trains."""

    steps: int = Field(200, ge=1, description="Optimizer steps of one bridge stage.")
    batch_size: int = Field(32, ge=1, description="Examples a step.")
    micro_batch_size: int = Field(8, ge=1, description="Examples in memory at once; the gradient is the same.")
    source: Literal["auto", "answers", "traces", "rejection"] = Field(
        "auto",
        description="What is imitated: auto (the item's trace where it has one, else the bare answer), answers, "
        "traces (items that have one), or rejection (the model's own correct samples).",
    )
    rejection_samples: int = Field(
        8, ge=1, description="With source rejection: samples drawn per training item to find correct ones."
    )
    replay_share: float = Field(
        0.0, ge=0, lt=1, description="Share of each batch from strata not being bridged, against forgetting."
    )


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised completion of an item under one option order."""

    item: Item
    order: Permutation
    completion: str


class Examples(Protocol):
    """Something with a length that writes the example at an index, on a given visit (epoch)."""

    def __len__(self) -> int: ...

    def example(self, index: int, visit: int) -> Example: ...


def train_sft(
    policy: Policy,
    examples: Examples,
    replay: Examples | None,
    settings: SftSettings,
    *,
    model: ModelSettings,
    prompts: PromptSettings,
    images: ImageCache,
    seed: int,
    checkpoints: Path,
    on_start: Callable[[int], None],
    on_step: OnStep,
) -> None:
    """Train `policy` in place; resumes from the latest checkpoint under `checkpoints`.

    The loss is the mean cross-entropy (nats) over all completion tokens of the step, however they fall into
    micro-batches. `on_start` is told the step from which training goes on.
    """
    trainable = Trainable(policy, model, settings, settings.steps, seed=seed)
    start = trainable.restore(checkpoints)
    on_start(start)
    share = settings.replay_share if replay is not None and len(replay) else 0.0
    replayed = min(round(settings.batch_size * share), settings.batch_size - 1)  # at least one example is bridged
    streams = [(examples, Shuffle(len(examples), seed), settings.batch_size - replayed)]
    if replay is not None and replayed:
        streams.append((replay, Shuffle(len(replay), seed + 1), replayed))
    for step in range(start + 1, settings.steps + 1):
        began = time.perf_counter()
        batch = [
            source.example(index, visit)
            for source, shuffle, size in streams
            for index, visit in shuffle.take((step - 1) * size, size)
        ]
        trainable.begin(step)
        loss, tokens = _accumulate(policy, batch, settings.micro_batch_size, prompts, images)
        metrics = {"loss": loss, **trainable.step(step)}
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        on_step(step, metrics, [example.item.id for example in batch])
        if step % settings.checkpoint_every == 0 and step < settings.steps:
            trainable.save(checkpoints, step)
    trainable.finish()


def _accumulate(
    policy: Policy, batch: Sequence[Example], micro: int, prompts: PromptSettings, images: ImageCache
) -> tuple[float, int]:
    """Accumulate the gradient of a step's mean loss; returns the loss and the number of its tokens."""
    rows = [
        (policy.encode(entry.item, [entry.order], prompts, images)[0], policy.completion_ids(entry.completion))
        for entry in batch
    ]
    total = sum(len(completion) for _, completion in rows)
    rows.sort(key=lambda row: len(row[0].ids) + len(row[1]))  # alike lengths side by side: less padding
    loss = 0.0
    for at in range(0, len(rows), micro):
        part = rows[at : at + micro]
        collated = policy.collate([prompt for prompt, _ in part], [completion for _, completion in part])
        logits = policy.completion_logits(collated).float()
        share = F.cross_entropy(logits, collated.labels, reduction="sum") / total
        share.backward()
        loss += float(share.detach())
    return loss, total


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator for the given parts; the same parts give the same draws in every process."""
    import hashlib

    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
