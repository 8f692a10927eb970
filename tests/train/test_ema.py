"""The moving average: it moves as its formula says, stands in without a trace, and survives a restart bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medbridge.errors import MedbridgeError
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.train.ema import Ema
from medbridge.train.optimization import OptimizerSettings, Trainable

ULP = 2.0**-23
"""Distance from 1.0 to the next float32."""

DECAYS = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.995, 0.999, 0.9999]), st.floats(0, 0.9999))


def parameters(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter((scale * torch.randn(shape, generator=generator)).to(dtype))
        for name, shape in {"matrix": (5, 7), "bias": (3,), "scalar": (), "none": (0, 2)}.items()
    }


def move(policy: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.values():
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


# -- the formula ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    decay=DECAYS,
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-6, 1e3),
    moved=st.floats(1e-6, 1e3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_one_update_is_the_formula_to_the_last_place(
    decay: float, seed: int, scale: float, moved: float, dtype: torch.dtype
) -> None:
    """ref = d ref0 + (1 - d) policy, computed in float64, is met within a unit in the last place of the larger."""
    policy = parameters(seed, scale, dtype)
    first = {name: p.detach().double() for name, p in policy.items()}
    ema = Ema(policy, decay)
    move(policy, seed + 1, moved)
    ema.update()
    for name, parameter in policy.items():
        newest = parameter.detach().double()
        expected = decay * first[name] + (1 - decay) * newest
        assert ema.averages[name].dtype == torch.float32
        error = (ema.averages[name].double() - expected).abs()
        assert (error <= ULP * torch.maximum(first[name].abs(), newest.abs())).all()


def test_powers_of_two_leave_no_rounding_at_all() -> None:
    policy = {"p": nn.Parameter(torch.tensor([1.0, -8.0, 0.5]))}
    ema = Ema(policy, 0.75)
    with torch.no_grad():
        policy["p"].copy_(torch.tensor([5.0, 8.0, 0.0]))
    ema.update()
    assert ema.averages["p"].tolist() == [0.75 * 1 + 0.25 * 5, 0.75 * -8 + 0.25 * 8, 0.75 * 0.5]


@pytest.mark.parametrize("decay", [0.9, 0.995, 0.999])
def test_what_is_left_of_the_first_model_after_200_updates(decay: float) -> None:
    policy = {"p": nn.Parameter(torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5)}
    first = policy["p"].detach().double()
    ema = Ema(policy, decay)
    with torch.no_grad():
        policy["p"].zero_()
    for _ in range(200):
        ema.update()
    torch.testing.assert_close(ema.averages["p"].double(), decay**200 * first, rtol=200 * ULP, atol=0)


@settings(max_examples=50, deadline=None)
@given(decay=DECAYS, seed=st.integers(0, 2**31), updates=st.integers(1, 60))
def test_many_updates_are_the_weighted_sum_of_all_policies(decay: float, seed: int, updates: int) -> None:
    policy = parameters(seed)
    expected = {name: p.detach().double() for name, p in policy.items()}
    largest = {name: p.abs() for name, p in expected.items()}
    ema = Ema(policy, decay)
    for update in range(updates):
        move(policy, seed + update, 0.1)
        ema.update()
        for name, parameter in policy.items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
            largest[name] = torch.maximum(largest[name], parameter.detach().double().abs())
    for name, average in ema.averages.items():
        assert ((average.double() - expected[name]).abs() <= updates * ULP * largest[name]).all()


@settings(max_examples=50, deadline=None)
@given(decay=DECAYS, seed=st.integers(0, 2**31), updates=st.integers(1, 20))
def test_a_policy_that_stands_still_is_not_left(decay: float, seed: int, updates: int) -> None:
    policy = parameters(seed)
    ema = Ema(policy, decay)
    for _ in range(updates):
        ema.update()
    assert all(torch.equal(ema.averages[name], parameter) for name, parameter in policy.items())


@pytest.mark.parametrize("decay", [0.99, 0.995])
def test_the_average_arrives_within_what_float32_can_hold(decay: float) -> None:
    policy = {"p": nn.Parameter(torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1)}
    ema = Ema(policy, decay)
    with torch.no_grad():
        policy["p"].add_(1e-3)
    for _ in range(5000):
        ema.update()
    off = (ema.averages["p"] - policy["p"]).abs().max().item()
    assert 0 < off <= 1.01 * ULP / (1 - decay)  # values lie in [1, 2]: half a unit is 2^-24


def test_no_decay_is_the_policy_itself_and_one_is_refused() -> None:
    policy = parameters(0)
    ema = Ema(policy, 0.0)
    move(policy, 1)
    ema.update()
    assert all(torch.equal(ema.averages[name], parameter) for name, parameter in policy.items())
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\)"):
            Ema(policy, decay)


def test_averages_share_no_memory_with_the_parameters() -> None:
    policy = parameters(0)
    ema = Ema(policy, 0.9)
    before = {name: tensor.clone() for name, tensor in ema.averages.items()}
    move(policy, 1)
    assert all(torch.equal(ema.averages[name], before[name]) for name in policy)
    assert not any(tensor.requires_grad for tensor in ema.averages.values())


# -- standing in ---------------------------------------------------------------------------------------------------


def test_the_average_stands_in_between_a_forward_and_its_backward() -> None:
    """As a trainer does it: the policy's graph is open while the reference computes its log-probabilities."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    policy = dict(model.named_parameters())
    ema = Ema(policy, 0.9)
    reference = [tensor.clone() for tensor in ema.averages.values()]
    move(policy, 3)
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    model(inputs).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    own = [parameter.detach().clone() for parameter in model.parameters()]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    model.zero_grad()

    loss = model(inputs).square().sum()
    with torch.no_grad(), ema.in_place():
        assert all(torch.equal(p, r) for p, r in zip(model.parameters(), reference, strict=True))
        outputs = model(inputs)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True) if p.grad is not None)
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), reference, strict=True):
            parameter.copy_(tensor)
        assert torch.equal(model(inputs), outputs)


def test_an_error_within_gives_the_parameters_back() -> None:
    policy = parameters(0)
    ema = Ema(policy, 0.9)
    move(policy, 1)
    own = {name: parameter.detach().clone() for name, parameter in policy.items()}
    with pytest.raises(KeyError), ema.in_place():
        raise KeyError
    assert all(torch.equal(policy[name], own[name]) for name in policy)


# -- under a trainer -----------------------------------------------------------------------------------------------

LORA = ModelSettings(lora=LoraSettings(rank=4, dropout=0.1))


def trained(policy: Policy, model: ModelSettings, decay: float | None = 0.9, steps: int = 0) -> Trainable:
    trainable = Trainable(policy, model, OptimizerSettings(learning_rate=1e-2, warmup_steps=0), steps=10, seed=0)
    if decay is not None:
        trainable.keep_average(decay)
    update(trainable, range(1, steps + 1))
    return trainable


def update(trainable: Trainable, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in trainable.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        trainable.step(step)


def average_of(trainable: Trainable) -> dict[str, torch.Tensor]:
    assert trainable.average is not None
    return trainable.average.averages


@pytest.mark.parametrize("model", [ModelSettings(), LORA], ids=["whole", "adapters"])
def test_each_update_moves_the_average_of_what_is_trained(
    model: ModelSettings, load_policy: Callable[..., Policy]
) -> None:
    trainable = trained(load_policy(trainable=True, lora=model.lora), model)
    averages = average_of(trainable)
    assert averages.keys() == trainable.parameters.keys()
    if model.lora is not None:
        assert all("lora_" in name for name in averages)
    before = {name: tensor.double() for name, tensor in averages.items()}
    update(trainable, range(1, 2))
    for name, parameter in trainable.parameters.items():
        expected = 0.9 * before[name] + 0.1 * parameter.detach().double()
        assert not torch.equal(averages[name].double(), before[name])
        torch.testing.assert_close(averages[name].double(), expected, rtol=4 * ULP, atol=ULP)


def test_a_skipped_update_moves_nothing(load_policy: Callable[..., Policy]) -> None:
    trainable = trained(load_policy(trainable=True), ModelSettings(), steps=2)
    before = {name: tensor.clone() for name, tensor in average_of(trainable).items()}
    for parameter in trainable.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.warns(UserWarning, match="the update is skipped"):
        trainable.step(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average_of(trainable).items())


@pytest.mark.parametrize("model", [ModelSettings(), LORA], ids=["whole", "adapters"])
def test_a_restored_average_goes_on_bit_for_bit(
    model: ModelSettings, load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    straight = trained(load_policy(trainable=True, lora=model.lora), model, steps=3)
    straight.save(tmp_path, 3)
    stored = {name: tensor.clone() for name, tensor in average_of(straight).items()}
    update(straight, range(4, 7))
    resumed = trained(load_policy(trainable=True, lora=model.lora), model, steps=1)
    assert resumed.restore(tmp_path) == 3
    assert all(torch.equal(tensor, stored[name]) for name, tensor in average_of(resumed).items())
    update(resumed, range(4, 7))
    assert all(torch.equal(tensor, average_of(straight)[name]) for name, tensor in average_of(resumed).items())


@pytest.mark.parametrize(("saved", "wanted"), [(None, 0.9), (0.9, None)])
def test_a_checkpoint_with_or_without_an_average_is_not_taken_for_the_other(
    saved: float | None, wanted: float | None, load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    trained(load_policy(trainable=True), ModelSettings(), saved, steps=1).save(tmp_path, 1)
    with pytest.raises(MedbridgeError, match="holds a moving average" if saved else "lacks the moving average"):
        trained(load_policy(trainable=True), ModelSettings(), wanted).restore(tmp_path)


def test_averages_of_other_parameters_are_refused() -> None:
    ema = Ema(parameters(0), 0.9)
    for other in ({}, {**ema.averages, "matrix": torch.zeros(7, 5)}, {**ema.averages, "bias": torch.zeros(3).half()}):
        with pytest.raises(MedbridgeError, match="other parameters"):
            ema.load(other)
