"""The whole RL step, rollouts included, beside TRL's `GRPOTrainer`, in one run.

    pytest bench/bench_whole_step.py -s

The embedded model (1.4 M parameters), taught the answer form and bridged a little, and questions about slices of
one average brain with their images: 16 questions x 8 completions a step, at temperature 1. Both sides sample with
transformers on the weights that they train, grade with the same function, and train with the loss "grpo", the same
AdamW and learning rate, for a few steps from the same weights. Runs are interleaved, and their first steps not counted.
The medians over runs of the mean time of a step, and the ratios, are printed. Nothing is asserted of times.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from measure import Times, rounded, table

from medbridge.config import RunSettings, parse_config
from medbridge.data import ImageCache, Item, build_prompt, grade, permutation
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.rollout import Graded, Request, SamplingSettings, TransformersEngine
from medbridge.rollout.weights import Weights
from medbridge.train import train_rl
from medbridge.train.rewards import reward

STEPS, RUNS = 7, 3
CONFIG = """
model: {from_nothing: {format_steps: 30}}
data: {sources: [{kind: brain}], strata: [task], prompt: {answer_style: text, system: ""}}
sft: {steps: 60, batch_size: 32, learning_rate: 2.0e-3, warmup_steps: 10}
rollout: {max_new_tokens: 12, batch_size: 512, engine: transformers}
rl: {steps: STEPS, prompts_per_step: 16, completions: 8, learning_rate: 3.0e-4, warmup_steps: 0, checkpoint_every: 1000}
"""
IMAGE_BYTES = 512 << 20


class Rollouts:
    """Completions by the transformers engine on the weights in training, graded; nothing is stored."""

    shares_weights = True

    def __init__(self, policy: Policy, settings: RunSettings, images: ImageCache, seed: int) -> None:
        self.policy = policy
        self.prompts = settings.data.prompt
        self.format_weight = settings.rl.format_weight
        self.engine = TransformersEngine(policy, self.prompts, images, batch_size=settings.rollout.batch_size)
        self.seed = seed

    def stored(self, step: int) -> list[Graded]:
        return []

    def sample(
        self, step: int, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Generator[list[Graded], None, None]:
        by_id = {request.item.id: request.item for request in requests}
        for rollouts in self.engine.generate(requests, sampling, seed=self.seed + step):
            outcomes = [grade(by_id[r.item_id], r.permutation, r.text, self.prompts) for r in rollouts]
            yield [Graded(r, o, reward(o, self.format_weight)) for r, o in zip(rollouts, outcomes, strict=True)]

    def store(self, step: int, graded: Sequence[Graded]) -> None:
        """Nothing is kept."""

    def sync(self, version: int) -> None:
        self.engine.update_weights(Weights(self.policy, version, Path(tempfile.gettempdir())))

    def rest(self) -> None:
        self.engine.sleep()


def ours(base: str, settings: RunSettings, items: Sequence[Item], seed: int) -> list[float]:
    """When each step ended, in seconds."""
    policy = Policy.load(base, settings.model, trainable=True)
    images = ImageCache(IMAGE_BYTES)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train_rl(
            policy, items, settings.rl, Rollouts(policy, settings, images, seed), model=settings.model,
            prompts=settings.data.prompt, images=images, rollout=settings.rollout, seed=seed,
            checkpoints=Path(folder), on_start=lambda step: None,
            on_step=lambda step, metrics, ids: ends.append(time.perf_counter()),
        )  # fmt: skip
    return ends


def by_trl(base: str, settings: RunSettings, items: Sequence[Item], seed: int) -> list[float]:
    """As `ours`, by TRL's trainer."""
    import datasets
    import trl
    from transformers import AutoProcessor, TrainerCallback

    rl, prompts = settings.rl, settings.data.prompt
    by_id = {item.id: item for item in items}
    chosen = random.Random(seed).sample(list(items), rl.prompts_per_step * STEPS)
    orders = [permutation(item, seed, 0) for item in chosen]
    texts = [build_prompt(*pair, prompts)[-1]["content"][-1]["text"] for pair in zip(chosen, orders, strict=True)]
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in texts],
        "image": [item.images[0] for item in chosen],
        "item": [item.id for item in chosen],
        "order": [list(order) for order in orders],
    }

    def earned(completions: list[Any], item: list[str], order: list[list[int]], **_: Any) -> list[float]:
        graded = [
            grade(by_id[name], tuple(shown), completion[0]["content"], prompts)
            for completion, name, shown in zip(completions, item, order, strict=True)
        ]
        return [reward(outcome, rl.format_weight) for outcome in graded]

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.padding_side = "left"  # as it asks for; it does not set it itself
    trl.GRPOTrainer(
        model=base, processing_class=processor, reward_funcs=earned, callbacks=[Clock()],
        train_dataset=datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()),
        args=trl.GRPOConfig(
            output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_strategy="no", seed=seed, max_steps=STEPS,
            per_device_train_batch_size=rl.prompts_per_step * rl.completions, num_generations=rl.completions,
            steps_per_generation=1, max_completion_length=settings.rollout.max_new_tokens, temperature=1.0, top_p=1.0,
            top_k=0, beta=0.0, loss_type="grpo", learning_rate=rl.learning_rate, lr_scheduler_type="constant",
            adam_beta1=rl.beta1, adam_beta2=rl.beta2, max_grad_norm=rl.max_gradient_norm, gradient_checkpointing=False,
        ),
    ).train()  # fmt: skip
    return ends


def test_whole_step(
    tmp_path: Path, save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    peers.prepare_imports()
    settings = parse_config(CONFIG.replace("STEPS", str(STEPS)), source="bench")
    run = Run(tmp_path / "run", settings, base_dir=Path.cwd(), reporter=Reporter())
    try:
        items = run.items.split("train")
        strata = sorted({item.stratum(run.strata_keys) for item in items})
        base = str(run.folder / run.bridge(0, run.base_model(), strata))
    finally:
        run.close()
    found: dict[str, list[float]] = {"medbridge": [], "TRL": []}
    for seed in range(RUNS):
        for name, train in (("medbridge", ours), ("TRL", by_trl)):
            ends = train(base, settings, items, seed)
            assert len(ends) == STEPS
            found[name].append((ends[-1] - ends[0]) / (STEPS - 1))
    times = {name: Times(seconds) for name, seconds in found.items()}
    with capsys.disabled():
        figures = table("16 questions x 8 completions with images, embedded model", times, {})
        figures["TRL_over_ours"] = rounded(times["TRL"].over(times["medbridge"]), 3)
        print(f"  TRL over ours {figures['TRL_over_ours']}")
    save("whole_step", "pytest bench/bench_whole_step.py -s", {
        "steps": STEPS - 1, "runs": RUNS, "threads": torch.get_num_threads(), "peers": peers.versions(), **figures,
    })  # fmt: skip
