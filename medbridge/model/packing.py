"""Rows without padding: prompts and completions laid out so that a group's prompt and images are encoded once.

Which tokens stand where and what each may look at. It runs no model; `attention` computes with the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from medbridge.model.encoded import EncodedPrompt

BLOCK_TOKENS = 128
"""Most tokens of the completions (or small groups) that share one attention call: few calls, and few keys that a query
is given in vain. Forward and backward of 8 heads of 64 on one busy core, one call a completion / 128 / the whole group:
16 x 30 tokens behind 100: 69, 55, 98 ms; 8 x 80 behind 320: 135, 142, 227 ms; 8 x 16 behind 1000: 306, 247, 337 ms; 64
and 256 tokens are within a tenth of 128."""

_PREFIX = -1
"""Number of the completion of a prompt token."""


class Block(NamedTuple):
    """One attention call: queries start:end, whose keys are those of prefix_start:prefix_end and then start:end.

    mask: bool [queries, keys], True where a query sees a key; None where the block is one causal sequence.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    mask: Tensor | None


class Segment(NamedTuple):
    """One causal sequence: queries start:end are the last of its keys, prefix_start:prefix_end and then start:end."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def keys(self) -> int:
        return self.prefix_end - self.prefix_start + self.end - self.start


@dataclass(slots=True, eq=False)
class PackedLayout:
    """Which tokens of a packed row of T see which: a completion its group's prompt and itself, a prompt itself.

    Attributes:
        segments: the row as causal sequences, in order: a prompt with its first completion, then each further one.
        groups, completions: int64 [T], numbers of the group and of the completion in it (-1 for the prompt).
        steps: int64 [T], place of the token in its own prompt + completion.
        images: int64 [T], number of the image whose tokens see one another in both directions, -1 at others; None
            where there is no such image.
    """

    segments: list[Segment]
    groups: Tensor
    completions: Tensor
    steps: Tensor
    images: Tensor | None
    _blocks: dict[int | None, list[Block]] = field(default_factory=dict)
    _biases: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = field(default_factory=dict)
    _varlen: tuple[Tensor, Tensor, Tensor] | None = None

    def blocks(self, window: int | None) -> list[Block]:
        """The row as attention calls with a mask, in order; made once and shared by all layers of a window.

        window: a token sees only the last so many tokens, itself counted; None is all.
        """
        if window not in self._blocks:
            self._blocks[window] = [self._block(*span, window) for span in self._spans()]
        return self._blocks[window]

    def biases(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """The blocks' masks as what is added to attention logits: 0, or -inf where a query doesn't see a key.

        Made once and shared by all layers. A mask of truth values is turned into this by each call on it, and each
        layer keeps its own for the backward pass.
        """
        if (window, dtype) not in self._biases:
            self._biases[window, dtype] = [
                None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
                for mask in (block.mask for block in self.blocks(window))
            ]
        return self._biases[window, dtype]

    def varlen(self) -> tuple[Tensor, Tensor, Tensor]:
        """For kernels of variable length, made once: the row's keys laid out segment by segment, int64, and the
        segments' bounds among the queries and among those keys, int32 [segments + 1] each.
        """
        if self._varlen is None:
            device = self.groups.device
            keys = [torch.arange(*span) for part in self.segments for span in (part[2:4], part[0:2])]
            bounds = torch.tensor([[part.end - part.start, part.keys] for part in self.segments]).cumsum(0)
            queries, laid_out = torch.nn.functional.pad(bounds.T, (1, 0)).to(torch.int32)
            self._varlen = torch.cat(keys).to(device), queries.to(device), laid_out.to(device)
        return self._varlen

    def _spans(self) -> list[Segment]:
        """Queries and keys of the blocks.

        Small groups stand together; a large one is its prompt with the first completion, then portions of the others.
        """
        spans: list[Segment] = []
        together = False  # whether the last span holds small groups, and may take another
        for _, members in groupby(self.segments, key=lambda part: part.prefix_start):
            first, *further = members
            start, end = first.start, further[-1].end if further else first.end
            small = end - start <= BLOCK_TOKENS
            if small and together and end - spans[-1].start <= BLOCK_TOKENS:
                spans[-1] = spans[-1]._replace(end=end)
            elif small:
                spans.append(Segment(start, end, start, start))
            else:
                spans.append(first)
                for number, part in enumerate(further):
                    if number and part.end - spans[-1].start <= BLOCK_TOKENS:
                        spans[-1] = spans[-1]._replace(end=part.end)
                    else:
                        spans.append(part)
            together = small
        return spans

    def _block(self, start: int, end: int, prefix_start: int, prefix_end: int, window: int | None) -> Block:
        prefix = slice(prefix_start, prefix_end)
        own = slice(start, end)

        def keys(of: Tensor) -> Tensor:
            return torch.cat([of[prefix], of[own]])[None]

        query, key = self.steps[own, None], keys(self.steps)
        within = keys(self.completions)
        sees = key <= query
        if self.images is not None:
            image = self.images[own, None]
            sees |= (keys(self.images) == image) & (image >= 0)
        if window is not None:
            sees &= key > query - window
        sees &= (within == self.completions[own, None]) | (within == _PREFIX)
        sees &= keys(self.groups) == self.groups[own, None]
        causal = prefix_start == prefix_end and torch.equal(sees, torch.ones_like(sees).tril())
        return Block(start, end, prefix_start, prefix_end, None if causal else sees)


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One row of T tokens without padding, and where the hidden states stand that predict completion tokens.

    Shapes: input_ids, type_ids [1, T]; positions [3 or 1, 1, T]; columns, labels, sequence_ids [N] for the N completion
    tokens: the hidden state at `columns` predicts `labels`, a token of completion `sequence_ids` (counted as they were
    given). The first tokens of a group's completions are all predicted by the last token of its prompt.
    """

    input_ids: Tensor
    type_ids: Tensor | None
    positions: Tensor
    vision: Mapping[str, Tensor]
    columns: Tensor
    labels: Tensor
    sequence_ids: Tensor
    layout: PackedLayout


def pack(
    prompts: Sequence[EncodedPrompt],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    *,
    bidirectional_images: bool,
) -> PackedBatch:
    """Lay completions out behind their prompts; neighbours with the same prompt (the same object) share it.

    Args:
        prompts: one for each completion.
        completions: token ids.
        device: where the batch goes.
        bidirectional_images: whether the tokens of an image see one another in both directions (Gemma 3).
    """
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    types: list[Tensor] = []
    segments: list[Segment] = []
    columns: list[Tensor] = []
    numbers: list[tuple[int, int, int, int]] = []  # group, completion, first step, length of each run of tokens
    at = row = 0
    shared = [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda row: id(prompts[row]))]
    for group, rows in enumerate(shared):
        prompt = prompts[rows[0]]
        length, start = len(prompt.ids), at
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        types.append(torch.zeros_like(prompt.ids) if prompt.type_ids is None else prompt.type_ids)
        numbers.append((group, _PREFIX, 0, length))
        at += length
        for row in rows:
            own = torch.as_tensor(completions[row], dtype=torch.long)
            first = row == rows[0]
            segments.append(Segment(start if first else at, at + len(own), start, start if first else start + length))
            predicts = [start + length - 1, *range(at, at + len(own) - 1)]
            columns.append(torch.tensor(predicts[: len(own)], dtype=torch.long))
            ids.append(own)
            positions.append((torch.arange(len(own)) + prompt.next_position).expand(len(prompt.positions), -1))
            types.append(torch.zeros_like(own))
            numbers.append((group, row - rows[0], length, len(own)))
            at += len(own)
    runs = torch.tensor(numbers)
    groups, members, firsts = (runs[:, column].repeat_interleave(runs[:, 3]) for column in range(3))
    steps = torch.arange(at) - (runs[:, 3].cumsum(0) - runs[:, 3]).repeat_interleave(runs[:, 3]) + firsts
    type_ids = torch.cat(types)
    images = _image_runs(type_ids) if bidirectional_images and bool((type_ids == 1).any()) else None
    lengths = torch.tensor([len(completion) for completion in completions])
    return PackedBatch(
        input_ids=torch.cat(ids)[None].to(device),
        type_ids=None if prompts[0].type_ids is None else type_ids[None].to(device),
        positions=torch.cat(positions, dim=1)[:, None].to(device),
        vision=merge_vision([prompts[rows[0]] for rows in shared], device),
        columns=torch.cat(columns).to(device),
        labels=torch.cat([torch.as_tensor(own, dtype=torch.long) for own in completions]).to(device),
        sequence_ids=torch.arange(len(completions)).repeat_interleave(lengths).to(device),
        layout=PackedLayout(
            [segment for segment in segments if segment.end > segment.start],
            groups.to(device), members.to(device), steps.to(device), None if images is None else images.to(device),
        ),
    )  # fmt: skip


def merge_vision(prompts: Sequence[EncodedPrompt], device: torch.device) -> dict[str, Tensor]:
    """Image tensors of several prompts, one after the other, as the models take them."""
    keys = {key for prompt in prompts for key in prompt.vision}
    return {
        key: torch.cat([prompt.vision[key] for prompt in prompts if key in prompt.vision]).to(device)
        for key in sorted(keys)
    }


def _image_runs(type_ids: Tensor) -> Tensor:
    """Number of the run of image tokens that each token [T] is in, -1 outside of them."""
    image = type_ids == 1
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:-1]
    return torch.where(image, starts.cumsum(0) - 1, -1)


def plan(
    prompts: Sequence[EncodedPrompt],
    completions: Sequence[Sequence[int]],
    *,
    tokens: int,
    most: int | None,
    image_tokens: Sequence[float],
) -> list[list[int]]:
    """Share rows out to micro-batches of at most `tokens`, those with the same prompt (the same object) together.

    A group costs its prompt, its completions and its images once each. One that does not fit is split, and each part
    has the prompt; one completion that does not fit by itself is a micro-batch of its own. Parts go where they leave
    the least room (best fit, the largest first): the same rows are always shared out alike.

    Args:
        prompts: one for each completion.
        completions: token ids.
        tokens: budget of a micro-batch.
        most: completions of a micro-batch at most; None is any number.
        image_tokens: cost of each prompt's images in the vision tower, in tokens.

    Returns:
        The rows' numbers, a list for each micro-batch, each prompt's side by side.
    """
    grouped: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        grouped.setdefault(id(prompt), []).append(row)
    parts: list[list[int]] = []
    costs: list[float] = []
    for rows in grouped.values():
        shared = len(prompts[rows[0]].ids) + image_tokens[rows[0]]
        lengths = [len(completions[row]) for row in rows]
        for chosen in best_fit(lengths, [1] * len(rows), tokens - shared, most):
            parts.append([rows[number] for number in chosen])
            costs.append(shared + sum(lengths[number] for number in chosen))
    bins = best_fit(costs, [len(part) for part in parts], tokens, most)
    return [[row for number in chosen for row in parts[number]] for chosen in bins]


def best_fit(sizes: Sequence[float], counts: Sequence[int], capacity: float, most: int | None) -> list[list[int]]:
    """Numbers of the items of each bin: the largest first, each where it leaves least room; too large ones alone."""
    bins: list[list[int]] = []
    room: list[float] = []
    free: list[float] = []
    for item in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        size, count = sizes[item], counts[item]
        fits = [at for at in range(len(bins)) if room[at] >= size and free[at] >= count]
        if fits:
            chosen = min(fits, key=lambda at: room[at])
            bins[chosen].append(item)
        else:
            chosen = len(bins)
            bins.append([item])
            room.append(capacity)
            free.append(float("inf") if most is None else most)
        room[chosen] -= size
        free[chosen] -= count
    return [sorted(items) for items in bins]
