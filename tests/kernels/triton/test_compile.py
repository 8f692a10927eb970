"""Every shipped kernel compiled ahead of time, with no GPU: what NVIDIA's and AMD's compilers made of it, and that
lengths of the input compile nothing anew and wait for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from medbridge_kernels import LossConfig, triton
from medbridge_kernels.triton import compile

pytestmark = pytest.mark.skipif(triton.interpreted(), reason="the interpreter compiles nothing")
SHIPPED = compile.shipped()


@pytest.fixture(autouse=True)
def fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does anyway, without its warning


@pytest.mark.slow
@pytest.mark.parametrize("target", compile.TARGETS)
@pytest.mark.parametrize("name", ["sweep", "group_advantages", "policy_terms"])
def test_shipped_kernels(name: str, target: str) -> None:
    for label, call in SHIPPED.items():
        if not label.startswith(name):
            continue
        for kernel in compile.compile_shipped(call, target):
            where = f"{label}: {kernel.kernel} on {target}"
            assert kernel.spills == 0, where
            assert 0 < kernel.registers <= 128, where
            assert kernel.shared <= compile.SHARED_MEMORY[target], where
            # Sums that depend on which thread comes first would change from run to run.
            assert not re.search(r"\b(atom|red)\.|atomic_", kernel.intermediate), where
            if name == "sweep":
                check_width(label, kernel, target)


def check_width(label: str, kernel: compile.Compiled, target: str) -> None:
    """All logits that lie in whole tiles come by 16 bytes, and their gradient goes so."""
    wide = "global_load_dwordx4|buffer_load_dwordx4" if target.startswith("gfx") else r"ld\.global\.v4"
    assert re.search(wide, kernel.intermediate), label
    loads, stores = kernel.loads(), kernel.stores()
    assert loads[16] >= 2, label
    assert "backward" not in label or stores[16] >= 2, label
    if "odd" not in label and "float32" not in label:
        # Narrow are the label's logit, and what lies before the first aligned one.
        assert loads.get(2, 0) <= 2, label
        assert stores.get(2, 0) <= 1, label


def lengths_of(call: Callable[[int], Any]) -> dict[str, int]:
    """How often each kernel was compiled for inputs of 50 lengths."""
    with compile.compiling_for("sm_90") as launched:
        for length in range(1, 51):
            call(length)
    # Each compilation makes an object; the launches after it find that object again.
    return {
        name: len({id(k) for k in launched if k.metadata.name == name}) for name in {k.metadata.name for k in launched}
    }


def sweeps(tokens: int) -> None:
    logits, rows = torch.zeros(tokens, 1_000, dtype=torch.bfloat16), torch.zeros(tokens)
    keep = torch.ones(tokens, dtype=torch.bool)
    triton.sweep(logits, rows.long(), keep, rows, True)
    triton.sweep_backward(logits, rows.long(), keep, rows, rows, rows, rows, rows, logits)


def advantages(count: int) -> None:
    offsets = torch.tensor([0, *range(2, count, 3), count])
    triton.group_advantages(torch.zeros(count), offsets, "mean", "batch_std", True, 1e-4 * count)


def policy(tokens: int) -> None:
    rows, ids = torch.zeros(tokens), torch.arange(tokens) // 3
    count = (tokens + 2) // 3
    config = LossConfig(clip_low=0.01 * tokens, kl_coef=0.1 * tokens, delta=5.0 + tokens, normalize="tokens")
    triton.policy_terms(rows, rows, ids, count, torch.zeros(count), False, rows, rows, None, None, None, config)


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (sweeps, {"sweep_kernel", "sweep_backward_kernel"}),
        (advantages, {"batch_moments_kernel", "group_advantages_kernel"}),
        (policy, {"policy_terms_kernel", "join_sums_kernel"}),
    ],
)
def test_lengths_compile_nothing_anew(call: Callable[[int], Any], kernels: set[str]) -> None:
    assert lengths_of(call) == dict.fromkeys(kernels, 1)


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this would wait for the GPU")

    calls = [call for label, call in SHIPPED.items() if "float16" not in label]
    with compile.compiling_for("sm_90") as launched:
        for call in calls:
            call()
        count = len(launched)
        # Tensors are made with torch.tensor in the calls of this test, not in the functions.
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        for call in calls:
            call()
    assert len(launched) == 2 * count


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton.why_missing() is None
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert "pip install triton" in str(triton.why_missing())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        triton.nothing  # noqa: B018
