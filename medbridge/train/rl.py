"""Sharpening: GRPO on items whose answers the model can already reach.

Each step samples a group of completions per item, rewards them, and moves probability towards those that did
better than their group. What is simplified so far: rows are padded, a prompt is encoded once per completion in
training, and one process trains.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from medbridge.data.images import ImageCache
from medbridge.data.items import Item
from medbridge.data.prompts import PromptSettings, permutation
from medbridge.model.policy import CompletionBatch, EncodedPrompt, ModelSettings, Policy
from medbridge.rollout.engine import Graded, Request, SamplingSettings
from medbridge.train.optimization import OptimizerSettings, Shuffle, Trainable
from medbridge.train.policy_loss import PolicyLoss
from medbridge.train.sft import OnStep
from medbridge_kernels import LossConfig, group_advantages


class RlSettings(OptimizerSettings):
    """How a sharpen stage trains. The defaults are the paper's where it states them (arXiv 2603.01301)."""

    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate after the warm-up: constant, or a cosine down to a tenth."
    )
    checkpoint_every: int = Field(10, ge=1, description="Steps between checkpoints.")
    steps: int = Field(100, ge=1, description="Optimizer steps of one sharpen stage.")
    reserved_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training items that bridging never sees and sharpening uses alone. Answers that "
        "SFT has memorised are right in every sample, and a group without a difference teaches nothing.",
    )
    prompts_per_step: int = Field(16, ge=1, description="Items sampled a step.")
    completions: int = Field(8, ge=2, description="Completions sampled per item: the group.")
    micro_batch_size: int = Field(16, ge=1, description="Completions in memory at once; same gradient.")
    updates_per_batch: int = Field(
        1, ge=1, description="Optimizer updates from one batch of rollouts; above 1 the clip takes effect."
    )
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; the loss uses the same. There is no nucleus cut in RL: "
        "its log-probabilities would be those of another distribution.",
    )  # fmt: skip
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo"] = Field(
        "grpo", description="Loss preset of medbridge_kernels: surrogate, ratio, clip and how it is normalised."
    )
    loss_impl: Literal["auto", "reference", "native", "triton"] = Field(
        "auto",
        description="Back end of the loss: native (C++) on a CPU, triton on a GPU, reference (plain torch, slow).",
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the stage's first model; above 0 keeps a copy."
    )
    format_weight: float = Field(0.1, ge=0, description="Reward for the answer form, beside 1 for being right.")


SampleStep = Callable[[int, Sequence[Request], SamplingSettings], Sequence[Graded]]
"""Samples and rewards the requests of a step. What a killed run had sampled already comes from its ledger."""


def train_rl(
    policy: Policy,
    items: Sequence[Item],
    settings: RlSettings,
    sample: SampleStep,
    *,
    model: ModelSettings,
    prompts: PromptSettings,
    images: ImageCache,
    max_new_tokens: int,
    seed: int,
    checkpoints: Path,
    on_start: Callable[[int], None],
    on_step: OnStep,
) -> None:
    """Train `policy` in place with GRPO; resumes from the latest checkpoint under `checkpoints`.

    All completions of a group see one option order (advantages compare like with like); it changes each time an
    item comes up. `on_start` is told the step from which training goes on.
    """
    sampling = SamplingSettings(temperature=settings.temperature, top_p=1.0, max_new_tokens=max_new_tokens)
    learner = _Learner(policy, settings, prompts, images, max_new_tokens)
    trainable = Trainable(policy, model, settings, settings.steps, seed=seed)
    start = trainable.restore(checkpoints)
    on_start(start)
    shuffle = Shuffle(len(items), seed)
    for step in range(start + 1, settings.steps + 1):
        began = time.perf_counter()
        taken = shuffle.take((step - 1) * settings.prompts_per_step, settings.prompts_per_step)
        requests = _groups([items[index] for index, _ in taken], step, settings.completions, seed)
        graded = list(sample(step, requests, sampling))
        sampled = time.perf_counter()
        trainable.begin(step)
        learner.loss.comparing = step == 1  # not again in a run that resumes
        metrics = learner.update(step, requests, graded, trainable)
        metrics["seconds_sampling"] = sampled - began
        metrics["seconds_training"] = time.perf_counter() - sampled - metrics.pop("seconds_comparing", 0.0)
        on_step(step, metrics, [request.item.id for request in requests])
        if step % settings.checkpoint_every == 0 and step < settings.steps:
            trainable.save(checkpoints, step)
    trainable.finish()


def _groups(items: Sequence[Item], step: int, completions: int, seed: int) -> list[Request]:
    """One request a group. An item drawn twice in a step is two groups: its samples are numbered on."""
    seen: dict[str, int] = {}
    requests = []
    for item in items:
        first = seen.get(item.id, 0)
        seen[item.id] = first + completions
        order = permutation(item, seed, step)
        requests.append(Request(item, tuple(range(first, first + completions)), (order,) * completions))
    return requests


class _Learner:
    """The update half of a step: advantages, loss and optimizer, from completions that were sampled already."""

    def __init__(
        self, policy: Policy, settings: RlSettings, prompts: PromptSettings, images: ImageCache, max_new_tokens: int
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.prompts = prompts
        self.images = images
        self.max_new_tokens = max_new_tokens
        self.config = LossConfig.preset(settings.loss, kl_coef=settings.kl_coefficient)
        self.reference = copy.deepcopy(policy.model).eval() if settings.kl_coefficient > 0 else None
        self.loss = PolicyLoss(policy, self.config, settings.loss_impl, settings.temperature)

    def update(
        self, step: int, requests: Sequence[Request], graded: Sequence[Graded], trainable: Trainable
    ) -> dict[str, float]:
        """One or more optimizer updates from the groups of a step; returns its metrics, means over the updates."""
        rewards = torch.tensor([entry.reward for entry in graded], dtype=torch.float32)
        offsets = torch.tensor(np.cumsum([0, *(len(request.samples) for request in requests)]))
        advantages = group_advantages(rewards, offsets, **self.config.advantage_options())
        rows = [
            (self.policy.encode(request.item, request.permutations[:1], self.prompts, self.images)[0], index)
            for group, request in enumerate(requests)
            for index in range(int(offsets[group]), int(offsets[group + 1]))
        ]
        metrics = describe(graded, rewards, offsets)
        shuffled = np.random.default_rng([step, len(rows)]).permutation(len(rows))
        updates = [
            self._optimize([rows[at] for at in part], graded, advantages, step, trainable)
            for part in np.array_split(shuffled, self.settings.updates_per_batch)
        ]
        for name in dict.fromkeys(name for update in updates for name in update):
            values = [update[name] for update in updates if name in update]
            metrics[name] = max(values) if name == "ratio_max" else sum(values) / len(values)
        return metrics | self.loss.take_seconds()

    def _optimize(
        self,
        rows: list[tuple[EncodedPrompt, int]],
        graded: Sequence[Graded],
        advantages: torch.Tensor,
        step: int,
        trainable: Trainable,
    ) -> dict[str, float]:
        """Accumulate the gradient over micro-batches under the counts of all `rows`, and update once."""
        normalizer = self._normalizer([len(graded[index].rollout.token_ids) for _, index in rows])
        # A row without advantage moves nothing unless the KL term pulls at it: it need not be computed.
        moved = [row for row in rows if self.reference is not None or float(advantages[row[1]]) != 0.0]
        moved.sort(key=lambda row: len(row[0].ids) + len(graded[row[1]].rollout.token_ids))
        if not moved:
            return {}
        totals: dict[str, float] = {"loss": 0.0}
        tokens = 0
        for at in range(0, len(moved), self.settings.micro_batch_size):
            part = moved[at : at + self.settings.micro_batch_size]
            chosen = [graded[index].rollout for _, index in part]
            batch = self.policy.collate(
                [prompt for prompt, _ in part], [rollout.token_ids.tolist() for rollout in chosen]
            )
            loss, outputs = self.loss.backward(
                self.policy.completion_hidden(batch),
                batch.labels,
                sequence_ids=batch.sequence_ids,
                advantages=advantages[[index for _, index in part]].to(self.policy.device),
                old_logprobs=torch.from_numpy(np.concatenate([r.logprobs for r in chosen])).to(self.policy.device),
                ref_logprobs=self._reference_logprobs(batch),
                normalizer=normalizer,
            )
            count = len(batch.labels)
            tokens += count
            totals["loss"] += float(loss)
            totals["entropy"] = totals.get("entropy", 0.0) + float(outputs.entropy.sum())
            for name, value in outputs.metrics.items():
                if name == "ratio_max":
                    totals[name] = max(totals.get(name, 0.0), float(value))
                else:
                    totals[name] = totals.get(name, 0.0) + count * float(value)
        means = {name: value if name in ("loss", "ratio_max") else value / tokens for name, value in totals.items()}
        return means | trainable.step(step)

    def _normalizer(self, lengths: Sequence[int]) -> float:
        counts = {
            "tokens": sum(lengths),
            "sequences": len(lengths),
            "constant": len(lengths) * self.max_new_tokens,
        }
        return float(counts[self.config.normalize])

    @torch.no_grad()
    def _reference_logprobs(self, batch: CompletionBatch) -> torch.Tensor | None:
        if self.reference is None:
            return None
        current, self.policy.model = self.policy.model, self.reference
        try:
            return self.loss.logprobs(self.policy.completion_hidden(batch), batch.labels)
        finally:
            self.policy.model = current


def describe(graded: Sequence[Graded], rewards: torch.Tensor, offsets: torch.Tensor) -> dict[str, float]:
    """What was sampled in a step: mean reward, accuracy, form, length, and the share of groups that teach anything."""
    outcomes = [entry.outcome for entry in graded]
    lengths = [len(entry.rollout.token_ids) for entry in graded]
    groups = [rewards[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return {
        "reward": float(rewards.mean()),
        "accuracy": float(np.mean([outcome.status == "correct" for outcome in outcomes])),
        "format": float(np.mean([outcome.well_formed for outcome in outcomes])),
        "completion_length": float(np.mean(lengths)),
        "truncated": float(np.mean([entry.rollout.finish_reason == "length" for entry in graded])),
        "signal": float(np.mean([bool(group.max() > group.min()) for group in groups])),
    }
