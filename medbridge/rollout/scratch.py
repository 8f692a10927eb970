"""Room for what the trainer hands to other processes: in memory where it fits, on a disk otherwise, gone afterwards.

It knows nothing of what is written there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from medbridge.errors import MedbridgeError

MEMORY = Path("/dev/shm")
"""Memory that looks like a disk."""

_PREFIX = "medbridge-weights-"


def make_home(needed: int, scratch: Path) -> tuple[Path, Callable[[], None]]:
    """A fresh folder where `needed` bytes have room, and what removes it.

    A lock in it is held as long as this process lives; folders of processes that were killed are removed here.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    place = choose_place(needed, (MEMORY, scratch))
    home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    lock = os.open(home / "lock.new", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(home / "lock.new", home / "lock")  # visible once it is held

    writer = os.getpid()

    def remove() -> None:
        if os.getpid() == writer:  # not in a process that was forked off
            shutil.rmtree(home, ignore_errors=True)
        os.close(lock)

    return home, remove


def choose_place(needed: int, places: Sequence[Path]) -> Path:
    """The first of `places` where `needed` bytes have room; what killed processes left there is removed before.

    Raises:
        MedbridgeError: none has room.
    """
    lacking = []
    for place in places:
        if not place.is_dir() or not os.access(place, os.W_OK):
            lacking.append(f"{place} is not a folder that can be written to")
            continue
        _remove_abandoned(place)
        free = shutil.disk_usage(place).free
        if place == MEMORY:
            free = min(free, _memory_left())
        if free >= needed:
            return place
        lacking.append(f"{place} has {free / 1e9:.2f} GB")
    raise MedbridgeError(
        f"The weights for the rollout engines take {needed / 1e9:.2f} GB, and there is no room: {'; '.join(lacking)}. "
        "Free some space, or give more shared memory (docker run --shm-size). The run can be resumed."
    )


def _remove_abandoned(place: Path) -> None:
    """Remove the folders whose writers are dead: nobody holds their locks any more."""
    for home in place.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(home / "lock", os.O_RDWR)
        except OSError:
            continue  # not ready yet, someone else's, or removed by another process just now
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home, ignore_errors=True)
        except OSError:
            pass  # held: its writer lives
        finally:
            os.close(lock)


def _memory_left() -> int:
    """Bytes that can be held in memory before something is killed for it: of the machine, and of the container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    left = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left = min(left, limit - used + int(stat["inactive_file"]))  # files that were read can be read again
    except (OSError, ValueError, KeyError):
        pass  # no such group, or one without a limit ("max")
    return left
