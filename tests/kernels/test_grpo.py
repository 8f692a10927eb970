"""The GRPO loss against a naive loop over tokens in float64, with gradients by finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge_kernels import LossConfig, group_advantages, grpo_loss, token_logprobs

VOCAB = 7


def batch(
    seed: int = 0,
    lengths: tuple[int, ...] = (3, 1, 4),
    spread: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Packed rows of a few sequences; `spread` moves the old and reference policies off the current one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logits = torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(VOCAB, (tokens,), generator=generator)
    logprobs = token_logprobs(logits, token_ids, 0.7)
    near = [logprobs + spread * torch.randn(tokens, generator=generator, dtype=torch.float64) for _ in range(2)]
    return {
        "logits": logits.to(dtype),
        "token_ids": token_ids,
        "sequence_ids": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        "advantages": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "old_logprobs": near[0],
        "ref_logprobs": near[1],
        "mask": torch.rand(tokens, generator=generator) < 0.8,
        "temperature": 0.7,
    }


def naive(data: dict[str, Any], config: LossConfig, normalizer: float | None) -> tuple[float, dict[str, float]]:
    """One token at a time, by the formulas of the papers, with nothing of torch but its numbers."""
    tokens = len(data["token_ids"])
    mask = data["mask"].tolist()
    lengths = [0] * len(data["advantages"])
    for t in range(tokens):
        lengths[data["sequence_ids"][t]] += mask[t]
    total, ratios, low, high, kls = 0.0, [], 0, 0, []
    for t in range(tokens):
        if not mask[t]:
            continue
        z = [float(value) / data["temperature"] for value in data["logits"][t]]
        top = max(z)
        log_sum = top + math.log(math.fsum(math.exp(value - top) for value in z))
        logprob = z[data["token_ids"][t]] - log_sum
        entropy = -math.fsum(math.exp(value - log_sum) * (value - log_sum) for value in z)
        sequence = int(data["sequence_ids"][t])
        a = float(data["advantages"][sequence])
        old = logprob if data["old_logprobs"] is None else float(data["old_logprobs"][t])
        r = math.exp(logprob - old)
        clipped = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
        term = -min((r if config.delta is None else min(r, config.delta)) * a, clipped * a)
        if data["ref_logprobs"] is not None:
            d = logprob - float(data["ref_logprobs"][t])
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[config.kl_estimator]
            kls.append(kl)
            term += config.kl_coef * kl
        term -= config.entropy_coef * entropy
        total += term / (lengths[sequence] if config.normalize == "sequences" else 1)
        ratios.append(r)
        low += a < 0 and r < 1 - config.clip_low
        high += a > 0 and r > 1 + config.clip_high
    count = sum(mask)
    if normalizer is None:
        normalizer = count if config.normalize == "tokens" else len(lengths)
    metrics = {
        "clip_low": low / count,
        "clip_high": high / count,
        "ratio_max": max(ratios),
        "effective_sample_size": sum(ratios) ** 2 / (count * sum(r * r for r in ratios)),
    }
    return total / normalizer, metrics | ({"kl": sum(kls) / count} if kls else {})


configs = st.builds(
    LossConfig,
    clip_low=st.sampled_from([0.1, 0.2, 1.0]),
    clip_high=st.sampled_from([0.0, 0.28]),
    delta=st.sampled_from([None, 1.5, 4.0]),
    kl_coef=st.sampled_from([0.0, 0.04, 1.0]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    entropy_coef=st.sampled_from([0.0, 0.01, -0.5]),
    normalize=st.sampled_from(["tokens", "sequences", "constant"]),
)


@settings(max_examples=120, deadline=None)
@given(configs, st.integers(0, 1000), st.sampled_from([None, 2.5]), st.booleans())
def test_equal_to_the_naive_loop(config: LossConfig, seed: int, normalizer: float | None, on_policy: bool) -> None:
    data = batch(seed)
    data["mask"][0] = True
    if on_policy:
        data["old_logprobs"] = None
    if config.normalize == "constant":
        normalizer = normalizer or 24.0
    loss, outputs = grpo_loss(**data, config=config, normalizer=normalizer)
    expected, metrics = naive(data, config, normalizer)
    assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert outputs.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert float(outputs.metrics[name]) == pytest.approx(value, rel=1e-11, abs=1e-13), name


@pytest.mark.parametrize(
    ("delta", "estimator", "normalize"),
    list(itertools.product([None, 1.6], ["k1", "k2", "k3"], ["tokens", "sequences", "constant"])),
)
def test_gradcheck(delta: float | None, estimator: str, normalize: str) -> None:
    config = LossConfig(delta=delta, kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.1, normalize=normalize)
    data = batch(3)
    logits = data.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: grpo_loss(z, data["token_ids"], **{k: v for k, v in data.items() if k != "token_ids"},
                            config=config, normalizer=5.0)[0],
        (logits,),
    )  # fmt: skip


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At ratio 1, where clipped and free terms tie, the gradient is that of -A log p."""
    data = {**batch(), "old_logprobs": None, "ref_logprobs": None}
    logits = data["logits"].requires_grad_()
    loss, _ = grpo_loss(**data, config=LossConfig(normalize="tokens"))
    (found,) = torch.autograd.grad(loss, logits)
    logprobs = token_logprobs(logits, data["token_ids"], 0.7)
    plain = -(logprobs * data["advantages"][data["sequence_ids"]] * data["mask"]).sum() / data["mask"].sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, logits)[0])


def test_clipped_tokens_have_no_gradient() -> None:
    data = batch(lengths=(4, 4), spread=0.0)
    logprobs = token_logprobs(data["logits"], data["token_ids"], 0.7)
    data |= {"mask": None, "ref_logprobs": None, "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    data["old_logprobs"] = logprobs - torch.tensor([0.5, -0.5] * 4, dtype=torch.float64)  # ratio 1.65, then 0.61
    logits = data["logits"].requires_grad_()
    loss, outputs = grpo_loss(**data, config=LossConfig())
    loss.backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert moved.tolist() == [False, True, False, True, True, False, True, False]
    assert float(outputs.metrics["clip_high"]) == float(outputs.metrics["clip_low"]) == 0.25


def test_micro_batches_add_up_to_the_whole_step() -> None:
    data = batch(lengths=(3, 5, 2, 6))
    for config, normalizer in (
        (LossConfig.preset("dapo"), float(data["mask"].sum())),
        (LossConfig.preset("grpo", kl_coef=0.04), 4.0),
        (LossConfig.preset("dr_grpo"), 4 * 6.0),
    ):
        whole = grpo_loss(**data, config=config, normalizer=normalizer)[0]
        parts = torch.zeros((), dtype=torch.float64)
        for first in (0, 2):
            own = (data["sequence_ids"] // 2) == first // 2
            part = {name: value[own] if isinstance(value, torch.Tensor) and name != "advantages" else value
                    for name, value in data.items()}  # fmt: skip
            part["sequence_ids"] = part["sequence_ids"] - first
            part["advantages"] = data["advantages"][first : first + 2]
            parts = parts + grpo_loss(**part, config=config, normalizer=normalizer)[0]
        torch.testing.assert_close(parts, whole)


def test_what_lies_outside_the_mask_does_not_matter() -> None:
    data = batch(1)
    mask = data["mask"]
    assert mask.any() and not mask.all()
    loss, outputs = grpo_loss(**data, config=LossConfig(kl_coef=0.1))
    junk = dict(data)
    junk["token_ids"] = data["token_ids"].where(mask, -100)
    junk["old_logprobs"] = data["old_logprobs"].where(mask, math.nan)
    junk["ref_logprobs"] = data["ref_logprobs"].where(mask, math.inf)
    logits = data["logits"].clone().requires_grad_()
    junk["logits"] = logits
    same, same_outputs = grpo_loss(**junk, config=LossConfig(kl_coef=0.1))
    assert same == loss
    assert (same_outputs.logprobs[~mask] == 0).all() and (same_outputs.entropy[~mask] == 0).all()
    torch.testing.assert_close(same_outputs.metrics, outputs.metrics, rtol=0, atol=0)
    same.backward()
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_learn_from_gives_a_zero_gradient(tokens: int, normalize: str) -> None:
    logits = torch.randn(tokens, VOCAB, requires_grad=True)
    loss, outputs = grpo_loss(
        logits,
        torch.zeros(tokens, dtype=torch.int64),
        sequence_ids=torch.zeros(tokens, dtype=torch.int64),
        advantages=torch.ones(1 if tokens else 0),
        mask=torch.zeros(tokens, dtype=torch.bool),
        config=LossConfig(normalize=normalize),
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None and not logits.grad.any()
    assert all(value.isfinite() for value in outputs.metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_float32(dtype: torch.dtype) -> None:
    data = batch(dtype=dtype)
    logits = data["logits"].requires_grad_()
    loss, outputs = grpo_loss(**data, config=LossConfig())
    exact, _ = grpo_loss(**{**data, "logits": data["logits"].detach().double()}, config=LossConfig())
    assert loss.dtype == outputs.logprobs.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


def test_outputs_are_detached_and_scaled_by_grad_output() -> None:
    data = batch()
    logits = data["logits"].requires_grad_()
    loss, outputs = grpo_loss(**data, config=LossConfig(entropy_coef=0.1))
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (thrice,) = torch.autograd.grad(loss, logits, grad_outputs=torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(thrice, 3 * once)
    tensors = [outputs.logprobs, outputs.entropy, *outputs.metrics.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sequence_ids": torch.zeros(8, dtype=torch.int32)}, TypeError, "sequence_ids must be int64"),
        ({"sequence_ids": torch.zeros(7, dtype=torch.int64)}, ValueError, r"sequence_ids has shape \(7,\)"),
        ({"old_logprobs": torch.zeros(3)}, ValueError, r"old_logprobs has shape \(3,\)"),
        ({"mask": torch.ones(8)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(9, dtype=torch.bool)}, ValueError, r"mask has shape \(9,\)"),
        ({"advantages": torch.ones(3, dtype=torch.int64)}, TypeError, "advantages must be floating point"),
        ({"advantages": torch.ones(3, 1)}, ValueError, r"advantages must be \[sequences\]"),
        (
            {"ref_logprobs": None, "config": LossConfig(kl_coef=0.1)},
            ValueError,
            "kl_coef = 0.1 needs ref_logprobs",
        ),
        ({"config": LossConfig.preset("dr_grpo")}, ValueError, "needs normalizer"),
        ({"impl": "triton"}, NotImplementedError, "impl='triton' isn't available in this version"),
        ({"impl": "fast"}, ValueError, "impl = 'fast', must be one of auto, triton, native, reference"),
    ],
)
def test_refusals(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grpo_loss(**{**batch(), "config": LossConfig(), **change})


def test_rows_must_be_packed() -> None:
    data = batch(lengths=(4, 4))
    with pytest.raises(ValueError, match=r"packed rows \[tokens, vocab\]"):
        grpo_loss(
            data["logits"].view(2, 4, VOCAB),
            data["token_ids"].view(2, 4),
            sequence_ids=data["sequence_ids"].view(2, 4),
            advantages=data["advantages"],
            config=LossConfig(),
        )


# --- the configuration ---


def test_presets() -> None:
    assert LossConfig.preset("grpo") == LossConfig()
    assert LossConfig.preset("bnpo").normalize == "tokens"
    assert LossConfig.preset("dapo").clip_high == 0.28
    assert LossConfig.preset("dr_grpo").advantage_options() == {"baseline": "mean", "scale": "none"}
    assert LossConfig.preset("dapo", clip_high=0.4, kl_coef=0.1) == LossConfig(
        normalize="tokens", clip_high=0.4, kl_coef=0.1
    )
    with pytest.raises(ValueError, match="unknown preset 'ppo', must be one of grpo, bnpo, dr_grpo, dapo"):
        LossConfig.preset("ppo")


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_low": -0.1},
        {"clip_low": 1.5},
        {"clip_high": math.nan},
        {"delta": 1.1},
        {"kl_coef": -1.0},
        {"kl_estimator": "k4"},
        {"normalize": "batch"},
        {"baseline": "median"},
        {"scale": "mad"},
    ],
)
def test_a_config_refuses_what_it_cannot_mean(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossConfig(**wrong)


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "constant"])
def test_nothing_waits_for_the_device(normalize: str) -> None:
    """Meta tensors have no values: whatever reads one on the host fails."""
    data = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch().items()}
    logits = data["logits"].requires_grad_()
    config = LossConfig(delta=2.0, kl_coef=0.1, entropy_coef=0.1, normalize=normalize)
    loss, outputs = grpo_loss(**data, config=config, normalizer=torch.tensor(4.0, device="meta"))
    loss.backward()
    assert logits.grad is not None and outputs.metrics["kl"].is_meta
    offsets = torch.tensor([0, 3, 3], device="meta")
    for options in ({}, {"baseline": "loo", "scale": "batch_std"}):
        assert group_advantages(torch.rand(3, device="meta"), offsets, **options).is_meta
