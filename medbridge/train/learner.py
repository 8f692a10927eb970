"""The update half of a sharpen step: advantages, loss and optimizer, from completions that were sampled already.

Which completions those are, and what weights drew them, is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.model.packing import PackedBatch
from medbridge.model.policy import EncodedPrompt, Policy
from medbridge.rollout.engine import Rollout
from medbridge.train.groups import Batch, describe, is_truncated
from medbridge.train.optimization import Trainable
from medbridge.train.policy_loss import PolicyLoss
from medbridge_kernels import group_advantages

if TYPE_CHECKING:
    from medbridge.train.rl import RlSettings


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
        self, policy: Policy, settings: RlSettings, prompts: PromptSettings, images: ImageCache, max_new_tokens: int
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.prompts = prompts
        self.images = images
        self.max_new_tokens = max_new_tokens
        self.config = settings.loss_config()
        self.reference = copy.deepcopy(policy.model).eval() if settings.kl_coefficient > 0 else None
        self.loss = PolicyLoss(policy, self.config, settings.loss_impl, settings.temperature)

    def update(self, step: int, batch: Batch, trainable: Trainable) -> dict[str, float]:
        """Update from the groups of a step; returns its metrics.

        The policy at the start of the step is the proximal one: ratios and their clip are relative to it, and how it
        differs from the engine's is left to the correction (decoupled PPO, arXiv 2110.00641).
        """
        rows = self._rows(batch)
        metrics = describe(batch, step, mask_truncated=self.settings.mask_truncated)
        shuffled = np.random.default_rng([step, len(rows)]).permutation(len(rows))
        parts = [[rows[at] for at in part] for part in np.array_split(shuffled, self.settings.updates_per_batch)]
        # The first update is computed at the proximal policy itself, whose log-probabilities are then the loss's own.
        self._note_logprobs([row for part in parts[1:] for row in part if row.moves])
        updates = [update for update in (self._optimize(part, step, trainable) for part in parts) if update]
        for name in updates[0] if updates else ():
            metrics[name] = sum(update[name] for update in updates) / len(updates)
        return metrics | self.loss.take_metrics() | self.loss.take_seconds()

    def _rows(self, batch: Batch) -> list[_Row]:
        rewards = torch.tensor([reward for group in batch.groups for reward in group.rewards], dtype=torch.float32)
        offsets = torch.tensor(np.cumsum([0, *(len(group.graded) for group in batch.groups)]))
        advantages = iter(group_advantages(rewards, offsets, **self.config.advantage_options()).tolist())
        rows = []
        for group in batch.groups:
            order = group.request.permutations[:1]
            [prompt] = self.policy.encode(group.request.item, order, self.prompts, self.images)
            for entry in group.graded:
                advantage = next(advantages)
                # A row without advantage moves nothing unless the KL term pulls at it: it need not be computed.
                moves = advantage != 0.0 or self.reference is not None
                masked = self.settings.mask_truncated and is_truncated(entry)
                rows.append(_Row(prompt, entry.rollout, advantage, moves and not masked))
        return rows

    def _optimize(self, rows: Sequence[_Row], step: int, trainable: Trainable) -> dict[str, float]:
        """Accumulate the gradient over micro-batches under the counts of all `rows`, and update once."""
        moved = [row for row in rows if row.moves]
        if not moved:
            return {}
        normalizer = self._normalizer([len(row.rollout.token_ids) for row in rows])
        total = 0.0
        for part, batch in self._micro_batches(moved):
            known = [row.old_logprobs for row in part if row.old_logprobs is not None]  # of all rows, or of none
            loss, _ = self.loss.backward(
                self.policy.packed_hidden(batch),
                batch.labels,
                sequence_ids=batch.sequence_ids,
                advantages=torch.tensor([row.advantage for row in part], device=self.policy.device),
                old_logprobs=torch.cat(known) if known else None,
                ref_logprobs=self._reference_logprobs(batch),
                rollout_logprobs=torch.from_numpy(np.concatenate([row.rollout.logprobs for row in part])).to(
                    self.policy.device
                ),
                normalizer=normalizer,
            )
            total += float(loss)
        return {"loss": total, **trainable.step(step, total)}

    def _micro_batches(self, rows: Sequence[_Row]) -> Iterator[tuple[list[_Row], PackedBatch]]:
        """Packed rows within the budget: completions of a group share their prompt and its images."""
        prompts, completions = [row.prompt for row in rows], [row.rollout.token_ids.tolist() for row in rows]
        tokens, most = self.settings.micro_batch_tokens, self.settings.micro_batch_size
        for part in self.policy.plan(prompts, completions, tokens=tokens, most=most):
            packed = self.policy.pack([prompts[at] for at in part], [completions[at] for at in part])
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
            for row, own in zip(part, logprobs.split([len(row.rollout.token_ids) for row in part]), strict=True):
                row.old_logprobs = own
        self.policy.model.train(training)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> torch.Tensor | None:
        if self.reference is None:
            return None
        current, self.policy.model = self.policy.model, self.reference
        try:
            return self.loss.logprobs(self.policy.packed_hidden(batch), batch.labels)
        finally:
            self.policy.model = current
