"""The output layer in chunks of tokens: log-probabilities, loss and gradients without the whole of the logits.

Internal to the package; the public functions stand in linear_grpo. Matrix products are torch's, what happens to a chunk
of logits is a back end's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medbridge_kernels import ops, reference
from medbridge_kernels.config import LossConfig
from medbridge_kernels.reference import PolicyInputs

DEFAULT_BUDGET = {"cpu": 160 << 20, "cuda": 1 << 30}
"""Bytes of logits held at a time. Each chunk reads and writes the whole gradient of the weight, so fewer are faster;
beyond these sizes little is gained."""

_PARTIAL_BYTES = 16 << 20
"""Size of the pieces in which a half-precision product is added to a float32 sum on a CPU."""


@dataclass(slots=True)
class OutputLayer:
    """The output layer in the type that its products are computed in, and the buffers of one chunk."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    banned_ids: Tensor | None
    budget: int
    _logits: Tensor | None = field(default=None, init=False)
    _tanh: Tensor | None = field(default=None, init=False)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float,
        banned_ids: Tensor | None,
        budget: int,
        computed_in: torch.dtype,
    ) -> OutputLayer:
        """From parameters, which may be of another type."""
        cast = None if bias is None else bias.detach().to(computed_in)
        return cls(weight.detach().to(computed_in), cast, scale, softcap, banned_ids, budget)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Ranges of tokens of about equal size whose logits fit the budget together."""
        vocab = self.weight.shape[0]
        row = max(1, vocab * self.weight.element_size() * (2 if self.softcap else 1))
        most = max(1, self.budget // row)
        count = -(-tokens // most)
        rows = -(-tokens // count) if count else 0
        if count:
            self._logits = self.weight.new_empty(rows, vocab)
            self._tanh = self.weight.new_empty(rows, vocab) if self.softcap else None
        for start in range(0, tokens, max(1, rows)):
            yield slice(start, min(tokens, start + rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a chunk, [n, vocab], in a buffer that the next chunk takes over."""
        assert self._logits is not None
        logits = self._logits[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self._tanh is not None:
            tanh = torch.tanh(logits.div_(self.softcap), out=self._tanh[: len(hidden)])
            torch.mul(tanh, self.softcap, out=logits)
        if self.banned_ids is not None:
            logits.index_fill_(-1, self.banned_ids, float("-inf"))
        return logits

    def pull_back(self, gradient: Tensor) -> Tensor:
        """From the gradient of the last chunk's logits to that of ``hidden weight^T + bias``, in place."""
        if self._tanh is not None:  # d softcap tanh(z / softcap) / dz = 1 - tanh^2
            gradient.addcmul_(gradient, self._tanh[: len(gradient)].square_(), value=-1)
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


@dataclass(slots=True)
class Gradients:
    """Gradients of hidden states, weight and bias, those that are needed, from one chunk of logits after the other."""

    layer: OutputLayer
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    _begun: bool = field(default=False, init=False)

    @classmethod
    def needed(
        cls, layer: OutputLayer, hidden: Tensor, chunks: int, of_hidden: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        """Room for them. More than one chunk of half precision is summed in float32."""
        weight = layer.weight
        make = torch.empty if chunks else torch.zeros
        dtype = weight.dtype if chunks <= 1 else torch.float32
        return cls(
            layer,
            make(hidden.shape, dtype=weight.dtype, device=weight.device) if of_hidden else None,
            make(weight.shape, dtype=dtype, device=weight.device) if of_weight else None,
            torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if of_bias else None,
        )

    def add(self, gradient: Tensor, hidden: Tensor, part: slice) -> None:
        """Adds what a chunk gives: `gradient` of its logits [n, vocab], its `hidden` states [n, width]."""
        gradient = self.layer.pull_back(gradient)
        if self.hidden is not None:
            torch.mm(gradient, self.layer.weight, out=self.hidden[part])
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), hidden, first=not self._begun)
            self._begun = True
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a b, [m, n], or = where it is the first. total may be float32 where a and b are half precision."""
    beta = 0 if first else 1  # with 0, what total held isn't read
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)
    else:  # a CPU has no product of half-precision factors that gives float32
        rows = max(1, _PARTIAL_BYTES // (4 * max(1, total.shape[1])))
        for start in range(0, len(total), rows):
            product = torch.mm(a[start : start + rows], b)
            part = total[start : start + rows]
            part.copy_(product) if first else part.add_(product)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that products with this tensor are computed in: autocast's where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _rows(temperature: float | Tensor, part: slice) -> float | Tensor:
    return temperature[part] if isinstance(temperature, Tensor) else temperature


# --- log-probabilities, with a backward pass that makes the logits again ---


@torch.library.custom_op("medbridge_kernels::linear_sweep", mutates_args=())
def linear_sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    entropy_grad: bool,
    scale: float,
    softcap: float,
    banned_ids: Tensor | None,
    budget: int,
    computed_in: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `vocabulary_sweep` gives, of projected hidden states."""
    tokens = len(token_ids)
    taus = ops.each(temperature, temperatures)
    logprobs, entropies, lse = ops.empty_rows(token_ids, entropy, impl)
    with torch.autocast(hidden.device.type, enabled=False):
        layer = OutputLayer.of(weight, bias, scale, softcap, banned_ids, budget, computed_in)
        for part in layer.chunks(tokens):
            logits = layer.logits(hidden[part].to(computed_in))
            found = ops.backend(impl).sweep(
                logits, token_ids[part], None if keep is None else keep[part], _rows(taus, part), entropy
            )
            logprobs[part], lse[part] = found[0], found[2]
            if entropy:
                entropies[part] = found[1]
    return logprobs, entropies, lse


@linear_sweep.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.empty_rows(token_ids, entropy, rest[-1])


@torch.library.custom_op("medbridge_kernels::linear_sweep_backward", mutates_args=())
def linear_sweep_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    scale: float,
    softcap: float,
    banned_ids: Tensor | None,
    budget: int,
    computed_in: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias in their types; empty where not asked for."""
    taus = ops.each(temperature, temperatures)
    with torch.autocast(hidden.device.type, enabled=False):
        layer = OutputLayer.of(weight, bias, scale, softcap, banned_ids, budget, computed_in)
        parts = list(layer.chunks(len(token_ids)))
        gradients = Gradients.needed(layer, hidden, len(parts), of_hidden, of_weight, of_bias)
        for part in parts:
            states = hidden[part].to(computed_in)
            logits = layer.logits(states)
            ops.backend(impl).sweep_backward(
                logits, token_ids[part], None if keep is None else keep[part], _rows(taus, part), lse[part],
                None if entropy is None else entropy[part], grad_logprobs[part],
                None if grad_entropy is None else grad_entropy[part], logits,
            )  # fmt: skip
            gradients.add(logits, states, part)
    found, leaves = (gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias)
    in_hidden, in_weight, in_bias = (
        hidden.new_empty(0) if gradient is None or leaf is None else gradient.to(leaf.dtype)
        for gradient, leaf in zip(found, leaves, strict=True)
    )
    return in_hidden, in_weight, in_bias


@linear_sweep_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if of_weight else hidden.new_empty(0),
        torch.empty_like(bias) if of_bias and bias is not None else hidden.new_empty(0),
    )


def _sweep_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, token_ids, keep, temperature, temperatures, entropy, entropy_grad, *layer, impl = inputs
    ctx.scale, ctx.softcap, banned_ids, ctx.budget, ctx.computed_in = layer
    kept_entropy = output[1] if entropy and entropy_grad else None
    ctx.save_for_backward(hidden, weight, bias, token_ids, keep, temperatures, output[2], kept_entropy, banned_ids)
    ctx.temperature, ctx.impl = temperature, impl
    ctx.set_materialize_grads(False)


def _sweep_gradient(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None) -> Any:
    hidden, weight, bias, token_ids, keep, temperatures, lse, entropy, banned_ids = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = linear_sweep_backward(
        hidden, weight, bias, token_ids, keep, ctx.temperature, temperatures,
        *ops.gradient_rows(lse, entropy, grad_logprobs, grad_entropy), *needs, ctx.scale, ctx.softcap, banned_ids,
        ctx.budget, ctx.computed_in, ctx.impl,
    )  # fmt: skip
    return *(grad if need else None for grad, need in zip(gradients, needs, strict=True)), *[None] * 12


linear_sweep.register_autograd(_sweep_gradient, setup_context=_sweep_context)


# --- the loss, with its gradients made along with it ---


def is_coupled(inputs: PolicyInputs, config: LossConfig) -> bool:
    """Whether the gradient at a token depends on log-probabilities of other tokens, which may be of other chunks."""
    if config.ratio_level == "sequence" or config.off_policy_threshold is not None:
        return True
    return config.correction != "none" and config.correction_level == "sequence" and inputs.old_logprobs is None


@dataclass(slots=True)
class ChunkedLoss:
    """A loss that isn't coupled, as it goes through the chunks."""

    layer: OutputLayer
    token_ids: Tensor
    keep: Tensor | None
    temperature: float | Tensor
    inputs: PolicyInputs
    config: LossConfig
    weight: Tensor
    factor: Tensor | None
    needs: tuple[bool, bool, bool]
    impl: str

    def terms(self, logprobs: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """A chunk's share of the loss, and its derivatives by log-probability and, where it has any, by entropy."""
        inputs = self.inputs.rows(part)
        with torch.enable_grad():
            logprobs = logprobs.requires_grad_()
            entropy = entropy.requires_grad_(self.config.entropy_coef != 0)
            factor = None if self.factor is None else self.factor[part]
            if factor is None:
                factor = reference.surrogate_factor(logprobs, inputs, self.config)
            ratio = reference.importance_ratio(logprobs, inputs, self.config)
            loss = reference.weighted_loss(logprobs, entropy, ratio, factor, self.weight[part], inputs, self.config)
            wanted = [logprobs, entropy] if entropy.requires_grad else [logprobs]
            by_logprob, *by_entropy = torch.autograd.grad(loss, wanted)
        return loss.detach(), by_logprob, by_entropy[0] if by_entropy else None

    def run(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        """Loss, log-probabilities, entropies and gradients."""
        tokens = len(self.token_ids)
        parts = list(self.layer.chunks(tokens))
        gradients = Gradients.needed(self.layer, hidden, len(parts), *self.needs)
        logprobs, entropies = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        backend = ops.backend(self.impl)
        for part in parts:
            states = hidden[part].to(self.layer.weight.dtype)
            logits = self.layer.logits(states)
            ids, temperature = self.token_ids[part], _rows(self.temperature, part)
            keep = None if self.keep is None else self.keep[part]
            logprob, entropy, lse = backend.sweep(logits, ids, keep, temperature, True)
            logprobs[part], entropies[part] = logprob, entropy
            share, by_logprob, by_entropy = self.terms(logprob, entropy, part)
            loss += share
            if any(self.needs):
                backend.sweep_backward(
                    logits, ids, keep, temperature, lse, None if by_entropy is None else entropy.detach(), by_logprob,
                    by_entropy, logits,
                )  # fmt: skip
                gradients.add(logits, states, part)
        return loss, logprobs, entropies, gradients


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            loss, logprobs, entropies, gradients = chunked.run(hidden.detach())
        ctx.mark_non_differentiable(logprobs, entropies)
        ctx.types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.gradients = gradients.hidden, gradients.weight, gradients.bias
        return loss, logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # what is given back would pass for a constant
            raise RuntimeError("linear_grpo_loss has no second derivative: its backward pass can't create a graph")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_grpo_loss: its gradients were made with the loss, and a backward pass has taken them"
            )
        # Given away, not lent: what a node still holds, autograd would copy.
        gradients, ctx.gradients = ctx.gradients, None
        grad_loss = grads[0]
        unit = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0  # on a GPU, looking would wait for the device
        return *(
            None if gradient is None else (gradient if unit else gradient.mul_(grad_loss)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.types, strict=True)
        ), None  # fmt: skip


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float | Tensor,
    inputs: PolicyInputs,
    config: LossConfig,
    normalizer: float | Tensor | None,
    layer: tuple[float, float, Tensor | None, int, torch.dtype],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-probabilities and entropies of a loss that isn't coupled."""

    def need(tensor: Tensor | None) -> bool:
        return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad

    needs = need(hidden), need(weight), need(bias)
    with torch.no_grad():
        token_weights = reference.token_weights(inputs, normalizer, config, torch.float32)
        factor = None
        if config.correction_level == "sequence":  # over whole sequences, from what was given alone
            assert inputs.old_logprobs is not None
            factor = reference.surrogate_factor(inputs.old_logprobs.float(), inputs, config)
        if isinstance(temperature, Tensor):
            temperature = temperature.float().contiguous()
        chunked = ChunkedLoss(
            OutputLayer.of(weight, bias, *layer),
            token_ids,
            keep,
            temperature,
            inputs,
            config,
            token_weights,
            factor,
            needs,
            impl,
        )
    return _LinearLoss.apply(hidden, weight, bias, chunked)
