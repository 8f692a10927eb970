"""Padded batches against packed rows of the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medbridge_kernels import LossConfig, grpo_loss, linear_grpo_loss, native
from medbridge_kernels.adapters import padded_grpo_loss, padded_linear_grpo_loss

VOCAB, WIDTH = 11, 4
PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs")
CONFIGS = {
    "clip": LossConfig(normalize="tokens", kl_coef=0.2, entropy_coef=0.1, delta=3.0),
    "sequences": LossConfig(kl_coef=0.2, correction="truncate", correction_level="sequence"),
    "gspo": LossConfig.preset("gspo", correction="mask", correction_cap=1.2, off_policy_threshold=0.1),
    "cispo": LossConfig.preset("cispo", off_policy_threshold=0.1),
    "sapo": LossConfig.preset("sapo", kl_coef=0.1),
}


def batch(seed: int, sequences: int = 3, length: int = 5, per_token: bool = False) -> dict[str, Any]:
    """A float64 batch whose mask has holes; the numbers outside of it are poison."""
    generator = torch.Generator().manual_seed(seed)
    shape = sequences, length

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mask = torch.rand(shape, generator=generator) < 0.7
    data: dict[str, Any] = {
        "hidden": normal(*shape, WIDTH),
        "token_ids": torch.randint(VOCAB, shape, generator=generator).where(mask, -100),
        "mask": mask,
        "advantages": normal(*shape) if per_token else normal(sequences),
        "temperature": 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64),
    }
    for name in PER_TOKEN:
        data[name] = (-2 + 0.5 * normal(*shape)).where(mask, float("nan"))
    return data


def packed(data: dict[str, Any]) -> dict[str, Any]:
    """The tokens in the mask as the rows that `grpo_loss` takes."""
    mask = data["mask"]
    rows = {name: data[name][mask] for name in ("token_ids", "temperature", *PER_TOKEN)}
    rows["sequence_ids"] = mask.nonzero()[:, 0]
    advantages = data["advantages"]
    if advantages.ndim == 2:
        return {**rows, "advantages": advantages[mask], "advantage_level": "token", "normalizer": float(len(mask))}
    return {**rows, "advantages": advantages}


def logits_of(data: dict[str, Any], weight: Tensor) -> Tensor:
    return (data["hidden"] @ weight.T).detach().requires_grad_()


def without_hidden(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "hidden"}


def weight_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CONFIGS)), st.integers(0, 500), st.integers(1, 4), st.integers(1, 6), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_equal_to_packed_rows(
    name: str, seed: int, sequences: int, length: int, per_token: bool, unshifted: bool
) -> None:
    data = batch(seed, sequences, length, per_token)
    options = {"config": CONFIGS[name]}
    if per_token and CONFIGS[name].normalize == "tokens":
        options["normalizer"] = 7.0
    logits = logits_of(data, weight_of(seed))
    rows = logits[data["mask"]].detach().requires_grad_()
    loss, outputs = grpo_loss(rows, **packed(data) | options)
    loss.backward()

    given_logits = logits
    if unshifted:
        last = torch.full((sequences, 1, VOCAB), float("nan"), dtype=torch.float64)
        given_logits = torch.cat([logits.detach(), last], 1).requires_grad_()
    found, theirs = padded_grpo_loss(given_logits, **without_hidden(data), **options)
    found.backward()
    torch.testing.assert_close(found, loss)
    gradient = given_logits.grad[:, :length]
    assert gradient is not None and not given_logits.grad[:, length:].any() and not gradient[~data["mask"]].any()
    torch.testing.assert_close(gradient[data["mask"]], rows.grad)
    for ours, expected in ((theirs.logprobs, outputs.logprobs), (theirs.entropy, outputs.entropy)):
        assert ours.shape == data["mask"].shape and not ours[~data["mask"]].any()
        torch.testing.assert_close(ours[data["mask"]], expected)
    assert theirs.metrics.keys() == outputs.metrics.keys()
    torch.testing.assert_close(theirs.metrics, outputs.metrics)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_hidden_states_equal_to_packed_rows(name: str, per_token: bool, gather: bool) -> None:
    data, config = batch(5, per_token=per_token), CONFIGS[name]
    data["hidden"][~data["mask"]] = 0.0
    normalizer = {"normalizer": 7.0}
    pair = []
    for padded in (False, True):
        hidden, weight = data["hidden"].clone().requires_grad_(), weight_of(5).requires_grad_()
        if padded:
            loss, outputs = padded_linear_grpo_loss(
                hidden, weight, **without_hidden(data), config=config, gather=gather, **normalizer
            )
            assert outputs.logprobs.shape == data["mask"].shape
            assert not outputs.logprobs[~data["mask"]].any() and not outputs.entropy[~data["mask"]].any()
        else:
            rows = packed(data) | {"config": config} | normalizer
            loss, _ = linear_grpo_loss(hidden[data["mask"]], weight, **rows)
        loss.backward()
        pair.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_sequence_without_tokens_counts_in_the_mean(per_token: bool) -> None:
    data, weight = batch(8, per_token=per_token), weight_of(8)
    data["mask"][1] = False
    columns = without_hidden(data) | {"config": CONFIGS["sequences"]}
    losses = [padded_linear_grpo_loss(data["hidden"], weight, **columns, **more)[0]
              for more in ({}, {"gather": False}, {"normalizer": 3.0})]  # fmt: skip
    torch.testing.assert_close(losses[1:], losses[:1] * 2)
    torch.testing.assert_close(padded_grpo_loss(data["hidden"] @ weight.T, **columns)[0], losses[0])


@pytest.mark.skipif(native.why_missing() is not None, reason="native back end not built")
@pytest.mark.parametrize("unshifted", [True, False])
def test_logits_are_not_copied(unshifted: bool) -> None:
    """In place, the gradient lands in the very memory of the logits, which only a view of them can do."""
    data = batch(1)
    made = logits_of(data, weight_of(1)).detach().float().requires_grad_()
    logits = torch.cat([made, made[:, -1:]], 1) if unshifted else made * 1
    memory = logits.detach()
    loss, _ = padded_grpo_loss(logits, **without_hidden(data), config=CONFIGS["clip"], inplace=True, impl="native")
    loss.backward()
    torch.testing.assert_close(memory[:, :5], made.grad)
    assert not memory[:, 5:].any()


def test_in_place_refuses_leaves() -> None:
    data = batch(1)
    logits = logits_of(data, weight_of(1))
    with pytest.raises(ValueError, match="inplace: the logits are a leaf"):
        padded_grpo_loss(logits, **without_hidden(data), config=CONFIGS["clip"], inplace=True)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_surrogate_weights_multiply_the_surrogate(name: str) -> None:
    """Against the loss of each token by itself, times its weight."""
    data = batch(2, sequences=1, length=4) | {"mask": torch.ones(1, 4, dtype=torch.bool)}
    for key in PER_TOKEN:
        data[key] = torch.linspace(-3, -1, 4, dtype=torch.float64)[None]
    data["token_ids"] = data["token_ids"].clamp(min=0)
    config, logits = CONFIGS[name], logits_of(data, weight_of(2))
    weights = torch.tensor([[0.0, 0.3, 1.0, 2.5]], dtype=torch.float64)

    def loss(advantages: Tensor, weights: Tensor | None) -> Tensor:
        columns = without_hidden(data) | {"advantages": advantages}
        return padded_grpo_loss(logits, **columns, config=config, surrogate_weights=weights, normalizer=1.0)[0]

    advantages = data["advantages"]
    nothing = loss(torch.zeros(1, 4, dtype=torch.float64), None)
    single = [loss(advantages * torch.eye(4, dtype=torch.float64)[[t]], None) - nothing for t in range(4)]
    expected = nothing + sum(float(weights[0, t]) * single[t] for t in range(4))
    if config.off_policy_threshold is None:
        torch.testing.assert_close(loss(advantages, weights), expected)
    torch.testing.assert_close(loss(advantages, weights[:, 2:3]), loss(advantages, None))
    torch.testing.assert_close(loss(advantages, weights[:, 1]), loss(0.3 * advantages, None))


def test_rewards() -> None:
    data, config = batch(3), LossConfig(baseline="loo", scale="none")
    del data["advantages"]
    rewards = {"rewards": torch.tensor([1.0, 0.0, 0.5]).double(), "group_offsets": torch.tensor([0, 2, 3])}
    logits = logits_of(data, weight_of(3))
    loss, _ = padded_grpo_loss(logits, **without_hidden(data), **rewards, config=config)
    advantages = torch.tensor([1.0, -1.0, 0.0]).double()
    weighted = torch.tensor([2.0, 0.5, 1.0]).double()
    columns = without_hidden(data) | {"config": config}
    torch.testing.assert_close(loss, padded_grpo_loss(logits, **columns, advantages=advantages)[0])
    torch.testing.assert_close(
        padded_grpo_loss(logits, **columns, **rewards, surrogate_weights=weighted)[0],
        padded_grpo_loss(logits, **columns, advantages=advantages * weighted)[0],
    )


def test_compiles_to_one_graph() -> None:
    data = batch(7, per_token=True)
    columns = {name: value.float() if value.is_floating_point() else value for name, value in data.items()}
    hidden, weight = columns.pop("hidden").requires_grad_(), weight_of(7).float()
    options: dict[str, Any] = {"config": CONFIGS["sequences"], "surrogate_weights": torch.rand(3, 5)}

    def loss(hidden: Tensor, columns: dict[str, Tensor]) -> Tensor:
        return padded_linear_grpo_loss(hidden, weight, gather=False, **columns, **options)[0]

    plain = loss(hidden, columns)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, columns)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden) for value in (compiled, plain)))


@pytest.mark.parametrize(("sequences", "length"), [(0, 3), (3, 0), (1, 1)])
def test_nothing_and_next_to_nothing(sequences: int, length: int) -> None:
    data = batch(4, sequences, length)
    data["mask"] = torch.zeros_like(data["mask"])
    for hidden_in in (True, False):
        hidden, weight = data["hidden"].clone().requires_grad_(), weight_of(4).requires_grad_()
        columns = without_hidden(data) | {"config": CONFIGS["sequences"]}
        if hidden_in:
            loss, outputs = padded_linear_grpo_loss(hidden, weight, **columns)
        else:
            loss, outputs = padded_grpo_loss(hidden @ weight.T, **columns)
        loss.backward()
        assert loss == 0 and not hidden.grad.any() and not weight.grad.any()
        assert outputs.entropy.shape == (sequences, length)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "must be \\[batch, length, vocab\\]"),
        ({"token_ids": torch.zeros(15, dtype=torch.int64)}, ValueError, "must be \\[batch, length, vocab\\]"),
        ({"mask": torch.ones(3, 6, dtype=torch.bool)}, ValueError, "mask has shape \\(3, 6\\)"),
        ({"mask": torch.ones(3, 5)}, TypeError, "mask must be bool"),
        ({"old_logprobs": torch.zeros(15)}, ValueError, "old_logprobs has shape \\(15,\\)"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature has shape \\(3,\\)"),
        ({"advantages": torch.zeros(2)}, ValueError, "advantages has shape \\(2,\\)"),
        ({"advantages": torch.zeros(3, 2)}, ValueError, "advantages has shape \\(3, 2\\)"),
        ({"surrogate_weights": torch.zeros(5)}, ValueError, "surrogate_weights has shape"),
        ({"surrogate_weights": -torch.ones(3)}, ValueError, "at least 0"),
        ({"advantages": None}, ValueError, "either advantages or rewards"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    data = batch(6)
    columns = without_hidden(data) | {"config": CONFIGS["clip"]} | changes
    with pytest.raises(error, match=message):
        padded_grpo_loss(logits_of(data, weight_of(6)), **columns)
    with pytest.raises(error, match=message.replace("vocab", "width")):
        padded_linear_grpo_loss(data["hidden"], weight_of(6), **columns)
