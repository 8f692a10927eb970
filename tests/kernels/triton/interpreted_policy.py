"""The policy terms in Triton's interpreter, against the reference in float64 with its error in float32 as budget."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge_kernels import PRESETS, LossConfig, ops, reference
from medbridge_kernels.reference import PolicyInputs
from medbridge_kernels.triton import policy_terms
from medbridge_kernels.triton.launch import LAUNCHES, Launch

NAN, INF = float("nan"), float("inf")
EPS = torch.finfo(torch.float32).eps
OPTIONS: dict[str, tuple[Any, ...]] = {
    "surrogate": ("clip", "cispo", "sapo"),
    "delta": (None, 1.5),
    "ratio_level": ("token", "sequence"),
    "kl": ("none", "k1", "k2", "k3", "corrected"),
    "entropy_coef": (0.0, 0.02),
    "correction": ("none", "truncate", "mask"),
    "correction_level": ("token", "sequence"),
    "off_policy_threshold": (None, 0.1),
    "normalize": ("tokens", "sequences", "constant"),
    "normalizer": (None, "number", "tensor"),
    "old": (True, False),
    "ref": (True, False),
    "rollout": (True, False),
    "mask": (True, False),
    "per_token": (True, False),
}


def is_allowed(option: dict[str, Any]) -> bool:
    """The others raise, in `LossConfig` or in `grpo_loss`."""
    return not (
        (option["delta"] is not None and option["surrogate"] != "clip")
        or (option["kl"] != "none" and not option["ref"])
        or (option["correction"] != "none" and not option["rollout"])
        or (option["correction"] == "none" and option["correction_level"] != "token")
        or (option["normalize"] == "constant" and option["normalizer"] is None)
    )


def pairwise() -> list[dict[str, Any]]:
    """Few sets of options in which every allowed pair of two options' values is found."""
    chance = random.Random(0)
    pairs = [
        {a: x, b: y}
        for a, b in itertools.combinations(OPTIONS, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
    ]
    chosen: list[dict[str, Any]] = []
    for pair in pairs:
        if any(pair.items() <= option.items() for option in chosen):
            continue
        for _ in range(500):
            option = {name: chance.choice(values) for name, values in OPTIONS.items()} | pair
            if is_allowed(option):
                chosen.append(option)
                break
        else:
            assert not any(
                is_allowed(dict(zip(OPTIONS, values, strict=True)) | pair) for values in random_options(chance)
            )
    return chosen


def random_options(chance: random.Random) -> list[list[Any]]:
    return [[chance.choice(values) for values in OPTIONS.values()] for _ in range(2_000)]


def draw(
    lengths: tuple[int, ...] = (3, 21, 1, 0, 9), per_token: bool = False, mask: bool = True, spread: float = 0.4
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = sum(lengths)
    noise = torch.randn(6, tokens, generator=generator)
    keep = torch.rand(tokens, generator=generator) < 0.8 if mask else torch.ones(tokens, dtype=torch.bool)
    logprobs = -noise[0].abs() - 0.1
    old = logprobs + spread * noise[1]
    rollout = old + spread * noise[3]
    if tokens:
        rollout[tokens // 2] = NAN  # the engine gave none
    return {
        "logprobs": logprobs.where(keep, 0.0),
        "entropy": noise[4].abs().where(keep, 0.0),
        "sequence_ids": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        "n_sequences": tokens if per_token else len(lengths),
        "advantages": torch.randn(tokens if per_token else len(lengths), generator=generator),
        "per_token": per_token,
        "old_logprobs": old,
        "ref_logprobs": logprobs + spread * noise[2],
        "rollout_logprobs": rollout,
        "keep": keep,
        "masked": mask,
    }


def ours(data: dict[str, Any], config: LossConfig, normalizer: float | Tensor | None) -> dict[str, Tensor]:
    loss, by_logprob, by_entropy, metrics = policy_terms(
        data["logprobs"], data["entropy"], data["sequence_ids"], data["n_sequences"], data["advantages"],
        data["per_token"], data["old_logprobs"], data["ref_logprobs"], data["rollout_logprobs"],
        data["keep"] if data["masked"] else None, normalizer, config,
    )  # fmt: skip
    names = ops.metric_names(config, data["ref_logprobs"] is not None, data["rollout_logprobs"] is not None)
    found = {"loss": loss, "by_logprob": by_logprob, **dict(zip(names, metrics, strict=True))}
    assert by_entropy.numel() == (len(by_logprob) if config.entropy_coef else 0)
    return found | ({"by_entropy": by_entropy} if config.entropy_coef else {})


def references(
    data: dict[str, Any], config: LossConfig, normalizer: float | Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    def cast(name: str) -> Any:
        return None if data[name] is None else data[name].to(dtype)

    logprobs, entropy = (cast(name).clone().requires_grad_() for name in ("logprobs", "entropy"))
    inputs = PolicyInputs(
        data["sequence_ids"], data["n_sequences"], cast("advantages"), data["per_token"], cast("old_logprobs"),
        cast("ref_logprobs"), cast("rollout_logprobs"), data["keep"],
    )  # fmt: skip
    loss, metrics = reference.policy_terms(logprobs, entropy, inputs, config, normalizer)
    loss.backward()
    found = {"loss": loss.detach(), "by_logprob": logprobs.grad, **metrics}
    return found | ({"by_entropy": entropy.grad} if config.entropy_coef else {})


def error_of(found: Tensor, true: Tensor) -> float:
    return (found.double() - true).abs().max().item() if true.numel() else 0.0


def check(data: dict[str, Any], config: LossConfig, normalizer: float | Tensor | None = None) -> dict[str, Tensor]:
    found = ours(data, config, normalizer)
    exact = references(data, config, normalizer, torch.float64)
    single = references(data, config, normalizer, torch.float32)
    assert found.keys() == exact.keys()
    for name, true in exact.items():
        largest = max(true.abs().max().item(), 1.0 if true.ndim == 0 else 0.0) if true.numel() else 0.0
        error, torchs = (error_of(by[name], true) for by in (found, single))
        # A handful of numbers may flatter torch: no budget is below the rounding of a sum's largest terms.
        assert error <= max(2 * torchs, 4 * EPS * largest), f"{name}: error {error}, torch's {torchs}, {config}"
    return found


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for few tokens and few sequences."""
    if "shipped_tiles" not in request.fixturenames:
        monkeypatch.setitem(LAUNCHES, ("policy_terms", 4), Launch(8, 32))
        monkeypatch.setitem(LAUNCHES, ("policy_sums", 4), Launch(2, 32))


@pytest.fixture
def shipped_tiles() -> None:
    """Leaves the tiles as they are."""


@pytest.mark.parametrize("option", pairwise(), ids=lambda option: "-".join(str(value) for value in option.values()))
def test_every_pair_of_options(option: dict[str, Any]) -> None:
    data = draw(per_token=option["per_token"], mask=option["mask"], lengths=(3, 11, 1, 0, 5))
    for name in ("old", "ref", "rollout"):
        if not option[name]:
            data[f"{name}_logprobs"] = None
    config = LossConfig(
        surrogate=option["surrogate"],
        delta=option["delta"],
        ratio_level=option["ratio_level"],
        kl_coef=0.0 if option["kl"] == "none" else 0.1,
        kl_estimator="k3" if option["kl"] in ("none", "corrected") else option["kl"],
        kl_bias_correction=option["kl"] == "corrected",
        entropy_coef=option["entropy_coef"],
        correction=option["correction"],
        correction_level=option["correction_level"],
        correction_cap=1.2 if option["correction"] != "none" else 2.0,
        correction_floor=0.6 if option["correction"] != "none" else 0.0,
        off_policy_threshold=option["off_policy_threshold"],
        normalize=option["normalize"],
    )
    normalizer = {None: None, "number": 7.0, "tensor": torch.tensor(7)}[option["normalizer"]]
    check(data, config, normalizer)


def test_the_pairs_are_all_there() -> None:
    chosen = pairwise()
    assert all(is_allowed(option) for option in chosen)
    assert any(option["surrogate"] == "sapo" and option["correction_level"] == "sequence" for option in chosen)
    assert any(option["delta"] and option["per_token"] for option in chosen)


@pytest.mark.usefixtures("shipped_tiles")
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_with_sequences_longer_than_a_tile(preset: str) -> None:
    config = LossConfig.preset(preset, kl_coef=0.05, entropy_coef=0.01, correction="truncate")
    check(draw((700, 2, 513, 40)), config, 900.0 if config.normalize == "constant" else None)


def test_dtypes_of_the_inputs() -> None:
    data = draw()
    config = LossConfig(kl_coef=0.1, correction="mask")
    expected = ours(data, config, None)
    for name in ("advantages", "old_logprobs", "ref_logprobs"):
        found = ours(data | {name: data[name].double()}, config, torch.tensor(5.0, dtype=torch.float64))
        assert torch.equal(found["ratio_max"], expected["ratio_max"])
    half = {name: data[name].bfloat16() for name in ("advantages", "old_logprobs", "rollout_logprobs")}
    check(data | {name: value.float() for name, value in half.items()}, config)
    exact = ours(data | {name: value.float() for name, value in half.items()}, config, None)
    assert torch.equal(ours(data | half, config, None)["by_logprob"], exact["by_logprob"])


def test_nothing_outside_the_mask_is_read() -> None:
    data = draw()
    config = LossConfig(
        ratio_level="sequence", kl_coef=0.1, entropy_coef=0.1, correction="mask", off_policy_threshold=0.1
    )
    expected = ours(data, config, None)
    names = ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    poisoned = {name: data[name].where(data["keep"], NAN) for name in names}
    found = ours(data | poisoned, config, None)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    assert found["by_logprob"][~data["keep"]].count_nonzero() == 0
    assert found["by_entropy"][~data["keep"]].count_nonzero() == 0


@pytest.mark.parametrize("lengths", [(), (0, 0), (4, 3)])
def test_no_tokens_and_all_masked(lengths: tuple[int, ...]) -> None:
    data = draw(lengths)
    data["keep"] = torch.zeros_like(data["keep"])
    data |= {"logprobs": data["logprobs"] * 0, "entropy": data["entropy"] * 0}
    for config in (LossConfig(kl_coef=0.1), LossConfig.preset("gspo", entropy_coef=0.1), LossConfig.preset("bnpo")):
        found = check(data, config)
        assert found["loss"] == 0 and all(value.count_nonzero() == 0 for value in found.values())


def test_without_old_logprobs_the_ratio_is_1() -> None:
    data = draw() | {"old_logprobs": None, "rollout_logprobs": None}
    found = check(data, LossConfig(off_policy_threshold=0.0))
    assert found["ratio_max"] == 1 and found["effective_sample_size"] == 1 and found["off_policy"] == 0


def test_the_off_policy_mask_leaves_out_what_is_drawn_away_from_alone() -> None:
    data = draw((4, 4, 4), mask=False) | {"advantages": torch.tensor([-1.0, 0.0, 1.0])}
    data["rollout_logprobs"] = data["logprobs"] + 0.5
    found = check(data, LossConfig(off_policy_threshold=0.4))
    torch.testing.assert_close(found["off_policy"], torch.tensor(1 / 3))
    assert found["by_logprob"][:4].count_nonzero() == 0 and (found["by_logprob"][8:] != 0).any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_that_overflow(level: str) -> None:
    data = draw((4, 5), spread=0.1)
    data["keep"] = torch.ones(9, dtype=torch.bool)
    data["old_logprobs"][1] -= 1e3
    data["rollout_logprobs"][6] -= 1e3
    data["advantages"] = torch.tensor([1.0, -1.0])
    config = LossConfig(ratio_level=level, correction="mask", correction_level=level)
    found, expected = ours(data, config, None), references(data, config, None, torch.float32)
    torch.testing.assert_close(found["loss"], expected["loss"])
    assert found["ratio_max"] == expected["ratio_max"] == INF
    # Torch multiplies the clip's 0 with the infinite ratio; a token that is clipped has the gradient 0.
    clipped = expected["by_logprob"].isnan()
    assert clipped.any() and found["by_logprob"][clipped].count_nonzero() == 0
    torch.testing.assert_close(found["by_logprob"][~clipped], expected["by_logprob"][~clipped])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("distance", [1e-6, 1e-3, 0.3, 0.999, 1.001, 5.0, 30.0])
def test_kl_near_and_far(estimator: str, distance: float) -> None:
    data = draw((6, 6), mask=False)
    data["ref_logprobs"] = data["logprobs"] + distance * torch.tensor([1.0, -1.0] * 6)
    found = check(data, LossConfig(kl_coef=1.0, kl_estimator=estimator))
    if estimator == "k3":
        d = data["logprobs"].double() - data["ref_logprobs"].double()
        torch.testing.assert_close(found["kl"].double(), (torch.expm1(-d) + d).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("which", ["logprobs", "old_logprobs", "ref_logprobs", "advantages"])
def test_a_nan_is_seen(which: str) -> None:
    data = draw(mask=False)
    data[which] = data[which].clone()
    data[which][1] = NAN
    config = LossConfig(kl_coef=0.1)
    found, expected = ours(data, config, None), references(data, config, None, torch.float32)
    assert found["loss"].isnan()
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


@pytest.mark.parametrize("ids", [[-1, 0, 1, 1], [0, 0, 1, 2], [0, 0, 2**40, 2**40]])
def test_tokens_of_no_sequence_make_the_loss_nan(ids: list[int]) -> None:
    data = draw((2, 2), mask=False) | {"sequence_ids": torch.tensor(ids)}
    found = ours(data, LossConfig(), None)
    stray = torch.tensor([not 0 <= one < 2 for one in ids])
    assert found["loss"].isnan() and torch.equal(found["by_logprob"].isnan(), stray)


def test_any_sequence_ids_stay_within_the_tokens() -> None:
    ids = torch.tensor([5, 0, -3, 1, 1, 0, 9, 1])
    data = draw((4, 4), mask=False) | {"sequence_ids": ids}
    ours(data, LossConfig.preset("gspo"), None)


def test_sequences_without_tokens_between_many() -> None:
    lengths = tuple([0, 3, 0, 0, 1] * 5)
    check(draw(lengths), LossConfig.preset("gspo", kl_coef=0.1))


def test_twice_gives_the_same_bits() -> None:
    data, config = draw(), LossConfig.preset("gspo", kl_coef=0.1, entropy_coef=0.1, correction="truncate")
    first = ours(data, config, None)
    for name, value in ours(data, config, None).items():
        assert torch.equal(value, first[name])
