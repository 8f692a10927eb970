"""The calls as a compiler and a GPU see them: whole graphs under torch.compile, one compilation for many lengths,
operators that keep torch.library's rules, and no waiting for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medbridge_kernels import (
    LossConfig,
    group_advantages,
    grpo_loss,
    linear,
    linear_grpo_loss,
    linear_token_logprobs,
    ops,
    token_logprobs,
    triton,
)
from tests.kernels.conftest import batch, offsets_of, packed_ids

VOCAB, WIDTH = 20, 6
FULL = LossConfig(kl_coef=0.1, entropy_coef=0.1, correction="truncate", off_policy_threshold=0.5, normalize="tokens")
PLAIN = LossConfig(kl_coef=0.1, normalize="tokens")
GSPO = LossConfig.preset("gspo", correction="mask", correction_level="sequence")


def of_length(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """All inputs of a batch of three sequences; the leaves are named as the arguments."""
    data = batch(seed, (tokens // 2, tokens - tokens // 2, 0), VOCAB, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return {name: value for name, value in data.items() if name != "temperature"} | {
        "temperature": torch.linspace(0.5, 2, tokens),
        "hidden": torch.randn(tokens, WIDTH, generator=generator),
        "weight": torch.randn(VOCAB, WIDTH, generator=generator),
        "rewards": torch.rand(3, generator=generator),
        "group_offsets": offsets_of([2, 1]),
    }


PER_TOKEN = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "mask", "temperature", "sequence_ids")


def loss_of(data: dict[str, Tensor], config: LossConfig, impl: str, **options: Any) -> Tensor:
    given = {name: data[name] for name in PER_TOKEN}
    loss, outputs = grpo_loss(
        data["logits"] * 1.5, data["token_ids"], **given, rewards=data["rewards"],
        group_offsets=data["group_offsets"], config=config, impl=impl, **options,
    )  # fmt: skip
    return loss + outputs.metrics["kl"] + outputs.entropy.sum()


def linear_loss_of(data: dict[str, Tensor], config: LossConfig, impl: str) -> Tensor:
    given = {name: data[name] for name in PER_TOKEN}
    loss, outputs = linear_grpo_loss(
        data["hidden"], data["weight"], data["token_ids"], **given, advantages=data["advantages"],
        bias=data["weight"][:, 0], softcap=5.0, memory_budget=3 * 2 * 4 * VOCAB, config=config, impl=impl,
    )  # fmt: skip
    return loss + outputs.metrics["ratio_max"]


def entropies_of(data: dict[str, Tensor], impl: str) -> Tensor:
    logprobs, entropy = token_logprobs(data["logits"], data["token_ids"], data["temperature"], entropy=True, impl=impl)
    return (logprobs * entropy).sum() + token_logprobs(data["logits"], data["token_ids"], impl=impl).sum()


def linear_entropies_of(data: dict[str, Tensor], impl: str) -> Tensor:
    logprobs, entropy = linear_token_logprobs(
        data["hidden"], data["weight"], data["token_ids"], data["temperature"], entropy=True, logit_scale=0.5,
        memory_budget=300, impl=impl,
    )  # fmt: skip
    return (logprobs * entropy).sum()


def advantages_of(data: dict[str, Tensor], impl: str) -> Tensor:
    return group_advantages(data["rewards"] * 2, data["group_offsets"], baseline="loo", impl=impl)


CALLS: dict[str, Callable[[dict[str, Tensor], str], Tensor]] = {
    "group_advantages": advantages_of,
    "token_logprobs": entropies_of,
    "grpo_loss": lambda data, impl: loss_of(data, FULL, impl),
    "grpo_loss in place": lambda data, impl: loss_of(data, FULL, impl, inplace=impl != "reference"),
    "gspo": lambda data, impl: loss_of(data, GSPO, impl),
    "linear_grpo_loss": lambda data, impl: linear_loss_of(data, PLAIN, impl),
    "linear gspo": lambda data, impl: linear_loss_of(data, GSPO, impl),
    "linear_token_logprobs": linear_entropies_of,
}
LEAVES = ("logits", "hidden", "weight")


def results(call: Callable[..., Tensor], data: dict[str, Tensor], impl: str) -> list[Tensor | None]:
    """Of a call, with the gradients of what can have one."""
    data = {name: value.detach().clone().requires_grad_(name in LEAVES) for name, value in data.items()}
    found = call(data, impl)
    if found.requires_grad:
        found.backward()
    return [found.detach(), *(data[name].grad for name in LEAVES)]


@pytest.fixture
def compiler() -> Iterator[SimpleNamespace]:
    """A back end of torch.compile that counts its calls; it takes autograd and shapes apart as inductor does."""
    torch._dynamo.reset()
    counted = SimpleNamespace(calls=0)

    def compile_graph(graph: Any, inputs: Any) -> Any:
        counted.calls += 1
        return aot_eager(graph, inputs)

    counted.backend = compile_graph
    yield counted
    torch._dynamo.reset()


# The reference is much more to trace.
WHOLE = ["group_advantages", "token_logprobs", "grpo_loss in place", "linear_grpo_loss", "linear_token_logprobs"]


@pytest.mark.parametrize(("name", "impl"), [*((name, "native") for name in WHOLE), ("grpo_loss", "reference")])
def test_one_graph_for_all_lengths(name: str, impl: str, compiler: SimpleNamespace) -> None:
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler.backend)
    first = None
    # The first length is no other size's, lest the compiler take the two for one.
    for place, tokens in enumerate((53, *range(2, 51)) if impl == "native" else (53, 2, 30)):
        data = of_length(tokens, seed=tokens)
        if name == "group_advantages":
            data["rewards"], data["group_offsets"] = torch.rand(tokens), offsets_of([1, tokens - 1])
        found = results(compiled, data, impl)
        if place % 16 == 0:
            torch.testing.assert_close(found, results(call, data, impl), rtol=1e-5, atol=1e-6)
        first = first or compiler.calls  # a compilation may begin anew and call twice
    assert compiler.calls == first


def test_compiled_loss_leaves_its_logits(compiler: SimpleNamespace) -> None:
    """In place is for eager calls: a compiler plans the memory itself."""

    config = LossConfig()

    def call(logits: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, _ = grpo_loss(
            logits * 1.5, data["token_ids"], sequence_ids=data["sequence_ids"], advantages=data["advantages"],
            config=config, inplace=True, impl="native",
        )  # fmt: skip
        return loss, (logits * 1.5).square().sum()

    data = of_length(6)
    compiled = torch.compile(call, fullgraph=True, backend=compiler.backend)
    logits = data["logits"].requires_grad_()
    sum(compiled(logits, data)).backward()
    other = data["logits"].detach().clone().requires_grad_()
    sum(call(other, data)).backward()
    torch.testing.assert_close(logits.grad, other.grad)


# --- torch.library's rules ---


@pytest.mark.parametrize(
    ("entropy", "per_row", "masked", "dtype"),
    [
        (False, False, False, torch.float32),
        (True, True, False, torch.float32),
        (True, False, True, torch.bfloat16),
        (False, True, True, torch.float16),
    ],
)
def test_vocabulary_sweep_keeps_the_rules(entropy: bool, per_row: bool, masked: bool, dtype: torch.dtype) -> None:
    data = of_length(5)
    logits, ids = data["logits"].to(dtype), data["token_ids"]
    keep = data["mask"] if masked else None
    taus = data["temperature"] if per_row else None
    torch.library.opcheck(
        ops.vocabulary_sweep,
        (logits.clone().requires_grad_(), ids, keep, 0.7, taus, entropy, entropy, False, "native"),
    )
    _, entropies, lse = ops.vocabulary_sweep(logits, ids, keep, 0.7, taus, entropy, False, False, "native")
    gradients = (torch.ones(5), torch.ones(5)) if entropy else (torch.ones(5), None)
    for op in (ops.vocabulary_sweep_backward, ops.vocabulary_sweep_backward_):
        torch.library.opcheck(
            op, (logits.clone(), ids, keep, 0.7, taus, lse, entropies if entropy else None, *gradients, "native")
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_group_advantages_keeps_the_rules(dtype: torch.dtype) -> None:
    rewards = torch.rand(3, dtype=dtype)
    torch.library.opcheck(ops.group_advantages, (rewards, offsets_of([2, 1]), "mean", "std", True, 1e-4, "native"))


@pytest.mark.parametrize(
    ("entropy", "with_bias", "dtype"),
    [(False, True, torch.float32), (True, False, torch.float32), (True, True, torch.bfloat16)],
)
def test_linear_sweep_keeps_the_rules(entropy: bool, with_bias: bool, dtype: torch.dtype) -> None:
    data = of_length(5)
    hidden, weight = data["hidden"].to(dtype), data["weight"].to(dtype)
    bias = torch.ones(VOCAB, dtype=dtype) if with_bias else None
    layer = (0.5, 4.0, torch.tensor([1, 2]), 300, dtype, "native")
    leaves = [None if one is None else one.clone().requires_grad_() for one in (hidden, weight, bias)]
    rows = (data["token_ids"], data["mask"], 0.7, None)
    torch.library.opcheck(linear.linear_sweep, (*leaves, *rows, entropy, entropy, *layer))
    _, entropies, lse = linear.linear_sweep(hidden, weight, bias, *rows, entropy, False, *layer)
    gradients = (entropies, torch.ones(5), torch.ones(5)) if entropy else (None, torch.ones(5), None)
    for of_weight in (False, True):
        torch.library.opcheck(
            linear.linear_sweep_backward,
            (hidden, weight, bias, *rows, lse, *gradients, True, of_weight, with_bias, *layer),
        )


# --- no waiting for the device ---


class NoTransfers(TorchDispatchMode):
    """Raises where a value would have to travel between the host and the device, for which a program waits.

    The device is "meta": without values, so that what asks for one (item, a boolean, nonzero, a copy) raises by itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        on_host = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor) and one.is_cpu]
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if any(one.ndim or copies for one in on_host):
            raise AssertionError(f"{func} takes or gives a tensor on the host")
        return out


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device without values passes for a GPU; kernels that are launched outside an operator do nothing."""

    def sweep(logits: Tensor, token_ids: Tensor, keep: Any, temperature: Any, entropy: bool) -> tuple[Tensor, ...]:
        row = logits.new_empty(token_ids.shape, dtype=torch.float32)
        return row, row.new_empty(token_ids.shape if entropy else (0,)), row.new_empty(token_ids.shape)

    kernels = SimpleNamespace(sweep=sweep, sweep_backward=lambda *rest: None)
    monkeypatch.setattr(ops, "backend", lambda impl: kernels)
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    # autocast knows no device of this name
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *rest: False)
    monkeypatch.setattr(torch, "autocast", lambda *rest, **options: contextlib.nullcontext())


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", list(CALLS))
def test_no_call_waits_for_the_device(name: str, impl: str) -> None:
    data = {key: value.to("meta") for key, value in of_length(12).items()}
    with NoTransfers():
        found = results(CALLS[name], data, impl)
    assert all(one is None or one.is_meta for one in found)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("config", [PLAIN, FULL, GSPO, LossConfig(normalize="constant")])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_no_loss_waits_for_the_device(level: str, config: LossConfig, impl: str) -> None:
    data = {key: value.to("meta") for key, value in of_length(12).items()}
    given = {name: data[name] for name in PER_TOKEN}
    advantages = torch.empty(12 if level == "token" else 3, device="meta")
    with NoTransfers():
        for hidden in (False, True):
            normalizer = torch.empty((), device="meta")
            leaf = data["hidden" if hidden else "logits"].detach().requires_grad_()
            call = linear_grpo_loss if hidden else grpo_loss
            first = (leaf, data["weight"]) if hidden else (leaf,)
            loss, _ = call(
                *first, data["token_ids"], **given, advantages=advantages, advantage_level=level,
                normalizer=normalizer, config=config, impl=impl,
            )  # fmt: skip
            (loss / 4).backward()
            assert leaf.grad is not None and leaf.grad.is_meta


def test_what_would_wait_is_found() -> None:
    """The two tests above can fail: each of these waits, and raises on such tensors."""
    values = torch.empty(3, device="meta")
    for wait in (
        lambda: values.sum().item(),
        lambda: bool((values > 0).any()),
        lambda: values[values > 0],
        lambda: values.nonzero(),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: torch.repeat_interleave(values, packed_ids([3]).to("meta")),
        lambda: torch.tensor([1.0, 2.0, 3.0]).to(values.device),
        lambda: torch.tensor(2.0).to(values.device) * values,
        lambda: values + torch.ones(3),
    ):
        with NoTransfers(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            wait()
