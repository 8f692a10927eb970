"""Data order, learning rate and checkpoints: what makes a resumed stage take the very same steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    constant = OptimizerSettings(learning_rate=1.0, schedule="constant", warmup_steps=3)
    assert [constant.rate(step, 10) for step in (1, 2, 3, 4, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = OptimizerSettings(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    rates = [cosine.rate(step, 10) for step in range(1, 11)]
    assert rates[:2] == [1 / 3, 2 / 3]
    for step in range(3, 11):
        assert rates[step - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_warm_up_longer_than_the_stage_or_none_at_all() -> None:
    assert all(0 < OptimizerSettings(learning_rate=1.0, warmup_steps=20).rate(step, 5) < 1 for step in range(1, 6))
    assert OptimizerSettings(learning_rate=1.0, warmup_steps=0, schedule="constant").rate(1, 5) == 1.0


# -- steps ---------------------------------------------------------------------------------------------------------


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trainable_of(policy: Policy, model: ModelSettings | None = None, **settings: Any) -> Trainable:
    return Trainable(policy, model or ModelSettings(), OptimizerSettings(**settings), steps=10, seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_stage_and_leaves_the_weights(
    value: float, load_policy: Callable[..., Policy]
) -> None:
    policy = load_policy(trainable=True)
    before = weights(policy)
    trainable = trainable_of(policy)
    for parameter in trainable.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    first = next(iter(trainable.parameters.values()))
    first.grad = torch.full_like(first, value)
    with pytest.raises(MedbridgeError, match="step 4: the gradient norm is"):
        trainable.step(4)
    assert same(weights(policy), before)


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


def save_some(policy: Policy, folder: Path, steps: int) -> Trainable:
    trainable = trainable_of(policy)
    for step in range(1, steps + 1):
        for parameter in trainable.parameters.values():
            parameter.grad = torch.full_like(parameter, step / 10)
        trainable.step(step)
        trainable.save(folder, step)
    return trainable


def test_the_last_two_checkpoints_are_kept(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    save_some(load_policy(trainable=True), tmp_path / "c", 4)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000003", "step-000004"]
    stored = load_file(tmp_path / "c" / "step-000004" / "state.safetensors")
    assert {name.split("/")[0] for name in stored} == {"parameter", "exp_avg", "exp_avg_sq", "step"}


def test_no_checkpoint_is_step_0(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    assert trainable_of(load_policy(trainable=True)).restore(tmp_path / "none") == 0
    (tmp_path / "some" / ".writing-x" / "step-000009").mkdir(parents=True)  # a kill while the first was written
    assert trainable_of(load_policy(trainable=True)).restore(tmp_path / "some") == 0


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing", "other shape"])
def test_a_damaged_checkpoint_names_its_folder_and_the_one_before_it_serves(
    damage: str, load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    save_some(load_policy(trainable=True), folder, 2)
    last = folder / "step-000002" / "state.safetensors"
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:-1000])
    elif damage == "garbage":
        last.write_bytes(b"\xff" * 5000)
    elif damage == "missing":
        last.unlink()
    else:
        from safetensors.torch import save_file

        stored = load_file(last)
        name = next(name for name in stored if name.startswith("parameter/") and stored[name].ndim == 2)
        stored[name] = stored[name][:-1].contiguous()
        save_file(stored, last, {"step": "2"})
    with pytest.raises(MedbridgeError, match=r"step-000002.*can't be read"):
        trainable_of(load_policy(trainable=True)).restore(folder)
    [first, second] = checkpoints(folder)
    second.rename(folder / "set aside")
    assert trainable_of(load_policy(trainable=True)).restore(folder) == 1
    assert first.name == "step-000001"


def test_a_checkpoint_of_other_parameters_is_refused(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    save_some(load_policy(trainable=True), tmp_path / "c", 1)
    with pytest.raises(MedbridgeError, match="holds other parameters than this stage trains"):
        trainable_of(load_policy(trainable=True), LORA).restore(tmp_path / "c")
