"""The consistency bonus of GRPO-CARE (arXiv 2506.16141): for right answers that their own reasoning makes likely.

A reward for the answer alone is also earned by reasoning that leads elsewhere. The bonus asks a slowly moving average
of the model, which has not learnt such shortcuts yet, how likely the answer is behind the prompt and the reasoning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from medbridge.errors import MedbridgeError
from medbridge.model.encoded import EncodedPrompt
from medbridge.model.policy import Policy
from medbridge.rollout.engine import Graded, Rollout
from medbridge.train.ranks import Ranks

MOST_LIKELY = 0.95
"""Likelihoods count up to this one, GRPO-CARE's: above it the model is sure, and a difference tells nothing."""


class Answer(NamedTuple):
    """An answer in a completion: its tokens are ids[start:end]."""

    prompt: EncodedPrompt
    ids: list[int]
    start: int
    end: int


def bonuses(groups: Sequence[Sequence[float | None]], weight: float, margin: float) -> list[list[float]]:
    """Bonus of each completion of each group, from the likelihoods of the right answers; None for all others.

    `weight` where a completion is right and its likelihood is at least the mean over its group's right ones, less
    `margin`; else 0. Right ones are compared with right ones only. The margin has a sense of its own, beside that of
    GRPO-CARE's code (near the mean nothing is held against a completion): equal completions differ by rounding when
    they fall into different micro-batches, and are to be paid alike.
    """
    paid = []
    for group in groups:
        right = [likelihood for likelihood in group if likelihood is not None]
        bar = math.fsum(right) / len(right) - margin if right else 0.0
        paid.append([weight if likelihood is not None and likelihood >= bar else 0.0 for likelihood in group])
    return paid


def right_likelihoods(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    groups: Sequence[Sequence[Graded]],
    logprobs: Callable[[Tensor, Tensor], Tensor],
    *,
    tokens: int,
    most: int | None,
    ranks: Ranks | None = None,
) -> list[list[float | None]]:
    """Likelihood of the answer of each completion of each group that is right; None for all others.

    Args:
        prompts: one for each group.
        groups: their completions.
        policy, logprobs, tokens, most, ranks: as of `answer_likelihoods`.
    """
    answers = [
        [answer_of(policy, prompt, entry) for entry in group] for prompt, group in zip(prompts, groups, strict=True)
    ]
    right = [answer for group in answers for answer in group if answer is not None]
    found = iter(answer_likelihoods(policy, right, logprobs, tokens=tokens, most=most, ranks=ranks))
    return [[None if answer is None else next(found) for answer in group] for group in answers]


def answer_of(policy: Policy, prompt: EncodedPrompt, entry: Graded) -> Answer | None:
    """The right answer of a completion among its tokens; None where it is wrong, or nothing was read.

    Raises:
        MedbridgeError: the completion's text is not what its tokens say.
    """
    if entry.outcome.status != "correct" or entry.outcome.span is None:
        return None
    start, end = answer_tokens(policy.decode, entry.rollout, entry.outcome.span)
    return Answer(prompt, entry.rollout.token_ids.tolist(), start, end)


def answer_tokens(decode: Callable[[Sequence[int]], str], rollout: Rollout, span: tuple[int, int]) -> tuple[int, int]:
    """The tokens [start, end) that write the characters `span` of a completion, or a part of one of them.

    From the first token that begins the first character to the one that completes the last. How far tokens reach is
    read off the text of the tokens up to there, and found by bisection: it never falls from a token to the next. A
    character that is begun and not complete decodes to something else, and counts as reached and not as complete. A
    token across an edge of the span belongs to it.

    Raises:
        MedbridgeError: the text is not what the tokens say.
    """
    ids = rollout.token_ids.tolist()

    @cache
    def complete(count: int) -> tuple[int, bool]:
        """Characters of the text that the first `count` tokens write, and whether they go on behind those."""
        said = decode(ids[:count])
        if rollout.text.startswith(said):
            return len(said), False
        differs = (at for at, (a, b) in enumerate(zip(said, rollout.text, strict=False)) if a != b)
        return next(differs, len(rollout.text)), True

    if complete(len(ids))[0] < span[1]:
        raise MedbridgeError(
            f"item {rollout.item_id!r}, sample {rollout.sample}: its text is not what its tokens say, so that the "
            "answer's tokens can't be told. The tokenizer is another than the one it was sampled with."
        )
    first = _least(len(ids), lambda count: sum(complete(count)) > span[0])
    last = _least(len(ids), lambda count: complete(count)[0] >= span[1])
    return first - 1, last


def answer_likelihoods(
    policy: Policy,
    answers: Sequence[Answer],
    logprobs: Callable[[Tensor, Tensor], Tensor],
    *,
    tokens: int,
    most: int | None,
    ranks: Ranks | None = None,
) -> list[float]:
    """Likelihood of each answer behind its prompt and its reasoning, by the policy as it computes now.

    The geometric mean of the probabilities of the answer's tokens (so that long answers are not unlikely), each given
    all tokens before it; at most `MOST_LIKELY`. What a completion says behind its answer is not looked at.

    Args:
        policy: as `reference.computing_as` has it.
        answers: their completions.
        logprobs: of labels [N] from hidden states [N, width], as `PolicyLoss.logprobs` (at the sampling temperature).
        tokens, most: budget of a micro-batch, as of `Policy.plan`.
        ranks: share the work; each has all of the answers, and gets all of the likelihoods.
    """
    ranks = ranks or Ranks()
    own = ranks.deal_rows(policy, [answer.prompt for answer in answers], [answer.end for answer in answers])
    likely = [0.0] * len(answers)
    for at, value in zip(
        own, _likelihoods(policy, [answers[at] for at in own], logprobs, tokens, most, ranks), strict=True
    ):
        likely[at] = value
    return ranks.total(*likely)


def _likelihoods(
    policy: Policy,
    answers: Sequence[Answer],
    logprobs: Callable[[Tensor, Tensor], Tensor],
    tokens: int,
    most: int | None,
    ranks: Ranks,
) -> list[float]:
    prompts, completions = [answer.prompt for answer in answers], [answer.ids[: answer.end] for answer in answers]
    found = [0.0] * len(answers)
    for part, packed in ranks.micro_batches(policy, prompts, completions, tokens=tokens, most=most):
        hidden = policy.packed_hidden(packed)
        if not part:
            continue
        spans = [range(answers[at].start, answers[at].end) for at in part]
        ends = torch.tensor([len(completions[at]) for at in part]).cumsum(0).tolist()
        wanted = torch.cat([torch.arange(end - len(span), end) for end, span in zip(ends, spans, strict=True)])
        wanted = wanted.to(policy.device)
        values = logprobs(hidden[wanted], packed.labels[wanted]).double()
        for at, own in zip(part, values.split([len(span) for span in spans]), strict=True):
            found[at] = min(math.exp(float(own.mean())), MOST_LIKELY)
    return found


def _least(high: int, holds: Callable[[int], bool]) -> int:
    """The least number from 1 to `high` at which a condition holds that holds from there on, and at `high`."""
    low = 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
