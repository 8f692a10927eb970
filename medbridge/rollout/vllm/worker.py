"""The process that vLLM runs in: takes messages, steps vLLM, sends what is finished. Started by `process` only.

`python -m medbridge.rollout.vllm.worker SOCKET`. It leads a process group of its own, and ends that group when the
other end of the socket is gone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from medbridge.errors import MedbridgeError
from medbridge.rollout.engine import Phase
from medbridge.rollout.vllm.process import says_no_memory
from medbridge.rollout.vllm.wire import Message, Wire, WireClosed, WireError
from medbridge.torchvision_ops import declare, prepare_children

if TYPE_CHECKING:
    from medbridge.rollout.vllm.llm import Drawn, Llm, Sampling

PHASES: dict[str, Phase] = {"weights": "weights", "transfer": "weights", "sleep": "sleep"}
"""What a message has it do, where that is not sampling."""

BEAT_S = 0.2
"""Least time between two signs of life."""

_UNUSABLE = (MedbridgeError, ValueError, TypeError, KeyError, ImportError, OSError, NotImplementedError)
"""Errors at the start that another start would meet again: settings, the model's files, an unknown architecture."""


class Worker:
    """Does what the messages say, one after the other, and steps vLLM between them."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._draws: set[int] = set()
        self._version = 0
        self._beaten = 0.0
        self._sampling: Sampling | None = None
        # Messages are taken off the socket at once: the other end may be sending while this one does.
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def run(self) -> NoReturn:
        phase: Phase = "start"
        try:
            first = self._inbox.get()
            llm = self._start(first)
            self._say("ready", {"longest": llm.longest})
            while True:
                phase = "sampling"
                message = self._next()
                if message is not None:
                    phase = PHASES.get(message.kind, phase)
                    self._handle(llm, message)
                else:
                    for drawn in llm.step():
                        self._send_drawn(llm, drawn)
                self._beat(llm)
        except WireClosed:
            end_group()
        except BaseException as error:
            self._say("failed", {"phase": phase, "kind": kind_of(error, phase), "detail": in_a_line(error)})
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
            end_group()

    def _start(self, message: Message) -> Llm:
        prepare_children()
        declare()
        from medbridge.rollout.vllm.llm import Llm

        return Llm(message.fields)

    def _next(self) -> Message | None:
        """The next message; None where there is none and vLLM has something to do."""
        if self._draws:
            try:
                return self._inbox.get_nowait()
            except queue.Empty:
                return None
        return self._inbox.get()

    def _handle(self, llm: Llm, message: Message) -> None:
        if message.kind == "sampling":
            from medbridge.rollout.vllm.llm import Sampling

            self._sampling = Sampling(**message.fields)
        elif message.kind == "draw":
            assert self._sampling is not None
            ids = np.frombuffer(message.blobs[0], np.int32).tolist()
            self._draws.add(message["draw"])
            llm.add(message["draw"], ids, message["images"], message["seeds"], self._sampling)
        elif message.kind == "drop":
            llm.drop(sorted(self._draws))
            self._draws.clear()
            self._say("dropped", {"counters": llm.counters()})
        elif message.kind == "weights":
            llm.load(Path(message["folder"]), message["version"], adapter=message["adapter"])
            self._version = message["version"]
            self._say("loaded")
        elif message.kind == "transfer":
            llm.transfer(message["step"], message["info"])
            if message["step"] == "finish":
                self._version = message["version"]
            self._say("loaded")
        elif message.kind == "sleep":
            llm.sleep()
            self._say("asleep")
        else:
            raise RuntimeError(f"unknown message {message.kind!r}")

    def _send_drawn(self, llm: Llm, drawn: Drawn) -> None:
        self._draws.discard(drawn.draw)
        fields = {
            "draw": drawn.draw, "lengths": [len(ids) for ids in drawn.token_ids], "reasons": drawn.reasons,
            "prompt_tokens": drawn.prompt_tokens, "images": drawn.images, "version": self._version,
        }  # fmt: skip
        if not self._draws:
            fields["counters"] = llm.counters()
        self._say("drawn", fields, np.concatenate(drawn.token_ids).tobytes(), np.concatenate(drawn.logprobs).tobytes())

    def _beat(self, llm: Llm) -> None:
        """Give a sign of life now and then, and the counters with it."""
        if self._draws and time.monotonic() - self._beaten > BEAT_S:
            self._beaten = time.monotonic()
            self._say("beat", {"counters": llm.counters()})

    def _say(self, kind: str, fields: dict[str, object] | None = None, *blobs: bytes) -> None:
        self._wire.send(Message(kind, fields or {}, blobs))

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._wire.receive())
        except (WireClosed, WireError):
            end_group()


def kind_of(error: BaseException, phase: str) -> str:
    """What an engine's failure counts as: "out of memory", "refused" (starting again would not help) or "died"."""
    if isinstance(error, MemoryError) or says_no_memory(f"{type(error).__name__}: {error}"):
        return "out of memory"
    if isinstance(error, MedbridgeError) or (phase == "start" and isinstance(error, _UNUSABLE)):
        return "refused"
    return "died"


def in_a_line(error: BaseException) -> str:
    """Type and message of an error without line breaks."""
    words = " ".join(str(error).split())[:600]
    return words if isinstance(error, MedbridgeError) else f"{type(error).__name__}: {words}"


def end_group() -> NoReturn:
    """End this process and all that it started, at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Connect to the engine at the socket that the command line names, and do what it says."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    Worker(Wire(connection)).run()


if __name__ == "__main__":
    main()
