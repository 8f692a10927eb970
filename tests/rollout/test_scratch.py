"""Scratch room: the first place that is large enough, nothing left behind by the living or the dead."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from medbridge.errors import MedbridgeError
from medbridge.rollout import scratch
from medbridge.rollout.scratch import choose_place, make_home

HOLDER = """
import sys, time
from pathlib import Path
from medbridge.rollout import scratch
scratch.MEMORY = Path(sys.argv[1])
home, _ = scratch.make_home(1, Path(sys.argv[1]))
(home / "weights").write_bytes(b"x" * 100)
print(home, flush=True)
time.sleep(60)
"""


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /dev/shm."""
    place = tmp_path / "memory"
    place.mkdir()
    monkeypatch.setattr(scratch, "MEMORY", place)
    return place


def test_memory_is_taken_if_it_has_room_and_else_the_disk(memory: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    home, remove = make_home(1000, disk)
    assert home.parent == memory
    remove()
    shutil.rmtree(memory)
    home, remove = make_home(1000, disk)
    assert home.parent == disk
    remove()
    assert list(disk.iterdir()) == []


def test_memory_counts_only_as_far_as_the_machine_has_some(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tmpfs may be larger than the memory behind it: filling it gets a process killed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    left = scratch._memory_left()
    assert 0 < left < 1 << 50
    monkeypatch.setattr(scratch, "_memory_left", lambda: 1000)
    assert choose_place(1000, (memory, disk)) == memory
    assert choose_place(1001, (memory, disk)) == disk


def test_no_room_anywhere_says_how_much_is_needed_and_what_to_do(memory: Path, tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"1000000000\.00 GB.*memory has .*; .*disk has .*shm-size.*resumed"):
        make_home(10**18, tmp_path / "disk")
    assert list(memory.iterdir()) == [] == list((tmp_path / "disk").iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(memory: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(memory)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        homes = [Path(process.stdout.readline().strip()) for process in processes if process.stdout]
        own, remove = make_home(1, tmp_path / "disk")
        assert {*homes, own} == set(memory.iterdir())
        processes[0].kill()
        processes[0].wait()
        again, remove_again = make_home(1, tmp_path / "disk")
        assert {homes[1], own, again} == set(memory.iterdir())
        remove()
        remove_again()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_forked_process_does_not_remove_what_its_parent_holds(memory: Path, tmp_path: Path) -> None:
    script = """
import os, sys, weakref
from pathlib import Path
from medbridge.rollout import scratch
scratch.MEMORY = Path(sys.argv[1])
class Owner: pass
owner = Owner()
home, remove = scratch.make_home(1, Path(sys.argv[1]))
weakref.finalize(owner, remove)
if os.fork() == 0:
    sys.exit(0)  # runs the finalizers
os.wait()
print(home.is_dir())
"""
    done = subprocess.run([sys.executable, "-c", script, str(memory)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
    assert list(memory.iterdir()) == []  # the parent's own finalizer removed it


def test_it_goes_with_its_owner(memory: Path, tmp_path: Path) -> None:
    class Owner:
        pass

    owner = Owner()
    home, remove = make_home(1, tmp_path)
    weakref.finalize(owner, remove)
    assert home.is_dir()
    del owner
    gc.collect()
    assert not home.exists()
