"""Models whose norms, MLPs and rotary embeddings are Liger's, in Triton's interpreter; `test_liger.py` runs this file.

Three places of Liger do not run there as they are, and are stood in for: libdevice's rsqrt and tanh, scalars of type
float (which have methods on a GPU), and the check that its tensors are on one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from medbridge.data import ImageCache, Item, PromptSettings
from medbridge.model import LoraSettings, Policy, liger
from medbridge.model.encoded import EncodedPrompt
from medbridge.train.parameters import add_adapters

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
PROMPT = PromptSettings(answer_style="text", system="")


def rsqrt(x: Any) -> Any:
    return tl.rsqrt(x)


def tanh(x: Any) -> Any:
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm

    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", rsqrt)
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", tanh)
    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(liger, "_on_gpu", lambda tensor: True)


@pytest.fixture
def rows(
    train_items: list[Item], images: ImageCache
) -> Callable[[Policy], tuple[list[EncodedPrompt], list[list[int]]]]:
    def make(policy: Policy) -> tuple[list[EncodedPrompt], list[list[int]]]:
        item = train_items[0]
        [prompt] = policy.encode(item, [tuple(range(len(item.options or ())))], PROMPT, images)
        return [prompt, prompt], [[5, 6], [8, 10, 11]]

    return make


def moved(policy: Policy) -> Policy:
    """With weights so far from their first values that norms and gates matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def outcome(policy: Policy, prompts: list[EncodedPrompt], completions: list[list[int]]) -> dict[str, Tensor]:
    """Hidden states and the gradient of every parameter, from a padded pass and a packed one."""
    policy.model.zero_grad()
    padded = policy.completion_hidden(policy.collate(prompts, completions))
    packed = policy.packed_hidden(policy.pack(prompts, completions))
    weights = torch.linspace(-1, 1, padded.numel(), dtype=padded.dtype).view_as(padded)
    ((padded * weights).sum() + (packed * weights.flip(0)).sum()).backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return {**found, "padded": padded.detach(), "packed": packed.detach()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Error of each by norm, relative to its own; to a millionth of the largest where the true one is nothing."""
    assert found.keys() == exact.keys()
    least = 1e-6 * max(float(value.norm()) for value in exact.values())
    return {name: float((found[name] - value).norm() / value.norm().clamp_min(least)) for name, value in exact.items()}


def in_float64(policy: Policy) -> Policy:
    model = copy.deepcopy(policy.model).double()
    return Policy(model, policy.processor, path=policy.path, compute_dtype=torch.float64)


def assert_as_exact(policy: Policy, given: tuple[list[EncodedPrompt], list[list[int]]]) -> None:
    """With Liger's kernels the error against float64 is of the size that it has without them."""
    exact = outcome(in_float64(policy), *given)
    plain = errors(outcome(policy, *given), exact)
    fused = errors(outcome(bound(policy), *given), exact)
    for name, error in fused.items():
        assert error < 2 * plain[name] + 1e-6, (name, error, plain[name])
    assert max(fused.values()) < 1e-3


def bound(policy: Policy) -> Policy:
    layers = policy.model.config.get_text_config().num_hidden_layers
    kinds = liger.use_liger(policy.model)
    assert kinds["norm"] > 2 * layers and kinds["mlp"] >= layers and kinds["rotary"] == layers
    return policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_and_gradients_are_those_of_transformers(
    architecture: str, load_policy: Callable[..., Policy], rows: Callable[[Policy], Any]
) -> None:
    policy = moved(load_policy(architecture, trainable=True))
    assert_as_exact(policy, rows(policy))


def test_adapters_and_gradient_checkpointing(load_policy: Callable[..., Policy], rows: Callable[[Policy], Any]) -> None:
    policy = load_policy(trainable=True)
    add_adapters(policy, LoraSettings(rank=2), seed=0)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    moved(policy)
    assert_as_exact(policy, rows(policy))
    assert any("lora_B" in name for name, parameter in policy.model.named_parameters() if parameter.requires_grad)


def test_a_copy_computes_with_its_own_weights(
    load_policy: Callable[..., Policy], rows: Callable[[Policy], Any]
) -> None:
    policy = bound(moved(load_policy(trainable=True)))
    given = rows(policy)
    first = policy.packed_hidden(policy.pack(*given))
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    other = Policy(model, policy.processor, path=policy.path, compute_dtype=torch.float32)
    assert torch.equal(other.packed_hidden(other.pack(*given)), first)
    assert not torch.equal(policy.packed_hidden(policy.pack(*given)), first)


def test_the_kernels_are_called(
    load_policy: Callable[..., Policy], rows: Callable[[Policy], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken kernel is seen: none of the three kinds is only bound."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    policy = load_policy(trainable=True)
    liger.use_liger(policy.model)
    called = set()
    for function in (LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction):
        real = function.apply

        def seen(*inputs: Any, name: str = function.__name__, real: Any = real) -> Any:
            called.add(name)
            return real(*inputs)

        monkeypatch.setattr(function, "apply", seen)
    prompts, completions = rows(policy)
    policy.packed_hidden(policy.pack(prompts[:1], completions[:1]))
    assert called == {"LigerRMSNormFunction", "LigerRopeFunction", "LigerSiLUMulFunction"}


def test_a_model_beside_it_stays_as_it_is(load_policy: Callable[..., Policy], tmp_path: Path) -> None:
    one, other = load_policy(trainable=True), load_policy(trainable=True)
    liger.use_liger(one.model)
    for module in other.model.modules():
        assert "forward" not in vars(module)
