"""Ends a server with the process that asked for it, however that one ends. A script that imports nothing of ours.

`python supervisor.py GRACE COMMAND...` runs COMMAND in a session of its own. Standard input is a socket whose other end
the asker holds: COMMAND's process id is written to it, and nothing is ever read. When COMMAND or the socket ends, when
the asker is gone or on SIGTERM, all of COMMAND's process group is told to end, and killed after GRACE seconds. The
exit status is COMMAND's, or 128 + N where signal N ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ORPHANS_S = 1.0
"""Seconds that the children of a server that has ended get: the asker waits to hear how it did."""

POLL_S = 1.0
"""Seconds between looks at whether the asker lives: a fork of it may hold the pipe open."""


def supervise(grace_s: float, command: list[str]) -> int:
    """Run `command` to its end or the asker's; gives the exit status."""
    asker = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server come to us and not to init
    told = _Told()
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    ).pid  # fmt: skip
    os.write(0, b"%d\n" % server)
    status: int | None = None
    while status is None and not told.to_end and os.getppid() == asker:
        readable, _, _ = select.select([0, told.wakeup], [], [], POLL_S)
        if told.wakeup in readable:
            os.read(told.wakeup, 4096)
        if 0 in readable and not os.read(0, 1):
            break
        status = _reaped(server)[0]
    ended = _end_group(server, grace_s if status is None else min(grace_s, ORPHANS_S))
    status = ended if status is None else status
    return 0 if status is None else status if status >= 0 else 128 - status


class _Told:
    """Signals as a readable file descriptor; `to_end` once one of them asked for the end."""

    def __init__(self) -> None:
        self.to_end = False
        self.wakeup, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)

    def _end(self, number: int, frame: object) -> None:
        self.to_end = True


def _reaped(server: int) -> tuple[int | None, bool]:
    """The server's exit code if it has ended just now, and whether any child is left."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found, False
        if pid == 0:
            return found, True
        if pid == server:
            found = os.waitstatus_to_exitcode(status)


def _end_group(group: int, grace_s: float) -> int | None:
    """SIGTERM to all of the group, SIGKILL to what is left after `grace_s`; the exit code of its leader."""
    found = None
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
            os.killpg(group, signal.SIGCONT)  # a stopped process hears nothing but SIGKILL
        until = time.monotonic() + patience
        while time.monotonic() < until:
            code, left = _reaped(group)
            found = found if code is None else code
            if not left:
                return found
            time.sleep(0.02)
    return found


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
