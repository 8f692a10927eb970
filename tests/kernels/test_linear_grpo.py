"""The loss and the log-probabilities from hidden states: those of the projected logits, whatever the chunks, with the
gradients of what needs one and nothing made for what needs none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge_kernels import LossConfig, grpo_loss, linear, linear_grpo_loss, linear_token_logprobs, token_logprobs
from tests.kernels.conftest import (
    CASES,
    FAST_DTYPES,
    IMPLS,
    LEVELS,
    NORMALIZE,
    VARIANTS,
    Errors,
    arguments,
    batch,
    configured,
    covering,
)

pytestmark = pytest.mark.usefixtures("poisoned")
VOCAB, WIDTH = 150, 12
FULL = LossConfig(kl_coef=0.1, entropy_coef=0.05, normalize="tokens")
COUPLED = LossConfig.preset("gspo", kl_coef=0.1, entropy_coef=0.05)
LAYERS: dict[str, list[Any]] = {
    "bias": [True, False],
    "logit_scale": [1.0, 0.3, -2.0],
    "softcap": [None, 4.0],
    "banned_ids": [None, [], [0, VOCAB - 1, 77, 77]],
    "rows": [1, 2, 5, 100],
}


def with_layer(data: dict[str, Any], layer: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """`batch` data with hidden states, weight and what a choice of LAYERS says, in place of logits."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(data["token_ids"])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    banned = layer.get("banned_ids")
    wide = 2 if layer.get("softcap") else 1
    return {name: value for name, value in data.items() if name != "logits"} | {
        "hidden": draw(tokens, WIDTH),
        "weight": (draw(VOCAB, WIDTH) / 2).to(dtype),
        "bias": draw(VOCAB) if layer.get("bias") else None,
        "token_ids": 1 + data["token_ids"] % (VOCAB // 2 - 1),  # none that is banned
        "logit_scale": layer.get("logit_scale", 1.0),
        "softcap": layer.get("softcap"),
        "banned_ids": None if banned is None else torch.tensor(banned, dtype=torch.int64),
        "memory_budget": layer.get("rows", 3) * VOCAB * dtype.itemsize * wide,
    }


LEAVES = ("hidden", "weight", "bias")


def run(
    data: Mapping[str, Any], config: LossConfig, needed: Sequence[str] = LEAVES, times: float = 1.0, **options: Any
) -> tuple[Tensor, dict[str, Tensor | None], Any]:
    """Loss, gradients of the leaves, and outputs."""
    leaves = {name: None if data[name] is None else data[name].detach().clone() for name in LEAVES}
    for name in needed:
        if leaves[name] is not None:
            leaves[name].requires_grad_()
    loss, outputs = linear_grpo_loss(**{**data, **leaves}, config=config, **options)
    assert loss.requires_grad == any(leaves[name] is not None for name in needed)
    if loss.requires_grad:
        (times * loss).backward()
    return loss.detach(), {name: None if leaf is None else leaf.grad for name, leaf in leaves.items()}, outputs


def in_float64(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in data.items()
    }


def same(found: tuple[Any, ...], expected: tuple[Any, ...], **tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for name in LEAVES:
        torch.testing.assert_close(found[1][name], expected[1][name], **tolerance)


def brought_near(data: dict[str, Any], config: LossConfig) -> dict[str, Any]:
    """With the policies that are compared with near the current one, as in training."""
    _, _, outputs = run(in_float64(data), config, (), impl="reference")
    near = {
        name: (0.9 * outputs.logprobs + 0.05 * data[name]).float()
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")
        if data[name] is not None
    }
    return data | near


def project(data: Mapping[str, Any]) -> Tensor:
    """The logits by the formula in the docstring."""
    logits = data["hidden"] @ data["weight"].t()
    if data["bias"] is not None:
        logits = logits + data["bias"]
    logits = data["logit_scale"] * logits
    if data["softcap"] is not None:
        logits = data["softcap"] * torch.tanh(logits / data["softcap"])
    if data["banned_ids"] is not None:
        logits[:, data["banned_ids"]] = -math.inf
    return logits


# --- what it computes ---


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_loss_of_the_projected_logits(impl: str) -> None:
    for place, layer in enumerate(covering(LAYERS)):
        data = with_layer(in_float64(batch(place, (4, 1, 0, 6), VOCAB)), layer, place, torch.float32)
        exact = in_float64(data)
        leaves = {name: None if exact[name] is None else exact[name].requires_grad_() for name in LEAVES}
        logits = project(exact)
        taken = {name: exact[name] for name in batch() if name != "logits"}
        for config in (FULL, COUPLED):
            loss, outputs = grpo_loss(logits, **taken, config=config, impl="reference")
            grads = torch.autograd.grad(loss, [leaf for leaf in leaves.values() if leaf is not None], retain_graph=True)
            found = run(data, config, impl=impl)
            torch.testing.assert_close(found[0].double(), loss.detach(), rtol=1e-4, atol=1e-5)
            got = [grad for name, grad in found[1].items() if leaves[name] is not None]
            for mine, true in zip(got, grads, strict=True):
                assert mine is not None and mine.dtype == torch.float32
                assert float((mine - true).norm()) <= 1e-4 * float(true.norm())
            torch.testing.assert_close(found[2].logprobs.double(), outputs.logprobs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[2].entropy.double(), outputs.entropy, rtol=1e-4, atol=1e-5)
            assert found[2].metrics.keys() == outputs.metrics.keys()
            for name, value in outputs.metrics.items():
                assert float(found[2].metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_within_twice_the_error_of_torch(variant: str, level: str, dtype: torch.dtype) -> None:
    errors, layers = Errors(), itertools.cycle(covering(LAYERS))
    for place, choice in enumerate(CASES):
        config = configured(choice, **VARIANTS[variant], ratio_level=level, normalize=NORMALIZE[place % len(NORMALIZE)])
        data = arguments(choice, config, batch(place, (4, 1, 6, 0, 2), VOCAB, dtype), place)
        data = with_layer(data, next(layers), place, dtype)
        data = brought_near(data, config)
        exact = run(in_float64(data), config, impl="reference")
        ours, theirs = (run(data, config, impl=impl) for impl in ("native", "reference"))
        errors.add("loss", ours[0], theirs[0], exact[0])
        for name in LEAVES:
            if data[name] is not None:
                errors.add(name, ours[1][name], theirs[1][name], exact[1][name])
        for name in ("logprobs", "entropy"):
            errors.add(name, *(getattr(found[2], name) for found in (ours, theirs, exact)))
        assert list(ours[2].metrics) == list(theirs[2].metrics)
    errors.check()


@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_any_chunks(config: LossConfig) -> None:
    data = with_layer(
        batch(0, (4, 1, 6, 0, 20), VOCAB, torch.float32), {"bias": True, "softcap": 3.0}, 0, torch.float32
    )
    expected = run(data | {"memory_budget": None}, config, impl="native")
    for budget in (1, 5000, 100_000, 1 << 30):
        found = run(data | {"memory_budget": budget}, config, impl="native")
        torch.testing.assert_close(found[2].logprobs, expected[2].logprobs)
        same(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_weight_gradient_is_summed_in_float32(config: LossConfig, dtype: torch.dtype) -> None:
    """Thousands of equal chunks, of which a half-precision sum would stop growing."""
    tokens = 3000
    data = with_layer(batch(0, (1,), VOCAB, dtype), {"rows": 1, "bias": True}, 0, dtype)
    data = brought_near(data, config)
    alone = run(data | {"normalizer": 1.0}, config, impl="native")
    for name in ("hidden", "token_ids", "old_logprobs", "ref_logprobs", "rollout_logprobs", "mask"):
        data[name] = data[name].expand(tokens, *data[name].shape[1:])
    data |= {"sequence_ids": torch.arange(tokens), "advantages": data["advantages"].expand(tokens)}
    found = run(data | {"normalizer": 1.0}, config, impl="native")
    for name in ("weight", "bias"):
        one, all_of_them = alone[1][name].float(), found[1][name].float() / tokens
        assert float((all_of_them - one).norm()) <= 2 * torch.finfo(dtype).eps * float(one.norm())


def test_coupled_losses_are_known() -> None:
    """Each of them would be wrong if its gradient were made from a chunk alone."""
    data = with_layer(batch(3, (5, 7, 3, 6), VOCAB, torch.float32), {"rows": 2}, 0, torch.float32)
    data = brought_near(data, FULL) | {"advantages": torch.tensor([-1.0, -0.5, 0.7, -0.2])}
    base = {"kl_coef": 0.1}
    for config, change in (
        (LossConfig(ratio_level="sequence", **base), {}),
        (LossConfig(surrogate="cispo", ratio_level="sequence", **base), {}),
        (LossConfig(off_policy_threshold=0.01, **base), {}),
        (LossConfig(off_policy_threshold=0.01, **base), {"old_logprobs": None}),
        (LossConfig(correction="truncate", correction_level="sequence", **base), {"old_logprobs": None}),
        (LossConfig(correction="mask", correction_level="sequence", **base), {}),
        (LossConfig(normalize="sequences", entropy_coef=0.1, **base), {}),
    ):
        found = run(data | change, config, impl="native")
        expected = run(data | change, config, impl="reference")
        same(found, expected, rtol=1e-4, atol=1e-7)


# --- what needs a gradient ---


@pytest.mark.parametrize("config", [FULL, COUPLED])
@pytest.mark.parametrize("needed", [s for n in range(4) for s in itertools.combinations(LEAVES, n)])
def test_only_gradients_that_are_needed(
    config: LossConfig, needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_layer(batch(0, (4, 7), VOCAB, torch.float32), {"bias": True, "rows": 3}, 0, torch.float32)
    expected = run(data, config, impl="reference")
    products = []
    add = linear._add_product

    def counted(total: Tensor, *rest: Any, **options: Any) -> None:
        products.append(total.shape)
        add(total, *rest, **options)

    monkeypatch.setattr(linear, "_add_product", counted)
    found = run(data, config, needed, impl="native")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name in LEAVES:
        if name in needed:
            torch.testing.assert_close(found[1][name], expected[1][name], rtol=1e-4, atol=1e-6)
        else:
            assert found[1][name] is None
    assert len(products) == (4 if "weight" in needed else 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_tied_weights(config: LossConfig, impl: str) -> None:
    data = with_layer(batch(0, (4, 7), VOCAB, torch.float32), {}, 0, torch.float32)
    read = torch.randint(VOCAB, (11,), generator=torch.Generator().manual_seed(5))
    found = []
    for exact in (False, True):
        given = in_float64(data) if exact else data
        weight = given["weight"].clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(read, weight))
        loss, _ = linear_grpo_loss(
            **{**given, "weight": weight, "hidden": hidden}, config=config, impl="reference" if exact else impl
        )
        loss.backward()
        found.append(weight.grad)
    assert found[0] is not None and found[1] is not None
    assert float((found[0] - found[1]).norm()) <= 1e-5 * float(found[1].norm())


@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_scaled_and_added_losses(config: LossConfig) -> None:
    data = with_layer(batch(0, (4, 7), VOCAB, torch.float32), {"bias": True}, 0, torch.float32)
    _, once, _ = run(data, config, impl="native")
    for times in (3.0, -0.5, 0.0):
        _, found, _ = run(data, config, impl="native", times=times)
        for name in LEAVES:
            torch.testing.assert_close(found[name], times * once[name], rtol=1e-5, atol=1e-7)
    leaves = {name: data[name].clone().requires_grad_() for name in LEAVES}
    losses = [linear_grpo_loss(**{**data, **leaves}, config=config, impl="native")[0] for _ in range(2)]
    (losses[0] + 2 * losses[1] + losses[0]).backward()  # one of them twice
    for name in LEAVES:
        torch.testing.assert_close(leaves[name].grad, 4 * once[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_a_scaled_loss_keeps_small_gradients(config: LossConfig, dtype: torch.dtype) -> None:
    """The scale of a loss (GradScaler) is there so that float16 gradients don't vanish."""
    data = with_layer(batch(0, [4] * 6, VOCAB, dtype), {"bias": True}, 0, dtype) | {"normalizer": 1e8}
    data = brought_near(data, config)
    exact = run(in_float64(data), config, times=2.0**20, impl="reference")
    ours, theirs = (run(data, config, times=2.0**20, impl=impl) for impl in ("native", "reference"))
    errors = Errors()
    for name in LEAVES:
        errors.add(name, ours[1][name], theirs[1][name], exact[1][name])
    errors.check()


def test_a_second_backward_pass_is_right_or_refused() -> None:
    data = with_layer(batch(0, (4, 7), VOCAB, torch.float32), {}, 0, torch.float32)
    for config in (FULL, COUPLED):
        hidden = data["hidden"].clone().requires_grad_()
        loss, _ = linear_grpo_loss(**{**data, "hidden": hidden}, config=config, impl="native")
        (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        if config is FULL:
            with pytest.raises(RuntimeError, match="a backward pass has taken them"):
                loss.backward()
        else:
            torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], once, rtol=0, atol=0)


@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_the_gradient_of_the_gradient_is_refused(config: LossConfig) -> None:
    data = with_layer(batch(0, (4, 7), VOCAB, torch.float32), {}, 0, torch.float32)
    hidden = data["hidden"].requires_grad_()
    loss, _ = linear_grpo_loss(**data, config=config, impl="native")
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (hidden.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_graph_without_a_gradient(impl: str) -> None:
    data = with_layer(batch(0, (4, 7), VOCAB, torch.float32), {}, 0, torch.float32)
    data["weight"].requires_grad_()
    expected = run(data, FULL, impl="reference")
    for config in (FULL, COUPLED):
        with torch.no_grad():
            loss, outputs = linear_grpo_loss(**data, config=config, impl=impl)
        assert not loss.requires_grad
        torch.testing.assert_close(outputs.logprobs, expected[2].logprobs, rtol=1e-5, atol=1e-5)


# --- dtypes ---


@pytest.mark.parametrize("config", [FULL, COUPLED])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_autocast(states: torch.dtype, config: LossConfig) -> None:
    """Products in bfloat16, gradients in the dtypes of the leaves, as wrong as torch's own at most twice."""
    data = with_layer(batch(0, [8] * 6, VOCAB, torch.float32), {"bias": True, "rows": 6}, 0, torch.float32)
    data["hidden"] = data["hidden"].to(states)
    exact = run(in_float64(data), config, impl="reference")
    found = []
    for impl in ("native", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(run(data, config, impl=impl))
    errors = Errors()
    for name in LEAVES:
        assert found[0][1][name].dtype == data[name].dtype
        errors.add(name, found[0][1][name], found[1][1][name], exact[1][name])
    for name in ("logprobs", "entropy"):
        errors.add(name, *(getattr(one[2], name) for one in (*found, exact)))
    errors.check()


def test_autocast_makes_its_products_in_half_precision() -> None:
    data = with_layer(batch(0, (8, 8), VOCAB, torch.float32), {}, 0, torch.float32)
    rounded = run(data | {name: data[name].bfloat16() for name in ("hidden", "weight")}, FULL, impl="native")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(data, FULL, impl="native")
    torch.testing.assert_close(found[2].logprobs, rounded[2].logprobs, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_of_the_results(impl: str) -> None:
    for dtype in FAST_DTYPES:
        data = with_layer(batch(0, (8, 8), VOCAB, dtype), {"bias": True}, 0, dtype)
        loss, gradients, outputs = run(data, FULL, impl=impl)
        assert {gradient.dtype for gradient in gradients.values() if gradient is not None} == {dtype}
        assert loss.dtype == outputs.logprobs.dtype == outputs.entropy.dtype == torch.float32


# --- sizes and layouts ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_nothing_to_learn_from_gives_zero_gradients(config: LossConfig, tokens: int, impl: str) -> None:
    data = batch(0, (tokens,) if tokens else (), VOCAB, torch.float32)
    data = with_layer(data, {"bias": True, "rows": 2}, 0, torch.float32)
    data["mask"] = torch.zeros(tokens, dtype=torch.bool)
    data["token_ids"] = data["token_ids"] - 100
    loss, gradients, outputs = run(data, config, impl=impl)
    assert float(loss) == 0
    for name in LEAVES:
        assert gradients[name].shape == data[name].shape and not gradients[name].any()
    assert outputs.logprobs.shape == (tokens,) and not outputs.logprobs.any() and not outputs.entropy.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_what_lies_outside_the_mask_does_not_matter(config: LossConfig, impl: str) -> None:
    data = with_layer(batch(1, (5, 3), VOCAB, torch.float32), {"rows": 3}, 0, torch.float32)
    mask = data["mask"]
    assert not mask.all()
    expected = run(data, config, impl=impl)
    changed = {name: data[name].where(mask, math.nan) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    changed["token_ids"] = data["token_ids"].where(mask, -100)
    found = run(data | changed, config, impl=impl)
    same(found, expected, rtol=0, atol=0)
    assert not found[1]["hidden"][~mask].any()


@pytest.mark.parametrize("config", [FULL, COUPLED])
def test_any_layout(config: LossConfig) -> None:
    data = with_layer(batch(0, (5, 3), VOCAB, torch.float32), {"bias": True, "rows": 3}, 0, torch.float32)
    data["temperature"] = torch.full((8,), 0.7)
    expected = run(data, config, impl="native")
    strided = {
        name: torch.stack([value, value], dim=-1)[..., 0]
        for name, value in data.items()
        if isinstance(value, Tensor) and name not in LEAVES
    }
    strided["temperature"] = torch.tensor(0.7).expand(8)
    leaves = {name: torch.stack([data[name]] * 2, dim=-1).requires_grad_() for name in LEAVES}
    views = {name: leaf[..., 0] for name, leaf in leaves.items()}
    views["weight"] = leaves["weight"][..., 0].t().contiguous().t()
    loss, _ = linear_grpo_loss(**{**data, **strided, **views}, config=config, impl="native")
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad[..., 0], expected[1][name], rtol=1e-5, atol=1e-7)
        assert not leaf.grad[..., 1].any()


def test_rewards_in_place_of_advantages() -> None:
    data = with_layer(batch(0, (5, 3, 1, 1), VOCAB, torch.float32), {"rows": 3}, 0, torch.float32)
    del data["advantages"]
    data |= {"rewards": torch.tensor([0.0, 1.0, 1.0, math.nan]), "group_offsets": torch.tensor([0, 2, 4])}
    for config in (FULL, COUPLED):
        same(run(data, config, impl="native"), run(data, config, impl="reference"), rtol=1e-4, atol=1e-6)


# --- log-probabilities ---


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_token_logprobs_are_those_of_the_projected_logits(entropy: bool, dtype: torch.dtype) -> None:
    errors = Errors()
    for place, layer in enumerate(covering(LAYERS)):
        data = with_layer(batch(place, (4, 7), VOCAB, dtype), layer, place, dtype)
        call = {name: data[name] for name in ("logit_scale", "softcap", "banned_ids", "memory_budget")}
        weights = torch.randn(2, 11, generator=torch.Generator().manual_seed(place))
        found = []
        for impl in ("native", "reference", "exact"):
            given = in_float64(data) if impl == "exact" else data
            leaves = {k: None if given[k] is None else given[k].detach().clone().requires_grad_() for k in LEAVES}
            result = linear_token_logprobs(
                leaves["hidden"], leaves["weight"], data["token_ids"], torch.linspace(0.5, 2, 11), entropy=entropy,
                bias=leaves["bias"], **call, impl="reference" if impl == "exact" else impl,
            )  # fmt: skip
            results = result if entropy else (result,)
            sum((w * r).sum() for w, r in zip(weights, results, strict=False)).backward()
            found.append([*results, *(leaf.grad for leaf in leaves.values() if leaf is not None)])
        for number, values in enumerate(zip(*found, strict=True)):
            errors.add(f"{number - len(found[0])}", *values)
    errors.check()


def test_token_logprobs_of_logits_and_hidden_states_are_the_same() -> None:
    data = with_layer(batch(0, (4, 8), VOCAB, torch.float32), {"bias": True, "rows": 5}, 0, torch.float32)
    hidden, ids = data["hidden"].view(3, 4, WIDTH), data["token_ids"].view(3, 4)
    temperature = torch.linspace(0.5, 2, 12).view(3, 4)
    for impl in IMPLS:
        found = linear_token_logprobs(
            hidden, data["weight"], ids, temperature, entropy=True, bias=data["bias"], memory_budget=3000, impl=impl
        )
        expected = token_logprobs(project(data).view(3, 4, VOCAB), ids, temperature, entropy=True, impl="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        nothing = linear_token_logprobs(hidden[:0], data["weight"], ids[:0], impl=impl)
        assert nothing.shape == (0, 4)


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_token_logprobs_with_one_of_two_used(used: str) -> None:
    data = with_layer(batch(0, (4, 8), VOCAB, torch.float32), {}, 0, torch.float32)
    found = []
    for impl in IMPLS:
        hidden = data["hidden"].clone().requires_grad_()
        results = linear_token_logprobs(
            hidden, data["weight"], data["token_ids"], entropy=True, memory_budget=3000, impl=impl
        )
        results[used == "entropy"].sum().backward()
        found.append(hidden.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


# --- refusals ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 4, WIDTH)}, ValueError, r"packed rows \[tokens, width\]"),
        ({"hidden": torch.ones(7, WIDTH)}, ValueError, r"hidden of shape \(7, 12\)"),
        ({"weight": torch.ones(VOCAB, 3)}, ValueError, r"weight has shape \(150, 3\), must be \[vocab, width\] with"),
        ({"weight": torch.ones(VOCAB)}, ValueError, r"weight has shape \(150,\)"),
        ({"weight": torch.ones(VOCAB, WIDTH).bfloat16()}, TypeError, "weight is torch.bfloat16 and hidden torch.float"),
        ({"bias": torch.ones(3)}, ValueError, r"bias has shape \(3,\), must be \[vocab\]"),
        ({"bias": torch.ones(VOCAB, dtype=torch.int64)}, TypeError, "bias must be floating point"),
        ({"bias": torch.ones(VOCAB).double()}, TypeError, "bias is torch.float64 and hidden torch.float32"),
        ({"token_ids": torch.zeros(8, dtype=torch.int32)}, TypeError, "token_ids must be int64"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale = 0"),
        ({"softcap": 0.0}, ValueError, r"softcap = 0.0, must be above 0"),
        ({"softcap": -1.0}, ValueError, r"softcap = -1.0, must be above 0"),
        ({"banned_ids": torch.ones(2)}, TypeError, "banned_ids must be int64"),
        ({"banned_ids": torch.tensor([VOCAB])}, (ValueError, IndexError), "banned|out of"),
        ({"memory_budget": 0}, ValueError, "memory_budget = 0 bytes"),
        ({"temperature": -1.0}, ValueError, "temperature = -1.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \(3,\)"),
        ({"ref_logprobs": None}, ValueError, "needs ref_logprobs"),
    ],
)
def test_refusals(change: dict[str, Any], error: Any, message: str, impl: str) -> None:
    data = with_layer(batch(0, (5, 3), VOCAB, torch.float32), {}, 0, torch.float32)
    with pytest.raises(error, match=message):
        linear_grpo_loss(**{**data, "config": FULL, "impl": impl, **change})


def test_refusals_of_log_probabilities() -> None:
    ids, weight = torch.zeros(3, dtype=torch.int64), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"must be \[\.\.\., width\]"):
        linear_token_logprobs(torch.ones(4, 2), weight, ids)
    with pytest.raises(ValueError, match=r"temperature has shape \(2,\)"):
        linear_token_logprobs(torch.ones(3, 2), weight, ids, torch.ones(2))
    with pytest.raises(NotImplementedError, match=r"got torch\.float64"):
        linear_token_logprobs(torch.ones(3, 2).double(), weight.double(), ids, impl="native")
