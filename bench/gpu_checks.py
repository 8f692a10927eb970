"""Checks of every Triton kernel on the device at hand, against the definitions in float64, without a test framework.

Used by gpu_kernels.py. Each check yields what it looked at and the error as a share of what is allowed: twice the error
that plain torch makes in the same dtype, or a few units in the last place where that is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medbridge_kernels import LossConfig, group_advantages, grpo_loss, linear_grpo_loss, linear_token_logprobs
from medbridge_kernels import token_logprobs as kernel_logprobs

Shares = Iterator[tuple[str, float]]
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Scale:
    """Where the checks run, and how large they are."""

    device: str
    vocabs: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    rows: int
    """Of logits in checks of the sweep."""
    shape: tuple[int, int]
    """Tokens and vocabulary in checks of the loss."""
    repeats: int
    large_group: int
    few: bool = False
    """Whether a few configurations of the loss stand for all of them."""

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU = Scale("cuda", (1, 123, 50_257, 151_936, 151_937), ALL_DTYPES, 48, (300, 5003), 20, 5000)
# The interpreter cuts a float32 off where GPUs round it to the nearest bfloat16: that dtype has to wait for them.
INTERPRETER = Scale("cpu", (1, 123, 4099), (torch.float32, torch.float16), 6, (24, 67), 3, 100)
QUICK_INTERPRETER = Scale("cpu", (1, 123), (torch.float32,), 3, (12, 35), 2, 100, few=True)
FEW = ("grpo", "mask token", "everything")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def allowed(found: Tensor, exact: Tensor, rival: Tensor, least: float = 0.0) -> float:
    """Largest error of `found` as a share of what is allowed; infinite where one is not finite and the other is.

    16 units in the last place of a float32 are always allowed, of the largest exact value or of `least`.
    """
    found, rival = found.double(), rival.double()
    finite = exact.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    found, exact, rival = found[finite], exact[finite], rival[finite]
    unit = max(least, float(exact.abs().max()))
    limit = max(2 * float((rival - exact).nan_to_num().abs().max()), 16 * FLOAT32_EPS * unit, 1e-30)
    return float((found - exact).abs().max()) / limit


def shares(what: str, found: dict[str, Tensor], exact: dict[str, Tensor], rival: dict[str, Tensor]) -> Shares:
    for name, value in found.items():
        least = 0.0 if name.startswith("gradient") else 1.0
        yield f"{what}: {name}", allowed(value.detach(), exact[name].detach(), rival[name].detach(), least)


# --- the vocabulary sweep ---


def logits_of(kind: str, rows: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows [rows, vocab] of one kind."""
    noise = torch.randn(rows, vocab, generator=generator(vocab))
    if kind == "constant":
        noise = torch.full((rows, vocab), 3.0)
    elif kind == "peaked":
        noise[:, vocab // 2] += 40.0
    elif kind == "ruled out" and vocab > 2:
        noise[:, 1::2] = float("-inf")
    elif kind == "strided":
        wide = torch.randn(rows, vocab + 7, generator=generator(vocab))
        return wide.mul(2).to(device, dtype)[:, 3 : 3 + vocab]
    return noise.mul(2).to(device, dtype)


def vocabulary_sweep(scale: Scale) -> Shares:
    """Log-probabilities, entropies and the gradient of the logits."""
    for dtype in scale.dtypes:
        for vocab in scale.vocabs:
            ids = 2 * torch.randint((vocab + 1) // 2, (scale.rows,), generator=generator(1))  # of those not ruled out
            g, h = (torch.randn(scale.rows, generator=generator(seed)).to(scale.device) for seed in (2, 3))
            g[0] = h[0] = 0.0  # a row without a gradient
            per_token = torch.linspace(0.5, 2.0, scale.rows, device=scale.device)
            for kind in ("spread", "peaked", "constant", "ruled out", "strided"):
                logits = logits_of(kind, scale.rows, vocab, dtype, scale.device)
                temperature = per_token if kind in ("strided", "peaked") else 0.7
                found, rival, exact = (
                    sweep_of(impl, rows, ids.to(scale.device), temperature, g, h)
                    for impl, rows in (("triton", logits), ("reference", logits), ("reference", logits.double()))
                )
                yield from shares(f"{dtype} {vocab} {kind}", found, exact, rival)


def sweep_of(
    impl: Any, logits: Tensor, ids: Tensor, temperature: float | Tensor, g: Tensor, h: Tensor
) -> dict[str, Tensor]:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = kernel_logprobs(logits, ids, temperature, entropy=True, impl=impl)
    (grad,) = torch.autograd.grad((logprobs * g + entropy * h).sum(), logits)
    return {"log-probability": logprobs, "entropy": entropy, "gradient": grad}


def many_rows(scale: Scale) -> Shares:
    """More rows than fit the second dimension of a grid."""
    rows = 70_000 if scale.on_gpu else 70
    logits = logits_of("spread", rows, 123, torch.float32, scale.device)
    ids = torch.arange(rows, device=scale.device) % 123
    ones = torch.ones(rows, device=scale.device)
    found, rival, exact = (
        sweep_of(impl, values, ids, 1.0, ones, ones)
        for impl, values in (("triton", logits), ("reference", logits), ("reference", logits.double()))
    )
    yield from shares(f"{rows} rows", found, exact, rival)


# --- the loss ---


@dataclass(frozen=True)
class Batch:
    """A step of ragged sequences in groups."""

    logits: Tensor
    arguments: dict[str, Any]
    """Of grpo_loss, without a configuration."""

    @classmethod
    def random(cls, scale: Scale, dtype: torch.dtype = torch.float32, shape: tuple[int, int] | None = None) -> Batch:
        rows, vocab = shape or scale.shape
        draw = generator(7)
        lengths = torch.randint(1, 9, (rows,), generator=draw)
        sequence_ids = torch.repeat_interleave(torch.arange(rows), lengths)[:rows]
        sequences = int(sequence_ids[-1]) + 1
        logits = torch.randn(rows, vocab, generator=draw).mul(2).to(dtype)
        ids = torch.randint(vocab, (rows,), generator=draw)
        near = logits.double().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1).float()
        old, ref, rollout = (near + 0.3 * torch.randn(rows, generator=draw) for _ in range(3))
        rollout[1] = float("nan")
        mask = torch.rand(rows, generator=draw) < 0.8
        arguments = {
            "token_ids": ids.where(mask, -100), "sequence_ids": sequence_ids, "mask": mask, "old_logprobs": old,
            "ref_logprobs": ref, "rollout_logprobs": rollout, "rewards": torch.rand(sequences, generator=draw),
            "group_offsets": torch.tensor([0, 1, max(1, sequences // 2), sequences]),
        }  # fmt: skip
        return cls(logits.to(scale.device), {name: value.to(scale.device) for name, value in arguments.items()})


def configurations() -> dict[str, LossConfig]:
    """Every variant and every option."""
    preset = LossConfig.preset
    names = ("grpo", "bnpo", "dapo", "cispo", "gspo", "sapo")
    found = {name: preset(name) for name in names}
    found |= {f"KL {k}": preset("grpo", kl_coef=0.05, kl_estimator=k) for k in ("k1", "k2", "k3")}
    found["KL corrected"] = preset("grpo", kl_coef=0.05, kl_bias_correction=True)
    found |= {
        f"{correction} {level}": preset(
            "dapo", correction=correction, correction_level=level, correction_cap=1.3, correction_floor=0.5
        )
        for correction in ("truncate", "mask")
        for level in ("token", "sequence")
    }
    found |= {
        "delta": preset("grpo", delta=1.5),
        "entropy": preset("bnpo", entropy_coef=0.01),
        "off-policy": preset("gspo", off_policy_threshold=0.05),
        "leave-one-out": preset("grpo", baseline="loo", scale="batch_std"),
        "everything": preset(
            "sapo", ratio_level="sequence", kl_coef=0.1, kl_estimator="k2", entropy_coef=0.02, correction="truncate",
            correction_level="sequence", off_policy_threshold=0.1,
        ),
    }  # fmt: skip
    return found


def loss_of(impl: Any, batch: Batch, config: LossConfig, **options: Any) -> dict[str, Tensor]:
    """Everything that grpo_loss gives, and the gradient of 3 x the loss."""
    logits = batch.logits.detach().requires_grad_()
    arguments = {name: value for name, value in (batch.arguments | options).items() if value is not None}
    loss, outputs = grpo_loss(logits, config=config, impl=impl, **arguments)
    (grad,) = torch.autograd.grad(3 * loss, logits)
    outputs_found = {"log-probability": outputs.logprobs, "entropy": outputs.entropy, **outputs.metrics}
    return {"loss": loss, "gradient": grad, **outputs_found}


def double(batch: Batch) -> Batch:
    arguments = {name: t.double() if t.is_floating_point() else t for name, t in batch.arguments.items()}
    return Batch(batch.logits.double(), arguments)


def losses(scale: Scale) -> Shares:
    """Every variant and option, and every form of its input."""
    forms: dict[str, dict[str, Any]] = {
        "": {},
        " no old": {"old_logprobs": None},
        " own count": {"normalizer": 100.0},
        " count on the device": {"normalizer": torch.tensor(100.0, device=scale.device)},
        " temperatures": {"temperature": torch.linspace(0.5, 2.0, scale.shape[0], device=scale.device)},
    }
    constant = {"dr_grpo": (LossConfig.preset("dr_grpo"), {" own count": forms[" own count"]})}
    cases = {name: (config, forms) for name, config in configurations().items()} | constant
    for dtype in scale.dtypes:
        batch = Batch.random(scale, dtype)
        for name, (config, its_forms) in cases.items():
            if scale.few and name not in FEW:
                continue
            if not scale.on_gpu and name not in ("grpo", "dr_grpo", "everything"):  # the interpreter is slow
                its_forms = {"": {}} if dtype == torch.float32 else {}
            for form, options in its_forms.items():
                found, rival, exact = (
                    loss_of(impl, values, config, **options)
                    for impl, values in (("triton", batch), ("reference", batch), ("reference", double(batch)))
                )
                yield from shares(f"{name}{form} {dtype}", found, exact, rival)
    batch = Batch.random(scale)
    per_token = {
        "rewards": None,
        "group_offsets": None,
        "advantage_level": "token",
        "advantages": batch.logits[:, 0].clone(),
    }
    config = LossConfig.preset("grpo")
    yield from shares(
        "advantages per token",
        loss_of("triton", batch, config, **per_token),
        loss_of("reference", double(batch), config, **per_token),
        loss_of("reference", batch, config, **per_token),
    )


def linear_losses(scale: Scale) -> Shares:
    """The loss and log-probabilities from hidden states, in several chunks."""
    draw = generator(11)
    for dtype in scale.dtypes[: 2 if scale.on_gpu else 1]:
        batch = Batch.random(scale, dtype)
        vocab, width = batch.logits.shape[1], 64
        tensors = [
            torch.randn(shape, generator=draw) for shape in ((len(batch.logits), width), (vocab, width), (vocab,))
        ]
        hidden, weight, bias = ((0.3 * tensor).to(scale.device, dtype).requires_grad_() for tensor in tensors)
        layers: dict[str, dict[str, Any]] = {
            "plain": {},
            "bias": {"bias": bias},
            "soft cap": {"bias": bias, "softcap": 5.0, "logit_scale": 0.8},
            "banned": {"banned_ids": torch.tensor([vocab - 1], device=scale.device)},
        }
        ids = batch.arguments["token_ids"] % (vocab - 1)
        arguments = batch.arguments | {"token_ids": ids}
        for layer, options in layers.items():
            for name in FEW if not scale.few else FEW[-1:]:
                results = []
                for impl, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
                    states, matrix = (t.detach().to(cast).requires_grad_() for t in (hidden, weight))
                    kept = options | {"bias": bias.detach().to(cast)} if "bias" in options else options
                    if impl == "triton":
                        kept = kept | {"memory_budget": 17 * vocab * dtype.itemsize}
                    loss, outputs = linear_grpo_loss(
                        states, matrix, config=configurations()[name], impl=impl, **arguments, **kept
                    )
                    by_hidden, by_weight = torch.autograd.grad(3 * loss, [states, matrix])
                    logprobs = linear_token_logprobs(states, matrix, ids, impl=impl, **kept)
                    results.append(
                        {
                            "loss": loss,
                            "gradient by hidden": by_hidden,
                            "gradient by weight": by_weight,
                            "log-probability": logprobs,
                        }
                        | {"entropy": outputs.entropy}
                    )
                found, rival, exact = results
                yield from shares(f"{name} {layer} {dtype}", found, exact, rival)


# --- group advantages ---


def advantages(scale: Scale) -> Shares:
    """Every baseline and scale, groups of 0, 1, 2, 7 and thousands, NaN rewards and equal ones."""
    sizes = torch.tensor([1, 2, 7, 0, scale.large_group, 33, 5])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    rewards = torch.rand(int(offsets[-1]), generator=generator(5))
    rewards[int(offsets[5]) : int(offsets[6])] = 0.1  # equal, and no fraction of two
    rewards[[4, 20]] = float("nan")
    rewards, offsets = rewards.to(scale.device), offsets.to(scale.device)
    for baseline in ("mean", "loo", "none"):
        for spread in ("std", "batch_std", "none"):
            for values in (*(rewards.to(dtype) for dtype in scale.dtypes), rewards.double(), 1000 + rewards / 1000):
                options: dict[str, Any] = {"baseline": baseline, "scale": spread}
                found, rival = (
                    group_advantages(values, offsets, **options, impl=impl) for impl in ("triton", "reference")
                )
                exact = group_advantages(values.double(), offsets, **options, impl="reference")
                what = f"{baseline} {spread} {values.dtype}"
                yield what, allowed(found, exact, rival)
                equal = found[int(offsets[5]) : int(offsets[6])]
                if baseline != "none":
                    yield f"{what}: equal rewards", float(equal.abs().max() > 0) * 2


# --- what is no number ---


def edges(scale: Scale) -> Shares:
    """No token, one, all masked; buffers that begin as NaN."""
    config = LossConfig.preset("grpo", kl_coef=0.1, entropy_coef=0.01)
    batch = Batch.random(scale)
    for name, rows in (("no token", 0), ("one token", 1), ("all", scale.shape[0])):
        arguments = {
            key: value if key in ("rewards", "group_offsets") else value[:rows]
            for key, value in batch.arguments.items()
        }
        for masked in (False, True):
            if masked:
                arguments["mask"] = torch.zeros_like(arguments["mask"])
            found = loss_of("triton", Batch(batch.logits[:rows], arguments), config)
            finite = all(bool(value.isfinite().all()) for value in found.values())
            zero = not masked or not bool(found["gradient"].any() or found["loss"] != 0)
            yield f"{name}, {'all masked' if masked else 'some masked'}", 2.0 * (not (finite and zero))
    plain = loss_of("triton", batch, config)
    with nan_poisoned():
        poisoned = loss_of("triton", batch, config)
    yield "every element is written", 2.0 * any(not torch.equal(plain[name], poisoned[name]) for name in plain)


@contextmanager
def nan_poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def in_place(scale: Scale) -> Shares:
    """The gradient over the logits is the same, lies there, and a second use of them is refused."""
    batch = Batch.random(scale, scale.dtypes[-1])
    config = LossConfig.preset("grpo", entropy_coef=0.01)
    expected = loss_of("triton", batch, config)["gradient"]
    leaf = batch.logits.detach().clone().requires_grad_()
    logits = leaf * 1.0
    loss, _ = grpo_loss(logits, config=config, inplace=True, impl="triton", **batch.arguments)
    again = logits.square().sum()
    (3 * loss).backward()
    assert leaf.grad is not None
    yield "gradient", 2.0 * (not torch.equal(leaf.grad, expected))
    yield "lies over the logits", 2.0 * (not torch.equal(logits.detach(), expected))
    try:
        again.backward()
    except RuntimeError as error:
        yield "second use", 2.0 * ("modified by an inplace operation" not in str(error))
    else:
        yield "second use was not refused", 2.0


def repeats(scale: Scale) -> Shares:
    """Bitwise the same, time after time."""
    batch = Batch.random(scale, shape=(scale.rows, max(scale.vocabs)))
    config = configurations()["everything"]
    first = loss_of("triton", batch, config)
    for number in range(scale.repeats):
        found = loss_of("triton", batch, config)
        yield f"repeat {number}", 2.0 * any(not torch.equal(found[name], first[name]) for name in first)


# --- what only a device can tell ---


def no_host_synchronisation(scale: Scale) -> Shares:
    """Loss and backward wait for nothing, advantages from rewards included."""
    batch = Batch.random(scale, torch.bfloat16)
    hidden = torch.randn(scale.shape[0], 64, device=scale.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(scale.shape[1], 64, device=scale.device, dtype=torch.bfloat16, requires_grad=True)
    ids = batch.arguments["token_ids"].clamp(min=0)
    logits = batch.logits.detach().requires_grad_()

    def linear(config: LossConfig) -> None:
        linear_grpo_loss(hidden, weight, config=config, impl="triton", **batch.arguments)[0].backward()

    calls: dict[str, Callable[[], Any]] = {
        f"loss, {name}": lambda config=config: loss_of("triton", batch, config)
        for name, config in configurations().items()
    }
    calls |= {f"linear loss, {name}": lambda name=name: linear(configurations()[name]) for name in ("grpo", "gspo")}
    calls["log-probabilities"] = lambda: kernel_logprobs(logits, ids, entropy=True, impl="triton")
    for name, call in calls.items():
        call()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            yield f"{name} ({str(error).splitlines()[0][:90]})", 2.0
        else:
            yield name, 0.0
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass
class Compiled:
    """Counts what Triton compiles."""

    kernels: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def counting(self) -> Iterator[None]:
        from triton import knobs

        def hook(*_: Any, fn: Any, **__: Any) -> bool:
            self.kernels[fn.name] += 1
            return False

        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before


def compiles(scale: Scale) -> Shares:
    """Each kernel is compiled at most once for 50 lengths."""
    compiled = Compiled()
    config = LossConfig.preset("dapo", kl_coef=0.01, delta=3.0)  # which no other check uses
    batch = Batch.random(scale, torch.float16, shape=(50 * 17, 1003))
    with compiled.counting():
        for number in range(50):
            rows = (1, 16, 48, 800)[number] if number < 4 else 17 * number + 1
            arguments = {
                key: value if key in ("rewards", "group_offsets") else value[:rows]
                for key, value in batch.arguments.items()
            }
            loss_of("triton", Batch(batch.logits[:rows], arguments), config)
    for name, count in compiled.kernels.items():
        yield f"{name} was compiled {count} times", float(count)
    yield "kernels were seen", 0.0 if compiled.kernels else 2.0


def under_torch_compile(scale: Scale) -> Shares:
    """The graph stays whole and the result the same."""
    batch = Batch.random(scale, torch.bfloat16)
    config = LossConfig.preset("grpo", entropy_coef=0.01)
    expected = loss_of("triton", batch, config)["gradient"]
    leaf = batch.logits.detach().clone().requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return 3 * grpo_loss(logits, config=config, impl="triton", **batch.arguments)[0]

    torch.compile(loss, fullgraph=True)(leaf).backward()
    assert leaf.grad is not None
    yield "gradient", allowed(leaf.grad, expected.double(), expected)


EVERYWHERE = (vocabulary_sweep, many_rows, losses, linear_losses, advantages, edges, in_place, repeats)
ON_GPU = (no_host_synchronisation, compiles, under_torch_compile)
