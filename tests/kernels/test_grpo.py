"""The GRPO loss: the reference against a naive loop over tokens with gradients by finite differences, and the native
back end against the reference in float64, at most twice as wrong as the reference in its own dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medbridge_kernels import LossConfig, group_advantages, grpo_loss, token_logprobs
from tests.kernels.conftest import (
    CASES,
    FAST_DTYPES,
    IMPLS,
    LEVELS,
    NORMALIZE,
    OPTIONS,
    VARIANTS,
    Errors,
    arguments,
    batch,
    configured,
    exact_advantages,
    is_allowed,
    log_softmax,
    offsets_of,
    packed_ids,
)

pytestmark = pytest.mark.usefixtures("poisoned")
WIDE = 150  # a vocabulary of whole blocks of vectors, single vectors, and a part of one


def gradient_of(data: dict[str, Any], config: LossConfig, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Loss, gradient of the logits, and outputs."""
    logits = data["logits"].detach().clone().requires_grad_()
    loss, outputs = grpo_loss(**{**data, "logits": logits}, config=config, **options)
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == logits.dtype
    return loss.detach(), logits.grad, outputs


def in_float64(data: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in data.items()
    }


# --- the definition: one token at a time ---


def distributions(logits: list[list[float]], data: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Log-probability and entropy of each token."""
    temperature = data["temperature"]
    per_token = temperature.tolist() if isinstance(temperature, Tensor) else [temperature] * len(logits)
    logprobs, entropies = [], []
    for row, token, tau in zip(logits, data["token_ids"].tolist(), per_token, strict=True):
        z = [value / tau for value in row]
        top = max(z)
        log_sum = top + math.log(math.fsum(math.exp(value - top) for value in z))
        logprobs.append(z[token] - log_sum)
        entropies.append(-math.fsum(math.exp(value - log_sum) * (value - log_sum) for value in z))
    return logprobs, entropies


def naive(
    data: dict[str, Any],
    config: LossConfig,
    logprobs: list[float],
    entropies: list[float],
    still: list[float],
) -> tuple[float, dict[str, float]]:
    """Loss and metrics by the formulas of the papers, with nothing of torch but its numbers.

    `still` are the log-probabilities where the definitions stop the gradient.
    """
    tokens = len(logprobs)
    sequence = data["sequence_ids"].tolist()
    mask = [True] * tokens if data["mask"] is None else data["mask"].tolist()
    kept = [t for t in range(tokens) if mask[t]]
    members = {s: [t for t in kept if sequence[t] == s] for s in sequence}
    if "rewards" in data:
        bounds = data["group_offsets"].tolist()
        groups = [data["rewards"].tolist()[a:b] for a, b in itertools.pairwise(bounds)]
        of_sequence = exact_advantages(groups, config.baseline, config.scale)
        n_sequences = len(of_sequence)
        advantage = [of_sequence[s] for s in sequence]
    elif data.get("advantage_level") == "token":
        advantage, n_sequences = data["advantages"].tolist(), len(set(sequence))
    else:
        of_sequence = data["advantages"].tolist()
        advantage, n_sequences = [of_sequence[s] for s in sequence], len(of_sequence)
    old = still if data["old_logprobs"] is None else data["old_logprobs"].tolist()
    low, high = 1 - config.clip_low, 1 + config.clip_high

    def mean(values: Callable[[int], float], t: int) -> float:
        return sum(values(k) for k in members[sequence[t]]) / len(members[sequence[t]])

    def ratio(current: list[float], t: int) -> float:
        if config.ratio_level == "token":
            return math.exp(current[t] - old[t])
        return math.exp(mean(lambda k: current[k] - old[k], t))

    def clip(value: float, least: float, most: float) -> float:
        return min(max(value, least), most)

    def surrogate(t: int) -> float:
        a, r = advantage[t], ratio(logprobs, t)
        if config.surrogate == "cispo":
            return -clip(ratio(still, t), low, high) * a * logprobs[t]
        if config.surrogate == "sapo":
            tau = config.sapo_temperature_positive if a > 0 else config.sapo_temperature_negative
            return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
        return -min((r if config.delta is None else min(r, config.delta)) * a, clip(r, low, high) * a)

    rollout = None if data["rollout_logprobs"] is None else data["rollout_logprobs"].tolist()

    def gap(t: int) -> float:
        assert rollout is not None
        return 0.0 if math.isnan(rollout[t]) else old[t] - rollout[t]

    def correction(t: int) -> float:
        if config.correction_level == "token":
            return math.exp(gap(t))
        return math.exp(sum(gap(k) for k in members[sequence[t]]))

    def weight_of(q: float) -> float:
        if config.correction == "truncate":
            return clip(q, config.correction_floor, config.correction_cap)
        return q if config.correction_floor <= q <= config.correction_cap else 0.0

    def is_off_policy(t: int) -> bool:
        if config.off_policy_threshold is None or (rollout is None and data["old_logprobs"] is None):
            return False
        sampled = old if rollout is None else rollout
        drift = mean(lambda k: 0.0 if math.isnan(sampled[k]) else sampled[k] - still[k], t)
        return advantage[t] < 0 and drift > config.off_policy_threshold

    def divergence(t: int) -> float:
        d = logprobs[t] - float(data["ref_logprobs"][t])
        return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[config.kl_estimator]

    total = 0.0
    for t in kept:
        term = surrogate(t)
        if config.correction != "none":
            term *= weight_of(correction(t))
        term *= not is_off_policy(t)
        if config.kl_coef:
            term += config.kl_coef * divergence(t) * (ratio(logprobs, t) if config.kl_bias_correction else 1.0)
        term -= config.entropy_coef * entropies[t]
        total += term / (len(members[sequence[t]]) if config.normalize == "sequences" else 1)
    counts = {"tokens": max(1, len(kept)), "sequences": n_sequences, "constant": math.nan}
    normalizer = counts[config.normalize] if data["normalizer"] is None else float(data["normalizer"])

    def average(values: Callable[[int], float]) -> float:
        return sum(map(values, kept)) / len(kept)

    def sample_size(values: Callable[[int], float]) -> float:
        return sum(map(values, kept)) ** 2 / (len(kept) * sum(values(t) ** 2 for t in kept))

    def r(t: int) -> float:
        return ratio(still, t)

    metrics = {
        "clip_low": average(lambda t: advantage[t] < 0 and r(t) < low),
        "clip_high": average(lambda t: advantage[t] > 0 and r(t) > high),
        "ratio_mean": average(r),
        "ratio_max": max(map(r, kept)),
        "effective_sample_size": sample_size(r),
    }
    if data["ref_logprobs"] is not None:
        metrics["kl"] = average(lambda t: divergence(t) * (r(t) if config.kl_bias_correction else 1.0))
    if rollout is not None:
        metrics["rollout_ratio_mean"] = average(lambda t: math.exp(gap(t)))
        metrics["rollout_ratio_max"] = max(math.exp(gap(t)) for t in kept)
        metrics["rollout_effective_sample_size"] = sample_size(lambda t: math.exp(gap(t)))
        metrics["rollout_kl"] = average(lambda t: math.exp(gap(t)) - 1 - gap(t))
    if config.correction != "none":
        metrics["corrected"] = average(lambda t: not config.correction_floor <= correction(t) <= config.correction_cap)
    if config.off_policy_threshold is not None:
        metrics["off_policy"] = average(is_off_policy)
    return total / normalizer, metrics


def naive_gradient(data: dict[str, Any], config: LossConfig) -> Tensor:
    """d loss / d logits by central differences."""
    logits = data["logits"].tolist()
    still, _ = distributions(logits, data)
    step = 1e-5
    gradient = torch.zeros(data["logits"].shape, dtype=torch.float64)
    for t, j in itertools.product(range(len(logits)), range(len(logits[0]))):
        at = logits[t][j]
        for sign in (1, -1):
            logits[t][j] = at + sign * step
            loss, _ = naive(data, config, *distributions(logits, data), still)
            gradient[t, j] += sign * loss / (2 * step)
        logits[t][j] = at
    return gradient


choices = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}).filter(is_allowed)
variants = st.builds(
    lambda surrogate, level, normalize: {**surrogate, "ratio_level": level, "normalize": normalize},
    st.sampled_from(list(VARIANTS.values())),
    st.sampled_from(LEVELS),
    st.sampled_from(NORMALIZE),
)


@settings(max_examples=150, deadline=None, derandomize=True)  # a kink of the loss may lie within the step
@given(choices, variants, st.integers(0, 1000))
def test_reference_is_the_naive_loop(choice: dict[str, Any], variant: dict[str, Any], seed: int) -> None:
    config = configured(choice, **variant)
    data = arguments(choice, config, batch(seed, lengths=(2, 1, 3), vocab=3), seed)
    loss, gradient, outputs = gradient_of(data, config, impl="reference")
    logprobs, entropies = distributions(data["logits"].tolist(), data)
    expected, metrics = naive(data, config, logprobs, entropies, logprobs)
    assert float(loss) == pytest.approx(expected, rel=1e-11, abs=1e-12)
    torch.testing.assert_close(gradient, naive_gradient(data, config), rtol=1e-6, atol=1e-9)
    keep = torch.ones(len(logprobs)) if data["mask"] is None else data["mask"]
    torch.testing.assert_close(outputs.logprobs, torch.tensor(logprobs, dtype=torch.float64) * keep)
    torch.testing.assert_close(outputs.entropy, torch.tensor(entropies, dtype=torch.float64) * keep)
    assert list(outputs.metrics) == list(metrics)
    for name, value in metrics.items():
        assert float(outputs.metrics[name]) == pytest.approx(value, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize("variant", ["clip", "delta", "sapo"])  # cispo stops the gradient of its ratio
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(variant: str, level: str) -> None:
    for place, choice in enumerate(CASES[::2]):
        # without old log-probabilities the ratio is 1 whatever the logits
        config = configured(choice, **VARIANTS[variant], ratio_level=level, normalize=NORMALIZE[place % len(NORMALIZE)])
        data = arguments({**choice, "old": "given"}, config, batch(place, lengths=(2, 0, 2), vocab=3), place)
        logits = data.pop("logits").requires_grad_()
        assert torch.autograd.gradcheck(lambda z: grpo_loss(z, **data, config=config)[0], (logits,))  # noqa: B023


# --- the native back end ---


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_within_twice_the_error_of_torch(variant: str, level: str, dtype: torch.dtype) -> None:
    errors = Errors()
    for place, (choice, normalize) in enumerate(itertools.product(CASES, NORMALIZE)):
        config = configured(choice, **VARIANTS[variant], ratio_level=level, normalize=normalize)
        data = arguments(choice, config, batch(place, (4, 1, 6, 0, 2), WIDE, dtype), place)
        exact = gradient_of(in_float64(data), config, impl="reference")
        ours, theirs = (gradient_of(data, config, impl=impl) for impl in ("native", "reference"))
        errors.add("loss", ours[0], theirs[0], exact[0])
        errors.add("gradient", ours[1], theirs[1], exact[1])
        for name in ("logprobs", "entropy"):
            errors.add(name, *(getattr(found[2], name) for found in (ours, theirs, exact)))
        assert list(ours[2].metrics) == list(exact[2].metrics)
        for name, value in exact[2].metrics.items():
            assert float(ours[2].metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    errors.check()


def assert_within_budget(data: dict[str, Any], config: LossConfig) -> None:
    """Largest errors. Few results may flatter torch: no budget is below the rounding of the log-sum-exp."""
    exact = gradient_of(in_float64(data), config, impl="reference")
    ours, theirs = (gradient_of(data, config, impl=impl) for impl in ("native", "reference"))
    lse = torch.logsumexp(data["logits"].double() / data["temperature"], dim=-1)
    rounding = torch.finfo(torch.float32).eps * max(1.0, float(lse.abs().max()))
    size = float(exact[1].abs().max())
    results = [(one[0], one[1], one[2].logprobs, one[2].entropy) for one in (ours, theirs, exact)]
    for place, least in enumerate((rounding, rounding * size, rounding, rounding)):
        mine, torchs, true = (one[place].double() for one in results)
        assert mine.isfinite().all() and mine.shape == true.shape
        budget = max(2 * float((torchs - true).abs().max()), least)
        assert float((mine - true).abs().max()) <= budget, place


FULL = LossConfig(kl_coef=0.1, entropy_coef=0.05, normalize="tokens")


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 123, 50_257, 151_936, 151_937])
def test_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    assert_within_budget(batch(vocab, (2, 1), vocab, dtype), FULL)


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("kind", ["peaked", "constant", "shifted", "ruled out", "all but one ruled out"])
def test_kinds_of_logits(kind: str, dtype: torch.dtype) -> None:
    data = batch(1, (4, 4), WIDE, torch.float32)
    rows, ids = torch.arange(8), data["token_ids"]
    logits = data["logits"]
    if kind == "peaked":
        logits[rows, ids.where(rows % 2 == 0, 3)] = 40.0
    elif kind == "constant":
        logits[:] = 5.5
    elif kind == "shifted":
        logits += 1000 * (-1.0) ** rows[:, None]
    elif kind == "ruled out":
        logits[:, torch.arange(WIDE) % 3 == 1] = -math.inf
        logits[rows, ids] = 1.0
    else:
        logits[:] = -math.inf
        logits[rows, ids] = 1.0
    data["logits"] = logits.to(dtype)
    # of the policies that are compared with: near the logits' own
    logprobs = log_softmax(data["logits"], 0.7)[rows, ids].float()
    data |= {"old_logprobs": logprobs + 0.1, "ref_logprobs": logprobs - 0.1}
    assert_within_budget(data, FULL)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_undefined_rows_are_nan_and_only_they(bad: float, impl: str) -> None:
    data = batch(2, (3, 3), WIDE, torch.float32) | {"mask": None}
    data["logits"][1, 77] = bad
    data["logits"][4] = -math.inf
    loss, gradient, outputs = gradient_of(data, FULL, impl=impl)
    assert loss.isnan()
    of_row = outputs.logprobs.isnan() & outputs.entropy.isnan()
    assert of_row.tolist() == [False, True, False, False, True, False]
    assert gradient.isnan().any(-1).tolist() == of_row.tolist()


# --- sizes ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_learn_from_gives_a_zero_gradient(tokens: int, normalize: str, level: str, impl: str) -> None:
    data = batch(0, (tokens,) if tokens else (), WIDE, torch.float32) | {"mask": torch.zeros(tokens, dtype=torch.bool)}
    config = LossConfig(
        normalize=normalize, ratio_level=level, kl_coef=0.1, entropy_coef=0.1, correction="mask",
        correction_level="sequence", off_policy_threshold=0.1,
    )  # fmt: skip
    for name, value in data.items():  # none of which is looked at
        if isinstance(value, Tensor) and value.is_floating_point() and name != "advantages":
            data[name] = torch.full_like(value, math.nan)
    loss, gradient, outputs = gradient_of(data, config, impl=impl)
    assert float(loss) == 0 and gradient.shape == (tokens, WIDE) and not gradient.any()
    assert all(float(value) == 0 for value in outputs.metrics.values())
    assert not outputs.logprobs.any() and not outputs.entropy.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_token(impl: str) -> None:
    data = batch(0, (1,), WIDE, torch.float32)
    loss, _, _ = gradient_of(data, LossConfig(), impl=impl)
    logprob = log_softmax(data["logits"], 0.7)[0, data["token_ids"][0]]
    ratio = float((logprob - data["old_logprobs"].double()).exp())
    advantage = float(data["advantages"])
    assert float(loss) == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage), rel=1e-5)


def test_more_rows_than_16_bits_count() -> None:
    data = batch(0, [7] * 10_000, 3, torch.float32)
    data["mask"][:] = True
    for config in (FULL, LossConfig.preset("gspo")):
        loss, gradient, outputs = gradient_of(data, config, impl="native")
        exact = gradient_of(in_float64(data), config, impl="reference")
        assert float(loss) == pytest.approx(float(exact[0]), rel=1e-4, abs=1e-7)
        assert (gradient - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max()
        torch.testing.assert_close(outputs.logprobs.double(), exact[2].logprobs, rtol=1e-5, atol=1e-6)


# --- what the loss is of ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [[1], [2], [7], [5000], [1, 2, 7, 0, 90]])
def test_rewards_in_place_of_advantages(groups: list[int], impl: str) -> None:
    sequences = sum(groups)
    data = batch(0, [1] * sequences, 5, torch.float32)
    rewards = torch.randint(3, (sequences,), generator=torch.Generator().manual_seed(1)) / 3
    rewards[0] = math.nan
    config = LossConfig(baseline="loo", scale="batch_std", normalize="tokens")
    advantages = group_advantages(rewards, offsets_of(groups), baseline="loo", scale="batch_std", impl="reference")
    expected = gradient_of(data | {"advantages": advantages}, config, impl=impl)
    del data["advantages"]
    found = gradient_of(data | {"rewards": rewards, "group_offsets": offsets_of(groups)}, config, impl=impl)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_rewards_have_no_gradient(impl: str) -> None:
    data = batch(0, [2] * 6, WIDE, torch.float32)
    del data["advantages"]
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 1 / 3])
    _, gradient, _ = gradient_of(
        data | {"rewards": rewards, "group_offsets": offsets_of([3, 2, 1])}, LossConfig(), impl=impl
    )
    assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_on_policy_gradient_is_the_policy_gradient(impl: str) -> None:
    """At ratio 1, where clipped and free terms tie, the gradient is that of -A log p."""
    data = batch(dtype=torch.float32) | {"old_logprobs": None, "ref_logprobs": None}
    for config in (LossConfig(normalize="tokens"), LossConfig(normalize="tokens", clip_low=0.0, clip_high=0.0)):
        _, found, _ = gradient_of(data, config, impl=impl)
        logits = data["logits"].double().requires_grad_()
        logprobs = token_logprobs(logits, data["token_ids"], 0.7, impl="reference")
        plain = -(logprobs * data["advantages"][data["sequence_ids"]] * data["mask"]).sum() / data["mask"].sum()
        torch.testing.assert_close(found, torch.autograd.grad(plain, logits)[0].float())


@pytest.mark.parametrize("impl", IMPLS)
def test_clipped_tokens_have_no_gradient(impl: str) -> None:
    data = batch(lengths=(4, 4), dtype=torch.float32)
    logprobs = log_softmax(data["logits"], 0.7).gather(-1, data["token_ids"][:, None])[:, 0].float()
    data |= {"mask": None, "ref_logprobs": None, "advantages": torch.tensor([1.0, -1.0])}
    data["old_logprobs"] = logprobs - torch.tensor([0.5, -0.5] * 4)  # ratio 1.65, then 0.61
    _, gradient, outputs = gradient_of(data, LossConfig(), impl=impl)
    moved = gradient.abs().sum(-1) > 0
    assert moved.tolist() == [False, True, False, True, True, False, True, False]
    assert float(outputs.metrics["clip_high"]) == float(outputs.metrics["clip_low"]) == 0.25


@pytest.mark.parametrize("impl", IMPLS)
def test_micro_batches_add_up_to_the_whole_step(impl: str) -> None:
    data = batch(lengths=(3, 5, 2, 6), dtype=torch.float32)
    for config, normalizer in (
        (LossConfig.preset("dapo"), float(data["mask"].sum())),
        (LossConfig.preset("grpo", kl_coef=0.04), torch.tensor(4)),
        (LossConfig.preset("gspo"), 4),
        (LossConfig.preset("dr_grpo"), 4 * 6.0),
    ):
        whole = gradient_of(data, config, normalizer=normalizer, impl=impl)
        parts = []
        for first in (0, 2):
            own = (data["sequence_ids"] // 2) == first // 2
            part = {name: value[own] if isinstance(value, Tensor) and name != "advantages" else value
                    for name, value in data.items()}  # fmt: skip
            part["sequence_ids"] = part["sequence_ids"] - first
            part["advantages"] = data["advantages"][first : first + 2]
            parts.append(gradient_of(part, config, normalizer=normalizer, impl=impl))
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", LEVELS)
def test_what_lies_outside_the_mask_does_not_matter(level: str, impl: str) -> None:
    data = batch(1, (5, 3), WIDE, torch.float32) | {"temperature": torch.linspace(0.5, 2, 8)}
    mask = data["mask"]
    assert mask.any() and not mask.all()
    config = LossConfig(
        ratio_level=level, kl_coef=0.1, entropy_coef=0.1, correction="truncate", correction_level="sequence",
        off_policy_threshold=0.01,
    )  # fmt: skip
    loss, gradient, outputs = gradient_of(data, config, impl=impl)
    for junk in (math.nan, math.inf, -math.inf):
        changed = {
            name: value.where(mask.view(-1, *[1] * (value.ndim - 1)), junk)
            for name, value in data.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name != "advantages"
        }
        changed["token_ids"] = data["token_ids"].where(mask, -100 if math.isnan(junk) else 1 << 40)
        found = gradient_of({**data, **changed}, config, impl=impl)
        assert found[0] == loss
        torch.testing.assert_close(found[1], gradient, rtol=0, atol=0)
        assert not found[1][~mask].any()
        torch.testing.assert_close(found[2].metrics, outputs.metrics, rtol=0, atol=0)
        for name in ("logprobs", "entropy"):
            torch.testing.assert_close(getattr(found[2], name), getattr(outputs, name), rtol=0, atol=0)
            assert not getattr(found[2], name)[~mask].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_integer_masks(impl: str) -> None:
    data = batch(dtype=torch.float32)
    expected = gradient_of(data, FULL, impl=impl)
    for dtype in (torch.int64, torch.uint8):
        found = gradient_of(data | {"mask": data["mask"].to(dtype)}, FULL, impl=impl)
        torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_advantages_per_token_number_their_sequences_anew(impl: str) -> None:
    data = batch(0, (3, 1, 4), WIDE, torch.float32)
    per_token = data | {"advantages": data["advantages"][data["sequence_ids"]], "advantage_level": "token"}
    for config in (LossConfig(), LossConfig.preset("gspo", entropy_coef=0.1)):
        expected = gradient_of(data, config, impl=impl)
        for ids in (data["sequence_ids"], torch.tensor([-7, 3, 1 << 40])[data["sequence_ids"]]):
            found = gradient_of(per_token | {"sequence_ids": ids}, config, impl=impl)
            torch.testing.assert_close(found[:2], expected[:2])


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_without_tokens_count_in_the_normalizer(impl: str) -> None:
    data = batch(0, (3, 0, 4), WIDE, torch.float32)
    loss, _, _ = gradient_of(data, LossConfig(), impl=impl)
    thrice, _, _ = gradient_of(data, LossConfig(), impl=impl, normalizer=1)
    torch.testing.assert_close(3 * loss, thrice)


# --- the graph ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_scaled_losses(entropy_coef: float, impl: str) -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    config = LossConfig(entropy_coef=entropy_coef)
    _, once, outputs = gradient_of(data, config, impl=impl)
    logits = data["logits"].requires_grad_()
    loss, _ = grpo_loss(**data, config=config, impl=impl)
    for scale in (3.0, -0.25, 0.0):
        (found,) = torch.autograd.grad(loss * scale, logits, retain_graph=True)
        torch.testing.assert_close(found, scale * once)
    (loss + 2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 3 * once)
    loss.backward()
    torch.testing.assert_close(logits.grad, 4 * once)
    assert not any(t.requires_grad for t in (outputs.logprobs, outputs.entropy, *outputs.metrics.values()))


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_of_the_same_logits_add_up(impl: str) -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    apart = [gradient_of(data, config, impl=impl)[1] for config in (FULL, LossConfig.preset("sapo"))]
    logits = data["logits"].requires_grad_()
    sum(grpo_loss(**data, config=config, impl=impl)[0] for config in (FULL, LossConfig.preset("sapo"))).backward()
    torch.testing.assert_close(logits.grad, apart[0] + apart[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_graph_without_a_gradient(impl: str) -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    loss, _ = grpo_loss(**data, config=FULL, impl=impl)
    assert not loss.requires_grad
    data["logits"].requires_grad_()
    with torch.no_grad():
        same, _ = grpo_loss(**data, config=FULL, impl=impl)
    assert not same.requires_grad
    assert float(same) == pytest.approx(float(loss), rel=1e-6)


def test_the_gradient_of_the_gradient_is_refused() -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    logits = data["logits"].requires_grad_()
    loss, _ = grpo_loss(**data, config=FULL, impl="native")
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_given_beside_the_logits_has_no_gradient(impl: str) -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    data["logits"].requires_grad_()
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages"):
        data[name].requires_grad_()
    config = LossConfig(kl_coef=0.1, correction="truncate", off_policy_threshold=0.1)
    grpo_loss(**data, config=config, impl=impl)[0].backward()
    given = [name for name, value in data.items() if isinstance(value, Tensor) and value.grad is not None]
    assert given == ["logits"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_dtypes_of_the_results(dtype: torch.dtype, impl: str) -> None:
    loss, gradient, outputs = gradient_of(batch(dtype=dtype), FULL, impl=impl)
    assert gradient.dtype == dtype
    for tensor in (loss, outputs.logprobs, outputs.entropy, *outputs.metrics.values()):
        assert tensor.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    for impl in IMPLS:
        for config in (FULL, LossConfig.preset("gspo", off_policy_threshold=0.1)):
            expected = gradient_of(data, config, impl=impl)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = gradient_of(data, config, impl=impl)
            torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)


# --- layouts ---


def relaid(tensor: Tensor, how: str) -> Tensor:
    """The same values, laid out otherwise in memory."""
    if how == "strided rows":
        room = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), 9, dtype=tensor.dtype)
        if tensor.ndim == 1:
            room = room[: 2 * len(tensor)]
            room[::2] = tensor
            return room[::2]
        room[:, : tensor.shape[-1]] = tensor
        return room[:, : tensor.shape[-1]]
    if how == "transposed" and tensor.ndim == 2:
        return tensor.t().contiguous().t()
    if how == "an odd place":
        room = torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])
        return room[1:].view(tensor.shape)
    return tensor.flip(0).contiguous().flip(0)


@pytest.mark.parametrize("how", ["strided rows", "transposed", "an odd place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout(impl: str, dtype: torch.dtype, how: str) -> None:
    data = batch(0, (3, 4), WIDE, dtype) | {"temperature": torch.linspace(0.5, 2, 7)}
    config = LossConfig(kl_coef=0.1, entropy_coef=0.1, correction="mask", off_policy_threshold=0.1)
    expected = gradient_of(data, config, impl=impl)
    moved = {name: relaid(value, how) if isinstance(value, Tensor) else value for name, value in data.items()}
    logits = moved["logits"].requires_grad_()
    loss, _ = grpo_loss(**moved, config=config, impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_inputs(impl: str) -> None:
    """One row of logits and one value of all else, for all tokens."""
    data = batch(0, (3, 4), WIDE, torch.float32) | {"mask": None, "temperature": torch.full((7,), 0.7)}
    spread = {
        name: value[:1].expand(value.shape)
        for name, value in data.items()
        if isinstance(value, Tensor) and name not in ("advantages", "sequence_ids")
    }
    spread["mask"] = torch.ones(1, dtype=torch.bool).expand(7)
    expected = gradient_of({**data, **{k: v.clone() for k, v in spread.items()}}, FULL, impl=impl)
    row = data["logits"][:1].clone().requires_grad_()
    loss, _ = grpo_loss(**{**data, **spread, "logits": row.expand(7, WIDE)}, config=FULL, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(row.grad, expected[1].sum(0, keepdim=True))


# --- in place ---


def made(data: dict[str, Any], by: Callable[[Tensor], Tensor] = lambda x: x + 0) -> tuple[Tensor, Tensor]:
    """A leaf, and logits that an operation made of it."""
    leaf = data["logits"].detach().clone().requires_grad_()
    return leaf, by(leaf)


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("config", [FULL, LossConfig.preset("gspo"), LossConfig.preset("cispo", entropy_coef=0.1)])
def test_in_place_is_the_same_over_the_logits(config: LossConfig, dtype: torch.dtype) -> None:
    data = batch(0, (3, 4), WIDE, dtype)
    _, expected, _ = gradient_of(data, config, impl="native")
    leaf, logits = made(data)
    loss, outputs = grpo_loss(**{**data, "logits": logits}, config=config, inplace=True, impl="native")
    before = outputs.logprobs.clone(), outputs.entropy.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=0)  # the very memory
    torch.testing.assert_close((outputs.logprobs, outputs.entropy), before, rtol=0, atol=0)


def test_in_place_in_rows_that_lie_apart() -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    _, expected, _ = gradient_of(data, FULL, impl="native")
    leaf = torch.cat([data["logits"], torch.full((7, 5), 3.0)], dim=1).requires_grad_()
    wide = leaf + 0
    grpo_loss(**{**data, "logits": wide[:, :WIDE]}, config=FULL, inplace=True, impl="native")[0].backward()
    torch.testing.assert_close(leaf.grad, torch.cat([expected, torch.zeros(7, 5)], dim=1), rtol=0, atol=0)
    assert (wide[:, WIDE:] == 3).all()


def test_second_use_of_logits_in_place_is_seen() -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    _, logits = made(data)
    losses = [grpo_loss(**{**data, "logits": logits}, config=FULL, inplace=True, impl="native")[0] for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()
    _, logits = made(data)
    loss, _ = grpo_loss(**{**data, "logits": logits}, config=FULL, inplace=True, impl="native")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for by in (torch.tanh, lambda x: torch.log_softmax(x, -1), torch.exp):  # they saved what they made
        _, logits = made(data, by)
        loss, _ = grpo_loss(**{**data, "logits": logits}, config=FULL, inplace=True, impl="native")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    _, logits = made(data)
    penalty = logits.square().mean()  # saved the logits
    loss, _ = grpo_loss(**{**data, "logits": logits}, config=FULL, inplace=True, impl="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


def test_in_place_beside_a_user_that_kept_nothing() -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    _, expected, _ = gradient_of(data, FULL, impl="native")
    for order in (1, -1):
        leaf, logits = made(data)
        parts = [grpo_loss(**{**data, "logits": logits}, config=FULL, inplace=True, impl="native")[0], logits.sum()]
        sum(parts[::order]).backward()
        torch.testing.assert_close(leaf.grad, expected + 1)


def test_in_place_without_a_gradient_leaves_the_logits() -> None:
    data = batch(0, (3, 4), WIDE, torch.float32)
    before = data["logits"].clone()
    grpo_loss(**data, config=FULL, inplace=True, impl="native")
    torch.testing.assert_close(data["logits"], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("by", "impl", "message"),
    [
        (None, "native", "leaf of the graph"),
        (lambda x: x + 0, "reference", "inplace needs impl='native' or impl='triton'"),
        (lambda x: x.t().contiguous().t(), "native", "contiguous over the vocabulary"),
        (lambda x: x[:1].expand(8, 7), "native", "in place|inplace|overlap"),
    ],
)
def test_in_place_refusals(by: Callable[[Tensor], Tensor] | None, impl: str, message: str) -> None:
    data = batch(dtype=torch.float32)
    logits = data["logits"].requires_grad_()
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**data, "logits": logits if by is None else by(logits)}, config=FULL, inplace=True, impl=impl)


# --- refusals ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(8, 7, dtype=torch.int64)}, "*", "must be floating point|isn't available"),
        ({"token_ids": torch.zeros(8, dtype=torch.int32)}, TypeError, "token_ids must be int64"),
        ({"token_ids": torch.zeros(7, dtype=torch.int64)}, ValueError, r"token_ids of shape \(7,\)"),
        ({"sequence_ids": torch.zeros(8, dtype=torch.int32)}, TypeError, "sequence_ids must be int64"),
        ({"sequence_ids": torch.zeros(7, dtype=torch.int64)}, ValueError, r"sequence_ids has shape \(7,\)"),
        ({"sequence_ids": packed_ids([4, 4]).flip(0)}, ValueError, r"sequence_ids\[4\] = 0 after 1: .* not decrease"),
        ({"sequence_ids": packed_ids([2, 2, 2, 2])}, ValueError, "from 0 to 3, must be from 0 to 2"),
        ({"sequence_ids": packed_ids([4, 4]) - 1}, ValueError, "from -1 to 0, must be from 0 to 2"),
        ({"old_logprobs": torch.zeros(3)}, ValueError, r"old_logprobs has shape \(3,\)"),
        ({"ref_logprobs": torch.zeros(8, 1)}, ValueError, r"ref_logprobs has shape \(8, 1\)"),
        ({"rollout_logprobs": torch.zeros(8, dtype=torch.int64)}, TypeError, "rollout_logprobs must be floating"),
        ({"mask": torch.ones(8)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(9, dtype=torch.bool)}, ValueError, r"mask has shape \(9,\)"),
        ({"advantages": torch.ones(3, dtype=torch.int64)}, TypeError, "advantages must be floating point"),
        ({"advantages": torch.ones(3, 1)}, ValueError, r"advantages must be \[sequences\]"),
        ({"advantages": None}, ValueError, "either advantages or rewards with group_offsets, got neither"),
        ({"rewards": torch.ones(3)}, ValueError, "got both"),
        ({"group_offsets": torch.tensor([0, 3])}, ValueError, "go together"),
        ({"advantages": None, "rewards": torch.ones(3)}, ValueError, "go together"),
        ({"advantage_level": "token"}, ValueError, r"advantages has shape \(3,\), must be \[tokens\]"),
        ({"advantage_level": "group"}, ValueError, "advantage_level = 'group'"),
        (
            {"advantages": None, "rewards": torch.ones(3), "group_offsets": torch.tensor([0, 3]),
             "advantage_level": "token"},
            ValueError,
            "rewards are of sequences",
        ),
        (
            {"advantages": None, "rewards": torch.ones(3), "group_offsets": torch.tensor([0, 2])},
            ValueError,
            "rise from 0 to the 3 rewards",
        ),
        ({"ref_logprobs": None, "config": LossConfig(kl_coef=0.1)}, ValueError, "kl_coef = 0.1 needs ref_logprobs"),
        (
            {"rollout_logprobs": None, "config": LossConfig(correction="mask")},
            ValueError,
            "correction = 'mask' needs rollout_logprobs",
        ),
        ({"config": LossConfig.preset("dr_grpo")}, ValueError, "needs normalizer"),
        ({"normalizer": 0}, ValueError, "normalizer = 0, must be above 0"),
        ({"normalizer": math.nan}, ValueError, "normalizer = nan, must be above 0"),
        ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \(3,\)"),
        ({"logits": torch.ones(2, 4, 7), "token_ids": torch.ones(2, 4, dtype=torch.int64)}, ValueError, "packed rows"),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Any], error: Any, message: str, impl: str) -> None:
    given = {**batch(dtype=torch.float32), "config": LossConfig(), "impl": impl, **change}
    with pytest.raises((TypeError, NotImplementedError) if error == "*" else error, match=message):
        grpo_loss(**given)
