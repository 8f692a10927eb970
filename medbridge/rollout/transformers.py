"""The rollout engine on plain transformers: runs wherever torch runs, with one prefill per item.

All samples of an item share its images and its question; only the order of the options differs. So a batch is
prefilled in two steps: what an item's prompts have in common once per item, then each option order's remaining
tokens on a copy of that cache. From there samples are decoded together, and as long as two of them have said the same,
they are one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.encoded import EncodedPrompt
from medbridge.model.packing import merge_vision
from medbridge.model.policy import Policy
from medbridge.rollout.engine import GREEDY, EngineStats, Request, Rollout, SamplingSettings
from medbridge.rollout.room import prompt_length
from medbridge.rollout.sampling import cut_at_stop, draw, tokens_to_stop, uniforms

if TYPE_CHECKING:
    from medbridge.rollout.weights import Weights

LOOK_EVERY = 16
"""Tokens between two looks for stop texts. What is drawn behind one is thrown away again, so this changes no result."""


@dataclass(slots=True)
class _State:
    """Rows being decoded: their cache, which cache slots each may see, their next positions and next logits."""

    cache: DynamicCache
    mask: Tensor  # [rows, slots]
    position: Tensor  # [rows]
    logits: Tensor  # [rows, vocabulary]

    def select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask, self.position, self.logits = self.mask[rows], self.position[rows], self.logits[rows]


class TransformersEngine:
    """Samples from a `Policy` that lives in this process, so that its weights are always the trainer's."""

    name = "transformers"

    def __init__(self, policy: Policy, prompts: PromptSettings, images: ImageCache, *, batch_size: int) -> None:
        """`batch_size` is the largest number of completions decoded together."""
        self.policy = policy
        self.prompts = prompts
        self.images = images
        self.batch_size = batch_size
        self._version = 0
        self._stats = EngineStats()

    def start(self) -> None:
        """Nothing: the policy is loaded already."""

    def sleep(self) -> None:
        """Nothing: the weights are the trainer's, who needs them."""

    def close(self) -> None:
        """Nothing: the policy belongs to the caller."""

    def update_weights(self, weights: Weights) -> None:
        """Note the version: the weights themselves are here already.

        Raises:
            MedbridgeError: they are those of another policy.
        """
        if weights.policy is not self.policy:
            raise MedbridgeError(
                f"the transformers engine samples from its own policy ({self.policy.path!r}) and can't take in the "
                f"weights of another ({weights.policy.path!r}). Make an engine for that one."
            )
        self._version = weights.version

    def stats(self) -> EngineStats:
        """The caches are what the samples of an item share: its prompts' common prefix, and its images."""
        return self._stats

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        for request in requests:
            prompt_length(
                request, self.policy, self.prompts, self.images, self.policy.context, who=repr(self.policy.path),
                cure="Give smaller images, or leave the item out.",
            )  # fmt: skip
        batch: list[Request] = []
        rows = 0
        for request in requests:
            if batch and rows + len(request.samples) > self.batch_size:
                yield self._generate(batch, sampling, seed)
                batch, rows = [], 0
            batch.append(request)
            rows += len(request.samples)
        if batch:
            yield self._generate(batch, sampling, seed)

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request], sampling: SamplingSettings, seed: int) -> list[Rollout]:
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with self.policy.autocast():
                return self._decode(requests, sampling, seed)
        finally:
            self.policy.model.train(training)

    def _decode(self, requests: Sequence[Request], sampling: SamplingSettings, seed: int) -> list[Rollout]:
        policy, device = self.policy, self.policy.device
        units: list[list[EncodedPrompt]] = []  # prompts that share a prefix
        variant_of_row: list[int] = []
        variants = 0
        for request in requests:
            orders = list(dict.fromkeys(request.permutations))
            prompts = policy.encode(request.item, orders, self.prompts, self.images)
            # Padding between prefix and suffix shortens a sliding window: such models prefill whole prompts.
            units.extend([prompts] if policy.full_attention else [[prompt] for prompt in prompts])
            variant_of_row.extend(variants + orders.index(order) for order in request.permutations)
            variants += len(orders)
        cuts = [_common_prefix([prompt.ids for prompt in unit]) for unit in units]
        state = self._prefill(units, cuts)
        flat = [prompt for unit in units for prompt in unit]
        prompt_of_row = [flat[variant] for variant in variant_of_row]

        samples = [(request.item.id, sample) for request in requests for sample in request.samples]
        limit = sampling.max_new_tokens
        noise = torch.from_numpy(np.stack([uniforms(seed, item_id, sample, limit) for item_id, sample in samples])).to(
            device
        )
        temperature = torch.tensor(
            [0.0 if sample == GREEDY else sampling.temperature for _, sample in samples], device=device
        )
        stops = torch.tensor(policy.stop_ids, device=device)
        rows = len(samples)
        tokens = torch.zeros(rows, limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, limit, device=device)
        room = torch.tensor([min(limit, policy.context - len(prompt.ids)) for prompt in prompt_of_row], device=device)
        lengths = room.clone()
        stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)  # samples that have not ended
        row_of = torch.tensor(variant_of_row, device=device)  # the decoded row that each of them follows
        for step in range(limit):
            token, logprob = draw(state.logits[row_of], temperature[alive], sampling.top_p, noise[alive, step])
            tokens[alive, step], logprobs[alive, step] = token, logprob
            ended = torch.isin(token, stops)
            stopped[alive[ended]] = True
            if sampling.stop and (step + 1) % LOOK_EVERY == 0:
                ended |= self._have_said(tokens[alive, : step + 1], sampling.stop)
            lengths[alive[ended]] = step + 1
            going = (~ended & (room[alive] > step + 1)).nonzero()[:, 0]
            if len(going) == 0:
                break
            alive = alive[going]
            # Samples that share a row and drew the same token go on sharing one.
            branches, row_of = torch.unique(row_of[going] * policy.vocab_size + token[going], return_inverse=True)
            parents = branches // policy.vocab_size
            if len(parents) != len(state.logits) or bool((parents.diff() != 1).any()):
                state.select(parents)
            self._advance(state, branches % policy.vocab_size)

        rollouts = []
        tokens_cpu, logprobs_cpu = tokens.cpu().numpy(), logprobs.cpu().numpy()
        row = 0
        for request in requests:
            for sample, order in zip(request.samples, request.permutations, strict=True):
                length, done = int(lengths[row]), bool(stopped[row])
                said = tokens_cpu[row, : length - done].tolist()
                end = tokens_to_stop(said, sampling.stop, policy.decode) if sampling.stop else None
                if end is not None:
                    length, said = end, said[:end]
                rollouts.append(
                    Rollout(
                        item_id=request.item.id, sample=sample, permutation=order,
                        text=cut_at_stop(policy.decode(said), sampling.stop),
                        token_ids=tokens_cpu[row, :length].astype(np.int32),
                        logprobs=logprobs_cpu[row, :length].astype(np.float32),
                        finish_reason="stop" if done or end is not None else "length",
                        prompt_tokens=len(prompt_of_row[row].ids), images=prompt_of_row[row].images,
                        weights=self._version,
                    )
                )  # fmt: skip
                row += 1
        self._count(rollouts, units, cuts)
        return rollouts

    def _have_said(self, tokens: Tensor, stop: Sequence[str]) -> Tensor:
        """Which of the samples [samples, tokens] hold a stop text."""
        texts = map(self.policy.decode, tokens.tolist())
        return torch.tensor([any(end in text for end in stop) for text in texts], device=tokens.device)

    def _count(
        self, rollouts: Sequence[Rollout], units: Sequence[Sequence[EncodedPrompt]], cuts: Sequence[int]
    ) -> None:
        asked = sum(rollout.prompt_tokens for rollout in rollouts)
        shown = sum(rollout.images or 0 for rollout in rollouts)
        saved = sum(cut * (len(unit) - 1) for unit, cut in zip(units, cuts, strict=True))
        computed = sum(len(prompt.ids) for unit in units for prompt in unit) - saved
        self._stats += EngineStats(
            prompt_tokens=asked, completion_tokens=sum(len(rollout.token_ids) for rollout in rollouts),
            prefix_hits=asked - computed, prefix_queries=asked,
            image_hits=shown - sum(unit[0].images for unit in units), image_queries=shown,
        )  # fmt: skip

    def _prefill(self, units: Sequence[Sequence[EncodedPrompt]], cuts: Sequence[int]) -> _State:
        """Prefill the first `cuts` tokens of each unit, which its prompts share, then the rest of each of them."""
        policy, device = self.policy, self.policy.device
        firsts = [unit[0] for unit in units]
        ids, mask, positions, types = self._left_pad(
            [(prompt, 0, cut) for prompt, cut in zip(firsts, cuts, strict=True)]
        )
        cache = DynamicCache(config=policy.model.config.get_text_config())
        policy.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=policy.positions_argument(positions),
            past_key_values=cache, use_cache=True,
            **policy.type_argument(types), **merge_vision(firsts, device),
        )  # fmt: skip
        unit_of = torch.tensor([index for index, unit in enumerate(units) for _ in unit], device=device)
        if len(unit_of) > len(units):
            cache.reorder_cache(unit_of)
        suffixes = [(prompt, cut, len(prompt.ids)) for unit, cut in zip(units, cuts, strict=True) for prompt in unit]
        ids, suffix_mask, positions, _ = self._left_pad(suffixes)
        mask = torch.cat([mask[unit_of], suffix_mask], dim=1)
        hidden = policy.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=policy.positions_argument(positions),
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        position = torch.tensor([prompt.next_position for prompt, _, _ in suffixes], device=device)
        return _State(cache, mask, position, policy.head(hidden))

    def _left_pad(
        self, parts: Sequence[tuple[EncodedPrompt, int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tokens [start, end) of each prompt, padded on the left: ids, mask, positions and type ids."""
        longest = max(end - start for _, start, end in parts)
        ids = torch.full((len(parts), longest), int(self.policy.tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        positions = torch.zeros(parts[0][0].positions.shape[0], len(parts), longest, dtype=torch.long)
        types = torch.zeros_like(ids) if parts[0][0].type_ids is not None else None
        for row, (prompt, start, end) in enumerate(parts):
            at = longest - (end - start)
            ids[row, at:] = prompt.ids[start:end]
            mask[row, at:] = 1
            positions[:, row, at:] = prompt.positions[:, start:end]
            if types is not None and prompt.type_ids is not None:
                types[row, at:] = prompt.type_ids[start:end]
        device = self.policy.device
        return ids.to(device), mask.to(device), positions.to(device), None if types is None else types.to(device)

    def _advance(self, state: _State, token: Tensor) -> None:
        """Feed each row its token."""
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(token), 1)], dim=1)
        axes = 3 if self.policy.uses_mrope else 1
        hidden = self.policy.model.base_model(
            input_ids=token[:, None], attention_mask=state.mask,
            position_ids=self.policy.positions_argument(state.position.expand(axes, -1)[..., None]),
            past_key_values=state.cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        state.position = state.position + 1
        state.logits = self.policy.head(hidden)


def _common_prefix(sequences: Sequence[Tensor]) -> int:
    """How many leading tokens all sequences share, leaving at least the last token of each."""
    shortest = min(len(sequence) for sequence in sequences) - 1
    if len(sequences) == 1:
        return shortest
    stacked = torch.stack([sequence[:shortest] for sequence in sequences])
    differs = (stacked != stacked[0]).any(0).nonzero()
    return int(differs[0]) if len(differs) else shortest
