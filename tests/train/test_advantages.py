"""Advantages of the best of k: against all subsets, and against the exact gradient; when k is what."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from medbridge.errors import MedbridgeError
from medbridge.train import RlSettings
from medbridge.train.advantages import advantages, differ
from medbridge_kernels import LossConfig, group_advantages

GRPO, DR_GRPO = LossConfig.preset("grpo"), LossConfig.preset("dr_grpo")
SIZES = (4, 7, 2, 5)
BINARY = (1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 0)
REAL = (1.1, 0.1, 0.0, 0.1, 1.6, 1.1, 1.1, 0.1, 0.0, 1.0, 0.3, -2.0, 1.1, 0.0, 0.0, 0.1, 0.0, 7.0)


def split(flat: Any, sizes: tuple[int, ...]) -> list[list[float]]:
    entries = iter(flat)
    return [[float(next(entries)) for _ in range(size)] for size in sizes]


def offsets(sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(np.cumsum([0, *sizes]))


def pkpo_by_subsets(group: list[float], k: int) -> list[float]:
    weights = []
    for at, own in enumerate(group):
        others = [value for number, value in enumerate(group) if number != at]
        gains = [max(own, *best) - max(best) for best in itertools.combinations(others, k - 1)]
        weights.append(k * float(np.mean(gains)))
    return weights


def pass_at_k_by_subsets(group: list[float], k: int) -> list[float]:
    subsets = list(itertools.combinations(range(len(group)), k))
    best = [max(group[at] for at in subset) for subset in subsets]
    mean, deviation = np.mean(best), np.std(best)
    own = [np.mean([b for b, subset in zip(best, subsets, strict=True) if at in subset]) for at in range(len(group))]
    return [0.0 if deviation == 0 else float((value - mean) / deviation) for value in own]


@pytest.mark.parametrize("rewards", [BINARY, REAL], ids=["binary", "real"])
@pytest.mark.parametrize(("algorithm", "k"), [("pkpo", 2), ("pass_at_k", 2), ("pkpo", 3), ("pass_at_k", 4)])
def test_groups_of_any_size_are_as_all_their_subsets(algorithm: Any, k: int, rewards: tuple[float, ...]) -> None:
    sizes = tuple(size for size in SIZES if size >= k)
    groups = [group for group in split(rewards, SIZES) if len(group) >= k]
    by_hand = {"pkpo": pkpo_by_subsets, "pass_at_k": pass_at_k_by_subsets}[algorithm]
    flat = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    found = advantages(algorithm, flat, offsets(sizes), k=k, config=GRPO)
    expected = [value for group in groups for value in by_hand(group, k)]
    assert max(map(abs, expected)) > 0.4
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("rewards", "k"), [((1.0, 0.0, 0.0), 2), ((1.0, 0.1, 0.0), 3), ((1.1, 0.5, -1.0), 2)])
def test_pkpo_is_the_gradient_of_the_best_of_k(rewards: tuple[float, ...], k: int) -> None:
    """Exactly: over all draws of n from a policy over three answers, its mean is d E[best of k] / d logits."""
    n, logits = 4, torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64, requires_grad=True)
    probabilities = logits.softmax(-1)
    best = torch.stack(
        [
            torch.stack([probabilities[at] for at in draw]).prod() * max(rewards[at] for at in draw)
            for draw in itertools.product(range(3), repeat=k)
        ]
    ).sum()
    [exact] = torch.autograd.grad(best, logits)
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=n):
        drawn = torch.tensor([rewards[at] for at in draw], dtype=torch.float64)
        credit = advantages("pkpo", drawn, torch.tensor([0, n]), k=k, config=DR_GRPO)
        score = torch.eye(3, dtype=torch.float64)[list(draw)] - probabilities.detach()  # gradient of log p
        chance = probabilities.detach()[list(draw)].prod()
        mean += chance * (credit[:, None] * score).sum(0) / n
    torch.testing.assert_close(mean, exact, atol=1e-12, rtol=1e-9)
    assert float(exact.abs().max()) > 0.05


@pytest.mark.parametrize("algorithm", ["pkpo", "pass_at_k"])
@pytest.mark.parametrize("config", [GRPO, DR_GRPO])
def test_at_k_1_it_is_the_advantage_of_the_group(algorithm: Any, config: LossConfig) -> None:
    rewards = torch.tensor(REAL)
    found = advantages(algorithm, rewards, offsets(SIZES), k=1, config=config)
    assert torch.equal(found, group_advantages(rewards, offsets(SIZES), **config.advantage_options()))
    assert torch.equal(found, advantages("group", rewards, offsets(SIZES), k=1, config=config))


@pytest.mark.parametrize("algorithm", ["group", "pkpo", "pass_at_k"])
def test_groups_that_differ_are_those_with_an_advantage(algorithm: Any) -> None:
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        size = int(generator.integers(2, 7))
        k = 1 if algorithm == "group" else int(generator.integers(1, size + 1))
        group = generator.choice([0.0, 0.1, 1.0, 1.1], size).tolist()
        found = advantages(algorithm, torch.tensor(group), torch.tensor([0, size]), k=k, config=GRPO)
        assert bool(found.any()) == differ(algorithm, group, k), (algorithm, k, group)
        seen.add((bool(found.any()), max(group) > min(group)))
    assert (True, True) in seen and (False, False) in seen
    assert ((False, True) in seen) == (algorithm != "group")  # too many are right for the best of k to be wrong


def test_no_groups_and_groups_that_are_too_small() -> None:
    nothing = advantages("pkpo", torch.tensor([]), torch.tensor([0]), k=3, config=DR_GRPO)
    assert nothing.shape == (0,)
    with pytest.raises(ValueError, match="a group has 2 completions, too few for the best of 3"):
        advantages("pass_at_k", torch.tensor(BINARY).float(), offsets(SIZES), k=3, config=GRPO)


# -- which k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "steps", "first", "expected"),
    [
        (0.5, 12, 4, [4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1]),
        (1.0, 6, 4, [4, 4, 3, 3, 2, 2]),
        (None, 4, 3, [3, 3, 3, 3]),
        (0.5, 4, 8, [8, 5, 1, 1]),  # fewer steps than values of k
        (0.1, 4, 8, [1, 1, 1, 1]),
        (0.5, 4, 1, [1, 1, 1, 1]),
    ],
)
def test_k_comes_down_to_1_over_its_share_of_the_steps(
    share: float | None, steps: int, first: int, expected: list[int]
) -> None:
    settings = RlSettings(advantage="pass_at_k", completions=16, anneal_share=share, steps=steps)
    assert [settings.k_at(step, first) for step in range(1, steps + 1)] == expected


def test_the_first_k_is_the_diagnosed_one_unless_it_is_set() -> None:
    said: list[str] = []
    assert RlSettings().first_k(16, said.append) == 1
    assert RlSettings(advantage="pass_at_k", pass_k=4).first_k(8, said.append) == 4
    diagnosed = RlSettings(advantage="pass_at_k")
    assert diagnosed.first_k(4, said.append) == 4 and diagnosed.first_k(1, said.append) == 1
    assert said == []
    assert diagnosed.first_k(16, said.append) == 7
    assert RlSettings(advantage="pkpo", loss="dr_grpo").first_k(16, said.append) == 8
    assert [
        text for text in said if re.search(r"diagnosed k is 16, .* 8 completions .* takes [78] at most", text)
    ] == said
    assert len(said) == 2
    with pytest.raises(MedbridgeError, match=r"no diagnosis has named a k.*diagnose.*number from 2 to 7"):
        diagnosed.first_k(None, said.append)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage": "pkpo"}, "loss grpo divides by the group's standard deviation. Set loss to dr_grpo"),
        ({"advantage": "pkpo", "loss": "gspo"}, "or advantage to pass_at_k"),
        ({"advantage": "pass_at_k", "loss": "dr_grpo"}, "meant not to. Set advantage to pkpo"),
        ({"advantage": "pass_at_k", "pass_k": 8}, "pass_k is 8, .* takes 2 to 7"),
        ({"advantage": "pkpo", "loss": "dr_grpo", "pass_k": 9}, "pass_k is 9, .* takes 2 to 8"),
        ({"advantage": "pass_at_k", "pass_k": 1}, "takes 2 to 7"),
        ({"advantage": "pass_at_k", "completions": 2}, "at least 3 completions"),
        ({"pass_k": 4}, "pass_k is 4, and isn't read: advantage is group"),
        ({"anneal_share": None}, "anneal_share is None, and isn't read"),
        ({"kl_reference": "ema"}, "kl_reference is ema, and isn't read: kl_coefficient is 0"),
        ({"consistency_margin": 0.1}, "isn't read: consistency_weight is 0"),
        ({"ema_decay": 0.9}, "ema_decay is 0.9, and isn't read: neither"),
        ({"ema_every": 10, "kl_coefficient": 0.1}, "ema_every is 10, and isn't read"),
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RlSettings(**settings)


def test_settings_written_out_in_full_are_taken_again() -> None:
    for settings in (
        RlSettings(),
        RlSettings(advantage="pkpo", loss="dr_grpo", pass_k=8),
        RlSettings(consistency_weight=0.5, ema_every=10),
        RlSettings(kl_coefficient=0.1, kl_reference="ema", ema_decay=0.9),
    ):
        assert RlSettings.model_validate(settings.model_dump(mode="json")) == settings
