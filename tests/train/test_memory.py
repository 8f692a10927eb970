"""What a stage is said to take of memory: against what it takes, and what is said where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import FromNothing, LoraSettings, ModelSettings, Policy, init_model
from medbridge.rollout import RolloutSettings
from medbridge.train import RlSettings, SftSettings
from medbridge.train.activations import MicroBatch, activations, cache_bytes
from medbridge.train.engine_memory import Sampling
from medbridge.train.memory import GIB, device_memory, plan_memory
from medbridge.train.parameters import add_adapters, trained_parameters

PROMPTS = PromptSettings(answer_style="text", system="")
SIDE = 224
GPU = torch.device("cuda")  # to plan for, not to run on


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A model whose training takes hundreds of MiB: beside them, what libraries take is little."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shape = FromNothing(hidden_size=256, layers=4, vision_hidden_size=256, vision_layers=3, image_size=SIDE)
    model = AutoModelForImageTextToText.from_pretrained(init_model(folder, shape, tiny_texts, seed=0))
    model.resize_token_embeddings(8000)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("shown", "model", "tokens"),
    [
        (True, {}, 16384),
        (True, {}, 2000),
        (False, {}, 16384),
        (True, {"freeze_vision": True}, 16384),
        (True, {"gradient_checkpointing": True}, 16384),
        (True, {"lora": {}}, 16384),
    ],
    ids=["images", "small micro-batches", "text", "frozen vision", "checkpointing", "adapters"],
)
def test_peaks_are_as_planned(
    shown: bool, model: dict[str, Any], tokens: int, wide_model: Path, picture: str, processes: Any, tmp_path: Path
) -> None:
    script, out, log = Path(__file__).with_name("peak_memory.py"), tmp_path / "found.json", tmp_path / "log"
    argv = [script, "train", wide_model, picture if shown else "", json.dumps(model), tokens, out]
    assert processes.wait(processes.start(argv, log)) == 0, log.read_text()
    found = json.loads(out.read_text())
    assert 0.8 < found["planned"] / found["measured"] < 1.2, (found["measured"] / (1 << 20), found["table"])


@pytest.mark.parametrize(("shown", "completions"), [(True, 256), (False, 512)])
def test_sampling_takes_what_is_planned(
    shown: bool, completions: int, wide_model: Path, picture: str, processes: Any, tmp_path: Path
) -> None:
    script, out, log = Path(__file__).with_name("peak_memory.py"), tmp_path / "found.json", tmp_path / "log"
    argv = [script, "sample", wide_model, picture if shown else "", "{}", completions, out]
    assert processes.wait(processes.start(argv, log)) == 0, log.read_text()
    found = json.loads(out.read_text())
    assert 0.8 < found["planned"] / found["measured"] < 1.2, (found["measured"] / (1 << 20), found["table"])


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_engines_take_their_share(engine: Any) -> None:
    config, trained = large_config(2, 256, 512, 8, 2), RlSettings()

    def planned(device: torch.device, engines: int, sleep: bool) -> Any:
        settings = RolloutSettings(vllm={"sleep": sleep, "gpu_memory": 0.5, "kv_cache_gb": 2})
        drawn = Sampling(engine, settings, engines, 64, 0)
        return plan_memory(config, ModelSettings(), trained, device=device, available=80 * GIB, sampling=drawn)

    awake, asleep = planned(GPU, 1, False), planned(GPU, 1, True)
    assert awake.held["rollout engines"] == sum(asleep.phases["sampling"].values()) == 40 * GIB
    assert asleep.held["rollout engines"] == sum(awake.phases["sampling"].values()) == 0
    assert asleep.peak == sum(asleep.held.values()) + 40 * GIB
    cpu = planned(torch.device("cpu"), 2, True)
    assert cpu.held["rollout engines"] == pytest.approx(2 * (cpu.held["weights"] + 2 * GIB), rel=1e-9)
    elsewhere = planned(GPU, 0, True)
    assert elsewhere.held["rollout engines"] == sum(elsewhere.phases["sampling"].values()) == 0


def saved_by(policy: Policy, run: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the model's own tensors."""
    own = {t.untyped_storage()._cdata for t in (*policy.model.parameters(), *policy.model.buffers())}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _ = run()  # held until the hooks have seen all of it
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize(
    "model", [{}, {"freeze_vision": True}, {"lora": LoraSettings()}], ids=["all", "frozen", "lora"]
)
def test_activations_are_those_that_autograd_keeps(
    architecture: str, model: dict[str, Any], tmp_path: Path, tiny_texts: list[str], picture: str, images: ImageCache
) -> None:
    shape = FromNothing(
        architecture=architecture, hidden_size=128, layers=3, vision_hidden_size=96, vision_layers=3, image_size=SIDE
    )  # fmt: skip
    settings = ModelSettings(**model)
    policy = Policy.load(str(init_model(tmp_path / "model", shape, tiny_texts, seed=0)), settings, trainable=True)
    network: nn.Module = policy.model
    if settings.lora is not None:
        network = add_adapters(policy, settings.lora, 0)
    trained_parameters(network, settings)
    item = Item(
        id="0", dataset="squares", split="train", question="How bright is the square?", answer="dark", options=None,
        images=(picture,), tags={}, floor=0.0,
    )  # fmt: skip
    [prompt] = policy.encode(item, [()], PROMPTS, images)
    row = policy.pack([prompt] * 4, [list(range(length)) for length in (40, 60, 90, 120)])
    batch = MicroBatch.of(row, policy.patches(row.vision))
    found = saved_by(policy, lambda: policy.packed_hidden(row))
    told = activations(
        policy.model, batch, computed_in=torch.float32, checkpointing=False, adapters=settings.lora is not None
    )
    assert told.text + told.vision == pytest.approx(found, rel=0.1)


def large_config(layers: int, width: int, inner: int, heads: int, key_heads: int) -> Any:
    """The shape of a published Qwen2.5-VL."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152_064, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads,
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                       "out_hidden_size": width},
        tie_word_embeddings=False,
    )  # fmt: skip


def test_a_large_model_is_planned_without_weights() -> None:
    config = large_config(28, 3584, 18944, 28, 4)
    alone = plan_memory(config, ModelSettings(), RlSettings())
    assert sum(alone.held.values()) > 8.2e9 * 12  # float32 weights and two states of 8.3 B parameters
    frugal = ModelSettings(gradient_checkpointing=True)
    shared = plan_memory(config, frugal, RlSettings(), device=GPU, ranks=8, available=80 * GIB)
    assert shared.held["weights"] * 8 == pytest.approx(alone.held["weights"], rel=1e-6)
    assert shared.fits, shared.table()
    shared.require()


def test_what_does_not_fit_is_refused_and_mended() -> None:
    config = large_config(28, 3584, 18944, 28, 4)
    plan = plan_memory(config, ModelSettings(), RlSettings(), device=GPU, available=80 * GIB)
    assert not plan.fits
    with pytest.raises(MedbridgeError, match=r"model\.lora") as refused:
        plan.require()
    assert "optimizer" in str(refused.value) and "available" in str(refused.value)
    for peak in plan.remedies.values():
        assert peak <= 80 * GIB
    hopeless = plan_memory(large_config(64, 5120, 27648, 40, 8), ModelSettings(), SftSettings(), available=GIB)
    assert not hopeless.remedies
    with pytest.raises(MedbridgeError, match="more or larger"):
        hopeless.require()


def test_parts_follow_the_settings() -> None:
    config = large_config(2, 256, 512, 8, 2)

    def held(model: ModelSettings, **settings: Any) -> Any:
        return plan_memory(config, model, RlSettings(**settings)).held

    plain = held(ModelSettings())
    assert plain["reference"] == plain["moving average"] == 0
    assert held(ModelSettings(), kl_coefficient=0.1)["reference"] == plain["weights"]
    assert held(ModelSettings(), kl_coefficient=0.1, kl_reference="ema")["moving average"] == plain["weights"]
    assert held(ModelSettings(lora=LoraSettings()), kl_coefficient=0.1)["reference"] == 0
    assert held(ModelSettings(), optimizer="adamw_8bit")["optimizer"] * 4 == plain["optimizer"]
    assert held(ModelSettings(freeze_vision=True))["optimizer"] < plain["optimizer"]


def test_a_cache_is_keys_and_values_of_all_layers() -> None:
    assert cache_bytes(large_config(28, 3584, 18944, 28, 4), 1000, torch.bfloat16) == 2 * 1000 * 28 * 4 * 128 * 2


def test_a_machine_has_memory() -> None:
    assert device_memory(torch.device("cpu")) > 0


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"config\.json"):
        plan_memory(str(tmp_path / "nothing"), ModelSettings(), RlSettings())
