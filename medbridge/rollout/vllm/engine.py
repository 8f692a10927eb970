"""The rollout engine on vLLM: prompts go to one process of ours that runs it, finished completions come back.

What happens in that process stands in `worker` and `llm`; how it is started and ended, in `process`; what is asked and
answered, in `draws`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import EngineFailure, EngineStats, Phase, Request, Rollout, SamplingSettings
from medbridge.rollout.room import prompt_length
from medbridge.rollout.settings import FailureSettings, VllmSettings
from medbridge.rollout.vllm.draws import Draw, Opened, ask, how, read, split
from medbridge.rollout.vllm.process import Process, engine_environment
from medbridge.rollout.vllm.transfer import Route, Transfer, choose_route
from medbridge.rollout.vllm.wire import Message, Patience
from medbridge.rollout.weights import Weights

AHEAD = 2
"""Completions that the process holds, in multiples of those that it decodes at a time: none of its rows is to wait."""

IMAGE_CACHE_BYTES = 1 << 28
"""Decoded images that the process keeps; one item's prompts are sent one after the other."""


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
        self._holds_model = True  # as it was started, no weights have come yet
        self._base: str | None = None  # which weights lie beneath the adapters
        self._longest = prompter.context
        self._flying: dict[int, Draw] = {}
        self._asked = 0
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
        self._process = Process(engine_environment(self._devices), self._log)
        self._holds_model, self._base = True, None
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
        self._flying = {}

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
        if self._adapter_rank and weights.adapted:
            base = weights.base()
            if base != self._base and not (self._holds_model and weights.policy.path == self.model):
                self._load(weights.base_folder(), weights.version, adapter=False)
            self._holds_model, self._base = False, base
            self._load(weights.adapter_folder(), weights.version, adapter=True)
            return
        self._holds_model, self._base = False, None
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
        """As `Engine.generate`. Left early, or followed by another call, it takes back what is not finished."""
        process = self._require_running()
        for request in requests:
            prompt_length(
                request, self.prompter, self.prompts, self.images, self._longest, who="vLLM",
                cure="Give smaller images, leave the item out, or raise rollout.vllm.max_length (or the room for it: "
                "gpu_memory, on a CPU kv_cache_gb).",
            )  # fmt: skip
        waiting = (draw for request in requests for draw in split(Opened(request), seed))
        flying = self._flying = {}
        room = AHEAD * self.settings.max_seqs
        patience = Patience(self._stall_s)
        try:
            process.send(how(sampling, self.prompter), "sampling", patience)
            following = next(waiting, None)
            while following is not None or flying:
                while following is not None and room > 0:
                    flying[self._asked] = following
                    process.send(ask(self._asked, following, self.prompter, self.prompts), "sampling", patience)
                    self._asked += 1
                    room -= len(following.positions)
                    following = next(waiting, None)
                answer = self._await("drawn", "sampling", patience)
                draw = flying.pop(answer["draw"])
                room += len(draw.positions)
                self._count(read(answer, draw, self.prompter, sampling.stop))
                rollouts = [rollout for rollout in draw.opened.rollouts if rollout is not None]
                if len(rollouts) == len(draw.opened.rollouts):
                    yield rollouts
                    if self._flying is not flying:
                        raise RuntimeError("this call was ended by a later one; an engine samples for one at a time")
                    patience.renew()
        except BaseException as error:
            if self._flying is flying:
                if isinstance(error, EngineFailure | MedbridgeError):
                    self._give_up(error)
                elif flying:
                    self._take_back()
            raise

    def _count(self, rollouts: Sequence[Rollout]) -> None:
        self._stats += EngineStats(
            prompt_tokens=sum(rollout.prompt_tokens for rollout in rollouts),
            completion_tokens=sum(len(rollout.token_ids) for rollout in rollouts),
        )

    def _take_back(self) -> None:
        """Have the process forget what it was sampling, so that the next call finds it idle."""
        self._flying = {}
        with contextlib.suppress(EngineFailure, MedbridgeError):  # the next call tells of it
            self._do(Message("drop"), "dropped", "sampling")

    # -- talking to the process ----------------------------------------------------------------------------

    def _require_running(self) -> Process:
        if self._failure is not None:
            raise self._failure
        self.start()
        if self._flying:
            self._take_back()
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
                f"vLLM can't run model {self.model!r} as it is set up: {message['detail']}\nMend that, change "
                "model.path or rollout.vllm, or set rollout.engine to transformers."
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
