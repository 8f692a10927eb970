"""All requests of one call, drawn from one server at the same time: what is in flight, and whether it still moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from medbridge.data.images import ImageCache
from medbridge.data.items import Item, Permutation
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import Request, Rollout, SamplingSettings
from medbridge.rollout.room import prompt_length
from medbridge.rollout.server.checks import Counters, read_counters
from medbridge.rollout.server.client import Client, ServerDown, ServerRefusal, ServerSilent
from medbridge.rollout.server.generation import (
    PATH,
    Answer,
    Part,
    data_uri,
    generate_body,
    parts,
    read_answer,
    sampling_params,
)


class Prompts:
    """Prompts as a server takes them, and how long they may be."""

    def __init__(self, prompter: Prompter, settings: PromptSettings, images: ImageCache) -> None:
        self.prompter = prompter
        self.settings = settings
        self.images = images
        self.longest = prompter.context
        self._unseen = {False, True}  # kinds of prompt (with images or not) of which no answer came yet

    def open(self, longest: int) -> None:
        """For a server that takes `longest` tokens and has not been compared with the trainer."""
        self.longest = min(longest, self.prompter.context)
        self._unseen = {False, True}

    def length(self, request: Request) -> int:
        """Tokens of a request's longest prompt, its images expanded.

        Raises:
            MedbridgeError: it leaves no room for an answer.
        """
        return prompt_length(
            request, self.prompter, self.settings, self.images, self.longest, who="the server",
            cure="Give smaller images, leave the item out, or raise rollout.vllm.max_length.",
        )  # fmt: skip

    def bodies(self, request: Request, length: int, sampling: SamplingSettings, seed: int, group: int) -> list[Any]:
        """(part, body) for each prompt of a request, with `group` samples at most."""
        images = [data_uri(self.images.get(path)) for path in request.item.images]
        limit = min(sampling.max_new_tokens, self.longest - length)
        return [
            (
                part,
                generate_body(
                    self.prompter.prompt_ids(request.item, part.permutation, self.settings),
                    images,
                    sampling_params(part, sampling, self.prompter, seed=seed, max_tokens=limit),
                ),
            )
            for part in parts(request, group)
        ]

    def compare(self, item: Item, order: Permutation, answer: Answer) -> None:
        """Of the first answers: the model must have seen the very tokens that the trainer gives it.

        Raises:
            MedbridgeError: it has not.
        """
        if (answer.images > 0) not in self._unseen:
            return
        self._unseen.discard(answer.images > 0)
        expected = self._trainer_ids(item, order)
        if answer.prompt_ids != expected:
            at = next((i for i, (a, b) in enumerate(zip(answer.prompt_ids, expected, strict=False)) if a != b), None)
            where = f"token {at} differs" if at is not None else "one is the other's beginning"
            raise MedbridgeError(
                f"item {item.id!r}: the server gave the model a prompt of {len(answer.prompt_ids)} tokens, the "
                f"trainer's has {len(expected)}, and {where}. Its processor settings (image sizes, perhaps) are not "
                f"those of {self.prompter.path!r}: serve that folder without --mm-processor-kwargs."
            )

    def _trainer_ids(self, item: Item, order: Permutation) -> list[int]:
        text = self.prompter.render(item, order, self.settings)
        pictures = [self.images.get(path) for path in item.images]
        bos = self.prompter.tokenizer.bos_token
        plain = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        encoded = self.prompter.processor(
            text=[text], images=[pictures] if pictures else None, return_tensors="pt", **plain
        )
        return list(encoded["input_ids"][0].tolist())


class _Slots:
    """How many completions may still begin. One task takes, any may give back."""

    def __init__(self, count: int) -> None:
        self.count = self.free = count
        self._changed = asyncio.Event()

    async def take(self, wanted: int) -> None:
        while self.free < wanted:
            self._changed.clear()
            await self._changed.wait()
        self.free -= wanted

    def give(self, back: int) -> None:
        self.free += back
        self._changed.set()


class Drawing:
    """Draws requests; each is handed to `done` when all of its samples are there.

    As many completions as the server decodes at a time are in flight, and the requests' order is kept as far as that.
    """

    def __init__(
        self,
        client: Client,
        prompts: Prompts,
        sampling: SamplingSettings,
        *,
        seed: int,
        weights: int,
        most: int,
        group: int,
        stall_s: float,
        done: Callable[[list[Rollout]], None],
        count: Callable[[Counters], None],
    ) -> None:
        """As follows.

        Args:
            most: completions in flight.
            group: samples that one question may ask for: 1 where the server takes no seed for each of them.
            stall_s: seconds without a token that are too long.
            done: told of each request's rollouts.
            count: told of the server's counters.
        """
        self.group = group
        self.client = client
        self.prompts = prompts
        self.sampling = sampling
        self.seed = seed
        self.weights = weights
        self.stall_s = stall_s
        self.done = done
        self.count = count
        self._slots = _Slots(most)
        self._answers = 0

    async def run(self, requests: Sequence[Request], lengths: Sequence[int]) -> None:
        """`lengths` as `Prompts.length` gives them. What is in flight is given up where one request fails.

        Raises:
            BaseExceptionGroup: of ServerDown, ServerSilent (no token for too long) or MedbridgeError.
        """
        async with asyncio.TaskGroup() as both:
            watch = both.create_task(self._watch())
            async with asyncio.TaskGroup() as group:
                for request, length in zip(requests, lengths, strict=True):
                    # not in this thread, which has answers to take meanwhile
                    bodies = await asyncio.to_thread(
                        self.prompts.bodies, request, length, self.sampling, self.seed, self.group
                    )
                    finished: list[tuple[int, Rollout]] = []
                    for part, body in bodies:
                        await self._slots.take(len(part.samples))
                        group.create_task(self._draw(request, part, body, finished))
                    if not bodies:
                        self.done([])
            watch.cancel()

    async def _draw(self, request: Request, part: Part, body: Any, finished: list[tuple[int, Rollout]]) -> None:
        item = request.item
        try:
            text = await self.client.ask("POST", PATH, body, timeout_s=None)
        except ServerRefusal as error:
            raise MedbridgeError(f"item {item.id!r}: {self.client.url} refuses its prompt: {error}") from error
        finally:
            self._slots.give(len(part.samples))
        answer = read_answer(
            part, text, self.sampling, self.prompts.prompter, images=len(item.images), weights=self.weights
        )
        if answer.aborted:
            raise ServerDown(f"{self.client.url} gave up a request that it had begun")
        await asyncio.to_thread(self.prompts.compare, item, part.permutation, answer)
        self._answers += 1
        finished.extend(answer.rollouts)
        if len(finished) == len(request.samples):
            self.done([rollout for _, rollout in sorted(finished, key=lambda entry: entry[0])])

    async def _watch(self) -> None:
        """Ends with ServerSilent when neither an answer comes nor a token is computed for too long."""
        period = min(2.0, self.stall_s / 4)
        clock = asyncio.get_running_loop().time
        silent, looked, health = 0.0, clock(), ""
        seen: tuple[int, int | None] | None = None
        while True:
            await asyncio.sleep(period)
            try:
                counters = read_counters(await self.client.ask("GET", "/metrics", timeout_s=period))
                self.count(counters)
                now: tuple[int, int | None] = (self._answers, counters.tokens)
                moved = now != seen or counters.tokens is None
                seen = now
                health = "it answers otherwise"
            except ServerRefusal:
                moved = True  # it keeps no statistics for us: that it answers must do
            except ServerSilent:
                moved, health = False, "it answers nothing at all"
            # bounded: if this very process was stopped for a while, the server is not to blame
            silent += min(clock() - looked, 3 * period)
            looked = clock()
            if moved or self._slots.free == self._slots.count:
                silent = 0.0
            if silent >= self.stall_s:
                raise ServerSilent(f"{self.client.url}: no token for {silent:.0f} s, and {health}")
