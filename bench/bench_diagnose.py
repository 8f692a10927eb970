"""Diagnosis: K samples an item from one prefill, against one `generate` call per sample, side by side in one run.

    pytest bench/bench_diagnose.py -s

The peer is the original evaluation's way: `model.generate` once for each sample, with the prompt and the image encoded
again each time. Its inputs are prepared beforehand and not timed; ours begins at the image files. Same model, same
sampling parameters. 200 items x 16 samples; the peer takes a sample of the calls, and its time is scaled up. Rounds are
interleaved; the ratio is that of the medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medbridge.config import parse_config
from medbridge.data import ImageCache, Item
from medbridge.measurement import measurement_request
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.rollout import SamplingSettings, TransformersEngine

ITEMS, SAMPLES, ROUNDS, CALLS = 200, 16, 3, 48
SAMPLING = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=12)
CONFIG = """
model: {from_nothing: {format_steps: 30}}
data: {sources: [{kind: brain}], strata: [task], prompt: {answer_style: text, system: ""}}
sft: {batch_size: 32, micro_batch_size: 16, learning_rate: 2.0e-3}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = parse_config(CONFIG, source="bench")
    return Run(tmp_path_factory.mktemp("bench") / "run", settings, base_dir=Path.cwd(), reporter=Reporter())


def ours(path: str, run: Run, items: list[Item]) -> tuple[float, int]:
    """Seconds and tokens of our engine on all items; the model is loaded anew, so that nothing is encoded yet."""
    policy = Policy.load(path, run.settings.model)
    engine = TransformersEngine(policy, run.settings.data.prompt, ImageCache(512 << 20), batch_size=512)
    requests = [measurement_request(item, SAMPLES, 0) for item in items]
    start = time.perf_counter()
    rollouts = [rollout for batch in engine.generate(requests, SAMPLING, seed=0) for rollout in batch]
    seconds = time.perf_counter() - start
    assert len(rollouts) == len(items) * (SAMPLES + 1)
    return seconds, sum(len(rollout.token_ids) for rollout in rollouts)


@torch.inference_mode()
def one_call_a_sample(path: str, run: Run, items: list[Item]) -> tuple[float, int]:
    """Seconds and tokens of `CALLS` generate calls, over evenly spaced items."""
    policy = Policy.load(path, run.settings.model)
    images = ImageCache(512 << 20)
    inputs = []
    for call in range(CALLS):
        item = items[call * len(items) // CALLS]
        request = measurement_request(item, SAMPLES, 0)
        prompt = policy.encode(item, [request.permutations[1 + call % SAMPLES]], run.settings.data.prompt, images)[0]
        pictures = [[images.get(name) for name in item.images]]
        inputs.append(policy.processor(text=[prompt.text], images=pictures, return_tensors="pt"))
    tokens = 0
    start = time.perf_counter()
    for encoded in inputs:
        out = policy.model.generate(
            **encoded, do_sample=True, temperature=SAMPLING.temperature, top_p=SAMPLING.top_p, top_k=0,
            max_new_tokens=SAMPLING.max_new_tokens,
        )  # fmt: skip
        tokens += out.shape[1] - encoded["input_ids"].shape[1]
    return time.perf_counter() - start, tokens


def test_against_one_call_a_sample(
    run: Run, save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(run.folder / run.base_model())
    items = run.items.split("validation")[:ITEMS]
    assert len(items) == ITEMS
    batched, single = [], []
    for _ in range(ROUNDS):
        batched.append(ours(path, run, items))
        single.append(one_call_a_sample(path, run, items))
    seconds = statistics.median(time for time, _ in batched)
    # the peer answers 16 times an item; ours adds the greedy completion in the same time
    peer = statistics.median(time for time, _ in single) * ITEMS * SAMPLES / CALLS
    figures = {
        "items": ITEMS,
        "samples": SAMPLES,
        "seconds": round(seconds, 2),
        "items_per_second": round(ITEMS / seconds, 1),
        "tokens_per_second": round(batched[0][1] / seconds),
        "peer_seconds_scaled": round(peer, 1),
        "peer_calls_timed": CALLS,
        "peer_tokens_per_call": round(single[0][1] / CALLS, 2),
        "tokens_per_completion": round(batched[0][1] / (ITEMS * (SAMPLES + 1)), 2),
        "ratio": round(peer / seconds, 1),
    }
    save("diagnose", "pytest bench/bench_diagnose.py -s", figures)
    with capsys.disabled():
        print(f"\n{ITEMS} items x {SAMPLES} samples, median of {ROUNDS} interleaved rounds")
        rates = f"{figures['items_per_second']} items/s, {figures['tokens_per_second']} tokens/s"
        print(f"  one prefill per item      {seconds:8.2f} s  {rates}")
        print(f"  one generate per sample   {peer:8.1f} s  (scaled from {CALLS} calls)")
        print(f"  ratio                     {figures['ratio']:8.1f} x")


@pytest.mark.benchmark(group="diagnosis of 40 items x 16 samples")
def test_diagnose(benchmark, run: Run) -> None:  # type: ignore[no-untyped-def]
    path = str(run.folder / run.base_model())
    benchmark.pedantic(ours, (path, run, run.items.split("validation")[:40]), rounds=3)
