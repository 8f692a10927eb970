"""The SFT step (forward, loss, backward, optimizer) beside TRL's `SFTTrainer`, in one run.

    pytest bench/bench_sft_step.py -s

A Qwen2.5-VL of 20 M parameters with a vocabulary of 32,000, made from nothing; 16 examples with completions of 24 to
240 tokens, each with an image of 64 tokens or without. Both sides get the same weights, examples, loss (mean
cross-entropy over the completions' tokens of the step) and AdamW, in float32; images are processed beforehand. The
peers, all of TRL 1.16, whose trainer neither packs nor does without padding where a model sees images:

- its defaults: micro-batches of 8 in the order that they come in, gradient checkpointing
- without gradient checkpointing, which is faster on a machine with the memory for it
- that, and examples of about equal length together, which its `group_by_length` sampling gives at best

Loss and gradients are compared with TRL's before anything is timed, with all examples in one micro-batch of TRL's: of
several it takes the mean of their means. Prints times of interleaved rounds, ratios, and
completion tokens a second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from measure import Case, rounded, table, timed
from peers_training import RATE, OursSft, Sft, gradient_error, make_model, questions, supervised, write_images

from medbridge.model import FromNothing
from medbridge.train import SftSettings

SHAPE = FromNothing(hidden_size=256, layers=8, vision_hidden_size=256, vision_layers=4, image_size=112)
VOCABULARY, TOGETHER, ROUNDS = 32_000, 8, 4
LENGTHS = np.random.default_rng(0).permutation(np.linspace(24, 240, 16).astype(int)).tolist()
MOST_ERROR = 1e-5
"""Relative difference of all gradients: float32 rounding, summed over thousands of tokens in another order."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("sft_step") / "model", SHAPE, vocabulary=VOCABULARY, tied=False))


def measured(model: str, images: bool) -> dict[str, Any]:
    """Everything with or without images, printed; the figures."""
    files = write_images(Path(model).parent / "images", len(LENGTHS), SHAPE.image_size)
    batch = supervised(questions([file if images else None for file in files]), LENGTHS)
    ours = OursSft(model, SftSettings(learning_rate=RATE, warmup_steps=0))
    default, plain = Sft(model), Sft(model, gradient_checkpointing=False)
    padded = plain.inputs(batch, TOGETHER)
    by_length = plain.inputs(sorted(batch, key=lambda one: len(one.completion)), TOGETHER)
    total = sum(LENGTHS)
    found, theirs = ours.gradients(batch), plain.gradients(plain.inputs(batch, len(batch)))
    errors = {"medbridge": gradient_error(found, theirs)}
    loss_errors = {"medbridge": abs(found.loss - theirs.loss)}
    assert errors["medbridge"] < MOST_ERROR, errors
    del found, theirs
    times = timed(
        {
            "medbridge": Case(lambda: ours.step(batch)),
            "TRL": Case(lambda: default.step(padded)),
            "TRL, not checkpointing": Case(lambda: plain.step(padded)),
            "TRL, not checkpointing, by length": Case(lambda: plain.step(by_length)),
        },
        ROUNDS,
    )
    speeds = {name: total / taken.median for name, taken in times.items()}
    title = (
        f"{len(LENGTHS)} examples {'with' if images else 'without'} an image, {min(LENGTHS)} to {max(LENGTHS)} tokens"
    )
    return table(title, times, {"tokens/s": speeds, "gradient error": errors, "loss error": loss_errors}) | {
        f"{name}_over_ours": rounded(taken.over(times["medbridge"]), 3)
        for name, taken in times.items()
        if name != "medbridge"
    }


def test_sft_step(
    model: str, save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    peers.prepare_imports()
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": ROUNDS, "peers": peers.versions()}
    with capsys.disabled():
        for images in (True, False):
            figures["with images" if images else "without images"] = measured(model, images)
    save("sft_step", "pytest bench/bench_sft_step.py -s", figures)
