"""The update half of a sharpen step: advantages, loss and optimizer, from completions that were sampled already.

Which completions those are, and what weights drew them, is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.model.encoded import EncodedPrompt
from medbridge.model.packing import PackedBatch
from medbridge.model.policy import Policy
from medbridge.rollout.engine import Rollout
from medbridge.train.advantages import advantages
from medbridge.train.consistency import bonuses, right_likelihoods
from medbridge.train.groups import Batch, describe, is_truncated
from medbridge.train.optimization import Trainable
from medbridge.train.policy_loss import PolicyLoss
from medbridge.train.ranks import Ranks
from medbridge.train.reference import Reference, computing_as, first_model
from medbridge.train.sft import Example, SupervisedTerm

if TYPE_CHECKING:
    from medbridge.train.rl_settings import RlSettings


@dataclass(slots=True, eq=False)
class _Row:
    """One completion in training. `old_logprobs` (float32, a token each) once they are known to differ from now."""

    prompt: EncodedPrompt
    rollout: Rollout
    advantage: float
    moves: bool
    old_logprobs: torch.Tensor | None = None


class Learner:
    """Turns the groups of a step into one or more optimizer updates of the policy."""

    def __init__(
        self,
        policy: Policy,
        settings: RlSettings,
        prompts: PromptSettings,
        images: ImageCache,
        max_new_tokens: int,
        *,
        first_k: int = 1,
        supervised: SupervisedTerm | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`first_k` as of `RlSettings.k_at`; `supervised` joins each update. Made before the policy has moved."""
        self.policy = policy
        self.settings = settings
        self.prompts = prompts
        self.images = images
        self.max_new_tokens = max_new_tokens
        self.first_k = first_k
        self.supervised = supervised
        self.ranks = ranks or Ranks()
        self.config = settings.loss_config()
        held = settings.kl_coefficient > 0 and settings.kl_reference == "first"
        self.first = first_model(policy) if held else None
        self.loss = PolicyLoss(policy, self.config, settings.loss_impl, settings.temperature)

    def update(
        self, step: int, batch: Batch, trainable: Trainable, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        """Update from the groups of a step, and from examples for the supervised term; returns its metrics.

        The policy at the start of the step is the proximal one: ratios and their clip are relative to it, and how it
        differs from the engine's is left to the correction (decoupled PPO, arXiv 2110.00641). Each update takes its
        share of the examples, and is made even where no group teaches anything.
        """
        k = self.settings.k_at(step, self.first_k)
        metrics = describe(
            batch, step, mask_truncated=self.settings.mask_truncated, algorithm=self.settings.advantage, k=k
        )
        prompts = self._encode(batch)
        rewards, more = self._rewards(batch, prompts, trainable)
        rows = self._rows(batch, prompts, rewards, k)
        parts = _deal(rows, self.settings.updates_per_batch, step)
        # The first update is computed at the proximal policy itself, whose log-probabilities are then the loss's own.
        for part in parts[1:]:  # each as it is dealt to the ranks when its turn comes
            self._note_logprobs([row for row in part if row.moves])
        shares = [[examples[at] for at in own] for own in np.array_split(np.arange(len(examples)), len(parts))]
        made = [self._optimize(part, own, step, trainable) for part, own in zip(parts, shares, strict=True)]
        for name in dict.fromkeys(name for update in made for name in update):
            values = [update[name] for update in made if name in update]
            metrics[name] = sum(values) / len(values)
        return metrics | more | self.loss.take_metrics(self.ranks) | self.loss.take_seconds()

    def _encode(self, batch: Batch) -> list[EncodedPrompt]:
        """The prompt of each group."""
        return [
            self.policy.encode(group.request.item, group.request.permutations[:1], self.prompts, self.images)[0]
            for group in batch.groups
        ]

    def _rewards(
        self, batch: Batch, prompts: Sequence[EncodedPrompt], trainable: Trainable
    ) -> tuple[list[list[float]], dict[str, float]]:
        """The rewards of each group, the consistency bonus among them where it has a weight, and its metrics."""
        rewards = [group.rewards for group in batch.groups]
        settings = self.settings
        if not settings.consistency_weight:
            return rewards, {}
        with computing_as(self.policy, _average(trainable)):
            likelihoods = right_likelihoods(
                self.policy, prompts, [group.graded for group in batch.groups], self.loss.logprobs, ranks=self.ranks,
                tokens=settings.micro_batch_tokens, most=settings.micro_batch_size,
            )  # fmt: skip
        paid = bonuses(likelihoods, settings.consistency_weight, settings.consistency_margin)
        metrics = {"consistency_bonus": float(np.mean([bonus for group in paid for bonus in group] or [0.0]))}
        right = [likelihood for group in likelihoods for likelihood in group if likelihood is not None]
        if right:
            metrics["answer_likelihood"] = float(np.mean(right))
        summed = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(rewards, paid, strict=True)]
        return summed, metrics

    def _rows(
        self, batch: Batch, prompts: Sequence[EncodedPrompt], rewards: Sequence[Sequence[float]], k: int
    ) -> list[_Row]:
        credited = iter(
            advantages(
                self.settings.advantage,
                torch.tensor([reward for group in rewards for reward in group], dtype=torch.float32),
                torch.tensor(np.cumsum([0, *map(len, rewards)])),
                k=k, config=self.config,
            ).tolist()
        )  # fmt: skip
        rows = []
        for prompt, group in zip(prompts, batch.groups, strict=True):
            for entry in group.graded:
                advantage = next(credited)
                # A row without advantage moves nothing unless the KL term pulls at it: it need not be computed.
                moves = advantage != 0.0 or self.settings.kl_coefficient > 0
                masked = self.settings.mask_truncated and is_truncated(entry)
                rows.append(_Row(prompt, entry.rollout, advantage, moves and not masked))
        return rows

    def _optimize(
        self, rows: Sequence[_Row], examples: Sequence[Example], step: int, trainable: Trainable
    ) -> dict[str, float]:
        """Accumulate the gradient over micro-batches under the counts of all `rows` and `examples`, and update once."""
        moved = [row for row in rows if row.moves]
        if not moved and not examples:
            return {}
        normalizer = self._normalizer([len(row.rollout.token_ids) for row in rows])
        total = 0.0
        for part, batch in self._micro_batches(moved):
            if not part:
                self._reference_logprobs(batch, trainable)
                self.ranks.idle(self.policy.packed_hidden(batch))
                continue
            known = [row.old_logprobs for row in part if row.old_logprobs is not None]  # of all rows, or of none
            ref_logprobs = self._reference_logprobs(batch, trainable)
            loss, _ = self.loss.backward(
                self.policy.packed_hidden(batch),
                batch.labels,
                sequence_ids=batch.sequence_ids,
                advantages=torch.tensor([row.advantage for row in part], device=self.policy.device),
                old_logprobs=torch.cat(known) if known else None,
                ref_logprobs=ref_logprobs,
                rollout_logprobs=torch.from_numpy(np.concatenate([row.rollout.logprobs for row in part])).to(
                    self.policy.device
                ),
                normalizer=normalizer,
            )
            total += float(loss)
        (total,) = self.ranks.total(total)
        if self.supervised is None or not examples:
            return {"loss": total, **trainable.step(step, total)}
        imitation, _ = self.supervised.backward(examples)
        whole = total + self.supervised.weight * imitation
        return {"loss": total, "sft_loss": imitation, **trainable.step(step, whole)}

    def _micro_batches(self, rows: Sequence[_Row]) -> Iterator[tuple[list[_Row], PackedBatch]]:
        """This rank's packed rows within the budget: completions of a group share their prompt and its images.

        Those without completions are stand-ins, as of `Ranks.micro_batches`.
        """
        lengths = [len(row.rollout.token_ids) for row in rows]
        own = self.ranks.deal_rows(self.policy, [row.prompt for row in rows], lengths)
        rows = [rows[at] for at in own]
        prompts, completions = [row.prompt for row in rows], [row.rollout.token_ids.tolist() for row in rows]
        tokens, most = self.settings.micro_batch_tokens, self.settings.micro_batch_size
        for part, packed in self.ranks.micro_batches(self.policy, prompts, completions, tokens=tokens, most=most):
            yield [rows[at] for at in part], packed

    def _normalizer(self, lengths: Sequence[int]) -> float:
        counts = {
            "tokens": sum(lengths),
            "sequences": len(lengths),
            "constant": len(lengths) * self.max_new_tokens,
        }
        return float(counts[self.config.normalize])

    @torch.no_grad()
    def _note_logprobs(self, rows: Sequence[_Row]) -> None:
        """Log-probabilities by the policy as it is now, for updates that come when it has moved."""
        training = self.policy.model.training
        self.policy.model.eval()  # without dropout
        for part, batch in self._micro_batches(rows):
            logprobs = self.loss.logprobs(self.policy.packed_hidden(batch), batch.labels)
            if not part:
                continue
            for row, own in zip(part, logprobs.split([len(row.rollout.token_ids) for row in part]), strict=True):
                row.old_logprobs = own
        self.policy.model.train(training)

    def _reference_logprobs(self, batch: PackedBatch, trainable: Trainable) -> torch.Tensor | None:
        if not self.settings.kl_coefficient:
            return None
        with computing_as(self.policy, self.first or _average(trainable)):
            return self.loss.logprobs(self.policy.packed_hidden(batch), batch.labels)


def _average(trainable: Trainable) -> Reference:
    assert trainable.average is not None, "settings that need an average have it kept"
    return trainable.average.in_place


def _deal(rows: Sequence[_Row], updates: int, step: int) -> list[list[_Row]]:
    """Rows of each update, in an order that depends on the step.

    Whole groups, so that each prompt is encoded in one update only; where there are fewer of them, single rows.
    """
    shuffled = [rows[at] for at in np.random.default_rng([step, len(rows)]).permutation(len(rows))]
    groups = list(dict.fromkeys(id(row.prompt) for row in shuffled))
    if len(groups) < updates:
        return [[shuffled[at] for at in part] for part in np.array_split(np.arange(len(rows)), updates)]
    dealt = {group: number for number, part in enumerate(np.array_split(groups, updates)) for group in part.tolist()}
    parts: list[list[_Row]] = [[] for _ in range(updates)]
    for row in shuffled:
        parts[dealt[id(row.prompt)]].append(row)
    return parts
