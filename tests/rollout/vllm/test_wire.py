"""Messages over a real socket: whole, in parts, too late, cut off, and not ours."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from medbridge.rollout.vllm.wire import LOOK_S, Message, Patience, Wire, WireClosed, WireError
from medbridge.rollout.vllm.wire import __file__ as wire_file


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def test_what_is_sent_arrives(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(Wire, ends)
    messages = [
        Message("empty"),
        Message("fields", {"text": 'Lunge \u2014 "\U0001f980"\n', "numbers": [1, -2.5, 2**62], "none": None}),
        Message("blobs", {"a": 1}, (b"", b"\x00\xff" * 500, b"x")),
    ]
    for message in messages:
        one.send(message)
    assert [other.receive() for _ in messages] == messages


def test_a_message_larger_than_the_sockets_buffers(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(Wire, ends)
    large = Message("large", {"list": list(range(100_000))}, (os.urandom(5 << 20),))
    thread = threading.Thread(target=one.send, args=(large, Patience(60)))
    thread.start()
    assert other.receive(Patience(60)) == large
    thread.join()


def test_a_message_in_small_parts_with_time_outs_between(ends: tuple[socket.socket, socket.socket]) -> None:
    raw, wire = ends[0], Wire(ends[1])
    sender, receiver = socket.socketpair()
    Wire(sender).send(Message("hello", {"a": [1, 2]}, (b"blob",)))
    content = receiver.recv(1 << 16)
    sender.close(), receiver.close()
    for at in range(0, len(content) - 7, 7):
        raw.sendall(content[at : at + 7])
        with pytest.raises(TimeoutError, match="no sign of life"):
            wire.receive(Patience(0.01))
    raw.sendall(content[len(range(0, len(content) - 7, 7)) * 7 :] + content)
    assert wire.receive() == Message("hello", {"a": [1, 2]}, (b"blob",))
    assert wire.receive().kind == "hello"


def test_messages_sent_before_the_end_are_read_and_then_it_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(Wire, ends)
    one.send(Message("last words"))
    one.close()
    assert other.receive().kind == "last words"
    with pytest.raises(WireClosed):
        other.receive()
    with pytest.raises(WireClosed):
        for _ in range(100):
            other.send(Message("nobody reads this", {}, (bytes(1 << 16),)))


def test_a_message_cut_off_by_the_end(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(b"MBW1\x00\x00\x00\x09")
    ends[0].close()
    with pytest.raises(WireClosed):
        Wire(ends[1]).receive()


@pytest.mark.parametrize("content", [b"HTTP/1.1 200 OK\r\n\r\n", b"MBW1" + b"\xff" * 8])
def test_what_is_no_message(ends: tuple[socket.socket, socket.socket], content: bytes) -> None:
    ends[0].sendall(content)
    with pytest.raises(WireError):
        Wire(ends[1]).receive(Patience(5))


def test_a_reader_that_takes_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = Wire(ends[0])
    with pytest.raises(TimeoutError):
        wire.send(Message("large", {}, (bytes(64 << 20),)), Patience(0.2))


def test_too_long_a_message_is_refused(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medbridge.rollout.vllm.wire._LONGEST", 100)
    with pytest.raises(ValueError, match="too long"):
        Wire(ends[0]).send(Message("large", {}, (bytes(101),)))


def test_time_in_which_this_process_stands_still_is_not_the_other_sides() -> None:
    """A process with patience for 10 looks is stopped for much longer; it must not give up when it goes on."""
    code = (
        "import os, signal, time\n"
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('wire', {wire_file!r})\n"
        "wire = sys.modules['wire'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(wire)\n"
        "LOOK_S, Patience = wire.LOOK_S, wire.Patience\n"
        "patience = Patience(10 * LOOK_S)\n"
        "patience.waited = 10 * LOOK_S - 3 * LOOK_S\n"
        "print('ready', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "print(patience.look(), flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    threading.Event().wait(4 * LOOK_S)  # longer than the patience that is left
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "True\n"
