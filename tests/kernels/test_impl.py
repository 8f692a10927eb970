"""The back ends by name, what each of them serves, and that they give the same again: bit by bit, on each run and with
any number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from medbridge_kernels import (
    LossConfig,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    native,
    token_logprobs,
    triton,
)
from medbridge_kernels.impl import FAST_DTYPES, choose
from tests.kernels.conftest import batch, offsets_of


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medbridge_kernels.impl._warned", set())
    monkeypatch.setattr(triton, "interpreted", lambda: False)


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """What the choice looks at of a tensor."""

    class Stub:
        pass

    stub: Any = Stub()
    stub.device, stub.dtype = torch.device(device), dtype
    return stub


# --- the choice ---


def test_the_extension_is_there() -> None:
    assert native.why_missing() is None


@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_auto_takes_the_fast_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", on("cpu", dtype)) == "native"
    monkeypatch.setattr(triton, "why_missing", lambda: None)
    assert choose("auto", on("cuda:0", dtype)) == "triton"


def test_auto_takes_the_reference_for_the_rest_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", on("cpu", torch.float64)) == "reference"
        assert choose("auto", on("cuda:0", torch.float64)) == "reference"
        assert choose("auto", on("meta")) == "reference"
        assert choose("auto", on("cpu", torch.int64)) == "reference"


def test_auto_is_the_fast_one_in_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without `impl` go through the extension."""
    data = batch(dtype=torch.float32)
    monkeypatch.setattr(native._native, "sweep", None)
    for call in (
        lambda: grpo_loss(**data, config=LossConfig()),
        lambda: token_logprobs(data["logits"], data["token_ids"]),
        lambda: linear_token_logprobs(torch.ones(8, 2), torch.ones(7, 2), data["token_ids"]),
    ):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            call()


@pytest.mark.parametrize(("device", "name"), [("cpu", "native"), ("cuda:0", "triton")])
def test_a_missing_back_end_is_warned_of_once(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr({"native": native, "triton": triton}[name], "why_missing", lambda: "no luck; do this")
    with pytest.warns(RuntimeWarning, match="slow reference: no luck; do this") as caught:
        for _ in range(3):
            assert choose("auto", on(device)) == "reference"
    assert len(caught) == 1
    with pytest.raises(NotImplementedError, match=f"impl='{name}' isn't available: no luck; do this"):
        choose(name, on(device))


def test_missing_back_ends_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_IMPORT_ERROR", "No module named '_native'")
    reason = native.why_missing()
    assert reason is not None and "No module named '_native'" in reason and "pip install --editable ." in reason
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    reason = triton.why_missing()
    assert reason is not None and "pip install triton" in reason


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch(dtype=torch.float32)
    expected, _ = grpo_loss(**data, config=LossConfig(), impl="reference")
    monkeypatch.setattr(native, "why_missing", lambda: "no luck")
    loss, _ = grpo_loss(**data, config=LossConfig())
    assert loss == expected


def test_native_is_refused_where_it_does_not_serve() -> None:
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(NotImplementedError, match=f"it takes float32, bfloat16, float16, got {dtype}"):
            choose("native", on("cpu", dtype))
    with pytest.raises(NotImplementedError, match="it serves CPU tensors, got one on cuda:0"):
        choose("native", on("cuda:0"))
    with pytest.raises(NotImplementedError, match="it serves CPU tensors, got one on meta"):
        token_logprobs(torch.ones(2, 3, device="meta"), torch.ones(2, dtype=torch.int64, device="meta"), impl="native")


def test_triton_is_refused_where_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "why_missing", lambda: None)
    with pytest.raises(NotImplementedError, match=r"it serves GPU tensors .* got one on cpu"):
        choose("triton", on("cpu"))
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    assert choose("triton", on("cpu")) == "triton"
    assert choose("auto", on("cpu")) == "native"
    with pytest.raises(NotImplementedError, match=r"got torch\.float64"):
        choose("triton", on("cuda:0", torch.float64))


@pytest.mark.parametrize("name", ["cuda", "Native", "", None])
def test_unknown_names(name: Any) -> None:
    with pytest.raises(ValueError, match="must be one of auto, triton, native, reference"):
        choose(name, on("cpu"))


def test_every_function_passes_impl_on() -> None:
    data = batch()  # float64
    ids, weight = data["token_ids"], torch.ones(7, 2, dtype=torch.float64)
    rest = {"sequence_ids": data["sequence_ids"], "advantages": data["advantages"], "config": LossConfig()}
    for call in (
        lambda impl: grpo_loss(**data, config=LossConfig(), impl=impl),
        lambda impl: token_logprobs(data["logits"], ids, impl=impl),
        lambda impl: linear_grpo_loss(torch.ones(8, 2).double(), weight, ids, **rest, impl=impl),
        lambda impl: linear_token_logprobs(torch.ones(8, 2).double(), weight, ids, impl=impl),
    ):
        call("auto")
        call("reference")
        for impl in ("native", "triton"):
            with pytest.raises(NotImplementedError, match=r"got torch\.float64"):
                call(impl)
    rewards = torch.ones(3, dtype=torch.float64)
    for impl in ("auto", "reference", "native"):  # which takes float64 here
        assert group_advantages(rewards, offsets_of([3]), impl=impl).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="it serves GPU tensors"):
        group_advantages(rewards, offsets_of([3]), impl="triton")


# --- the same again ---


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of all functions, at a size that is shared out among threads.

    Those of hidden states apart: torch's matrix products may add up in another order with other threads.
    """
    data = batch(0, (40, 25, 0, 35), 3001, dtype)
    found, of_products = [], []
    for config in (LossConfig(entropy_coef=0.1, kl_coef=0.1), LossConfig.preset("gspo")):
        logits = data["logits"].detach().clone().requires_grad_()
        loss, outputs = grpo_loss(**{**data, "logits": logits}, config=config, impl="native")
        loss.backward()
        found += [loss.detach(), logits.grad, outputs.logprobs, outputs.entropy, *outputs.metrics.values()]
        leaves = [torch.linspace(-1, 1, n * 5).view(n, 5).sin().to(dtype).requires_grad_() for n in (100, 3001)]
        rest = {name: data[name] for name in data if name not in ("logits", "temperature")}
        loss, _ = linear_grpo_loss(*leaves, **rest, config=config, memory_budget=300_000, impl="native")
        loss.backward()
        of_products += [loss.detach(), *(leaf.grad for leaf in leaves)]
    rewards = torch.rand(70_000, generator=torch.Generator().manual_seed(0))
    for scale in ("std", "batch_std"):
        found.append(group_advantages(rewards, offsets_of([5000] * 14), scale=scale, impl="native"))
    return found, of_products


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_bitwise_the_same_on_each_run(dtype: torch.dtype) -> None:
    first, of_products = {}, {}
    for run in range(20):
        threads = 1 + run % 2
        torch.set_num_threads(threads)
        found, products = everything(dtype)
        for known, now in ((first.setdefault(0, found), found), (of_products.setdefault(threads, products), products)):
            for expected, value in zip(known, now, strict=True):
                assert expected is not None and value is not None
                assert torch.equal(expected, value), run
