"""Bridging: supervised fine-tuning on completion tokens, where the model lacks support."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medbridge.data.images import ImageCache
from medbridge.data.items import Item, Permutation
from medbridge.data.prompts import PromptSettings
from medbridge.model.policy import BANNED_LOGIT, OutputLayer, Policy
from medbridge.model.settings import ModelSettings
from medbridge.train.optimization import Shuffle, Trainable
from medbridge.train.ranks import Ranks
from medbridge.train.settings import SftSettings
from medbridge_kernels import LossConfig, linear_grpo_loss

OnStep = Callable[[int, dict[str, float], list[str]], None]
"""Called after each optimizer step with the step (from 1), its metrics and the ids of its items."""

Score = Callable[[int], float]
"""How good the model is on held-out items, finite, the higher the better.

Called with the step, after the update of each step behind which a checkpoint is saved, and of the last one. Weights and
training mode are to be left as they are. Under rl.staleness the sampling thread is at work meanwhile.
"""


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


@dataclass(frozen=True, slots=True)
class Supervision:
    """What is imitated, and in which portions.

    Attributes:
        examples: what a batch is made of.
        replay: what a share of it (`settings.replay_share`) is taken from, against forgetting; None where nothing is.
        settings: of these a step beside RL reads batch_size, replay_share and the micro-batches' budget; its steps and
            optimizer are the RL settings'.
        weight: of the mean cross-entropy in the loss of a step beside RL.
    """

    examples: Examples
    replay: Examples | None
    settings: SftSettings
    weight: float = 1.0


class SupervisedTerm:
    """The supervised part of each step: its examples, and their gradient."""

    def __init__(
        self,
        policy: Policy,
        supervision: Supervision,
        prompts: PromptSettings,
        images: ImageCache,
        *,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        """The order of the examples depends on `seed` only. Of several ranks, rank 0 draws them."""
        self.ranks = ranks or Ranks()
        self.policy = policy
        self.settings = supervision.settings
        self.weight = supervision.weight
        self.prompts = prompts
        self.images = images
        size, replay = self.settings.batch_size, supervision.replay
        share = self.settings.replay_share if replay is not None and len(replay) else 0.0
        replayed = min(round(size * share), size - 1)  # at least one example is bridged
        self._streams = [(supervision.examples, Shuffle(len(supervision.examples), seed), size - replayed)]
        if replay is not None and replayed:
            self._streams.append((replay, Shuffle(len(replay), seed + 1), replayed))

    def batch(self, step: int) -> list[Example]:
        """The examples of a step, counted from 1: the same at each call."""
        drawn: list[Example] = self.ranks.share(
            lambda: [
                source.example(index, visit)
                for source, shuffle, size in self._streams
                for index, visit in shuffle.take((step - 1) * size, size)
            ]
        )
        return drawn

    def backward(self, batch: Sequence[Example]) -> tuple[float, int]:
        """Add the gradient of `weight` times the mean loss; returns that mean (nats) and the number of its tokens.

        The mean is that over all completion tokens of the batch, however they fall into micro-batches.
        """
        policy, settings = self.policy, self.settings
        encoded = [policy.encode(entry.item, [entry.order], self.prompts, self.images)[0] for entry in batch]
        completions = [policy.completion_ids(entry.completion) for entry in batch]
        total = sum(map(len, completions))
        own = self.ranks.deal_rows(policy, encoded, [len(ids) for ids in completions])
        encoded, completions = [encoded[at] for at in own], [completions[at] for at in own]
        loss = 0.0
        for part, packed in self.ranks.micro_batches(
            policy, encoded, completions, tokens=settings.micro_batch_tokens, most=settings.micro_batch_size
        ):
            hidden = policy.packed_hidden(packed)
            if not part:
                self.ranks.idle(hidden)
                continue
            share = cross_entropy(policy, hidden, packed.labels) / total
            (self.weight * share).backward()
            loss += float(share.detach())
        (loss,) = self.ranks.total(loss)
        return loss, total


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
    say: Callable[[str], None] = warnings.warn,
    score: Score | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Train `policy` in place; resumes from the latest checkpoint under `checkpoints`.

    The loss is the mean cross-entropy (nats) over all completion tokens of the step. `on_start` is told the step from
    which training goes on, `say` of skipped steps and damaged checkpoints. Several ranks call it together; what is
    called back, and `policy` in the end, is then rank 0's.
    """
    ranks = ranks or Ranks()
    trainable = Trainable(policy, model, settings, settings.steps, seed=seed, say=say, ranks=ranks)
    start = trainable.restore(checkpoints)
    ranks.lead(on_start, start)
    supervision = Supervision(examples, replay, settings)
    supervised = SupervisedTerm(trainable.policy, supervision, prompts, images, seed=seed, ranks=ranks)
    for step in range(start + 1, settings.steps + 1):
        began = time.perf_counter()
        batch = supervised.batch(step)
        trainable.begin(step)
        loss, tokens = supervised.backward(batch)
        metrics = {"loss": loss, **trainable.step(step, loss)}
        metrics["seconds_training"] = time.perf_counter() - began
        metrics["tokens_per_second"] = tokens / metrics["seconds_training"]
        saves = step % settings.checkpoint_every == 0 and step < settings.steps
        if saves or step == settings.steps:
            trainable.publish()
        held_out = ranks.share(scored, score if saves or step == settings.steps else None, step)
        if held_out is not None:
            metrics["held_out_accuracy"] = held_out
        ranks.lead(on_step, step, metrics, [example.item.id for example in batch])
        if saves:
            trainable.save(checkpoints, step, score=held_out)
    trainable.finish()


def scored(score: Score | None, step: int) -> float | None:
    """The score of a step, where there is one to be asked for."""
    return None if score is None else score(step)


def cross_entropy(policy: Policy, hidden: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy (nats) of labels [N] by the policy's output layer on hidden states [N, width].

    It is CISPO's loss on policy under an advantage of 1, -log p, whose gradient is made chunk by chunk with the logits.
    These are never held whole, unless only the model knows how to make them (adapters on the output layer). On a GPU
    it is Liger's fused kernel where that is installed.
    """
    layer = policy.output_layer()
    with policy.autocast():
        if layer is None:
            return F.cross_entropy(policy.head(hidden).float(), labels, reduction="sum")
        if hidden.is_cuda and layer.softcap is None and importlib.util.find_spec("liger_kernel"):
            return _liger_cross_entropy(hidden, labels, layer)
        loss, _ = linear_grpo_loss(
            hidden, token_ids=labels, sequence_ids=torch.zeros_like(labels), advantages=hidden.new_ones(1),
            config=LossConfig.preset("cispo"), normalizer=1.0, **layer._asdict(),
        )  # fmt: skip
        return loss


def _liger_cross_entropy(hidden: Tensor, labels: Tensor, layer: OutputLayer) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    bias = layer.bias
    if layer.banned_ids is not None:  # it knows none: a bias takes them out (which a soft cap would undo)
        bias = torch.zeros_like(layer.weight[:, 0]) if bias is None else bias
        bias = bias.index_fill(0, layer.banned_ids, BANNED_LOGIT)
    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, layer.weight, labels, bias=bias, reduction="sum", accum_dtype=torch.float32
    )
    return loss


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator for the given parts; the same parts give the same draws in every process."""
    import hashlib

    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
