"""Checkpoints on disk: whoever is killed wherever, whatever byte is lost, the newest whole one loads."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from medbridge.errors import MedbridgeError
from medbridge.train.checkpoints import Checkpoint, Checkpoints, best_checkpoint, checkpoints
from medbridge.train.tensor_files import digest_of, read_tensors, write_tensors

CPU = torch.device("cpu")


def content(step: int, size: int = 50) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that tell which step they are of."""
    return {
        "weights": {"a/b": torch.full((size, 3), float(step)), "c": torch.tensor(step, dtype=torch.bfloat16)},
        "optimizer": {"step": torch.tensor(float(step)), "quantised": torch.full((size,), step % 251).to(torch.uint8)},
    }


def save(store: Checkpoints, step: int, size: int = 50, score: float | None = None) -> Path:
    return store.save(step, content(step, size), {"position": 10 * step}, score)


def assert_is(found: Checkpoint | None, step: int, size: int = 50) -> None:
    assert found is not None and found.step == step
    assert found.state() == {"step": step, "position": 10 * step}
    assert found.shapes("never saved") == {}
    for name, tensors in content(step, size).items():
        stored = dict(found.tensors(name, CPU))
        assert found.shapes(name) == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        assert stored.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert stored[key].dtype == tensor.dtype and torch.equal(stored[key], tensor)


def silent(message: str) -> NoReturn:
    raise AssertionError(f"said: {message}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- files ---------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
])  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    specs=st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), st.tuples(SHAPES, DTYPES))
)
def test_any_tensors_come_back_bit_for_bit_and_to_any_reader(
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = torch.Generator().manual_seed(len(specs))
    tensors = {}
    for name, (shape, dtype) in specs.items():
        raw = torch.randint(0, 2, (*shape, 64), generator=generator).to(torch.uint8)
        tensors[name] = raw[..., 0].bool() if dtype == torch.bool else raw.view(dtype)[..., 0]  # not contiguous
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    assert write_tensors(path, tensors) == digest_of(path)
    for stored in (dict(read_tensors(path, CPU)), load_file(path)):
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape
            copies = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(one) for one in (stored[name], tensor)]
            assert bytes(copies[0].untyped_storage()) == bytes(copies[1].untyped_storage())


def test_a_checkpoint_is_synced_before_it_gets_its_name_and_named_before_it_is_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut can undo: names before bytes. The order of the calls is all that can be seen of it here."""
    log: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        log.append(("name", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    save(Checkpoints(tmp_path / "c"), 1)
    files = {"weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {name for _, name in log[:4]} == files and {kind for kind, _ in log[:4]} == {"sync"}
    assert log[4:] == [
        ("sync", ".writing-step-000001"), ("name", "step-000001"), ("sync", "c"),
        ("sync", ".writing-newest.json"), ("name", "newest.json"), ("sync", "c"),
    ]  # fmt: skip


# -- what is kept --------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept_and_named(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2, say=silent)
    for step, score in enumerate([0.2, 0.7, None, 0.7, 0.6, None, 0.1], start=1):
        save(store, step, score=score)
    assert names(tmp_path) == ["newest.json", "step-000002", "step-000006", "step-000007"]
    assert json.loads((tmp_path / "newest.json").read_text()) == {"newest": "step-000007", "best": "step-000002"}
    assert_is(store.newest(), 7)
    assert_is(best_checkpoint(tmp_path), 2)
    save(store, 8, score=0.71)
    assert names(tmp_path) == ["newest.json", "step-000007", "step-000008"]
    assert_is(best_checkpoint(tmp_path), 8)


@pytest.mark.parametrize("keep", [1, 3])
def test_without_scores_so_many_are_kept(keep: int, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=keep, say=silent)
    for step in (9, 99, 999_999, 1_000_000):  # sorted as numbers, also beyond six digits
        save(store, step)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [9, 99, 999_999, 1_000_000][-keep:]
    assert best_checkpoint(tmp_path) is None
    assert_is(store.newest(), 1_000_000)


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, say=silent)
    save(store, 1, size=10)
    save(store, 1, size=20)
    assert_is(store.newest(), 1, size=20)
    assert names(tmp_path) == ["newest.json", "step-000001"]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_rank_is_refused(score: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is finite"):
        save(Checkpoints(tmp_path), 1, score=score)
    assert names(tmp_path) == []


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", say=silent).newest() is None
    assert checkpoints(tmp_path / "none") == [] and best_checkpoint(tmp_path / "none") is None


# -- damage --------------------------------------------------------------------------------------------------------

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def cut(path: Path, at: float) -> None:
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


def flip(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 1 << int(64 * at) % 8
    path.write_bytes(raw)


def delete(path: Path, at: float) -> None:
    path.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, delete])
@pytest.mark.parametrize("at", [0.0, 0.02, 0.33, 0.5, 0.999])
def test_any_damage_to_any_file_falls_back_with_one_message(
    name: str, damage: Callable[[Path, float], None], at: float, tmp_path: Path
) -> None:
    said: list[str] = []
    store = Checkpoints(tmp_path, say=said.append)
    save(store, 1)
    damage(save(store, 2) / name, at)
    assert_is(store.newest(), 1)
    [message] = said
    assert message.startswith(f"{tmp_path}: step-000002 is damaged ({name}")
    assert message.endswith("set aside as damaged-step-000002. Training goes on from step-000001.")
    assert names(tmp_path) == ["damaged-step-000002", "step-000001"]  # its files can still be looked at
    assert_is(store.newest(), 1)
    assert len(said) == 1  # and not again
    save(store, 2)
    assert names(tmp_path) == ["newest.json", "step-000001", "step-000002"]
    assert_is(store.newest(), 2)


def test_every_single_bit_of_the_small_files_counts(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3, say=lambda message: None)
    save(store, 1)
    folder = save(store, 2)
    for name in ("state.json", "manifest.json"):
        whole = (folder / name).read_bytes()
        for bit in range(8 * len(whole)):
            raw = bytearray(whole)
            raw[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(raw)
            assert_is(store.newest(), 1)
            (tmp_path / "damaged-step-000002").rename(folder)
            (folder / name).write_bytes(whole)
    assert_is(store.newest(), 2)


def test_several_damaged_ones_and_none_left(tmp_path: Path) -> None:
    said: list[str] = []
    store = Checkpoints(tmp_path, keep=3, say=said.append)
    for step in (1, 2, 3):
        save(store, step)
    delete(tmp_path / "step-000003" / "manifest.json", 0)
    cut(tmp_path / "step-000002" / "state.json", 0.5)
    assert_is(store.newest(), 1)
    assert "step-000003 is damaged (manifest.json: No such file" in said[0]
    assert "step-000002 is damaged (state.json is not as it was written)" in said[0]
    flip(tmp_path / "step-000001" / "weights.safetensors", 0.5)
    assert store.newest() is None
    assert said[1].endswith("Training begins again: no whole checkpoint is left.")
    assert len(said) == 2


def test_a_folder_that_is_gone_is_missed(tmp_path: Path) -> None:
    said: list[str] = []
    store = Checkpoints(tmp_path, say=said.append)
    save(store, 1)
    save(store, 2).rename(tmp_path / "elsewhere")
    assert_is(store.newest(), 1)
    assert said == [f"{tmp_path}: step-000002 is gone. Training goes on from step-000001."]


@pytest.mark.parametrize("pointer", [None, b"", b"\xff\x00", b"[]", b'{"newest": '])
def test_the_folders_tell_where_the_pointer_does_not(pointer: bytes | None, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, say=silent)
    save(store, 1)
    save(store, 2)
    (tmp_path / "newest.json").unlink()
    if pointer is not None:
        (tmp_path / "newest.json").write_bytes(pointer)
    assert_is(store.newest(), 2)


def test_a_damaged_best_one_gives_its_place_to_the_next(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1)):
        save(store, step, score=score)
    flip(tmp_path / "step-000002" / "weights.safetensors", 0.9)
    assert_is(best_checkpoint(tmp_path), 1)


# -- kills ---------------------------------------------------------------------------------------------------------


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)  # only where `work` returned or raised
    return os.waitpid(child, 0)[1]


def killed_at(operation: int, folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills this very process (SIGKILL) right before its n-th change to the folder."""
    changes = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in changes and (isinstance(args[0], int) or str(folder) in os.fsdecode(args[0])):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_a_kill_at_any_change_to_the_disk_leaves_the_newest_whole_one(tmp_path: Path) -> None:
    """Two saves, the second of which drops a checkpoint: killed before each file operation in turn."""

    def work(operation: int, folder: Path) -> Callable[[], None]:
        def run() -> None:
            sys.addaudithook(killed_at(operation, folder))
            store = Checkpoints(folder, keep=2)
            save(store, 3)
            (folder.parent / f"{operation} saved").touch()
            save(store, 4)
            os._exit(0)

        return run

    found: list[int] = []
    for operation in range(1, 1000):
        folder = tmp_path / f"at {operation}"
        store = Checkpoints(folder, keep=2, say=silent)
        save(store, 1)
        save(store, 2)
        status = in_a_child(work(operation, folder))
        newest = store.newest()
        assert newest is not None
        assert_is(newest, newest.step)
        assert newest.step >= (3 if (tmp_path / f"{operation} saved").exists() else 2)
        save(store, 5)  # and what the killed one left is no hindrance
        assert_is(store.newest(), 5)
        assert all(not name.startswith((".", "damaged")) for name in names(folder))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        found.append(newest.step)
    assert found == sorted(found) and set(found) == {2, 3, 4}
    assert len(found) > 40


def test_a_process_killed_again_and_again_loses_no_checkpoint_that_it_had_finished(tmp_path: Path) -> None:
    """Kills at random times, in the middle of writes too; each process goes on from the newest and tells its saves."""
    size = 200_000
    folder, told = tmp_path / "c", tmp_path / "told"
    told.touch()

    def work() -> None:
        store = Checkpoints(folder, keep=2, say=silent)
        newest = store.newest()
        step = newest.step if newest else 0
        with told.open("ab", buffering=0) as log:
            while True:
                step += 1
                save(store, step, size)
                log.write(b"%d\n" % step)

    generator = random.Random(0)
    left = []
    for kill in range(25):
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(3)
        while told.read_text().count("\n") <= kill and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 1.5 * (time.monotonic() - began)))  # anywhere in the next saves
        left.append(any(name.startswith(".") for name in names(folder)))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        finished = [int(line) for line in told.read_text().split()]
        newest = Checkpoints(folder, say=silent).newest()
        assert newest is not None and newest.step >= finished[-1] > kill
        assert_is(newest, newest.step, size)
    assert any(left)  # some kills fell into a save


def test_a_kill_while_a_step_is_saved_again_leaves_it_or_the_one_before(tmp_path: Path) -> None:
    """Between its two renames the step is gone, and is missed; never is half of it taken for damage."""

    def work(operation: int, folder: Path) -> Callable[[], None]:
        def run() -> None:
            sys.addaudithook(killed_at(operation, folder))
            save(Checkpoints(folder), 2)
            os._exit(0)

        return run

    found: list[int] = []
    for operation in range(1, 1000):
        folder = tmp_path / f"at {operation}"
        said: list[str] = []
        store = Checkpoints(folder, say=said.append)
        save(store, 1)
        save(store, 2)
        status = in_a_child(work(operation, folder))
        newest = store.newest()
        assert newest is not None
        assert_is(newest, newest.step)
        found.append(newest.step)
        gone = f"{folder}: step-000002 is gone. Training goes on from step-000001."
        assert said == ([gone] if newest.step == 1 else [])
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert found.count(1) <= 1 and len(found) > 15


# -- full disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_with_a_message_and_the_older_checkpoint_loads(small_disk: Path) -> None:
    folder = small_disk / "c"
    store = Checkpoints(folder, say=silent)
    size = 250_000  # 3.25 MB each: the third doesn't fit beside two
    save(store, 1, size)
    save(store, 2, size)
    for _ in range(2):
        with pytest.raises(MedbridgeError) as caught:
            save(store, 3, size)
        message = str(caught.value)
        assert message.startswith(f"{folder}: the checkpoint of step 3 can't be written ([Errno 28] No space left")
        assert "It needs 0.00325 GB" in message and "resumes at step-000002" in message
        assert names(folder) == ["newest.json", "step-000001", "step-000002"]  # the half is not left to fill the disk
        assert_is(store.newest(), 2, size)
    for path in (folder / "step-000001").iterdir():
        path.unlink()
    (folder / "step-000001").rmdir()
    save(store, 3, size)
    assert_is(store.newest(), 3, size)


def test_a_disk_that_fills_up_at_any_byte(small_disk: Path) -> None:
    """Room for ever more of the second checkpoint, down to its manifest and the pointer."""
    fitted = []
    for pages in range(20):
        folder = small_disk / f"{pages}"
        store = Checkpoints(folder, say=silent)
        save(store, 1, 1000)
        filler = small_disk / "filler"
        filler.write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail
        filler.write_bytes(bytes(4096 * (free - pages)))
        try:
            save(store, 2, 1000)
            fitted.append(pages)
        except MedbridgeError as error:
            assert "No space left" in str(error)
        filler.unlink()
        newest = store.newest()
        assert newest is not None
        assert_is(newest, newest.step, 1000)
        assert newest.step == 2 if pages in fitted else newest.step in (1, 2)
    assert 0 not in fitted and 19 in fitted


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    with pytest.raises(MedbridgeError, match=r"can't be written.*resumes at its first step"):
        save(Checkpoints(tmp_path / "c"), 1)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """What a quota does where nothing can be mounted."""
    store = Checkpoints(tmp_path / "c", say=silent)
    save(store, 1, 100)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            save(store, 2, 50_000)
        except MedbridgeError as error:
            os._exit(0 if "File too large" in str(error) else 4)

    assert os.waitstatus_to_exitcode(in_a_child(work)) == 0
    assert_is(store.newest(), 1, 100)
    assert names(tmp_path / "c") == ["newest.json", "step-000001"]


def test_a_checkpoint_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so that the refusal is played."""
    store = Checkpoints(tmp_path, say=silent)
    folder = save(store, 1)
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "weights.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(PermissionError):
            store.newest()
    assert_is(store.newest(), 1)
    assert folder.is_dir()


def test_content_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, say=silent)
    for bad in (float("nan"), np.int64(3)):
        with pytest.raises((ValueError, TypeError)):
            store.save(1, content(1), {"position": bad})
    assert names(tmp_path) == []
