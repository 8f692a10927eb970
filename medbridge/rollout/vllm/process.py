"""Starts the process that vLLM runs in, waits for what it says, and ends it with all that it started.

What is said stands in `wire`, what the process does in `worker`. This side imports no vLLM.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from medbridge.rollout.engine import EngineFailure, Phase
from medbridge.rollout.vllm.wire import LOOK_S, Message, Patience, Wire, WireClosed, WireError

GRACE_S = 3.0
"""What the process has to end by itself before it is killed."""

WORKER = ("-m", "medbridge.rollout.vllm.worker")
SUPERVISOR = Path(__file__).parents[1] / "server" / "supervisor.py"

_LONGEST_ADDRESS = 100
"""Bytes that the path of a socket may have, with some to spare."""

_TAIL = 64 << 10
_DECORATION = re.compile(r"^(\x1b\[[0-9;]*m|\([^)]*pid=\d+\)|[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d|\[[\w./:]+\]|\s)+")
_CAUSE = re.compile(r"\w*(Error|Exception)\b|error:|out of memory|No space left", re.IGNORECASE)
_NO_CAUSE = re.compile(r"Engine core initialization failed|root cause|See stack trace|EngineDeadError|\^{4,}")

_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""Variables by which torchrun tells a process which of several it is."""

_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|bad_alloc|no available memory|not enough memory"
    r"|is less than desired|is less than requested memory",
    re.IGNORECASE,
)
"""What torch, CUDA, C++ and vLLM say when memory does not suffice."""


class Process:
    """vLLM's process, from its start to its end."""

    def __init__(self, environment: dict[str, str], log: Path | None) -> None:
        """Start it; `receive` says when it is ready. What it prints is appended to `log`, or goes with it."""
        place = tempfile.gettempdir()
        self._folder = Path(
            tempfile.mkdtemp(prefix="medbridge-vllm-", dir=place if len(place) < _LONGEST_ADDRESS // 2 else "/tmp")
        )
        self.log = log or self._folder / "vllm.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        address = str(self._folder / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(1)
        self._wire: Wire | None = None
        # The supervisor ends the process with this one, however this one ends: it sees the other end of the socket go.
        self._lifeline, theirs = socket.socketpair()
        command = [sys.executable, *WORKER, address]
        with theirs, self.log.open("ab") as written:
            self._began = written.tell()
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", str(SUPERVISOR), str(GRACE_S), *command],
                stdin=theirs.fileno(), stdout=written, stderr=written, env=environment, start_new_session=True,
            )  # fmt: skip
        with self._lifeline.makefile("r") as told:
            line = told.readline()
        self.pid = int(line) if line else None

    # -- talking -------------------------------------------------------------------------------------------

    def connect(self, phase: Phase, patience: Patience) -> None:
        """Wait until the process asks for its connection.

        Raises:
            EngineFailure: it died before, or did not ask in time.
        """
        self._listener.settimeout(LOOK_S)
        while self._wire is None:
            try:
                self._wire = Wire(self._listener.accept()[0])
            except TimeoutError:
                if self._supervisor.poll() is not None:
                    raise self.died(phase) from None
                if not patience.look():
                    raise _hung(phase, patience) from None
        if self.log.parent != self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)  # the socket has served; nothing is left if we are killed

    def send(self, message: Message, phase: Phase, patience: Patience) -> None:
        """Raises EngineFailure where the process is gone or takes nothing for too long."""
        assert self._wire is not None
        try:
            self._wire.send(message, patience)
        except TimeoutError:
            raise _hung(phase, patience) from None
        except WireClosed:
            raise self.died(phase) from None

    def receive(self, phase: Phase, patience: Patience) -> Message:
        """The next message.

        Raises:
            EngineFailure: the process is gone, or said nothing for too long.
        """
        assert self._wire is not None
        try:
            return self._wire.receive(patience)
        except TimeoutError:
            raise _hung(phase, patience) from None
        except WireClosed:
            raise self.died(phase) from None
        except WireError as error:
            raise EngineFailure(phase, "died", str(error)) from error

    # -- its end -------------------------------------------------------------------------------------------

    def died(self, phase: Phase, detail: str | None = None) -> EngineFailure:
        """What to raise for a process that has ended, or says itself that it must."""
        words = last_words(self.log, self._began)
        kind: Literal["died", "out of memory"] = "out of memory" if says_no_memory(f"{detail} {words}") else "died"
        detail = detail or self._how_it_ended()
        return EngineFailure(phase, kind, f"{detail}; the last words of its log: {words}" if words else detail)

    def _how_it_ended(self) -> str:
        try:
            code = self._supervisor.wait(2 * GRACE_S + 5)
        except subprocess.TimeoutExpired:
            return "its connection was closed"
        if code > 128 or code < 0:
            number = code - 128 if code > 0 else -code
            perhaps = " (perhaps the kernel, out of memory)" if number == signal.SIGKILL else ""
            return f"killed by signal {number}{perhaps}"
        return f"exit status {code}"

    def close(self) -> None:
        """End it with everything that it started. Calling it again does nothing."""
        if self.pid is not None:
            # It has nothing to save; a stopped or hanging one would not end by itself.
            _kill_group(self.pid)
        self._lifeline.close()
        self._listener.close()
        if self._wire is not None:
            self._wire.close()
        try:
            self._supervisor.wait(2 * GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self.pid = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _hung(phase: Phase, patience: Patience) -> EngineFailure:
    return EngineFailure(phase, "hung", f"no sign of life for {patience.waited:.0f} s")


def last_words(log: Path, start: int = 0) -> str:
    """The line of a log, from byte `start` on, that says best why its process ended; empty if there is none."""
    try:
        with log.open("rb") as written:
            written.seek(max(start, log.stat().st_size - _TAIL))
            text = written.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [_DECORATION.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _NO_CAUSE.search(line)]
    causes = [line for line in lines if _CAUSE.search(line)]
    return (causes or lines or [""])[-1][:400]


def says_no_memory(words: str) -> bool:
    """Whether an error's words are about memory that does not suffice."""
    return _NO_MEMORY.search(words) is not None


def engine_environment(devices: Sequence[int | str] | None) -> dict[str, str]:
    """The environment of vLLM's process, which sees these GPUs only (None: all that this process sees).

    What torchrun tells this process about the ranks that train is not for it: its own workers would take them for
    theirs, and wait for a store that is not there.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # ours is a setting
    shown = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
    return {**environment, **shown, "VLLM_NO_USAGE_STATS": "1"}
