"""What a trainer asks of the processes (ranks) that train one model together; here they are one.

`parallel.Processes` answers the same questions for several. Every rank runs the same trainer: rank 0 samples, records
and saves, the others get from it what each step is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medbridge.model.encoded import EncodedPrompt
from medbridge.model.packing import PackedBatch
from medbridge.model.policy import Policy

if TYPE_CHECKING:
    from medbridge.train.held import Held


class Ranks:
    """One process that is all there is.

    Attributes:
        rank, count: this process among those that train.
        leads: whether it is rank 0, which alone holds the run's folder, the engines and the terminal.
    """

    rank = 0
    count = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, make: Callable[..., Any], *inputs: Any) -> Any:
        """What `make(*inputs)` gives on rank 0, on every rank; it is called there only.

        Raises:
            Exception: what `make` has raised, on rank 0; MedbridgeError with its message on all others.
        """
        return make(*inputs)

    def lead(self, do: Callable[..., Any], *inputs: Any) -> None:
        """As `share`, for what is done and gives nothing."""

        def call() -> None:
            do(*inputs)

        self.share(call)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        return [value]

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks, each exactly rounded."""
        return [math.fsum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def largest(self, value: float) -> float:
        return float(max(self.gather(value)))

    def hold(self, policy: Policy, trained: dict[str, torch.nn.Parameter]) -> Held:
        """What this rank holds of the parameters under training, which are `policy`'s."""
        from medbridge.train.held import Held

        return Held(policy, trained)

    def deal(self, costs: Sequence[float]) -> list[int]:
        """The numbers of those things that are this rank's, so that no rank has much more to do than another.

        All ranks call it with the same costs. The dearest go first, each to the rank that has least.
        """
        loads = [(0.0, 0)] * self.count  # cost and number of what a rank has
        own = []
        for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
            least = min(range(self.count), key=lambda rank: loads[rank])
            loads[least] = loads[least][0] + costs[at], loads[least][1] + 1
            if least == self.rank:
                own.append(at)
        return sorted(own)

    def deal_rows(self, policy: Policy, prompts: Sequence[EncodedPrompt], lengths: Sequence[int]) -> list[int]:
        """The numbers of this rank's completions: whole groups, which share a prompt object, where they suffice.

        Where there are fewer groups than ranks, they are split, and their prompts are computed on several ranks.
        """
        costs = {id(prompt): len(prompt.ids) + policy.image_tokens(prompt) for prompt in prompts}
        if len(costs) < self.count:
            return self.deal([costs[id(p)] + length for p, length in zip(prompts, lengths, strict=True)])
        for prompt, length in zip(prompts, lengths, strict=True):
            costs[id(prompt)] += length
        own = {list(costs)[at] for at in self.deal(list(costs.values()))}
        return [at for at, prompt in enumerate(prompts) if id(prompt) in own]

    def micro_batches(
        self,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        completions: Sequence[Sequence[int]],
        *,
        tokens: int,
        most: int | None,
    ) -> Iterator[tuple[list[int], PackedBatch]]:
        """This rank's completions as packed rows within the budget of `Policy.plan`, with their numbers in each.

        Every rank gets the same number of rows, for each pass through a sharded model is one of all ranks: one that has
        fewer is given stand-ins, which have no numbers. Their hidden states are to be computed like those of all
        others, and where a gradient is made, given to `idle`.
        """
        parts = policy.plan(prompts, completions, tokens=tokens, most=most) if prompts else []
        missing = int(self.largest(len(parts))) - len(parts)
        for part in parts:
            yield part, policy.pack([prompts[at] for at in part], [completions[at] for at in part])
        for _ in range(missing):
            yield [], policy.pack(*_stand_in(policy))

    def idle(self, hidden: Tensor) -> None:
        """The backward pass of a stand-in: this rank adds nothing to any gradient."""
        hidden.backward(torch.zeros_like(hidden))


def _stand_in(policy: Policy) -> tuple[list[EncodedPrompt], list[list[int]]]:
    """The shortest row there is, without an image."""
    ids = torch.tensor(policy.completion_ids("a")[:1])
    positions = torch.zeros(3 if policy.uses_mrope else 1, 1, dtype=torch.long)
    prompt = EncodedPrompt(ids, torch.zeros(1, dtype=torch.long), positions, 1, {}, "")
    return [prompt], [ids.tolist()]
