"""The RL step without its rollout (forward, loss, backward, optimizer) beside TRL's `GRPOTrainer`, in one run.

    pytest bench/bench_rl_step.py -s

A Qwen2.5-VL of 30 M parameters with a vocabulary of 151,936, made from nothing; 8 completions of 32 to 128 tokens a
question, and an image of 256 tokens or none. Both sides get the same weights, prompts, images, completions, advantages,
loss (clipped, mean over the tokens of the step: "dapo" of TRL, "bnpo" here) and AdamW, all in float32. Prompts are
encoded and images processed beforehand on both sides. The peers:

- TRL 1.16's `GRPOTrainer`, whose micro-batch is a group: prompt and image once for each completion, padded
- the same with gradient checkpointing, which is its default; and ours with it

Loss and all gradients of a side are compared with TRL's before anything is timed. Prints median, fastest and slowest of
interleaved rounds, ratios, and the peak of resident memory beyond the loaded model over two steps (gradients and
optimizer states count) in a process of its own. "of ceiling": floating-point operations a second of our step as a share
of those of a large matrix product in the same rounds. It asserts that gradients agree, memory, and no time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import pytest
import torch
from measure import Case, product, rounded, steps_peak, table, timed
from peers_training import Grpo, Ours, gradient_error, make_model, questions, rl_settings, sampled, write_images
from torch.utils.flop_counter import FlopCounterMode

from medbridge.model import FromNothing

SHAPE = FromNothing(hidden_size=128, layers=28, vision_hidden_size=256, vision_layers=5, image_size=224)
VOCABULARY = 151_936
TOKENS = range(700, VOCABULARY)  # none that stands for an image, of the tokenizer or of the model
LENGTHS = (32, 45, 59, 73, 87, 101, 114, 128)
OURS_ROUNDS = 3
MOST_ERROR = 1e-5
"""Relative difference of all gradients: float32 rounding, summed over thousands of tokens in another order."""
CEILING = 2048


class Load(NamedTuple):
    """What a step trains on, and in how many rounds TRL takes part: it needs up to a minute for a group."""

    groups: int
    image: bool
    rounds: int
    checkpointed_rounds: int


LOADS = {
    "a group with an image": Load(1, True, 2, 1),
    "a group without image": Load(1, False, 3, 1),
    "4 groups without image": Load(4, False, 1, 0),
}
MEMORY_OF = ("a group with an image", "a group without image")


def _questions(load: Load, images: Path) -> Any:
    files = write_images(images, load.groups, SHAPE.image_size)
    return sampled(questions([file if load.image else None for file in files]), LENGTHS, TOKENS)


def _ours(model: str, load: Load, checkpointing: bool) -> Callable[[], None]:
    ours = Ours.load(model, rl_settings(), gradient_checkpointing=checkpointing)
    batch = _questions(load, Path(model).parent / "images")
    return lambda: ours.step(batch)


def _trl(model: str, load: Load, checkpointing: bool) -> Callable[[], None]:
    peers.prepare_imports()
    trl = Grpo(model, gradient_checkpointing=checkpointing, gradient_accumulation_steps=load.groups)
    inputs = trl.inputs(_questions(load, Path(model).parent / "images"), model)
    return lambda: trl.step(inputs)


SIDES = {
    "medbridge": (_ours, False),
    "medbridge, checkpointing": (_ours, True),
    "TRL": (_trl, False),
    "TRL, checkpointing": (_trl, True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("rl_step") / "model", SHAPE, vocabulary=VOCABULARY, tied=True))


def measured(name: str, load: Load, model: str) -> dict[str, Any]:
    """Everything of one load, printed; the figures."""
    batch = _questions(load, Path(model).parent / "images")
    ours = Ours.load(model, rl_settings())
    checkpointed = Ours.load(model, rl_settings(), gradient_checkpointing=True)
    trl = Grpo(model, gradient_checkpointing=False, gradient_accumulation_steps=load.groups)
    inputs = trl.inputs(batch, model)
    exact = trl.gradients(inputs)
    sides = {"medbridge": ours.gradients(batch), "medbridge, checkpointing": checkpointed.gradients(batch)}
    errors = {side: gradient_error(found, exact) for side, found in sides.items()}
    loss_errors = {side: abs(found.loss - exact.loss) for side, found in sides.items()}
    assert max(errors.values()) < MOST_ERROR, errors
    del exact, sides
    with FlopCounterMode(display=False) as counter:
        ours.step(batch)
    cases = {
        "medbridge": Case(lambda: ours.step(batch)),
        "medbridge, checkpointing": Case(lambda: checkpointed.step(batch)),
        "product": product(CEILING),
        "TRL": Case(lambda: trl.step(inputs), rounds=load.rounds, warm=True),
    }
    if load.checkpointed_rounds:
        default = Grpo(model, gradient_accumulation_steps=load.groups)
        cases["TRL, checkpointing"] = Case(lambda: default.step(inputs), rounds=load.checkpointed_rounds, warm=True)
    times = timed(cases, OURS_ROUNDS)
    columns = {"gradient error": errors, "loss error": loss_errors}
    figures = table(f"{name}: {len(LENGTHS)} completions of {LENGTHS[0]} to {LENGTHS[-1]} tokens each", times, columns)
    own, speed = times["medbridge"], 2 * CEILING**3 / times["product"].median
    figures["TRL_over_ours"] = rounded(times["TRL"].over(own), 3)
    if load.checkpointed_rounds:
        figures["TRL_over_ours_both_checkpointing"] = rounded(
            times["TRL, checkpointing"].over(times["medbridge, checkpointing"]), 3
        )
    figures["of_ceiling"] = rounded(counter.get_total_flops() / own.median / speed, 3)
    print("  " + ", ".join(f"{key} {figures[key]}" for key in figures if key not in cases), flush=True)
    return figures


def memory(name: str, load: Load, model: str) -> dict[str, float]:
    """Peak of each side beyond the loaded model, in MiB, and the ratios; printed."""
    found = {side: steps_peak(build, model, load, checkpointing) for side, (build, checkpointing) in SIDES.items()}
    print(f"\n{name}: MiB beyond the loaded model: " + ", ".join(f"{side} {mib:.0f}" for side, mib in found.items()))
    ratio = found["TRL"] / found["medbridge"]
    default = found["TRL, checkpointing"] / found["medbridge, checkpointing"]
    print(f"  TRL over ours {ratio:.3g}, both checkpointing {default:.3g}", flush=True)
    return {side: rounded(mib) for side, mib in found.items()} | {
        "TRL_over_ours": rounded(ratio, 3), "TRL_over_ours_both_checkpointing": rounded(default, 3),
    }  # fmt: skip


def test_rl_step(
    model: str, save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    peers.prepare_imports()
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "peers": peers.versions()}
    with capsys.disabled():
        for name, load in LOADS.items():
            figures[name] = measured(name, load, model)
        figures["peak_MiB"] = {name: memory(name, LOADS[name], model) for name in MEMORY_OF}
    save("rl_step", "pytest bench/bench_rl_step.py -s", figures)
    with_image = figures["peak_MiB"]["a group with an image"]
    assert with_image["TRL_over_ours"] >= 3
