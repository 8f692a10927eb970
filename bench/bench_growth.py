"""How the update of a sharpen step grows: time per token over the size of groups and their number, memory over steps.

    pytest bench/bench_growth.py -s

A Qwen2.5-VL of 4 M parameters made from nothing, questions without image, completions of 40 to 100 tokens that are
given. "Token" is one of a completion or of a prompt, which counts once for its group; the vocabulary is small, so that
both cost about the same. Time per token is that of the update (packing, forward, loss, backward, optimizer) and should
not grow: the least of interleaved rounds, over that of the smallest step. Memory is what is resident after 50 steps
and after 500. What each of these trains on is drawn anew, as in a run: shapes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import MIB, Case, resident, rounded, timed
from peers_training import Ours, make_model, questions, rl_settings, sampled

from medbridge.model import FromNothing
from medbridge.train.groups import Batch

SHAPE = FromNothing(hidden_size=192, layers=6, vision_hidden_size=64, vision_layers=1, image_size=56)
VOCABULARY, ROUNDS, STEPS, WARM = 2_000, 15, 500, 50
TOKENS = range(700, VOCABULARY)  # none that stands for an image, of the tokenizer or of the model
COMPLETIONS, GROUPS = (2, 4, 8, 16), (1, 2, 4, 8)
MOST_GROWTH_MIB = 32
"""Of resident memory from step 50 to step 500: what an allocator may take for shapes that it has not seen."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("growth") / "model", SHAPE, vocabulary=VOCABULARY, tied=False))


def lengths(completions: int) -> list[int]:
    """From 40 to 100 tokens, with the same mean for any number of completions."""
    return np.linspace(40, 100, completions).astype(int).tolist()


def tokens(batch: Batch, ours: Ours) -> int:
    prompts = [ours.policy.encode(group.request.item, group.request.permutations[:1], ours.learner.prompts,
                                  ours.learner.images)[0] for group in batch.groups]  # fmt: skip
    completions = sum(len(entry.rollout.token_ids) for group in batch.groups for entry in group.graded)
    return completions + sum(len(prompt.ids) for prompt in prompts)


def growth(ours: Ours, batches: dict[str, Batch]) -> dict[str, float]:
    """Time per token of each batch over the first one's, printed."""
    times = timed({name: Case(lambda batch=batch: ours.step(batch)) for name, batch in batches.items()}, ROUNDS)
    each = {name: min(times[name]) / tokens(batch, ours) for name, batch in batches.items()}
    first = next(iter(each.values()))
    print(
        "\n" + ", ".join(f"{name}: {1e6 * taken:.0f} us a token ({taken / first:.2f})" for name, taken in each.items())
    )
    return {name: rounded(taken / first, 3) for name, taken in each.items()}


def test_growth(
    model: str, save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = Ours.load(model, rl_settings(micro_batch_tokens=4096))
    items = questions([None] * max(GROUPS))
    by_completions = {f"{count} completions": sampled(items[:2], lengths(count), TOKENS) for count in COMPLETIONS}
    by_groups = {f"{count} groups": sampled(items[:count], lengths(8), TOKENS) for count in GROUPS}
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": ROUNDS}
    with capsys.disabled():
        figures["time_per_token"] = growth(ours, by_completions) | growth(ours, by_groups)
        generator = np.random.default_rng(0)
        held = {}
        for step in range(1, STEPS + 1):
            ours.step(sampled(items[:1], generator.integers(10, 60, 4).tolist(), TOKENS))
            if step in (WARM, STEPS):
                held[step] = resident() / MIB
        figures["resident_MiB"] = {str(step): rounded(mib) for step, mib in held.items()}
        print(f"resident MiB: {figures['resident_MiB']}")
    save("growth", "pytest bench/bench_growth.py -s", figures)
    assert held[STEPS] - held[WARM] < MOST_GROWTH_MIB
