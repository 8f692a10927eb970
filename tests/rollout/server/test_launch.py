"""Processes that must not outlive us, in real processes; the command line and the key of a server of ours."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from medbridge.data import ImageCache
    from medbridge.model import Prompter

SERVER = """
import os, signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""

ASKER = """
import socket, subprocess, sys
ours, theirs = socket.socketpair()
process = subprocess.Popen([sys.executable, "-I", *sys.argv[1:]], stdin=theirs.fileno(), start_new_session=True)
theirs.close()
held = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, pass_fds=[ours.fileno()])  # keeps it open
print(process.pid, held.pid, flush=True)
process.wait()
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


@pytest.fixture
def script(tmp_path: Path) -> Iterator[list[str]]:
    """A server, with a child that does not end when it is told to; they write their process ids to `pids`."""
    (tmp_path / "server.py").write_text(SERVER)
    yield [sys.executable, str(tmp_path / "server.py"), str(tmp_path / "pids")]
    for pid in pids(tmp_path):
        if running(pid):
            os.kill(pid, signal.SIGKILL)


def pids(folder: Path) -> list[int]:
    path = folder / "pids"
    return [int(part) for part in path.read_text().split()] if path.is_file() and path.read_text() else []


def both_pids(folder: Path) -> list[int]:
    return list(wait_for(lambda: len(found := pids(folder)) == 2 and found, "the server's process ids"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Any command in place of `vllm serve`."""
    from medbridge.rollout import VllmSettings
    from medbridge.rollout.server import launch

    started = []

    def start(command: list[str], grace_s: float = 0.3) -> Any:
        monkeypatch.setattr(launch, "GRACE_S", grace_s)
        monkeypatch.setattr(launch, "serve_command", lambda *args, **kwargs: command)
        monkeypatch.setattr(launch, "find_spec", lambda name: object())
        server = launch.LaunchedServer("model", VllmSettings(), dtype="float32", log_dir=None)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


def test_close_ends_the_server_and_its_children(run: Callable[..., Any], script: list[str], tmp_path: Path) -> None:
    server = run(script)
    both = both_pids(tmp_path)
    assert server.pid == both[0]
    assert server.ended() is None
    folder = server._log.parent
    server.close()
    server.close()
    assert not any(map(running, both))
    assert not folder.exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_close_ends_a_server_that_stands_still_or_whose_supervisor_was_killed(
    run: Callable[..., Any], script: list[str], tmp_path: Path, stopped: bool
) -> None:
    server = run(script)
    both = both_pids(tmp_path)
    if stopped:
        os.killpg(both[0], signal.SIGSTOP)
    else:
        server._process.kill()
        server._process.wait()
    server.close()
    wait_for(lambda: not any(map(running, both)), "the end of the server")


def test_the_server_ends_when_its_asker_is_killed(script: list[str], tmp_path: Path) -> None:
    from medbridge.rollout.server import supervisor

    (tmp_path / "asker.py").write_text(ASKER)
    asker = subprocess.Popen(
        [sys.executable, str(tmp_path / "asker.py"), supervisor.__file__, "0.3", *script],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert asker.stdout is not None
    watcher, held = map(int, asker.stdout.readline().split())
    both = both_pids(tmp_path)
    asker.kill()
    asker.communicate()
    try:
        wait_for(lambda: not any(map(running, [*both, watcher])), "the end of the server")
    finally:
        os.kill(held, signal.SIGKILL)


def test_a_child_ends_when_the_server_was_killed(run: Callable[..., Any], script: list[str], tmp_path: Path) -> None:
    server = run(script)
    parent, child = both_pids(tmp_path)
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: server.ended(), "the end of the server")
    assert "SIGKILL" in server.ended()
    assert not running(child)


def test_how_a_server_ended_with_the_words_that_say_why(run: Callable[..., Any]) -> None:
    said = [
        "(EngineCore pid=12) INFO 11-23 00:11:19 [core.py:1] loading",
        "(EngineCore pid=12) ERROR 11-23 00:11:19 [core.py:1090] ValueError: max_model_len is too long, \u00e9",
        "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.",
        "[rank0]:[W1123 socket.cpp:1] closing",
    ]
    server = run([sys.executable, "-c", f"import sys; print({chr(10).join(said)!r}, flush=True); sys.exit(3)"])
    wait_for(lambda: server.ended(), "the end of the server")
    assert server.ended() == "exit status 3; its last words: ValueError: max_model_len is too long, \u00e9"


def test_how_a_server_ended_that_could_not_be_started(run: Callable[..., Any]) -> None:
    server = run(["/nowhere/python"])
    wait_for(lambda: server.ended(), "the end of the supervisor")
    assert "No such file" in server.ended()


def test_the_key_stands_in_no_command_line(run: Callable[..., Any], script: list[str], tmp_path: Path) -> None:
    server = run(script)
    both_pids(tmp_path)
    assert len(server.key) >= 32
    for pid in (server.pid, server._process.pid):
        assert server.key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert f"VLLM_API_KEY={server.key}".encode() in Path(f"/proc/{server.pid}/environ").read_bytes()


def test_the_command_line_follows_the_settings() -> None:
    from medbridge.rollout import VllmSettings
    from medbridge.rollout.server.launch import serve_command

    def command(gpu: bool, **settings: Any) -> str:
        return " ".join(
            serve_command("m", VllmSettings(**settings), port=7, dtype="bfloat16", seed=5, gpu=gpu)
        )  # fmt: skip

    cpu = command(False)
    gpu = command(True, max_seqs=9, max_length=77, tensor_parallel=2, eager=True, prefix_cache=False)
    for line in (cpu, gpu):
        assert "--host 127.0.0.1 --port 7 " in line and "--dtype bfloat16" in line and "--seed 5" in line
    for flag in ("--enforce-eager", "--enable-prefix-caching", "--max-num-seqs 256", "--kv-cache-memory-bytes"):
        assert flag in cpu
    for flag in ("--gpu-memory", "--sleep", "--tensor"):
        assert flag not in cpu
    for flag in (
        "--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs 9", "--max-model-len 77",
        "--tensor-parallel-size 2", "--gpu-memory-utilization 0.85", "--enable-sleep-mode",
    ):  # fmt: skip
        assert flag in gpu
    assert "--enforce-eager" not in command(True) and "--enable-sleep-mode" not in command(True, sleep=False)


def test_the_devices_are_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    from medbridge.rollout.server.launch import serve_environment

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert serve_environment("k", ("2", "3"))["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert serve_environment("k", ())["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/collective_rpc", None, 401),
        ("/v1/models", b"Bearer wrong", 401),
        ("/health", b"Bearer ", 401),
        ("/health", b"Bearer right", 200),
    ],
)
def test_every_path_asks_for_the_key(
    monkeypatch: pytest.MonkeyPatch, path: str, header: bytes | None, status: int
) -> None:
    from medbridge.rollout.server.guard import RequireKey

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setenv("VLLM_API_KEY", "right")
    headers = [] if header is None else [(b"authorization", header)]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(RequireKey(app)(scope, lambda: None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status


def test_starting_and_stopping_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from medbridge.rollout.server.guard import RequireKey

    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    monkeypatch.setenv("VLLM_API_KEY", "right")
    asyncio.run(RequireKey(app)({"type": "lifespan"}, lambda: None, None))  # type: ignore[arg-type]
    asyncio.run(RequireKey(app)({"type": "websocket", "headers": []}, lambda: None, _ignore))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


async def _ignore(message: Any) -> None:
    pass


# -- the engine and a server of ours -----------------------------------------------------------------------


@pytest.fixture
def engine(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, prompter: Prompter, images: ImageCache) -> Any:
    """An engine whose servers run given commands, one after the other; it keeps the commands that are left."""
    from medbridge.data import PromptSettings
    from medbridge.rollout import FailureSettings, ServerSettings, VllmSettings
    from medbridge.rollout.server import launch
    from medbridge.rollout.server.engine import ServerEngine

    def make(commands: list[list[str]], start_s: float = 60) -> Any:
        monkeypatch.setattr(launch, "GRACE_S", 0.3)
        monkeypatch.setattr(launch, "serve_command", lambda *args, **kwargs: commands.pop(0))
        monkeypatch.setattr(launch, "find_spec", lambda name: object())
        return ServerEngine(
            prompter, PromptSettings(), images, url=None, model=prompter.path, settings=ServerSettings(),
            vllm=VllmSettings(), failure=FailureSettings(start_timeout_s=start_s), dtype="float32",
        )  # fmt: skip

    return make


def ending(words: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({words!r}, flush=True); sys.exit(1)"]


def test_a_port_that_was_taken_meanwhile_is_chosen_anew(engine: Callable[..., Any]) -> None:
    from medbridge.rollout import EngineFailure

    commands = [ending("OSError: [Errno 98] Address already in use"), ending("ValueError: no such model"), ["never"]]
    with pytest.raises(EngineFailure, match="no such model") as caught:
        engine(commands).start()
    assert (caught.value.phase, caught.value.kind, commands) == ("start", "died", [["never"]])


def test_a_start_without_memory(engine: Callable[..., Any]) -> None:
    from medbridge.rollout import EngineFailure

    with pytest.raises(EngineFailure) as caught:
        engine([ending("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")]).start()
    assert caught.value.kind == "out of memory"


def test_a_start_that_takes_too_long(engine: Callable[..., Any], script: list[str], tmp_path: Path) -> None:
    from medbridge.rollout import EngineFailure

    made = engine([script], start_s=0.5)
    with pytest.raises(EngineFailure, match=r"not ready after 0\.5 s") as caught:
        made.start()
    assert (caught.value.phase, caught.value.kind) == ("start", "hung")
    assert not any(map(running, pids(tmp_path)))


def test_vllm_is_missing(engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from medbridge.errors import MedbridgeError
    from medbridge.rollout.server import launch

    made = engine([])
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(MedbridgeError, match="pip install"):
        made.start()
