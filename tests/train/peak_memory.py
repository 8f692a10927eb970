"""Trains two steps in a process of its own, or samples, and writes the peak of its memory and the plan of it as JSON.

Not a test: `test_memory.py` starts it. Arguments: "train" or "sample", the model's folder, a picture or "", the model's
settings as JSON, tokens of a micro-batch or completions, and the file to write.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft  # noqa: F401  its modules shall not count
import torch

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.data.answers import Outcome
from medbridge.model import ModelSettings, Policy
from medbridge.model.allocator import give_freed_memory_back
from medbridge.rollout import RolloutSettings, TransformersEngine
from medbridge.rollout.engine import Graded, Request, Rollout
from medbridge.train import RlSettings
from medbridge.train.activations import MicroBatch
from medbridge.train.engine_memory import Sampling
from medbridge.train.groups import Batch, Group
from medbridge.train.learner import Learner
from medbridge.train.memory import plan_memory
from medbridge.train.optimization import Trainable

GROUPS, LENGTHS = 3, (32, 45, 59, 73, 87, 101, 114, 128)
PROMPTS = PromptSettings(answer_style="text", system="")


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) << 10


def sampled(picture: str) -> Batch:
    """Groups of random completions, half of them right."""
    generator = np.random.default_rng(0)
    groups = []
    for number in range(GROUPS):
        item = Item(
            id=str(number), dataset="squares", split="train", question="How bright is the square?", answer="dark",
            options=("dark", "grey"), images=(picture,) if picture else (), tags={}, floor=0.5,
        )  # fmt: skip
        order = permutation(item, 0, 0)
        graded = [
            Graded(
                Rollout(item.id, sample, order, "", generator.integers(0, 250, length),
                        np.zeros(length, np.float32), "stop", 0),
                Outcome("correct" if sample % 2 else "wrong", None, None, None, True), float(sample % 2),
            )
            for sample, length in enumerate(LENGTHS)
        ]  # fmt: skip
        groups.append(Group(Request(item, tuple(range(len(LENGTHS))), (order,) * len(LENGTHS)), tuple(graded)))
    return Batch(groups, [], 0, 0, 0.0)


def sample(folder: str, picture: str, held: str, completions: str, out: str) -> None:
    torch.set_num_threads(1)
    policy, images = Policy.load(folder, ModelSettings.model_validate_json(held)), ImageCache(64 << 20)
    give_freed_memory_back()
    rows, settings = int(completions), RolloutSettings(max_new_tokens=64)
    engine = TransformersEngine(policy, PROMPTS, images, batch_size=rows)
    first = sampled(picture).groups[0].request
    numbers, orders = tuple(range(8)), first.permutations[:1] * 8
    requests = [Request(replace(first.item, id=str(n)), numbers, orders) for n in range(rows // 8)]
    list(engine.generate(requests[:1], settings, seed=0))  # what libraries set up at their first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    list(engine.generate(requests, settings, seed=0))
    peak = resident("VmHWM") - before
    longest = policy.length(first.item, first.permutations[0], PROMPTS, images)
    plan = plan_memory(
        folder, ModelSettings(), RlSettings(), sampling=Sampling("transformers", settings, 0, rows, longest)
    )
    parts = plan.phases["sampling"]
    Path(out).write_text(json.dumps({"measured": peak, "planned": sum(parts.values()), "table": plan.table()}))


def train(folder: str, picture: str, held: str, tokens: str, out: str) -> None:
    torch.set_num_threads(1)
    model, images = ModelSettings.model_validate_json(held), ImageCache(64 << 20)
    settings = RlSettings(micro_batch_tokens=int(tokens), learning_rate=1e-6, warmup_steps=0)
    batch = sampled(picture)
    before = resident("VmRSS")
    policy = Policy.load(folder, model, trainable=True)
    give_freed_memory_back()  # what is in use is to be measured, and not what the C library keeps for later
    trainable = Trainable(policy, model, settings, 10, seed=0)
    learner = Learner(policy, settings, PROMPTS, images, 128)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for step in (1, 2):
        learner.update(step, batch, trainable)
    peak = resident("VmHWM") - before
    encoded = [policy.encode(g.request.item, g.request.permutations[:1], PROMPTS, images)[0] for g in batch.groups]
    prompts = [prompt for prompt in encoded for _ in LENGTHS]
    completions = [entry.rollout.token_ids.tolist() for group in batch.groups for entry in group.graded]
    parts = policy.plan(prompts, completions, tokens=settings.micro_batch_tokens, most=None)
    rows = [policy.pack([prompts[at] for at in part], [completions[at] for at in part]) for part in parts]
    largest = max((MicroBatch.of(row, policy.patches(row.vision)) for row in rows), key=lambda one: one.tokens)
    plan = plan_memory(folder, model, settings, micro_batch=largest, micro_batches=len(parts))
    Path(out).write_text(json.dumps({"measured": peak, "planned": plan.peak, "table": plan.table()}))


{"train": train, "sample": sample}[sys.argv[1]](*sys.argv[2:])
