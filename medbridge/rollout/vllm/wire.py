"""Messages between an engine and its process: JSON with raw bytes behind it, over a socket. It knows no engine."""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_HEADER = struct.Struct("!4sII")
_MAGIC = b"MBW1"
_LONGEST = 1 << 30
_CHUNK = 1 << 20
LOOK_S = 0.5
"""Longest time that is waited without looking up. A wait counts no more than twice that between two looks, so that a
process which was itself stopped for a while does not blame the other side."""


class WireError(Exception):
    """What arrives is no message of ours."""


class WireClosed(Exception):
    """The other end is gone."""


@dataclass(frozen=True, slots=True)
class Message:
    """`kind` says what it is, `fields` is what JSON holds, and `blobs` are raw bytes."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    blobs: tuple[bytes, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class Patience:
    """Seconds that may pass without a sign of life. What passes while this very process stands still is not counted."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waited = 0.0
        self._looked = time.monotonic()

    def look(self) -> bool:
        """Count the time since the last look; False: patience is at an end."""
        now = time.monotonic()
        self.waited += min(now - self._looked, 2 * LOOK_S)
        self._looked = now
        return self.waited < self.seconds

    def renew(self) -> None:
        self.waited, self._looked = 0.0, time.monotonic()

    @property
    def next_look_s(self) -> float:
        return max(0.0, min(LOOK_S, self.seconds - self.waited))


class Wire:
    """One end of a connected stream socket. One thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._received = bytearray()

    def send(self, message: Message, patience: Patience | None = None) -> None:
        """Write a message; without `patience` it waits as long as it takes.

        Raises:
            TimeoutError: the other end has taken nothing for too long; the connection can't be used any more.
            WireClosed: it is gone.
        """
        head = {"kind": message.kind, "fields": dict(message.fields), "blobs": [len(blob) for blob in message.blobs]}
        text = json.dumps(head, separators=(",", ":")).encode()
        size = sum(map(len, message.blobs))
        if max(len(text), size) > _LONGEST:
            raise ValueError(f"a message of {len(text)} + {size} bytes is too long for the connection")
        left = memoryview(b"".join((_HEADER.pack(_MAGIC, len(text), size), text, *message.blobs)))
        while left:
            try:
                left = left[self._socket.send(left[:_CHUNK]) :]
            except BlockingIOError:
                self._wait(patience, lambda seconds: select.select([], [self._socket], [], seconds)[1])
            except OSError as error:
                raise WireClosed(str(error)) from error
            else:
                if patience is not None:
                    patience.renew()

    def receive(self, patience: Patience | None = None) -> Message:
        """The next message; without `patience` it waits as long as it takes.

        Raises:
            TimeoutError: nothing came for too long. Waiting again is allowed.
            WireClosed: the other end is gone, and all that it sent has been read.
            WireError: what came is no message of ours.
        """
        while (message := self._next()) is None:
            try:
                got = self._socket.recv(_CHUNK)
            except BlockingIOError:
                self._wait(patience, lambda seconds: select.select([self._socket], [], [], seconds)[0])
                continue
            except OSError as error:
                raise WireClosed(str(error)) from error
            if not got:
                raise WireClosed("the connection was closed")
            self._received += got
        return message

    def close(self) -> None:
        self._socket.close()

    def _wait(self, patience: Patience | None, ready: Callable[[float | None], object]) -> None:
        if patience is None:
            ready(None)
        elif not ready(patience.next_look_s) and not patience.look():
            raise TimeoutError(f"no sign of life for {patience.waited:.0f} s")

    def _next(self) -> Message | None:
        """A whole message from what has been received."""
        if len(self._received) < _HEADER.size:
            return None
        magic, length, size = _HEADER.unpack_from(self._received)
        if magic != _MAGIC or max(length, size) > _LONGEST:
            raise WireError(f"not a message: it begins with {bytes(self._received[:16])!r}")
        end = _HEADER.size + length + size
        if len(self._received) < end:
            return None
        head = json.loads(bytes(self._received[_HEADER.size : _HEADER.size + length]))
        blobs = []
        at = _HEADER.size + length
        for count in head["blobs"]:
            blobs.append(bytes(self._received[at : at + count]))
            at += count
        if at != end:
            raise WireError(f"message {head['kind']!r}: {size} bytes follow it and its parts are {head['blobs']}")
        del self._received[:end]
        return Message(head["kind"], head["fields"], tuple(blobs))
