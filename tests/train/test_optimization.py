"""Data order, learning rates, updates and resuming: what makes a resumed stage take the very same steps."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medbridge.data import Item
from medbridge.errors import MedbridgeError
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.train.optimization import OptimizerSettings, Shuffle, Trainable, checkpoints

# -- data order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_epoch_is_a_permutation_and_differs_from_the_last(count: int) -> None:
    order = list(Shuffle(count, seed=3).take(0, 5 * count))
    epochs = [[index for index, epoch in order if epoch == number] for number in range(5)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 7 or len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_can_be_taken_up_anywhere() -> None:
    whole = list(Shuffle(7, seed=0).take(0, 60))
    for start in (0, 1, 6, 7, 20, 45):
        assert list(Shuffle(7, seed=0).take(start, 10)) == whole[start : start + 10]
    shuffle = Shuffle(7, seed=0)
    assert list(shuffle.take(30, 5)) + list(shuffle.take(2, 5)) == whole[30:35] + whole[2:7]  # also backwards
    assert list(Shuffle(7, seed=1).take(0, 60)) != whole


# -- learning rate -------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_follows_its_schedule() -> None:
    constant = OptimizerSettings(schedule="constant", warmup_steps=3)
    assert [constant.factor(step, 10) for step in (1, 2, 3, 4, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = OptimizerSettings(schedule="cosine", warmup_steps=2)
    rates = [cosine.factor(step, 10) for step in range(1, 11)]
    assert rates[:2] == [1 / 3, 2 / 3]
    for step in range(3, 11):
        assert rates[step - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_line_falls_evenly_to_the_same_end() -> None:
    linear = OptimizerSettings(schedule="linear", warmup_steps=2)
    rates = [linear.factor(step, 10) for step in range(1, 11)]
    assert rates[:2] == [1 / 3, 2 / 3]
    assert rates[2:] == pytest.approx([1 - 0.9 * done / 8 for done in range(1, 9)])
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_no_schedule_jumps_where_the_warm_up_ends(schedule: Any) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup_steps=50)
    rates = [settings.factor(step, 500) for step in range(1, 501)]
    assert max(rates) <= 1.0 and min(rates) > 0
    assert max(abs(one - two) for one, two in itertools.pairwise(rates)) <= 1 / 50


def test_a_warm_up_longer_than_the_stage_or_none_at_all() -> None:
    assert all(0 < OptimizerSettings(warmup_steps=20).factor(step, 5) < 1 for step in range(1, 6))
    assert OptimizerSettings(warmup_steps=0, schedule="constant").factor(1, 5) == 1.0


# -- steps ---------------------------------------------------------------------------------------------------------


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trainable_of(policy: Policy, model: ModelSettings | None = None, **settings: Any) -> Trainable:
    return Trainable(policy, model or ModelSettings(), OptimizerSettings(**settings), steps=10, seed=0)


def give_gradients(trainable: Trainable, value: float = 1.0) -> None:
    for parameter in trainable.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])  # the last is finite, and its norm isn't
def test_an_update_that_is_not_finite_is_skipped_and_the_third_in_a_row_stops_the_stage(
    value: float, load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = load_policy(trainable=True)
    said: list[str] = []
    trainable = Trainable(policy, ModelSettings(), OptimizerSettings(), steps=10, seed=0, say=said.append)
    give_gradients(trainable)
    assert trainable.step(1)["skipped"] == 0.0
    before = weights(policy)
    moments = {name: trainable.optimizer.state[p]["exp_avg"].clone() for name, p in trainable.parameters.items()}
    first = next(iter(trainable.parameters.values()))

    def spoilt(step: int) -> dict[str, float]:
        give_gradients(trainable)
        first.grad = torch.full_like(first, value)
        return trainable.step(step)

    for step in (2, 3):
        metrics = spoilt(step)
        assert metrics["skipped"] == 1.0 and not math.isfinite(metrics["gradient_norm"])
        assert all(parameter.grad is None for parameter in trainable.parameters.values())
    assert (
        said[1] == f"step 3: the gradient norm is {'nan' if value != value else 'inf'}; the update is skipped (2 in "
        "a row, 3 stop)"
    )
    assert same(weights(policy), before)
    for name, parameter in trainable.parameters.items():
        assert torch.equal(trainable.optimizer.state[parameter]["exp_avg"], moments[name])

    give_gradients(trainable)
    assert trainable.step(4)["skipped"] == 0.0  # and the count begins again
    trainable.save(tmp_path / "c", 4)
    before = weights(policy)
    spoilt(5)
    spoilt(6)
    with pytest.raises(
        MedbridgeError, match=r"step 7: .*3 updates in a row.*the last whole checkpoint is .*step-000004"
    ):
        spoilt(7)
    assert same(weights(policy), before)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_an_update_with_a_finite_gradient(
    loss: float, load_policy: Callable[..., Policy]
) -> None:
    policy = load_policy(trainable=True)
    trainable = trainable_of(policy, max_skipped_steps=1)
    before = weights(policy)
    give_gradients(trainable)
    with pytest.raises(MedbridgeError, match=rf"at a loss of {loss}, and 1 updates .*; none was saved"):
        trainable.step(1, loss)
    assert same(weights(policy), before)
    give_gradients(trainable)
    assert trainable.step(2, 0.5)["skipped"] == 0.0


def test_skips_in_a_row_are_counted_across_a_restart(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def skip(trainable: Trainable, step: int) -> None:
        give_gradients(trainable, math.nan)
        trainable.step(step)

    trainable = trainable_of(load_policy(trainable=True), max_skipped_steps=2)
    with pytest.warns(UserWarning, match="1 in a row, 2 stop"):
        skip(trainable, 1)
    trainable.save(tmp_path, 1)
    resumed = trainable_of(load_policy(trainable=True), max_skipped_steps=2)
    assert resumed.restore(tmp_path) == 1
    with pytest.raises(MedbridgeError, match="2 updates in a row"):
        skip(resumed, 2)


def test_gradients_are_scaled_down_to_the_norm_and_cleared(load_policy: Callable[..., Policy]) -> None:
    policy = load_policy(trainable=True)
    trainable = trainable_of(policy, max_gradient_norm=0.5, warmup_steps=0, schedule="constant", learning_rate=1e-3)
    for parameter in trainable.parameters.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(parameter.numel() for parameter in trainable.parameters.values())
    found = trainable.step(1)
    assert found["gradient_norm"] == pytest.approx(2 * math.sqrt(count), rel=1e-4)  # as it was before the scaling
    assert found["learning_rate"] == 1e-3
    assert all(parameter.grad is None for parameter in trainable.parameters.values())
    first = next(iter(trainable.parameters.values()))
    moment = trainable.optimizer.state[first]["exp_avg"]
    torch.testing.assert_close(moment, torch.full_like(moment, 0.1 * 0.5 / math.sqrt(count)), rtol=1e-3, atol=1e-12)


def test_a_frozen_vision_tower_stays_as_it_is(
    load_policy: Callable[..., Policy], sft: Callable[..., Any], answers: Any, train_items: list[Item]
) -> None:
    for architecture in ("qwen2_5_vl", "gemma3"):
        policy = load_policy(architecture, trainable=True)
        before = weights(policy)
        sft(policy, answers(train_items), model=ModelSettings(freeze_vision=True), steps=2)
        after = weights(policy)
        tower = [name for name in before if ".visual." in name or ".vision_tower." in name]
        assert tower and all(torch.equal(before[name], after[name]) for name in tower)
        assert not same(before, after)


def group_of(trainable: Trainable, parameter: torch.Tensor) -> dict[str, Any]:
    [group] = [g for g in trainable.optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


@pytest.mark.parametrize("vision_rate", [None, 3e-4])
@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_matrices_decay_and_the_vision_tower_has_its_own_rate(
    vision_rate: float | None, architecture: str, load_policy: Callable[..., Policy]
) -> None:
    trainable = trainable_of(
        load_policy(architecture, trainable=True), learning_rate=1e-2, vision_learning_rate=vision_rate,
        weight_decay=0.1, schedule="linear", warmup_steps=1,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
    give_gradients(trainable, 0.0)
    metrics = trainable.step(1)
    assert metrics["learning_rate"] == 5e-3
    towers = set()
    for name, parameter in trainable.parameters.items():
        vision = "visual." in name or "vision_tower." in name
        towers.add(vision)
        rate = 0.5 * (vision_rate or 1e-2) if vision else 5e-3
        assert group_of(trainable, parameter)["lr"] == rate
        decayed = before[name] * (1 - 0.1 * rate) if parameter.ndim >= 2 else before[name]  # all that a step does here
        torch.testing.assert_close(parameter.detach(), decayed, rtol=1e-6, atol=0)
        assert parameter.ndim >= 2 or torch.equal(parameter, before[name])
    assert towers == {True, False}
    assert len(trainable.optimizer.param_groups) == (2 if vision_rate is None else 4)


@pytest.mark.parametrize("model", [ModelSettings(freeze_vision=True), ModelSettings(lora=LoraSettings(rank=2))])
def test_a_rate_for_a_tower_that_does_not_train_is_refused(
    model: ModelSettings, load_policy: Callable[..., Policy]
) -> None:
    with pytest.raises(MedbridgeError, match=r"vision_learning_rate is 0\.001, and no parameter of the vision tower"):
        trainable_of(load_policy(trainable=True, lora=model.lora), model, vision_learning_rate=1e-3)


def test_adapters_in_the_tower_have_its_rate(load_policy: Callable[..., Policy]) -> None:
    model = ModelSettings(lora=LoraSettings(rank=2, targets=r".*\.(qkv|q_proj)$"))
    trainable = trainable_of(load_policy(trainable=True, lora=model.lora), model, vision_learning_rate=1e-3)
    for name, parameter in trainable.parameters.items():
        assert group_of(trainable, parameter)["peak"] == (1e-3 if "visual." in name else 1e-5)
    assert {"visual." in name for name in trainable.parameters} == {True, False}


def test_the_update_is_adamw_as_its_paper_has_it(load_policy: Callable[..., Policy]) -> None:
    """arXiv 1711.05101, algorithm 2, in float64 over five updates."""
    trainable = trainable_of(
        load_policy(trainable=True), learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, warmup_steps=2,
        max_gradient_norm=1e9,
    )  # fmt: skip
    name, parameter = next((n, p) for n, p in trainable.parameters.items() if p.ndim == 2)
    value, first, second = parameter.detach().double(), torch.tensor(0.0), torch.tensor(0.0)
    for step in range(1, 6):
        generator = torch.Generator().manual_seed(step)
        for other in trainable.parameters.values():
            other.grad = torch.randn(other.shape, generator=generator)
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        rate = 1e-2 * trainable.settings.factor(step, 10)
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        value = value * (1 - rate * 0.1)
        value = value - rate * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        trainable.step(step)
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7, msg=name)


def test_eight_bit_states_ask_for_what_they_need(
    load_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it isn't installed
    with pytest.raises(MedbridgeError, match="`pip install bitsandbytes`"):
        trainable_of(load_policy(trainable=True), optimizer="adamw_8bit")
    stand_in = types.ModuleType("bitsandbytes.optim")
    stand_in.AdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    with pytest.raises(MedbridgeError, match="runs on a GPU"):
        trainable_of(load_policy(trainable=True), optimizer="adamw_8bit")


def test_recomputed_activations_give_the_same_steps(
    load_policy: Callable[..., Policy], sft: Callable[..., Any], answers: Any, train_items: list[Item], tmp_path: Path
) -> None:
    logs = [
        sft(
            load_policy(trainable=True), answers(train_items), steps=3, checkpoints=tmp_path / str(recompute),
            model=ModelSettings(gradient_checkpointing=recompute),
        )
        for recompute in (False, True)
    ]  # fmt: skip
    assert logs[0].series("loss") == pytest.approx(logs[1].series("loss"), abs=1e-5)
    assert logs[0].series("gradient_norm") == pytest.approx(logs[1].series("gradient_norm"), rel=1e-4)


# -- adapters ------------------------------------------------------------------------------------------------------

LORA = ModelSettings(lora=LoraSettings(rank=4, alpha=8, dropout=0.1))


def test_only_adapters_train_and_the_merged_model_is_an_ordinary_one(
    load_policy: Callable[..., Policy], sft: Callable[..., Any], answers: Any, train_items: list[Item], tmp_path: Path
) -> None:
    policy = load_policy(trainable=True, lora=LORA.lora)
    before = weights(policy)
    trainable = trainable_of(policy, LORA)
    assert trainable.parameters and all("lora_" in name for name in trainable.parameters)
    assert not any("visual" in name for name in trainable.parameters)
    trainable.finish()
    assert same(weights(policy), before)  # an untrained adapter adds nothing

    sft(policy, answers(train_items), model=LORA, steps=3)
    after = weights(policy)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.split(".")[-2].endswith("_proj") and "visual" not in name for name in changed)
    loaded = load_policy(path=policy.save(tmp_path / "merged"))
    assert same(weights(loaded), after)


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 8 / 16), (True, 8 / 4)])
def test_adapters_are_scaled_by_the_rank_or_by_its_root(
    stabilised: bool, scale: float, load_policy: Callable[..., Policy]
) -> None:
    """rsLoRA, arXiv 2312.03732: alpha / sqrt(rank)."""
    model = ModelSettings(lora=LoraSettings(rank=16, alpha=8, rank_stabilised=stabilised))
    trainable = trainable_of(load_policy(trainable=True, lora=model.lora), model)
    layer = trainable.policy.model.model.language_model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": scale}
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.01)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    trainable.finish()
    merged = trainable.policy.model.model.language_model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged.detach(), before + scale * product.detach())


@pytest.mark.parametrize("model", [ModelSettings(), LORA], ids=["whole", "adapters"])
def test_masters_and_moments_are_float32_under_a_bfloat16_model(
    model: ModelSettings, load_policy: Callable[..., Policy], sft: Callable[..., Any], answers: Any,
    train_items: list[Item], killed: type[Exception], tmp_path: Path,
) -> None:  # fmt: skip
    """And a stage that computes in bfloat16 resumes with the same bits as well."""

    def load() -> Policy:
        return load_policy(trainable=True, dtype="bfloat16", lora=model.lora)

    policy = load()
    trainable = trainable_of(policy, model)
    held = {parameter.dtype for parameter in policy.model.parameters() if not parameter.requires_grad}
    assert held == (set() if model.lora is None else {torch.bfloat16})
    give_gradients(trainable)
    trainable.step(1)
    for parameter in trainable.parameters.values():
        assert parameter.dtype == torch.float32
        assert {value.dtype for value in trainable.optimizer.state[parameter].values()} == {torch.float32}

    options = {"model": model, "steps": 4, "checkpoint_every": 2}
    whole, resumed, examples = load(), load(), answers(train_items)
    sft(whole, examples, checkpoints=tmp_path / "straight", **options)
    with pytest.raises(killed):
        sft(load(), examples, checkpoints=tmp_path / "cut", kill_at=3, **options)
    assert sft(resumed, examples, checkpoints=tmp_path / "cut", **options).start == 2
    assert same(weights(resumed), weights(whole))


def test_adapter_targets_that_fit_nothing_are_named(load_policy: Callable[..., Policy]) -> None:
    model = ModelSettings(lora=LoraSettings(targets=["no_such_module"]))
    with pytest.raises(MedbridgeError, match=r"model\.lora\.targets fits no module"):
        trainable_of(load_policy(trainable=True), model)


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [ModelSettings(), LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("kill_at", [2, 4, 6])
def test_a_stage_cut_off_anywhere_ends_with_the_same_bits(
    model: ModelSettings,
    kill_at: int,
    load_policy: Callable[..., Policy],
    sft: Callable[..., Any],
    answers: Any,
    killed: type[Exception],
    train_items: list[Item],
    tmp_path: Path,
) -> None:
    """Checkpoints stand at steps 3 and 6, so one kill comes before any, and one right behind the first."""
    examples = answers(train_items)
    whole, straight = load_policy(trainable=True, lora=model.lora), tmp_path / "straight"
    log = sft(whole, examples, model=model, checkpoints=straight, steps=7, checkpoint_every=3)
    assert log.start == 0

    folder = tmp_path / "cut-off"
    with pytest.raises(killed):
        sft(
            load_policy(trainable=True, lora=model.lora), examples, model=model, checkpoints=folder, steps=7,
            checkpoint_every=3, kill_at=kill_at,
        )  # fmt: skip
    torch.rand(kill_at)  # another process has drawn other random numbers
    resumed = load_policy(trainable=True, lora=model.lora)
    again = sft(resumed, examples, model=model, checkpoints=folder, steps=7, checkpoint_every=3)
    assert again.start == 3 * ((kill_at - 1) // 3)
    assert again.items == {step: ids for step, ids in log.items.items() if step > again.start}
    assert same(weights(resumed), weights(whole))
    for step, metrics in again.metrics.items():
        assert metrics["loss"] == log.metrics[step]["loss"]


@pytest.mark.parametrize("model", [ModelSettings(), LORA], ids=["whole", "adapters"])
def test_a_stage_cut_off_at_every_step_in_turn_ends_with_the_same_bits(
    model: ModelSettings,
    load_policy: Callable[..., Policy],
    sft: Callable[..., Any],
    answers: Any,
    killed: type[Exception],
    train_items: list[Item],
    tmp_path: Path,
) -> None:
    """One stage, ended after each of its steps: every process takes one step and is the last one's heir."""
    examples, options = answers(train_items), {"model": model, "steps": 6, "checkpoint_every": 1}
    whole = load_policy(trainable=True, lora=model.lora)
    log = sft(whole, examples, checkpoints=tmp_path / "straight", **options)
    for step in range(2, 7):
        with pytest.raises(killed):
            sft(
                load_policy(trainable=True, lora=model.lora), examples, checkpoints=tmp_path / "cut", kill_at=step,
                **options,
            )  # fmt: skip
        disturb_generators(step)
    resumed = load_policy(trainable=True, lora=model.lora)
    again = sft(resumed, examples, checkpoints=tmp_path / "cut", **options)
    assert again.start == 5 and again.metrics[6]["loss"] == log.metrics[6]["loss"]
    assert same(weights(resumed), weights(whole))


def disturb_generators(seed: int) -> None:
    """Another process begins with generators of its own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("cut", range(6))
def test_every_generator_goes_on_where_it_stood(cut: int, load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Steps that draw from the generators as they come (nobody calls `begin`), with dropout in the adapters."""
    average: list[dict[str, torch.Tensor]] = []

    def steps(trainable: Trainable, first: int, last: int) -> list[tuple[float, ...]]:
        drawn = []
        for step in range(first, last + 1):
            text = [7, random.randrange(5, 100), int(np.random.randint(5, 100)), 7]
            logits = trainable.policy.model(input_ids=torch.tensor([text])).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]))
            loss.backward()
            trainable.step(step, loss.item())
            drawn.append((*text, random.gauss(), np.random.standard_normal(), loss.item()))
        return drawn

    def begun() -> Trainable:
        policy = load_policy(trainable=True, lora=LORA.lora)
        trainable = trainable_of(policy, LORA, warmup_steps=0, learning_rate=1e-2)
        average.append(trainable.keep_average(0.9).averages)
        return trainable

    straight = begun()
    disturb_generators(0)
    expected = steps(straight, 1, 6)

    killed = begun()
    disturb_generators(0)
    found = steps(killed, 1, cut)
    killed.save(tmp_path, cut, {"position": {"epoch": cut, "name": "\u00e9"}})
    disturb_generators(99)
    resumed = begun()
    assert resumed.restore(tmp_path) == cut
    assert resumed.extra == {"position": {"epoch": cut, "name": "\u00e9"}}
    found += steps(resumed, cut + 1, 6)
    assert found == expected
    assert same(weights(resumed.policy), weights(straight.policy))
    assert same(average[0], average[2])
    for name, parameter in straight.parameters.items():
        assert same(straight.optimizer.state[parameter], resumed.optimizer.state[resumed.parameters[name]])


def save_some(policy: Policy, folder: Path, steps: int, **settings: Any) -> Trainable:
    trainable = trainable_of(policy, **settings)
    for step in range(1, steps + 1):
        give_gradients(trainable, step / 10)
        trainable.step(step)
        trainable.save(folder, step, {"position": step}, score=-step)
    return trainable


def test_the_newest_checkpoints_are_kept_and_the_best(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    trainable = save_some(load_policy(trainable=True), tmp_path / "c", 4)
    assert [path.name for path in checkpoints(tmp_path / "c")] == ["step-000001", "step-000003", "step-000004"]
    last = tmp_path / "c" / "step-000004"
    assert load_file(last / "weights.safetensors").keys() == trainable.parameters.keys()
    stored = load_file(last / "optimizer.safetensors")
    assert {name.split("/")[0] for name in stored} == {"exp_avg", "exp_avg_sq", "step"}
    assert json.loads((last / "state.json").read_text())["position"] == 4


def test_fewer_or_more_checkpoints_are_kept(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    save_some(load_policy(trainable=True), tmp_path / "c", 4, keep_checkpoints=1)
    assert [path.name for path in checkpoints(tmp_path / "c")] == ["step-000001", "step-000004"]


def test_no_checkpoint_is_step_0(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    assert trainable_of(load_policy(trainable=True)).restore(tmp_path / "none") == 0
    (tmp_path / "some" / ".writing-step-000009").mkdir(parents=True)  # a kill while the first was written
    trainable = trainable_of(load_policy(trainable=True))
    assert trainable.restore(tmp_path / "some") == 0 and trainable.extra == {}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_serves(
    name: str, load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    save_some(load_policy(trainable=True), folder, 2)
    last = folder / "step-000002" / name
    last.write_bytes(last.read_bytes()[:-10])
    resumed = trainable_of(load_policy(trainable=True))
    with pytest.warns(UserWarning, match=rf"step-000002 is damaged \({name} .*Training goes on from step-000001"):
        assert resumed.restore(folder) == 1
    assert resumed.extra == {"position": 1}
    assert [path.name for path in checkpoints(folder)] == ["step-000001"]
    straight = save_some(load_policy(trainable=True), tmp_path / "other", 1)
    assert same(weights(resumed.policy), weights(straight.policy))


def test_a_checkpoint_under_other_settings_is_refused_before_anything_is_loaded(
    load_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_some(load_policy(trainable=True), tmp_path / "c", 1)
    with pytest.raises(MedbridgeError, match="holds other parameters than this stage trains"):
        trainable_of(load_policy(trainable=True), LORA).restore(tmp_path / "c")
    other = trainable_of(load_policy(trainable=True))
    before = weights(other.policy)
    monkeypatch.setattr(other, "settings", other.settings.model_copy(update={"optimizer": "adamw_8bit"}))
    with pytest.raises(MedbridgeError, match="was saved with optimizer adamw"):
        other.restore(tmp_path / "c")
    assert same(weights(other.policy), before) and not other.optimizer.state


def test_a_caller_can_not_write_over_the_state_of_the_trainer(
    load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="are taken"):
        trainable_of(load_policy(trainable=True)).save(tmp_path, 1, {"trainer": 1})
