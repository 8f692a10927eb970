"""The loss's configuration: presets, the values it refuses, and its passage through an operator as a string."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from medbridge_kernels import PRESETS, LossConfig
from medbridge_kernels.config import config_of


def test_presets() -> None:
    assert list(PRESETS) == ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo"]
    assert LossConfig.preset("grpo") == LossConfig()
    assert LossConfig.preset("bnpo").normalize == "tokens"
    assert LossConfig.preset("dapo").clip_high == 0.28
    assert LossConfig.preset("dr_grpo").normalize == "constant"
    assert LossConfig.preset("dr_grpo").advantage_options() == {"baseline": "mean", "scale": "none"}
    assert LossConfig.preset("gspo").ratio_level == "sequence"
    assert LossConfig.preset("cispo").surrogate == "cispo"
    assert LossConfig.preset("sapo").surrogate == "sapo"
    assert LossConfig.preset("dapo", clip_high=0.4, kl_coef=0.1) == LossConfig(
        normalize="tokens", clip_high=0.4, kl_coef=0.1
    )
    with pytest.raises(ValueError, match="unknown preset 'ppo', must be one of grpo, bnpo, dr_grpo, dapo"):
        LossConfig.preset("ppo")


@pytest.mark.parametrize(
    "wrong",
    [
        {"surrogate": "ppo"},
        {"ratio_level": "group"},
        {"clip_low": -0.1},
        {"clip_low": 1.5},
        {"clip_low": math.nan},
        {"clip_high": -0.1},
        {"clip_high": math.nan},
        {"surrogate": "cispo", "clip_high": -1.0},
        {"surrogate": "cispo", "clip_low": 0.1, "clip_high": -0.2},
        {"delta": 1.1},
        {"delta": 1.2},
        {"delta": math.nan},
        {"surrogate": "sapo", "sapo_temperature_positive": 0.0},
        {"surrogate": "sapo", "sapo_temperature_negative": -1.0},
        {"kl_coef": -1.0},
        {"kl_coef": math.nan},
        {"kl_coef": math.inf},
        {"kl_estimator": "k4"},
        {"entropy_coef": math.nan},
        {"entropy_coef": math.inf},
        {"correction": "clip"},
        {"correction": "mask", "correction_level": "group"},
        {"correction": "mask", "correction_cap": 0.0},
        {"correction": "mask", "correction_cap": math.nan},
        {"correction": "truncate", "correction_floor": -0.1},
        {"correction": "truncate", "correction_floor": 2.0},
        {"off_policy_threshold": -0.1},
        {"off_policy_threshold": math.nan},
        {"normalize": "batch"},
        {"baseline": "median"},
        {"scale": "mad"},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} = "):
        LossConfig(**wrong)


UNREAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"surrogate": surrogate}, {"delta": 2.0}) for surrogate in ("cispo", "sapo")),
    *(
        ({"surrogate": surrogate}, {name: 0.5})
        for surrogate in ("clip", "cispo")
        for name in ("sapo_temperature_positive", "sapo_temperature_negative")
    ),
    *(
        ({}, change)
        for change in ({"correction_level": "sequence"}, {"correction_cap": 3.0}, {"correction_floor": 0.1})
    ),
]


@pytest.mark.parametrize(("config", "unread"), UNREAD)
def test_what_would_not_be_read_is_refused(config: dict[str, Any], unread: dict[str, Any]) -> None:
    LossConfig(**config)
    (name,) = unread
    with pytest.raises(ValueError, match=f"{name} = .* isn't read with (surrogate|correction) = "):
        LossConfig(**config, **unread)


@pytest.mark.parametrize(
    "config",
    [
        *map(LossConfig.preset, PRESETS),
        LossConfig(clip_high=math.inf),
        LossConfig(delta=math.inf, kl_coef=1, entropy_coef=-0.1),
        LossConfig(correction="truncate", correction_cap=math.inf, correction_floor=1 / 3, off_policy_threshold=0.1),
    ],
)
def test_passes_through_a_string(config: LossConfig) -> None:
    assert config_of(config.key) == config


def test_is_frozen_and_a_key_of_dictionaries() -> None:
    config = LossConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kl_coef = 0.1  # type: ignore[misc]
    assert {config: 1}[LossConfig()] == 1
    assert dataclasses.replace(config, kl_coef=0.1) == LossConfig(kl_coef=0.1)
    assert dataclasses.replace(config, kl_coef=0.1).key != config.key
