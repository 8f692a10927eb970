"""The rollout engine on vLLM: prompts go to one process of ours that runs it, finished completions come back.

What happens in that process stands in `worker` and `llm`; how it is started and ended, in `process`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medbridge.data.images import ImageCache
from medbridge.data.items import Permutation
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import (
    GREEDY,
    EngineFailure,
    EngineStats,
    Phase,
    Request,
    Rollout,
    SamplingSettings,
)
from medbridge.rollout.sampling import cut_at_stop, tokens_to_stop
from medbridge.rollout.settings import FailureSettings, VllmSettings
from medbridge.rollout.vllm.process import Process, visible_devices
from medbridge.rollout.vllm.transfer import Route, Transfer, choose_route
from medbridge.rollout.vllm.wire import Message, Patience
from medbridge.rollout.weights import Weights

AHEAD = 2
"""Completions that the process holds, in multiples of those that it decodes at a time: none of its rows is to wait."""

ORDERS_DIFFER = 32
"""Tokens by which the prompts of an item's option orders may differ in length: a line's end may join a word."""

IMAGE_CACHE_BYTES = 1 << 28
"""Decoded images that the process keeps; one item's prompts are sent one after the other."""


@dataclass(slots=True)
class _Draw:
    """Samples that one prompt answers: those at `positions` of a request."""

    number: int  # of the request
    positions: list[int]
    permutation: Permutation
    seeds: list[int]  # none: the greedy completion


@dataclass(slots=True)
class _Open:
    """A request whose rollouts are not all there."""

    request: Request
    length: int
    rollouts: list[Rollout | None] = field(init=False)

    def __post_init__(self) -> None:
        self.rollouts = [None] * len(self.request.samples)


class VllmEngine:
    """Samples with vLLM, in a process of its own, from the model folder until other weights come.

    A sample's draw depends on its own seed, so that it is repeated whatever else is sampled beside it, up to floating
    point: another batch shape may round differently.
    """

    name = "vllm"

    def __init__(
        self,
        prompter: Prompter,
        prompts: PromptSettings,
        images: ImageCache,
        *,
        model: str,
        settings: VllmSettings,
        failure: FailureSettings,
        dtype: Literal["float32", "bfloat16"],
        devices: Sequence[int | str] | None = None,
        seed: int,
        adapter_rank: int = 0,
        log: Path | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            prompter: of the model; its `Policy` where the trainer is in this process.
            model: folder or id that vLLM loads at each start.
            devices: the GPUs, as CUDA_VISIBLE_DEVICES names them; None: all that are visible, or the CPU.
            seed: of vLLM itself; samples have their own.
            adapter_rank: rank of the adapters that the trainer trains; 0: none.
            log: file that the process's output is appended to; None: it is kept as long as the process lives.
        """
        self.prompter = prompter
        self.prompts = prompts
        self.images = images
        self.model = model
        self.settings = settings
        self.dtype = dtype
        self._stall_s, self._start_s = failure.stall_timeout_s, failure.start_timeout_s
        self._devices = devices
        self._seed = seed
        self._adapter_rank = adapter_rank if settings.lora == "adapter" else 0
        self._log = log
        self._process: Process | None = None
        self._failure: EngineFailure | None = None
        self._route: Route = "folder"
        self._transfer: Transfer | None = None
        self._holds_model = True  # whether the weights beneath adapters are those of `model`
        self._longest = prompter.context
        self._draws = 0
        self._stats = EngineStats()
        self._counters: dict[str, int] = {}

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, load the model.

        Raises:
            EngineFailure: it died, hung or ran out of memory.
            MedbridgeError: vLLM can't hold this model, or not with these settings.
        """
        if self._process is not None:
            return
        self._failure = None
        self._route, _ = choose_route(*self._gpus())
        environment = {**os.environ, **visible_devices(self._devices), "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # ours is a setting
        self._process = Process(environment, self._log)
        self._holds_model = True
        patience = Patience(self._start_s)
        try:
            self._process.connect("start", patience)
            self._process.send(Message("start", self._wanted()), "start", patience)
            self._longest = min(self.prompter.context, int(self._await("ready", "start", patience)["longest"]))
        except BaseException as error:
            self._give_up(error)
            raise

    def close(self) -> None:
        if self._process is not None:
            self._keep_counters()
            self._process.close()
            self._process = None
        self._transfer = None
        self._failure = None

    def sleep(self) -> None:
        """On a GPU, keep the weights in the host's memory and give the GPU's back."""
        if self._process is not None:
            self._do(Message("sleep"), "asleep", "sleep")

    def stats(self) -> EngineStats:
        """Those of the caches as the process told them last, a fraction of a second ago."""
        return self._stats + EngineStats(**self._counters)

    def _wanted(self) -> dict[str, Any]:
        """What the process makes vLLM from."""
        return {
            "model": self.model, "dtype": self.dtype, "seed": self._seed, "vllm": self.settings.model_dump(),
            "sleep": self.settings.sleep, "adapter_rank": self._adapter_rank,
            "transfer": None if self._route == "folder" else self._route,
            "image_token": self.prompter.image_token_id, "image_cache_bytes": IMAGE_CACHE_BYTES,
        }  # fmt: skip

    # -- weights -------------------------------------------------------------------------------------------

    def update_weights(self, weights: Weights) -> None:
        """Sample from these weights from now on.

        They go from GPU to GPU where trainer and engine are both on one, else by a folder; adapters alone where
        settings and weights allow it.

        Raises:
            EngineFailure: as for `generate`.
            MedbridgeError: they could not be written, or are not this model's.
        """
        self._require_running()
        if self._adapter_rank and self._holds_model and weights.policy.path == self.model:
            self._load(weights.adapter_folder(), weights.version, adapter=True)
            return
        self._holds_model = False
        if self._route == "folder":
            self._load(weights.folder(), weights.version, adapter=False)
            return
        if self._transfer is None:
            workers = self.settings.tensor_parallel
            self._transfer = Transfer(self._route, workers, self._move)
        self._moving = weights.version
        try:
            self._transfer.send(weights)
        except BaseException as error:
            self._give_up(error)
            raise

    def _load(self, folder: Path, version: int, *, adapter: bool) -> None:
        self._do(
            Message("weights", {"folder": str(folder), "version": version, "adapter": adapter}), "loaded", "weights"
        )

    def _move(self, step: str, info: dict[str, Any]) -> None:
        """One step of a transfer, as `Transfer` calls it."""
        self._do(Message("transfer", {"step": step, "info": info, "version": self._moving}), "loaded", "weights")

    def _gpus(self) -> tuple[str | None, list[str]]:
        """UUIDs of the trainer's GPU and of the engine's; None and none where they are not both on GPUs."""
        device = self.prompter.device if isinstance(self.prompter, Policy) else torch.device("cpu")
        if device.type != "cuda":
            return None, []
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = known.split(",") if known else [str(at) for at in range(torch.cuda.device_count())]
        uuids = {name.strip(): str(torch.cuda.get_device_properties(at).uuid) for at, name in enumerate(names)}
        devices = [str(name) for name in self._devices or names[: self.settings.tensor_parallel]]
        return str(torch.cuda.get_device_properties(device).uuid), [uuids.get(name, name) for name in devices]

    # -- sampling ------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        """As `Engine.generate`. Left early, it takes back what is not finished."""
        process = self._require_running()
        opened = [_Open(request, self._checked_length(request)) for request in requests]
        waiting = (draw for number, entry in enumerate(opened) for draw in _split(number, entry.request, seed))
        flying: dict[int, _Draw] = {}
        room = AHEAD * self.settings.max_seqs
        patience = Patience(self._stall_s)
        try:
            process.send(Message("sampling", self._how(sampling)), "sampling", patience)
            following = next(waiting, None)
            while following is not None or flying:
                while following is not None and room > 0:
                    flying[self._draws] = following
                    room -= len(following.positions)
                    self._send(process, following, opened[following.number], sampling, patience)
                    following = next(waiting, None)
                message = self._await("drawn", "sampling", patience)
                draw = flying.pop(message["draw"])
                room += len(draw.positions)
                entry = opened[draw.number]
                self._read(message, draw, entry, sampling)
                if None not in entry.rollouts:
                    finished = [rollout for rollout in entry.rollouts if rollout is not None]
                    entry.rollouts = [None]  # handed on: nothing of it is needed here any more
                    patience.renew()
                    yield finished
                    patience.renew()
        except BaseException as error:
            if isinstance(error, EngineFailure | MedbridgeError):
                self._give_up(error)
            elif flying:
                self._take_back()
            raise

    def _checked_length(self, request: Request) -> int:
        """Tokens of a request's longest prompt, its images expanded.

        Raises:
            MedbridgeError: it leaves no room for an answer.
        """
        length = 0
        for order in dict.fromkeys(request.permutations):
            length = max(length, self.prompter.length(request.item, order, self.prompts, self.images))
            if length + ORDERS_DIFFER < self._longest:
                break
        if length >= self._longest:
            raise MedbridgeError(
                f"item {request.item.id!r}: its prompt has {length} tokens, and vLLM takes {self._longest} with the "
                "answer. Give smaller images, leave the item out, or raise rollout.vllm.max_length (or the room for "
                "it: gpu_memory, on a CPU kv_cache_gb). Nothing was sampled yet."
            )
        return length

    def _how(self, sampling: SamplingSettings) -> dict[str, Any]:
        return {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "stop": list(sampling.stop),
            "stop_ids": self.prompter.stop_ids, "banned": self.prompter.banned,
        }  # fmt: skip

    def _send(
        self, process: Process, draw: _Draw, entry: _Open, sampling: SamplingSettings, patience: Patience
    ) -> None:
        item = entry.request.item
        ids = self.prompter.prompt_ids(item, draw.permutation, self.prompts)
        fields = {
            "draw": self._draws, "images": item.images, "seeds": draw.seeds,
            "max_tokens": min(sampling.max_new_tokens, self._longest - entry.length),
        }  # fmt: skip
        self._draws += 1
        process.send(Message("draw", fields, (np.array(ids, np.int32).tobytes(),)), "sampling", patience)

    def _read(self, message: Message, draw: _Draw, entry: _Open, sampling: SamplingSettings) -> None:
        """Rollouts from a finished draw, into the request that they belong to."""
        ids = np.frombuffer(message.blobs[0], np.int32)
        logprobs = np.frombuffer(message.blobs[1], np.float32)
        item_id = entry.request.item.id
        if not np.isfinite(logprobs).all():
            raise MedbridgeError(
                f"item {item_id!r}: vLLM gives a token that it drew no finite log-probability. The weights hold NaN or "
                f"infinity, or {self.dtype} is too narrow for them."
            )
        at = 0
        for position, length, reason in zip(draw.positions, message["lengths"], message["reasons"], strict=True):
            own = slice(at, at + length)
            at += length
            rollout = self._rollout(ids[own], logprobs[own], reason, message, draw, sampling, item_id)
            entry.rollouts[position] = Rollout(**rollout, sample=entry.request.samples[position])
            self._stats += EngineStats(
                prompt_tokens=rollout["prompt_tokens"], completion_tokens=len(rollout["token_ids"])
            )

    def _rollout(
        self, ids: np.ndarray, logprobs: np.ndarray, reason: str, message: Message, draw: _Draw,
        sampling: SamplingSettings, item_id: str,
    ) -> dict[str, Any]:  # fmt: skip
        if reason not in ("stop", "length"):
            raise EngineFailure("sampling", "died", f"vLLM gave up a completion of item {item_id!r} ({reason})")
        closed = bool(len(ids)) and int(ids[-1]) in self.prompter.stop_ids
        said = ids[: len(ids) - closed].tolist()
        end = tokens_to_stop(said, sampling.stop, self.prompter.decode) if sampling.stop else None
        if end is not None:  # the same token ends it on every engine
            ids, logprobs, said, reason = ids[:end], logprobs[:end], said[:end], "stop"
        return {
            "item_id": item_id, "permutation": draw.permutation,
            "text": cut_at_stop(self.prompter.decode(said), sampling.stop),
            "token_ids": ids.copy(), "logprobs": logprobs.copy(), "finish_reason": reason,
            "prompt_tokens": message["prompt_tokens"], "images": message["images"], "weights": message["version"],
        }  # fmt: skip

    def _take_back(self) -> None:
        """Have the process forget what it was sampling, so that the next call finds it idle."""
        with contextlib.suppress(EngineFailure, MedbridgeError):  # the next call tells of it
            self._do(Message("drop"), "dropped", "sampling")

    # -- talking to the process ----------------------------------------------------------------------------

    def _require_running(self) -> Process:
        if self._failure is not None:
            raise self._failure
        self.start()
        assert self._process is not None
        return self._process

    def _do(self, message: Message, answer: str, phase: Phase) -> None:
        """Send a message and wait for its answer."""
        process = self._require_running()
        patience = Patience(self._stall_s)
        try:
            process.send(message, phase, patience)
            self._await(answer, phase, patience)
        except BaseException as error:
            self._give_up(error)
            raise

    def _await(self, kind: str, phase: Phase, patience: Patience) -> Message:
        """The next message of a kind.

        Raises:
            EngineFailure: the process died, hung or ran out of memory.
            MedbridgeError: it says that it can't do this, and that starting it again would not help.
        """
        assert self._process is not None
        while True:
            message = self._process.receive(phase, patience)
            if phase != "start":
                patience.renew()
            if "counters" in message.fields:
                self._counters = message["counters"]
            if message.kind == "failed":
                raise self._told(message)
            if message.kind == kind:
                return message

    def _told(self, message: Message) -> EngineFailure | MedbridgeError:
        """What to raise for a failure that the process tells of itself."""
        assert self._process is not None
        if message["kind"] == "refused" and message["phase"] == "start":
            return MedbridgeError(
                f"vLLM can't run model {self.model!r} as it is set up: {message['detail']}\nChange model.path or "
                "rollout.vllm, or set rollout.engine to transformers."
            )
        if message["kind"] == "refused":
            return MedbridgeError(message["detail"])
        if message["kind"] == "out of memory":
            return EngineFailure(message["phase"], "out of memory", message["detail"])
        return self._process.died(message["phase"], message["detail"])

    def _give_up(self, error: BaseException) -> None:
        """End the process after an error. It takes a `start` to go on: other weights are lost with it."""
        self.close()
        if isinstance(error, EngineFailure):
            self._failure = error
        else:
            self._failure = EngineFailure("sampling", "died", f"it was ended after: {error!r}")

    def _keep_counters(self) -> None:
        """Counters begin at 0 with each process."""
        self._stats += EngineStats(**self._counters)
        self._counters = {}


def _split(number: int, request: Request, seed: int) -> Iterator[_Draw]:
    """One draw for each option order, the greedy sample by itself."""
    groups: dict[tuple[bool, Permutation], list[int]] = {}
    for position, (sample, order) in enumerate(zip(request.samples, request.permutations, strict=True)):
        groups.setdefault((sample == GREEDY, order), []).append(position)
    for (greedy, order), positions in groups.items():
        if greedy:
            yield from (_Draw(number, [position], order, []) for position in positions)
        else:
            seeds = [sample_seed(seed, request.item.id, request.samples[position]) for position in positions]
            yield _Draw(number, positions, order, seeds)


def sample_seed(seed: int, item_id: str, sample: int) -> int:
    """Seed of one sample's draw, that the run's seed, the item and the sample's index decide."""
    digest = hashlib.blake2b(f"{seed}|{item_id}|{sample}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
