"""The ledger: what is stored comes back, whole batches or nothing, whoever is killed or reads at the same time."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medbridge.data import Item, Outcome
from medbridge.errors import MedbridgeError
from medbridge.ledger import SCHEMA_VERSION, Ledger, Stage, VerdictRow, to_json
from medbridge.rollout import GREEDY, Graded, Rollout
from medbridge.support import GateSettings, Tally, decide, measure

TABLES = ("items", "stages", "rollouts", "outcomes", "tallies", "verdicts", "batches", "metrics")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "run.sqlite")
    yield opened
    opened.close()


def begin(ledger: Ledger, kind: str = "diagnose") -> Stage:
    return ledger.begin_stage(round=0, kind=kind, model="models/base", strata=["a", "b"], plan={"x": math.nan})


def rollout(item_id: str, sample: int, tokens: int = 3) -> Rollout:
    generator = np.random.default_rng([sample + 1, len(item_id)])
    return Rollout(
        item_id=item_id, sample=sample, permutation=(1, 0), text="<answer>über\x00 'x'</answer>",
        token_ids=generator.integers(0, 2**31 - 1, tokens).astype(np.int32),
        logprobs=-generator.random(tokens).astype(np.float32), finish_reason="stop", prompt_tokens=17,
        images=len(item_id), weights=sample + 2,
    )  # fmt: skip


def graded(item_id: str, sample: int, status: str = "correct", reward: float | None = None) -> Graded:
    outcome = Outcome(status=status, option=None, answer=None, span=None, well_formed=False)  # type: ignore[arg-type]
    if status != "abstain":
        outcome = Outcome(status=status, option=1, answer="über", span=(8, 12), well_formed=True)  # type: ignore[arg-type]
    return Graded(rollout(item_id, sample), outcome, reward)


def counts(ledger: Ledger) -> dict[str, int]:
    return {table: ledger.count(table) for table in TABLES}


# -- what is stored comes back -------------------------------------------------------------------------------------


def test_rollouts_come_back_byte_for_byte_and_in_order(ledger: Ledger) -> None:
    stage = begin(ledger)
    stored = [graded("b", GREEDY), graded("b", 0, "wrong", 0.1), graded("a", 3, "abstain", 1 / 3)]
    ledger.save_rollouts(stage.stage_id, 0, stored)
    empty = Graded(rollout("c", 0, tokens=0), stored[2].outcome)
    ledger.save_rollouts(stage.stage_id, 2, [empty])
    found = ledger.rollouts(stage.stage_id)
    assert len(found) == 4
    for before, after in zip([*stored, empty], found, strict=True):
        assert after.outcome == before.outcome
        assert after.reward == before.reward
        for name in ("item_id", "sample", "permutation", "text", "finish_reason", "prompt_tokens", "images", "weights"):
            assert getattr(after.rollout, name) == getattr(before.rollout, name)
        for name, dtype in (("token_ids", np.int32), ("logprobs", np.float32)):
            old, new = getattr(before.rollout, name), getattr(after.rollout, name)
            assert new.dtype == dtype and new.tobytes() == old.tobytes()
    assert [entry.rollout.item_id for entry in ledger.rollouts(stage.stage_id, step=2)] == ["c"]
    assert [entry.rollout.sample for entry in ledger.rollouts(stage.stage_id, item_ids=["b"])] == [GREEDY, 0]
    assert ledger.rollouts(stage.stage_id, item_ids=[]) == []
    assert ledger.rollouts(stage.stage_id + 1) == []
    assert ledger.sampled(stage.stage_id) == {"a": 1, "b": 1, "c": 1}  # the greedy completion is no sample


def test_items_are_stored_once_with_their_stratum(ledger: Ledger) -> None:
    item = Item("d/train/0", "d", "train", "Què?", "no", ("yes", "no"), ("/x.png",), {"m": "CT"}, 0.5)
    opened = Item("d/train/1", "d", "train", "What?", "lung", None, (), {"m": "MR"}, 0.0)
    ledger.add_items([item, opened], ["m"])
    ledger.add_items([item], ["m"])
    found = ledger.items()
    assert found["d/train/0"] == {
        "item_id": "d/train/0", "dataset": "d", "split": "train", "stratum": "CT", "question": "Què?",
        "options": ["yes", "no"], "answer": "no", "images": ["/x.png"], "tags": {"m": "CT"}, "floor": 0.5,
    }  # fmt: skip
    assert found["d/train/1"]["options"] is None
    assert list(ledger.items(["d/train/1", "unknown"])) == ["d/train/1"]


def test_tallies_come_back_and_are_replaced(ledger: Ledger) -> None:
    stage = begin(ledger)
    first = [Tally("b", "c1", 0.25, 4, 1, 2, None, {"0": 1, "1": 1}), Tally("a", "c1", 1 / 3, 4, 4, 0, True, {"é": 4})]
    ledger.save_tallies(stage.stage_id, first)
    wider = [Tally("b", "c1", 0.25, 8, 3, 2, False, {"0": 3})]
    ledger.save_tallies(stage.stage_id, wider)
    assert ledger.tallies(stage.stage_id) == [first[1], wider[0]]


def test_verdicts_are_stored_with_the_end_of_their_stage_and_nan_becomes_null(ledger: Ledger) -> None:
    stage = begin(ledger)
    settings = GateSettings()
    estimate = measure([Tally("a", "a", 0.5, 0, 0)], settings, seed=0)  # no samples: its abstain rate is not a number
    verdict = decide(estimate, settings)
    row = VerdictRow("s", verdict.kind, verdict.reason, verdict.to_dict(), {"rate": math.inf, "ks": np.arange(2)})
    done = ledger.finish_stage(stage.stage_id, result_model=None, summary={"loss": math.nan}, verdicts=[row])
    assert (done.status, done.summary, done.plan) == ("done", {"loss": None}, {"x": None})
    assert done.finished is not None and done.finished >= done.started
    found = ledger.verdicts(stage.stage_id)["s"]
    assert found.support == {"rate": None, "ks": [0, 1]}
    assert found.verdict["evidence"]["abstain_rate"] is None
    assert (found.kind, found.reason) == (verdict.kind, verdict.reason)


def test_no_stored_json_holds_what_json_does_not_know() -> None:
    value = {"a": [math.nan, -math.inf, np.float32(0.5), np.int64(3)], 4: (np.array([[1.0, math.nan]]), None, True)}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {
        "a": [None, None, 0.5, 3], "4": [[[1.0, None]], None, True],
    }  # fmt: skip


def test_steps_are_recorded_and_rewound(ledger: Ledger) -> None:
    stage, other = begin(ledger, "bridge"), begin(ledger, "sharpen")
    for step in range(1, 5):
        ledger.log_step(stage.stage_id, step, {"loss": step / 2, "kl": math.nan}, [f"i{step}", "i0"])
    ledger.log_step(other.stage_id, 4, {"loss": 9.0}, [])
    ledger.save_rollouts(stage.stage_id, 4, [graded("i4", 0)])
    ledger.rewind(stage.stage_id, 2)
    assert ledger.metrics(stage.stage_id)["loss"] == [(1, 0.5), (2, 1.0)]
    assert all(math.isnan(value) for _, value in ledger.metrics(stage.stage_id)["kl"])
    assert ledger.trained_items(stage.stage_id) == [["i1", "i0"], ["i2", "i0"]]
    assert ledger.metrics(other.stage_id) == {"loss": [(4, 9.0)]}
    assert len(ledger.rollouts(stage.stage_id, step=4)) == 1  # a step that is taken again finds its rollouts
    ledger.log_step(stage.stage_id, 3, {"loss": 0.0}, [])


def test_meta_values_come_back(ledger: Ledger) -> None:
    assert ledger.meta("config") is None
    ledger.set_meta("config", {"a": [1, None]})
    ledger.set_meta("config", {"a": [2, None]})
    assert ledger.meta("config") == {"a": [2, None]}


# -- all or nothing ------------------------------------------------------------------------------------------------


def test_an_exception_inside_a_transaction_leaves_nothing(ledger: Ledger) -> None:
    stage = begin(ledger)

    def failing() -> Iterator[Graded]:
        yield graded("a", 0)
        yield graded("a", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.save_rollouts(stage.stage_id, 0, failing())
    assert counts(ledger) == {**dict.fromkeys(TABLES, 0), "stages": 1}
    ledger.save_rollouts(stage.stage_id, 0, [graded("a", 0)])  # the connection is usable as before


def test_a_rollout_stored_twice_is_refused_with_its_whole_batch(ledger: Ledger) -> None:
    stage = begin(ledger)
    ledger.save_rollouts(stage.stage_id, 0, [graded("a", 0)])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.save_rollouts(stage.stage_id, 0, [graded("b", 0), graded("a", 0)])
    assert ledger.sampled(stage.stage_id) == {"a": 1}
    ledger.save_rollouts(stage.stage_id, 1, [graded("a", 0)])  # another step is another sample


def test_a_step_logged_twice_is_refused(ledger: Ledger) -> None:
    stage = begin(ledger)
    ledger.log_step(stage.stage_id, 1, {"loss": 1.0}, ["a"])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.log_step(stage.stage_id, 1, {"loss": 2.0}, ["b"])
    assert ledger.metrics(stage.stage_id) == {"loss": [(1, 1.0)]}


def test_rows_of_no_stage_are_refused(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        ledger.save_rollouts(99, 0, [graded("a", 0)])
    with pytest.raises(sqlite3.IntegrityError):
        begin(ledger, "dream")


# -- a full disk ---------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of so many bytes; where none may be mounted, a limit on the size of the database."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        self.mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def open(self) -> Ledger:
        opened = Ledger(self.folder / "run.sqlite")
        if not self.mounted:
            opened._db.execute(f"PRAGMA max_page_count = {self.size // 4096}")
        return opened

    def make_room(self) -> None:
        self.size *= 10
        if self.mounted:
            subprocess.run(["mount", "-o", f"remount,size={self.size}", str(self.folder)], check=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture(params=[300_000, 6_000_000])  # full while the log grows for the first time, and after many checkpoints
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk", request.param)
    yield disk
    disk.close()


def long_graded(item_id: str, sample: int) -> Graded:
    return replace(graded(item_id, sample), rollout=rollout(item_id, sample, tokens=400))


def fill(ledger: Ledger, stage: Stage) -> int:
    """Store batches of two rollouts until the disk is full; how many were stored."""
    for batch in range(100_000):
        try:
            ledger.save_rollouts(stage.stage_id, 0, [long_graded(f"i{batch}", sample) for sample in range(2)])
        except MedbridgeError as error:
            assert str(ledger.path) in str(error) and "the disk is full" in str(error)
            assert "is kept" in str(error) and "same command again" in str(error)
            return batch
    raise AssertionError("the disk never filled up")


def test_a_full_disk_keeps_whole_batches_and_the_run_goes_on_once_there_is_room(small_disk: SmallDisk) -> None:
    opened = small_disk.open()
    stage = begin(opened)
    stored = fill(opened, stage)
    assert stored > 5
    for _ in range(2):
        with pytest.raises(MedbridgeError, match="the disk is full"):
            opened.set_meta("large", "x" * 10_000_000)
        assert opened.sampled(stage.stage_id) == {f"i{n}": 2 for n in range(stored)}
        opened.close()  # as by the process that ends with the error
        opened = small_disk.open()
    assert opened._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    small_disk.make_room()
    opened.close()
    opened = small_disk.open()
    opened.save_rollouts(stage.stage_id, 0, [graded(f"i{stored}", sample) for sample in range(2)])
    assert opened.sampled(stage.stage_id) == {f"i{n}": 2 for n in range(stored + 1)}
    assert opened.meta("large") is None
    opened.close()


def test_a_disk_that_is_full_from_the_start_is_a_clear_error(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk", 8192)
    try:
        if disk.mounted:
            with pytest.raises(MedbridgeError, match=r"the disk (is full|can't be written to)"):
                disk.open()
    finally:
        disk.close()


# -- files that can't be used --------------------------------------------------------------------------------------


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    opened = Ledger(path)
    opened.set_meta("schema_version", SCHEMA_VERSION + 1)
    opened.close()
    for read_only in (False, True):
        with pytest.raises(MedbridgeError, match=f"schema {SCHEMA_VERSION + 1}, this medbridge reads {SCHEMA_VERSION}"):
            Ledger(path, read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_corrupt_file_is_a_clear_error(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "run.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(MedbridgeError, match=r"run\.sqlite: not a readable run database"):
        Ledger(path, read_only=read_only)
    assert path.read_bytes().startswith(b"this is no database")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_something_else_is_a_clear_error(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "run.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    with pytest.raises(MedbridgeError, match=r"run\.sqlite: "):
        Ledger(path, read_only=read_only)


def test_reading_needs_a_file_and_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with pytest.raises(MedbridgeError, match="no such run database"):
        Ledger(path, read_only=True)
    assert not path.exists()
    Ledger(path).close()
    reader = Ledger(path, read_only=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.set_meta("x", 1)
    reader.close()


# -- several processes and threads ---------------------------------------------------------------------------------


def test_a_reader_sees_whole_batches_while_a_writer_works(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    writer = Ledger(path)
    stage = begin(writer)
    seen: list[int] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            reader = Ledger(path, read_only=True)
            while not stop.is_set():
                seen.append(len(reader.rollouts(stage.stage_id)))
            reader.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not seen and not failures:
        time.sleep(0.001)
    for batch in range(30):
        writer.save_rollouts(stage.stage_id, 0, [graded(f"i{batch}", sample) for sample in range(10)])
    stop.set()
    thread.join()
    writer.close()
    assert not failures
    assert all(count % 10 == 0 for count in seen) and seen == sorted(seen)


def test_an_open_transaction_does_not_block_a_reader(ledger: Ledger) -> None:
    stage = begin(ledger)
    with ledger.transaction():
        ledger._db.execute("DELETE FROM stages")
        reader = Ledger(ledger.path, read_only=True)
        assert [found.stage_id for found in reader.stages()] == [stage.stage_id]
        reader.close()


WRITER = """
import sys
import numpy as np
from pathlib import Path
from medbridge.data import Outcome
from medbridge.ledger import Ledger
from medbridge.rollout import Graded, Rollout

ledger = Ledger(Path(sys.argv[1]))
stage = ledger.begin_stage(round=0, kind="diagnose", model="m", strata=[], plan={})
outcome = Outcome("wrong", 0, "x", (0, 1), True)
tokens, logprobs = np.arange(200, dtype=np.int32), np.zeros(200, dtype=np.float32)
batch = 0
while True:
    entries = [
        Graded(Rollout(f"i{batch}", n, (), "x" * 200, tokens, logprobs, "stop", 1), outcome) for n in range(64)
    ]
    ledger.save_rollouts(stage.stage_id, 0, entries)
    batch += 1
"""


def test_a_killed_writer_leaves_whole_batches(tmp_path: Path, processes: Any) -> None:
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    for number in range(5):
        path = tmp_path / f"run-{number}.sqlite"
        writer = processes.start([script, path], tmp_path / "log")
        wal = path.with_name(path.name + "-wal")
        deadline = time.monotonic() + 60
        while not (wal.exists() and wal.stat().st_size > 500_000) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.0037 * number)
        assert processes.kill(writer) == -9
        reopened = Ledger(path)
        [stage] = reopened.stages()
        assert stage.status == "running"
        assert reopened.count("rollouts") == reopened.count("outcomes") > 0
        assert set(reopened.sampled(stage.stage_id).values()) == {64}
        assert reopened._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        reopened.close()
