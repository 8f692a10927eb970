"""The rollout engine that asks one `vllm serve` process over HTTP: the user's, or one that it starts itself."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NoReturn

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import EngineFailure, EngineStats, Phase, Request, Rollout, SamplingSettings
from medbridge.rollout.server.checks import Counters, check_server, read_counters, serve_line
from medbridge.rollout.server.client import Client, ServerDown, ServerRefusal, ServerSilent
from medbridge.rollout.server.drawing import Drawing, Prompts
from medbridge.rollout.server.launch import LaunchedServer
from medbridge.rollout.settings import FailureSettings, ServerSettings, VllmSettings
from medbridge.rollout.vllm.process import says_no_memory
from medbridge.rollout.weights import Weights, check_folder

POLL_S = 0.25
"""Seconds between looks at a server that starts."""

FAREWELL_S = 3.0
"""Seconds that a server of ours has, once it answers no more, to say how it ended."""


class ServerEngine:
    """Samples from one `vllm serve` process."""

    name = "vllm-server"

    def __init__(
        self,
        prompter: Prompter,
        prompts: PromptSettings,
        images: ImageCache,
        *,
        url: str | None,
        model: str,
        settings: ServerSettings,
        vllm: VllmSettings,
        failure: FailureSettings,
        dtype: str,
        devices: Sequence[str] = (),
        seed: int = 0,
        log_dir: Path | None = None,
    ) -> None:
        """As follows.

        Args:
            url: the user's server; None has one started here.
            model: its folder or id, which a user's server must serve.
            dtype, devices, seed, log_dir: of a server that is started here: what it computes in, its GPUs as
                CUDA_VISIBLE_DEVICES names them, and where its log is kept (None: nowhere).
        """
        self.model = model
        self.url = url
        self._prompts = Prompts(prompter, prompts, images)
        self._key_variable = settings.api_key_env
        self._vllm = vllm
        self._failure = failure
        self._dtype = dtype
        self._devices = devices
        self._seed = seed
        self._log_dir = log_dir
        self._launched: LaunchedServer | None = None
        self._client: Client | None = None
        self._drawing: Future[None] | None = None
        self._was_up = False
        self._asleep = False
        self._version = 0
        self._stats = EngineStats()  # of rollouts, and of the caches of servers before this one
        self._at_start = self._counters = Counters()

    # -- its life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """As `Engine.start`; a user's server is checked.

        Raises:
            MedbridgeError: the server is not there, or not what we need; with the cure.
            EngineFailure: ours did not start, or the user's, which was there before, did not come back.
        """
        if self._client is not None:
            return
        try:
            try:
                client = self._connected(self.url) if self.url is not None else self._started()
                longest = check_server(
                    client, self.model, self._key_variable, self._prompts.prompter, timeout_s=self._patience
                )
                self._at_start = self._counters = self._read_counters(client)
            except (ServerDown, ServerSilent) as error:
                self._fail("start", error)
        except BaseException:
            self.close()
            raise
        self._prompts.open(min(longest, self._vllm.max_length or longest))
        self._version, self._was_up = 0, True

    def _started(self) -> Client:
        """A server of our own, once it is ready."""
        for _ in range(3):
            self.close()
            self._launched = LaunchedServer(
                self.model, self._vllm, dtype=self._dtype, devices=self._devices, seed=self._seed,
                log_dir=self._log_dir,
            )  # fmt: skip
            self._client = Client(self._launched.url, self._launched.key, proxies=False)
            ended = self._ended_before_ready(self._launched, self._client)
            if not ended:
                return self._client
            if "address already in use" not in ended.lower():  # else the port was taken since we looked
                break
        raise EngineFailure("start", _kind(ended), ended)

    def _ended_before_ready(self, launched: LaunchedServer, client: Client) -> str:
        """How it ended while we waited for it to get ready; empty as soon as it is."""
        until = time.monotonic() + self._failure.start_timeout_s
        while (ended := launched.ended()) is None:
            if self._trouble(client) is None:
                return ""
            if time.monotonic() > until:
                seconds, words = self._failure.start_timeout_s, launched.last_words()
                raise EngineFailure("start", "hung", f"not ready after {seconds:g} s; its last words: {words}")
            time.sleep(POLL_S)
        return ended

    def _connected(self, url: str) -> Client:
        """The user's server: at once, or, where it was there before, as soon as it is back."""
        self._client = Client(url, os.environ.get(self._key_variable), proxies=True)
        until = time.monotonic() + (self._failure.start_timeout_s if self._was_up else 0)
        while (trouble := self._trouble(self._client)) is not None:
            if time.monotonic() < until:
                time.sleep(POLL_S)
            elif self._was_up:
                raise EngineFailure("start", "died", f"not back after {self._failure.start_timeout_s:g} s: {trouble}")
            else:
                raise MedbridgeError(
                    f"rollout.server.urls: no server is ready at {url} ({trouble}). Correct the address, or start one "
                    f"there and wait until it is ready:\n  {serve_line(self.model, self._key_variable)}"
                )
        return self._client

    def _trouble(self, client: Client) -> str | None:
        """Why the server is not healthy; None if it is."""
        try:
            client.call("GET", "/health", timeout_s=self._patience)
        except (ServerDown, ServerSilent) as error:
            return str(error)
        except ServerRefusal:
            pass  # it runs; what it refuses, the checks find out
        return None

    def close(self) -> None:
        self._stop_drawing()
        self._keep_counters()
        if self._client is not None:
            self._client.close()
        if self._launched is not None:
            self._launched.close()
        self._client = self._launched = None
        self._asleep = False

    # -- sampling ------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        client = self._ready()
        lengths = [self._prompts.length(request) for request in requests]
        done: queue.SimpleQueue[list[Rollout] | None] = queue.SimpleQueue()
        drawing = Drawing(
            client, self._prompts, sampling, seed=seed, weights=self._version, most=self._vllm.max_seqs,
            group=self._vllm.max_seqs if self._launched else 1,
            stall_s=self._failure.stall_timeout_s, done=done.put, count=self._count,
        )  # fmt: skip
        self._drawing = future = client.submit(drawing.run(requests, lengths))
        future.add_done_callback(lambda _: done.put(None))
        try:
            while (rollouts := done.get()) is not None:
                tokens = sum(len(rollout.token_ids) for rollout in rollouts)
                prompts = sum(rollout.prompt_tokens for rollout in rollouts)
                self._stats += EngineStats(prompt_tokens=prompts, completion_tokens=tokens)
                yield rollouts
            future.result()
        except BaseExceptionGroup as group:
            error = _first(group)
            if isinstance(error, ServerDown | ServerSilent):
                self._fail("sampling", error)
            raise error from None
        finally:
            future.cancel()

    def _stop_drawing(self) -> None:
        if self._drawing is not None:
            self._drawing.cancel()
            self._drawing = None

    # -- weights and memory --------------------------------------------------------------------------------

    def update_weights(self, weights: Weights) -> None:
        """As `Engine.update_weights`; the server reads `weights.folder()`, so it must see the same files.

        Raises:
            MedbridgeError: the server does not let its weights be changed, or can't read these.
        """
        client = self._ready()
        self._stop_drawing()
        folder = weights.folder().resolve()
        files = [str(file) for file in check_folder(folder, weights.version)]
        try:
            # what is in flight ends, and nothing begins: half of an answer would come from each version
            self._post(client, "/pause?mode=wait&clear_cache=true")
            try:
                loaded = self._post(client, "/collective_rpc", {"method": "medbridge_load", "args": [files]})
                for cache in ("encoder", "mm", "prefix"):
                    answer = self._post(client, f"/reset_{cache}_cache")
                if not json.loads(answer)["success"]:
                    raise ServerDown("its prefix cache can't be emptied")
            finally:
                self._post(client, "/resume")
        except ServerRefusal as error:
            raise MedbridgeError(
                f"{client.url} does not let its weights be changed ({error}). {self._how_to_sync()}"
            ) from error
        except ServerSilent as error:
            self._fail("weights", error)
        except ServerDown as error:
            if says_no_memory(str(error)) or self._trouble(client) is not None:
                self._fail("weights", error)
            raise MedbridgeError(
                f"{client.url} can't take over the weights in {folder}: {error}. It must see that folder under the "
                f"same path. {self._how_to_sync()}"
            ) from error
        lacking = sorted({name for names in json.loads(loaded)["results"] for name in names})
        if lacking:
            raise MedbridgeError(
                f"{folder}: weights of version {weights.version} lack those of {len(lacking)} of the layers of "
                f"{client.url} (for example {lacking[0]!r}). Does it serve {self.model}?"
            )
        self._version = weights.version

    def _how_to_sync(self) -> str:
        return f"Start it with\n  {serve_line(self.model, self._key_variable, sync=True)}"

    def sleep(self) -> None:
        """Only a server of ours on a GPU sleeps: a user's may have other users."""
        if self._launched is None or self._asleep or not (self._vllm.sleep and self._launched.gpu):
            return
        client = self._ready()
        self._stop_drawing()
        try:
            self._post(client, "/sleep?level=1&mode=wait")
        except (ServerDown, ServerSilent) as error:
            self._fail("sleep", error)
        self._asleep = True

    def _ready(self) -> Client:
        """The client of a server that is started and awake."""
        self.start()
        assert self._client is not None
        if self._asleep:
            try:
                self._post(self._client, "/wake_up")
            except (ServerDown, ServerSilent) as error:
                self._fail("sleep", error)
            self._asleep = False
        return self._client

    def _post(self, client: Client, path: str, body: dict[str, object] | None = None) -> str:
        return client.call("POST", path, body, timeout_s=self._failure.stall_timeout_s)

    # -- counting and failing ------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        if self._client is not None and (self._drawing is None or self._drawing.done()):
            with contextlib.suppress(ServerDown, ServerSilent):  # what was seen last must do
                self._count(self._read_counters(self._client))
        return self._stats + EngineStats(**self._counters.since(self._at_start))

    def _read_counters(self, client: Client) -> Counters:
        try:
            return read_counters(client.call("GET", "/metrics", timeout_s=self._patience))
        except ServerRefusal:
            return Counters()  # it keeps no statistics

    def _count(self, counters: Counters) -> None:
        self._counters = counters

    def _keep_counters(self) -> None:
        self._stats += EngineStats(**self._counters.since(self._at_start))
        self._at_start = self._counters = Counters()

    @property
    def _patience(self) -> float:
        """Seconds that a question may take that costs the server nothing."""
        return min(30.0, self._failure.stall_timeout_s)

    def _fail(self, phase: Phase, error: ServerDown | ServerSilent) -> NoReturn:
        """As an EngineFailure, with how the server ended, or what it said last, if it is ours."""
        kind: Literal["hung", "died"] = "hung" if isinstance(error, ServerSilent) else "died"
        detail = str(error)
        if self._launched is not None and kind == "died":
            until = time.monotonic() + FAREWELL_S
            while (ended := self._launched.ended()) is None and time.monotonic() < until:
                time.sleep(0.05)
            detail = f"{error} ({ended or 'its last words: ' + self._launched.last_words()})"
        raise EngineFailure(phase, _kind(detail) if kind == "died" else kind, detail) from error


def _kind(detail: str) -> Literal["died", "out of memory"]:
    return "out of memory" if says_no_memory(detail) else "died"


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
