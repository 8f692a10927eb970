"""Starting, watching and ending a process, on one that only plays vLLM's part: it ends, hangs and breaks on demand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medbridge.rollout.engine import EngineFailure
from medbridge.rollout.vllm import process as process_module
from medbridge.rollout.vllm import wire
from medbridge.rollout.vllm.process import Process, engine_environment, last_words
from medbridge.rollout.vllm.wire import Message, Patience

ACTOR = f"""
import importlib.util, os, signal, socket, subprocess, sys, time
spec = importlib.util.spec_from_file_location("wire", {wire.__file__!r})  # the package around it takes seconds
wire = sys.modules["wire"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wire)
Message, Wire = wire.Message, wire.Wire
if ROLE == "never asks":
    time.sleep(600)
if ROLE == "no model":
    sys.exit("ValueError: no such model")
if ROLE == "no memory":
    print("INFO 11-23 00:00:00 [x.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB", flush=True)
    sys.exit(1)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
wire = Wire(connection)
while True:
    message = wire.receive()
    if message.kind == "fork":  # as vLLM does where it needs several processes
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        wire.send(Message("forked", dict(pid=child.pid, own=os.getpid())))
    elif message.kind == "exit":
        print("RuntimeError: the reason", flush=True)
        os._exit(3)
    elif message.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif message.kind == "garbage":
        connection.setblocking(True)
        connection.sendall(b"no message of ours at all")
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Process]]:
    """A process that plays a role."""
    started: list[Process] = []

    def begin(role: str) -> Process:
        script = tmp_path / "actor.py"
        script.write_text(f"ROLE = {role!r}\n{ACTOR}")
        monkeypatch.setattr(process_module, "WORKER", (str(script),))
        started.append(Process(dict(os.environ), tmp_path / "logs" / "vllm.log"))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def comes_true(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 120
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def all_end(pids: list[int]) -> bool:
    return comes_true(lambda: not any(map(is_alive, pids)))


def forked(process: Process) -> list[int]:
    process.connect("start", Patience(60))
    process.send(Message("fork"), "start", Patience(60))
    message = process.receive("start", Patience(60))
    assert message["own"] == process.pid
    pids = [message["own"], message["pid"]]
    assert all(map(is_alive, pids))
    return pids


def test_close_ends_all_of_it(play: Callable[[str], Process]) -> None:
    process = play("good")
    pids = forked(process)
    process.close()
    assert all_end(pids)
    process.close()


def test_what_stands_still_is_ended_too(play: Callable[[str], Process]) -> None:
    process = play("good")
    pids = forked(process)
    os.killpg(pids[0], signal.SIGSTOP)
    process.close()
    assert all_end(pids)


def test_a_process_that_never_asks_for_its_connection_hangs(play: Callable[[str], Process]) -> None:
    process = play("never asks")
    with pytest.raises(EngineFailure, match="no sign of life for 1 s") as caught:
        process.connect("start", Patience(0.6))
    assert (caught.value.phase, caught.value.kind) == ("start", "hung")
    pid = process.pid
    assert pid is not None
    process.close()
    assert all_end([pid])


@pytest.mark.parametrize(
    ("role", "kind", "words"),
    [
        ("no model", "died", "exit status 1; the last words of its log: ValueError: no such model"),
        ("no memory", "out of memory", "the last words of its log: torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_process_that_cannot_start(play: Callable[[str], Process], role: str, kind: str, words: str) -> None:
    with pytest.raises(EngineFailure, match=words) as caught:
        play(role).connect("start", Patience(60))
    assert (caught.value.phase, caught.value.kind) == ("start", kind)


def test_a_process_that_ends_itself(play: Callable[[str], Process]) -> None:
    process = play("good")
    pids = forked(process)
    process.send(Message("exit"), "sampling", Patience(60))
    with pytest.raises(EngineFailure, match="exit status 3; the last words of its log: RuntimeError: the reason") as e:
        process.receive("sampling", Patience(60))
    assert (e.value.phase, e.value.kind) == ("sampling", "died")
    process.close()
    assert all_end(pids)


def test_a_process_that_is_killed(play: Callable[[str], Process]) -> None:
    process = play("good")
    pids = forked(process)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EngineFailure, match=r"killed by signal 9 \(perhaps the kernel, out of memory\)") as caught:
        process.receive("weights", Patience(60))
    assert (caught.value.phase, caught.value.kind) == ("weights", "died")
    process.close()
    assert all_end(pids)


def test_a_process_that_stands_still(play: Callable[[str], Process]) -> None:
    process = play("good")
    process.connect("start", Patience(60))
    process.send(Message("stop"), "sleep", Patience(60))
    with pytest.raises(EngineFailure, match="no sign of life") as caught:
        process.receive("sleep", Patience(0.3))
    assert (caught.value.phase, caught.value.kind) == ("sleep", "hung")
    with pytest.raises(EngineFailure, match="no sign of life"):
        process.send(Message("large", {}, (bytes(64 << 20),)), "sampling", Patience(0.3))


def test_a_process_that_talks_nonsense(play: Callable[[str], Process]) -> None:
    process = play("good")
    process.connect("start", Patience(60))
    process.send(Message("garbage"), "sampling", Patience(60))
    with pytest.raises(EngineFailure, match="not a message"):
        process.receive("sampling", Patience(60))


PARENT = """
import os, sys, time
from pathlib import Path
from medbridge.rollout.vllm import process as process_module
from medbridge.rollout.vllm.process import engine_environment, Process
from medbridge.rollout.vllm.wire import Message, Patience
actor, log, told, how = sys.argv[1:]
process_module.WORKER = (actor,)
process = Process(dict(os.environ), Path(log))
process.connect("start", Patience(60))
process.send(Message("fork"), "start", Patience(60))
message = process.receive("start", Patience(60))
process.send(Message("stop"), "start", Patience(60))  # a process that hangs must go as well
Path(told + ".part").write_text(f"{message['own']} {message['pid']}")
os.rename(told + ".part", told)
if how == "raise":
    raise SystemExit("an error that nobody handles")
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_nothing_outlives_its_parent(tmp_path: Path, processes: Any, how: str) -> None:
    (tmp_path / "actor.py").write_text(f"ROLE = 'good'\n{ACTOR}")
    (tmp_path / "parent.py").write_text(PARENT)
    told = tmp_path / "told"
    parent = processes.start(
        [tmp_path / "parent.py", tmp_path / "actor.py", tmp_path / "log", told, how], tmp_path / "parent.log"
    )
    assert comes_true(told.exists), (tmp_path / "parent.log").read_text()
    pids = [int(word) for word in told.read_text().split()]
    assert (processes.kill(parent) == -9) if how == "kill" else (processes.wait(parent) == 1)
    assert all_end(pids)


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_bytes(b"ValueError: of an earlier start\n")
    began = log.stat().st_size
    assert last_words(log, began) == ""
    with log.open("ab") as written:
        written.write(b"INFO 11-23 00:32:46 [core.py:1] loading\n\xff\xfe\n")
    assert last_words(log, began) == "\ufffd\ufffd"
    with log.open("ab") as written:
        written.write(
            b"\x1b[36m(Worker pid=20356)\x1b[0;0m ERROR 11-23 00:32:46 [core.py:2] KeyError: 'x'\n"
            b"RuntimeError: Engine core initialization failed. See root cause above.\nbye\n"
        )
    assert last_words(log, began) == "KeyError: 'x'"


def test_an_engine_is_told_its_gpus_and_nothing_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "VLLM_CPU_KVCACHE_SPACE")
    for name in foreign:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("HF_HOME", "models")
    environment = engine_environment([2])
    assert environment["HF_HOME"] == "models" and environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert not environment.keys() & set(foreign)
    assert engine_environment(None)["CUDA_VISIBLE_DEVICES"] == "0,1,2"
