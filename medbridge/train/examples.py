"""What supervised stages imitate: completions of items, made anew at each visit. How they are trained on: see `sft`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from medbridge.data import Item, permutation, target_completion
from medbridge.data.prompts import PromptSettings
from medbridge.train.sft import Example, seeded


class Answers:
    """Supervised completions of items; the option order changes with each visit."""

    def __init__(self, items: Sequence[Item], prompts: PromptSettings, *, seed: int, traces: bool = True) -> None:
        """`traces`: an item's reasoning is imitated too, where it has one."""
        self.items = items
        self.prompts = prompts
        self.seed = seed
        self.traces = traces

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, visit: int) -> Example:
        item = self.items[index] if self.traces else replace(self.items[index], trace=None)
        order = permutation(item, self.seed + 1, visit)
        return Example(item, order, target_completion(item, order, self.prompts))


class RandomAnswers(Answers):
    """Completions in the right form with an answer drawn at random: they teach the form and nothing else."""

    def example(self, index: int, visit: int) -> Example:
        item = self.items[index]
        order = permutation(item, self.seed + 1, visit)
        choices = item.options or tuple(sorted({i.answer for i in self.items if i.options is None}))
        drawn = int(torch.randint(len(choices), (), generator=seeded(self.seed, item.id, visit)))
        guess = replace(item, answer=choices[drawn], trace=None)
        return Example(item, order, target_completion(guess, order, self.prompts))


class Accepted:
    """Completions that were sampled and found correct."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int, visit: int) -> Example:
        return self.examples[index]
