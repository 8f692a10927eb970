"""Layout of packed rows: nothing is lost, doubled or over budget, and each token sees what it may."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medbridge.model.encoded import EncodedPrompt
from medbridge.model.packing import BLOCK_TOKENS, PackedBatch, PackedLayout, best_fit, pack, plan

CPU = torch.device("cpu")


def prompt(length: int, *, image: tuple[int, int] | None = None, next_position: int | None = None) -> EncodedPrompt:
    """A made-up prompt of `length` tokens, the ones from image[0] to image[1] an image's."""
    types = torch.zeros(length, dtype=torch.long)
    if image is not None:
        types[slice(*image)] = 1
    return EncodedPrompt(
        ids=torch.arange(length) + 1000, type_ids=types, positions=torch.arange(length).expand(3, -1),
        next_position=length if next_position is None else next_position,
        vision={} if image is None else {"pixel_values": torch.full((4, 3), float(length))}, text="",
    )  # fmt: skip


def packed(groups: list[tuple[EncodedPrompt, list[int]]], bidirectional: bool = False) -> PackedBatch:
    """Groups of completions of the given lengths; the tokens of completion i are 100 i, 100 i + 1 and so on."""
    prompts = [one for one, lengths in groups for _ in lengths]
    lengths = [length for _, lengths in groups for length in lengths]
    completions = [[100 * row + at for at in range(length)] for row, length in enumerate(lengths)]
    return pack(prompts, completions, CPU, bidirectional_images=bidirectional)


def seen_in_blocks(layout: PackedLayout, window: int | None) -> Tensor:
    """bool [T, T]: which key each query is given by the blocks."""
    total = len(layout.steps)
    seen = torch.zeros(total, total, dtype=torch.bool)
    at = 0
    for block in layout.blocks(window):
        assert block.start == at < block.end  # each token is a query once, in order
        at = block.end
        keys = [*range(block.prefix_start, block.prefix_end), *range(block.start, block.end)]
        size = (block.end - block.start, len(keys))
        mask = torch.ones(size, dtype=torch.bool).tril() if block.mask is None else block.mask
        assert mask.shape == size and len(set(keys)) == len(keys)
        seen[block.start : block.end, keys] = mask
    assert at == total
    return seen


def seen_by_hand(
    groups: list[tuple[EncodedPrompt, list[int]]], window: int | None, bidirectional: bool
) -> list[list[bool]]:
    """The same by the rule itself, token by token."""
    tokens = []  # group, completion (None in the prompt), place in its own sequence, image
    for group, (one, lengths) in enumerate(groups):
        assert one.type_ids is not None
        tokens += [(group, None, at, bool(one.type_ids[at])) for at in range(len(one.ids))]
        tokens += [(group, n, len(one.ids) + at, False) for n, count in enumerate(lengths) for at in range(count)]

    def sees(query: tuple[int, int | None, int, bool], key: tuple[int, int | None, int, bool]) -> bool:
        if query[0] != key[0] or key[1] not in (None, query[1]):
            return False
        if window is not None and key[2] <= query[2] - window:
            return False
        return key[2] <= query[2] or (bidirectional and query[3] and key[3])  # one image a prompt here

    return [[sees(query, key) for key in tokens] for query in tokens]


LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(st.integers(1, 140), LENGTHS), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(GROUPS, st.sampled_from([None, 1, 7, 100]), st.booleans())
def test_each_token_sees_its_prompt_and_itself(
    shapes: list[tuple[int, list[int]]], window: int | None, bidirectional: bool
) -> None:
    groups = [(prompt(length, image=(length // 3, length // 2)), lengths) for length, lengths in shapes]
    layout = packed(groups, bidirectional).layout
    assert seen_in_blocks(layout, window).tolist() == seen_by_hand(groups, window, bidirectional)


@settings(deadline=None, max_examples=40)
@given(GROUPS)
def test_segments_are_the_causal_sequences(shapes: list[tuple[int, list[int]]]) -> None:
    """What kernels of variable length are given: queries are the last of their keys."""
    groups = [(prompt(length), lengths) for length, lengths in shapes]
    layout = packed(groups).layout
    index, queries, keys = layout.varlen()
    seen = torch.zeros(len(layout.steps), len(layout.steps), dtype=torch.bool)
    for part in range(len(queries) - 1):
        own, laid_out = range(*queries[part : part + 2].tolist()), index[keys[part] : keys[part + 1]]
        for at, query in enumerate(own):
            seen[query, laid_out[: len(laid_out) - len(own) + at + 1]] = True
    assert seen.tolist() == seen_by_hand(groups, None, False)
    assert queries.dtype == keys.dtype == torch.int32 and int(queries[-1]) == len(layout.steps)


def test_a_row_holds_prompts_once_and_completions_behind_them() -> None:
    first, second = prompt(3, image=(1, 2), next_position=9), prompt(2)
    batch = packed([(first, [2, 0, 3]), (second, [1])])
    assert batch.input_ids.tolist() == [[1000, 1001, 1002, 0, 1, 200, 201, 202, 1000, 1001, 300]]
    assert batch.positions[:, 0].tolist() == [[0, 1, 2, 9, 10, 9, 10, 11, 0, 1, 2]] * 3
    assert batch.labels.tolist() == [0, 1, 200, 201, 202, 300]
    assert batch.columns.tolist() == [2, 3, 2, 5, 6, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 2, 2, 2, 3]
    assert batch.type_ids is not None and batch.type_ids.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.vision["pixel_values"].shape == (4, 3)  # once for three completions


def test_only_the_same_object_is_shared() -> None:
    one, other = prompt(4), prompt(4)
    assert packed([(one, [1, 1])]).input_ids.shape == (1, 6)
    assert packed([(one, [1]), (other, [1])]).input_ids.shape == (1, 10)
    assert packed([(one, [1]), (other, [1]), (one, [1])]).input_ids.shape == (1, 15)


def test_blocks_are_bounded_and_plain_causal_where_they_can_be() -> None:
    blocks = packed([(prompt(400), [30, 60, 60, 60, 300]), (prompt(20), [9, 9]), (prompt(5), [9])]).layout.blocks(None)
    assert [block.mask is None for block in blocks] == [True, False, False, False, False]
    assert [(block.end - block.start, block.prefix_end - block.prefix_start) for block in blocks] == [
        (430, 0), (120, 400), (60, 400), (300, 400), (38 + 14, 0),
    ]  # fmt: skip
    long = packed([(prompt(400), [10] * 100)]).layout.blocks(None)
    assert all(block.end - block.start <= BLOCK_TOKENS for block in long[1:])
    assert sum(block.mask.numel() for block in long if block.mask is not None) < 1400**2 / 3


def test_masks_are_made_once_for_all_layers() -> None:
    layout = packed([(prompt(200), [50, 50])]).layout
    assert layout.blocks(None) is layout.blocks(None)
    assert layout.blocks(16) is layout.blocks(16) is not layout.blocks(None)


# -- planning ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 40), min_size=1, max_size=9)), max_size=6),
    st.integers(1, 200),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sampled_from([0.0, 12.5]),
)
def test_a_plan_takes_every_row_once_within_the_budget(
    shapes: list[tuple[int, list[int]]], tokens: int, most: int | None, image: float
) -> None:
    prompts = [one for length, lengths in shapes for one in [prompt(length)] * len(lengths)]
    completions = [[0] * length for _, lengths in shapes for length in lengths]
    images = [image] * len(prompts)
    order = np.random.default_rng(len(prompts)).permutation(len(prompts)).tolist()  # groups need not stand together
    prompts, completions = [prompts[at] for at in order], [completions[at] for at in order]
    parts = plan(prompts, completions, tokens=tokens, most=most, image_tokens=images)
    assert sorted(row for part in parts for row in part) == list(range(len(prompts)))
    assert parts == plan(prompts, completions, tokens=tokens, most=most, image_tokens=images)
    for part in parts:
        shared = {id(prompts[row]): prompts[row] for row in part}
        cost = sum(len(one.ids) + image for one in shared.values()) + sum(len(completions[row]) for row in part)
        assert part and (cost <= tokens or len(part) == 1)
        assert most is None or len(part) <= most
        # each prompt's rows stand side by side: it is laid out once
        row = pack([prompts[at] for at in part], [completions[at] for at in part], CPU, bidirectional_images=False)
        assert row.input_ids.shape[1] + image * len(shared) == cost


def test_a_group_stays_whole_where_it_fits_and_images_count() -> None:
    one, other = prompt(50), prompt(50)
    rows: tuple[list[EncodedPrompt], list[list[int]]] = ([one, other] * 4, [[0] * 10] * 8)
    assert plan(*rows, tokens=180, most=None, image_tokens=[0] * 8) == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert plan(*rows, tokens=179, most=None, image_tokens=[0] * 8) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan(*rows, tokens=180, most=None, image_tokens=[20] * 8) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan(*rows, tokens=75, most=None, image_tokens=[0] * 8) == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert plan([], [], tokens=75, most=None, image_tokens=[]) == []


def test_ragged_rows_fill_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 200).tolist()
    parts = plan(
        [prompt(1) for _ in lengths], [[0] * length for length in lengths], tokens=1000, most=None,
        image_tokens=[0] * len(lengths),
    )  # fmt: skip
    least = -(-(sum(lengths) + len(lengths)) // 1000)
    assert len(parts) <= least + 1


def test_best_fit_prefers_the_fullest_bin() -> None:
    assert best_fit([6, 5, 4, 3], [1] * 4, 10, None) == [[0, 2], [1, 3]]
    assert best_fit([7, 5, 3], [1] * 3, 10, None) == [[0, 2], [1]]
    assert best_fit([20, 1], [1] * 2, 10, None) == [[0], [1]]
    assert best_fit([1, 1, 1], [1, 2, 1], 10, 2) == [[0, 2], [1]]


@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_without_type_ids_is_packed(images: int) -> None:
    bare = dataclasses.replace(prompt(3, image=(1, 2) if images else None), type_ids=None)
    batch = packed([(bare, [2])], bidirectional=True)
    assert batch.type_ids is None and batch.layout.images is None
