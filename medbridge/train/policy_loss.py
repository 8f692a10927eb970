"""The loss half of a sharpen update: from hidden states of completion tokens to the gradient that the model gets.

It is cut off from the model's own backward pass, so that what the loss costs can be told from what the model costs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from medbridge.model.policy import OutputLayer, Policy
from medbridge.train.ranks import Ranks
from medbridge_kernels import (
    LossConfig,
    LossOutputs,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from medbridge_kernels.impl import Impl

_LARGEST = {"ratio_max", "rollout_ratio_max"}
"""Metrics of which a step has the largest; of all others it has the mean over tokens."""

_MEANS = {"effective_sample_size": "ratio_mean", "rollout_effective_sample_size": "rollout_ratio_mean"}
"""The mean of the ratios that an effective sample size is of."""

_COMPARED_BYTES = 64 << 20
"""Logits of the tokens that the back ends are compared on: plain torch holds several copies of them."""


class PolicyLoss:
    """Loss and gradient of the completion tokens of one micro-batch after the other; keeps time and metrics.

    Attributes:
        comparing: whether the next micro-batch is also timed with plain torch. Only that one is.
    """

    def __init__(self, policy: Policy, config: LossConfig, impl: Impl, temperature: float) -> None:
        self.policy = policy
        self.config = config
        self.impl = impl
        self.temperature = temperature
        self.comparing = False
        self._clock = _Clock(policy.device)
        self._tokens = 0
        self._metrics = _Metrics()
        self._comparison = {"seconds_loss_plain": 0.0, "seconds_comparing": 0.0}

    def backward(self, hidden: Tensor, labels: Tensor, **inputs: Any) -> tuple[Tensor, LossOutputs]:
        """Adds the gradient of the loss to the model's parameters; returns the loss, detached, and its outputs.

        Args:
            hidden: [tokens, width], with the graph of the model's forward pass.
            labels: int64 [tokens].
            inputs: what else `linear_grpo_loss` takes of these tokens.
        """
        layer = self.policy.output_layer()
        if self.comparing and layer is not None:
            self._compare(hidden.detach(), layer, labels, inputs)
        self.comparing = False
        self._tokens += len(labels)
        states = hidden.detach().requires_grad_()
        with self._clock.running():
            loss, outputs = self._loss(states, layer, labels, self.impl, inputs)
            loss.backward()
        hidden.backward(states.grad)
        self._metrics.add(outputs, len(labels))
        return loss.detach(), outputs

    def logprobs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [tokens] of the labels by the policy's output layer, as the loss computes them."""
        layer = self.policy.output_layer()
        with self.policy.autocast():
            if layer is None:
                return token_logprobs(self.policy.head(hidden), labels, self.temperature, impl=self.impl)
            return linear_token_logprobs(
                hidden, token_ids=labels, temperature=self.temperature, impl=self.impl, **layer._asdict()
            )

    def take_metrics(self, ranks: Ranks | None = None) -> dict[str, float]:
        """The loss's own metrics and the entropy over all ranks' tokens since the last call; none without tokens."""
        taken, self._metrics = self._metrics, _Metrics()
        return taken.over(ranks or Ranks()).means()

    def take_seconds(self) -> dict[str, float]:
        """What was spent on the loss since the last call, in seconds.

        "seconds_loss" in loss and output layer, forward and backward. After a comparison also "seconds_loss_plain",
        what it would have been with plain torch, and "seconds_comparing", what finding that out took.
        """
        seconds = {"seconds_loss": self._clock.take()}
        if self._comparison["seconds_comparing"]:
            more = self._comparison["seconds_loss_plain"] * self._tokens
            seconds |= self._comparison | {"seconds_loss_plain": seconds["seconds_loss"] + more}
        self._comparison = dict.fromkeys(self._comparison, 0.0)
        self._tokens = 0
        return seconds

    def _compare(self, hidden: Tensor, layer: OutputLayer, labels: Tensor, inputs: dict[str, Any]) -> None:
        """Notes the seconds a token that plain torch would take more than the back end in use.

        Measured on as many tokens as plain torch can hold comfortably, without the weight's gradient, which costs both
        the same. Nothing is trained by it.
        """
        began = time.perf_counter()
        frozen = layer._replace(weight=layer.weight.detach(), bias=None if layer.bias is None else layer.bias.detach())
        count = max(1, min(len(labels), _COMPARED_BYTES // (4 * len(frozen.weight))))
        part = {
            name: value[:count] if isinstance(value, Tensor) and value.shape == labels.shape else value
            for name, value in inputs.items()
        }
        taken: dict[str, float] = {}
        impls: tuple[Impl, ...] = (self.impl, "reference", self.impl, "reference")  # the first of each warms up
        for impl in impls:
            states = hidden[:count].requires_grad_()
            clock = _Clock(self.policy.device)
            with clock.running():
                loss, _ = self._loss(states, frozen, labels[:count], impl, part)
                loss.backward()
            taken[impl] = clock.take()
        self._comparison = {
            "seconds_loss_plain": (taken["reference"] - taken[self.impl]) / count,
            "seconds_comparing": time.perf_counter() - began,
        }

    def _loss(
        self, states: Tensor, layer: OutputLayer | None, labels: Tensor, impl: Impl, inputs: dict[str, Any]
    ) -> tuple[Tensor, LossOutputs]:
        options = {**inputs, "temperature": self.temperature, "config": self.config, "impl": impl}
        with self.policy.autocast():
            if layer is None:  # adapters on the output layer, say: only the model knows how to make its logits
                return grpo_loss(self.policy.head(states), labels, **options)
            return linear_grpo_loss(states, token_ids=labels, **layer._asdict(), **options)


class _Metrics:
    """Metrics of micro-batches on the way to those of all their tokens together, however these were split."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._squares: dict[str, float] = {}  # of ratios whose effective sample size is told, by its name

    def add(self, outputs: LossOutputs, tokens: int) -> None:
        values = {name: float(value) for name, value in outputs.metrics.items()}
        values["entropy"] = float(outputs.entropy.mean())
        self._tokens += tokens
        for name, value in values.items():
            if name in _LARGEST:
                self._largest[name] = max(self._largest.get(name, value), value)
            else:
                self._sums[name] = self._sums.get(name, 0.0) + tokens * value
        for name, mean in _MEANS.items():
            if values.get(name):  # (sum r)^2 / (count * sum r^2)
                self._squares[name] = self._squares.get(name, 0.0) + tokens * values[mean] ** 2 / values[name]

    def over(self, ranks: Ranks) -> _Metrics:
        """Those of the tokens of all ranks together."""
        merged = _Metrics()
        for tokens, sums, largest, squares in ranks.gather([self._tokens, self._sums, self._largest, self._squares]):
            merged._tokens += tokens
            for own, others in ((merged._sums, sums), (merged._squares, squares)):
                for name, value in others.items():
                    own[name] = own.get(name, 0.0) + value
            for name, value in largest.items():
                merged._largest[name] = max(merged._largest.get(name, value), value)
        return merged

    def means(self) -> dict[str, float]:
        means = {name: value / self._tokens for name, value in self._sums.items()}
        for name, squares in self._squares.items():
            means[name] = means[_MEANS[name]] ** 2 * self._tokens / squares
        return means | self._largest


class _Clock:
    """Adds up the seconds of what runs in it: of the device's own work, where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """The sum so far, which starts anew. On a GPU it waits for the last of it."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
