"""The state of one run: a SQLite file with items, rollouts, outcomes, tallies, verdicts, stages and metrics.

Every batch is one transaction, so a kill at any instant loses at most the batch in flight. This file knows how
rows are stored; what they mean is decided in `pipeline`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medbridge.data.answers import Outcome, Status
from medbridge.data.items import Item
from medbridge.errors import MedbridgeError
from medbridge.rollout.engine import GREEDY, Graded, Rollout
from medbridge.support.tallies import Tally

SCHEMA_VERSION = 4

TRAINING = ("bridge", "sharpen", "mixed")
"""Kinds of stage that a verdict calls for; each ends a round."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    item_id TEXT PRIMARY KEY, dataset TEXT NOT NULL, split TEXT NOT NULL, stratum TEXT NOT NULL,
    question TEXT NOT NULL, options TEXT, answer TEXT NOT NULL, images TEXT NOT NULL,
    tags TEXT NOT NULL, floor REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE stages (
    stage_id INTEGER PRIMARY KEY, round INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('format', 'diagnose', 'control', 'route', 'bridge', 'sharpen', 'mixed',
        'evaluate')),
    status TEXT NOT NULL CHECK (status IN ('running', 'done')),
    model TEXT NOT NULL, result_model TEXT, strata TEXT NOT NULL, plan TEXT NOT NULL,
    started REAL NOT NULL, finished REAL, summary TEXT
);
CREATE TABLE rollouts (
    rollout_id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages, step INTEGER NOT NULL,
    item_id TEXT NOT NULL, sample INTEGER NOT NULL, permutation TEXT NOT NULL, text TEXT NOT NULL,
    token_ids BLOB NOT NULL, logprobs BLOB NOT NULL, finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, images INTEGER, weights INTEGER NOT NULL,
    UNIQUE (stage_id, step, item_id, sample)
);
CREATE TABLE outcomes (
    rollout_id INTEGER PRIMARY KEY REFERENCES rollouts,
    status TEXT NOT NULL CHECK (status IN ('correct', 'wrong', 'abstain')),
    option INTEGER, answer TEXT, span_start INTEGER, span_end INTEGER,
    well_formed INTEGER NOT NULL, reward REAL
);
CREATE TABLE tallies (
    stage_id INTEGER NOT NULL REFERENCES stages, item_id TEXT NOT NULL, cluster TEXT NOT NULL,
    floor REAL NOT NULL, n INTEGER NOT NULL, c INTEGER NOT NULL, abstained INTEGER NOT NULL,
    greedy_correct INTEGER, votes TEXT NOT NULL, PRIMARY KEY (stage_id, item_id)
) WITHOUT ROWID;
CREATE TABLE verdicts (
    stage_id INTEGER NOT NULL REFERENCES stages, stratum TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('bridge', 'sharpen', 'done', 'undecided')),
    reason TEXT NOT NULL, verdict TEXT NOT NULL, support TEXT NOT NULL, PRIMARY KEY (stage_id, stratum)
) WITHOUT ROWID;
CREATE TABLE batches (
    stage_id INTEGER NOT NULL REFERENCES stages, step INTEGER NOT NULL, item_ids TEXT NOT NULL,
    PRIMARY KEY (stage_id, step)
) WITHOUT ROWID;
CREATE TABLE metrics (
    stage_id INTEGER NOT NULL REFERENCES stages, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL,
    PRIMARY KEY (stage_id, step, name)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run. `model` and `result_model` are folders relative to the run folder, or model ids."""

    stage_id: int
    round: int
    kind: str
    status: str
    model: str
    result_model: str | None
    strata: tuple[str, ...]
    plan: dict[str, Any]
    started: float
    finished: float | None
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """A stratum's verdict as stored: `verdict` is the gate's evidence, `support` the measured curves."""

    stratum: str
    kind: str
    reason: str
    verdict: dict[str, Any]
    support: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion to show, without its tokens. `truncated`: it reached the most tokens allowed."""

    item_id: str
    sample: int
    text: str
    truncated: bool
    outcome: Outcome


class Ledger:
    """A run's SQLite file. One process writes; any number may read."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only and not path.is_file():
            raise MedbridgeError(f"{path}: no such run database. Give a run folder made by `medbridge run`.")
        try:
            if read_only:
                self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            else:
                self._db = sqlite3.connect(path, isolation_level=None)
                # WAL with NORMAL: a killed process loses nothing committed, and readers are never blocked.
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("PRAGMA busy_timeout = 10000")
                self._db.execute("PRAGMA foreign_keys = ON")
            self._check_schema(read_only)
        except sqlite3.DatabaseError as error:
            _refuse_full_disk(path, error)
            raise MedbridgeError(
                f"{path}: not a readable run database ({error}). Restore it from a backup, or start a new run "
                "in another folder."
            ) from error

    def _check_schema(self, read_only: bool) -> None:
        if not read_only:
            with self.transaction():
                if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                    for statement in _SCHEMA.split(";"):
                        if statement.strip():
                            self._db.execute(statement)
                    self._db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (json.dumps(SCHEMA_VERSION),))
        found = self.meta("schema_version")
        if found != SCHEMA_VERSION:
            raise MedbridgeError(
                f"{self.path}: run database of schema {found}, this medbridge reads {SCHEMA_VERSION}. "
                "Use the medbridge version that made it, or start a new run."
            )

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's writes, or none of them.

        Raises:
            MedbridgeError: the disk is full. What was stored before stays.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            _refuse_full_disk(self.path, error)
            raise

    # -- run-wide facts ------------------------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))

    def add_items(self, items: Iterable[Item], strata: Sequence[str]) -> None:
        """Store items once, each with its stratum under the tag keys `strata`. Known ids are left as they are."""
        rows = (
            (
                item.id,
                item.dataset,
                item.split,
                item.stratum(strata),
                item.question,
                None if item.options is None else to_json(item.options),
                item.answer,
                to_json(item.images),
                to_json(dict(item.tags)),
                item.floor,
            )
            for item in items
        )
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO items VALUES (?,?,?,?,?,?,?,?,?,?)", rows)

    def items(self, ids: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Stored items by id, as dictionaries with the columns' names."""
        cursor = self._db.execute("SELECT * FROM items")
        names = [column[0] for column in cursor.description]
        wanted = None if ids is None else set(ids)
        found: dict[str, dict[str, Any]] = {}
        for row in cursor:
            if wanted is None or row[0] in wanted:
                record = dict(zip(names, row, strict=True))
                for key in ("options", "images", "tags"):
                    record[key] = None if record[key] is None else json.loads(record[key])
                found[row[0]] = record
        return found

    # -- stages --------------------------------------------------------------------------------------------

    def begin_stage(
        self, *, round: int, kind: str, model: str, strata: Sequence[str], plan: Mapping[str, Any]
    ) -> Stage:
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO stages (round, kind, status, model, strata, plan, started) VALUES (?,?,?,?,?,?,?)",
                (round, kind, "running", model, to_json(list(strata)), to_json(plan), time.time()),
            )
        assert cursor.lastrowid is not None
        return self.stage(cursor.lastrowid)

    def finish_stage(
        self,
        stage_id: int,
        *,
        result_model: str | None,
        summary: Mapping[str, Any],
        verdicts: Sequence[VerdictRow] = (),
    ) -> Stage:
        """Mark a stage done. `verdicts` are written in the same transaction."""
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO verdicts VALUES (?,?,?,?,?,?)",
                [(stage_id, v.stratum, v.kind, v.reason, to_json(v.verdict), to_json(v.support)) for v in verdicts],
            )
            self._db.execute(
                "UPDATE stages SET status = 'done', result_model = ?, finished = ?, summary = ? WHERE stage_id = ?",
                (result_model, time.time(), to_json(summary), stage_id),
            )
        return self.stage(stage_id)

    def stage(self, stage_id: int) -> Stage:
        return next(stage for stage in self.stages() if stage.stage_id == stage_id)

    def stages(self) -> list[Stage]:
        rows = self._db.execute(
            "SELECT stage_id, round, kind, status, model, result_model, strata, plan, started, finished, summary "
            "FROM stages ORDER BY stage_id"
        )
        return [
            Stage(
                stage_id=row[0],
                round=row[1],
                kind=row[2],
                status=row[3],
                model=row[4],
                result_model=row[5],
                strata=tuple(json.loads(row[6])),
                plan=json.loads(row[7]),
                started=row[8],
                finished=row[9],
                summary=json.loads(row[10]) if row[10] else {},
            )
            for row in rows
        ]

    # -- rollouts and outcomes -----------------------------------------------------------------------------

    def save_rollouts(self, stage_id: int, step: int, graded: Iterable[Graded]) -> None:
        """Store one batch of rollouts with their outcomes, all or none. A row stored before is an error."""
        with self.transaction():
            for entry in graded:
                rollout, outcome = entry.rollout, entry.outcome
                cursor = self._db.execute(
                    "INSERT INTO rollouts (stage_id, step, item_id, sample, permutation, text, token_ids, logprobs,"
                    " finish_reason, prompt_tokens, images, weights) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        stage_id,
                        step,
                        rollout.item_id,
                        rollout.sample,
                        to_json(list(rollout.permutation)),
                        # a lone surrogate has no UTF-8 form; one "?" in its place keeps the span's offsets
                        rollout.text.encode("utf-8", "replace").decode("utf-8"),
                        rollout.token_ids.astype("<i4").tobytes(),
                        rollout.logprobs.astype("<f4").tobytes(),
                        rollout.finish_reason,
                        rollout.prompt_tokens,
                        rollout.images,
                        rollout.weights,
                    ),
                )
                span = outcome.span or (None, None)
                self._db.execute(
                    "INSERT INTO outcomes VALUES (?,?,?,?,?,?,?,?)",
                    (
                        cursor.lastrowid,
                        outcome.status,
                        outcome.option,
                        outcome.answer,
                        span[0],
                        span[1],
                        int(outcome.well_formed),
                        entry.reward,
                    ),
                )

    def rollouts(
        self, stage_id: int, *, step: int | None = None, item_ids: Sequence[str] | None = None
    ) -> list[Graded]:
        """Stored rollouts of a stage, in the order in which they were stored."""
        query = (
            "SELECT item_id, sample, permutation, text, token_ids, logprobs, finish_reason, prompt_tokens, images,"
            " weights, status, option, answer, span_start, span_end, well_formed, reward"
            " FROM rollouts JOIN outcomes USING (rollout_id) WHERE stage_id = ?"
        )
        arguments: list[Any] = [stage_id]
        if step is not None:
            query += " AND step = ?"
            arguments.append(step)
        chosen, ids = _among(item_ids)
        query += chosen
        arguments.extend(ids)
        found = []
        for row in self._db.execute(query + " ORDER BY rollout_id", arguments):
            rollout = Rollout(
                item_id=row[0],
                sample=row[1],
                permutation=tuple(json.loads(row[2])),
                text=row[3],
                token_ids=np.frombuffer(row[4], dtype="<i4"),
                logprobs=np.frombuffer(row[5], dtype="<f4"),
                finish_reason=row[6],
                prompt_tokens=row[7],
                images=row[8],
                weights=row[9],
            )
            span = None if row[13] is None else (row[13], row[14])
            outcome = Outcome(status=row[10], option=row[11], answer=row[12], span=span, well_formed=bool(row[15]))
            found.append(Graded(rollout, outcome, row[16]))
        return found

    def outcomes(self, stage_id: int, item_ids: Sequence[str] | None = None) -> list[tuple[str, int, Outcome]]:
        """(item id, sample, outcome) of a stage's rollouts, without their tokens, in the order of storing."""
        chosen, arguments = _among(item_ids)
        rows = self._db.execute(
            "SELECT item_id, sample, status, option, answer, span_start, span_end, well_formed"
            f" FROM rollouts JOIN outcomes USING (rollout_id) WHERE stage_id = ?{chosen} ORDER BY rollout_id",
            (stage_id, *arguments),
        )
        return [
            (
                row[0],
                row[1],
                Outcome(row[2], row[3], row[4], None if row[5] is None else (row[5], row[6]), bool(row[7])),
            )
            for row in rows
        ]

    def greedy_statuses(self, stage_id: int) -> dict[str, Status]:
        """How the greedy completion of each item of a measurement came out."""
        rows = self._db.execute(
            "SELECT item_id, status FROM rollouts JOIN outcomes USING (rollout_id)"
            " WHERE stage_id = ? AND step = 0 AND sample = ?",
            (stage_id, GREEDY),
        )
        return dict(rows.fetchall())

    def examples(self, stage_id: int, item_ids: Sequence[str]) -> list[Completion]:
        """Of each of these items of a measurement: the greedy completion, and the first sampled one of each status.

        In the order of the items' ids and the samples. A measurement's step is 0.
        """
        chosen, arguments = _among(item_ids)
        rows = self._db.execute(
            "SELECT item_id, sample, text, finish_reason = 'length', status, option, answer, span_start, span_end,"
            " well_formed FROM rollouts JOIN outcomes USING (rollout_id) WHERE rollout_id IN ("
            # SQLite takes a bare column of a group with MIN() from the row that has the minimum
            " SELECT rollout_id FROM (SELECT rollout_id, MIN(sample) FROM rollouts JOIN outcomes USING (rollout_id)"
            f" WHERE stage_id = ? AND step = 0{chosen} GROUP BY item_id, sample = ?, status))"
            " ORDER BY item_id, sample",
            (stage_id, *arguments, GREEDY),
        )
        return [
            Completion(
                row[0], row[1], row[2], bool(row[3]),
                Outcome(row[4], row[5], row[6], None if row[7] is None else (row[7], row[8]), bool(row[9])),
            )
            for row in rows
        ]  # fmt: skip

    def completions(
        self, stage_id: int, item_ids: Sequence[str] | None = None
    ) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
        """(item id, sample, permutation, text) of a stage's rollouts, in the order of storing."""
        chosen, arguments = _among(item_ids)
        rows = self._db.execute(
            f"SELECT item_id, sample, permutation, text FROM rollouts WHERE stage_id = ?{chosen} ORDER BY rollout_id",
            (stage_id, *arguments),
        )
        for item_id, sample, order, text in rows:
            yield item_id, sample, tuple(json.loads(order)), text

    def cut_off(self, stage_id: int) -> dict[str, int]:
        """How many samples (the greedy one apart) of each item of a stage ended at their token limit."""
        rows = self._db.execute(
            "SELECT item_id, SUM(finish_reason = 'length') FROM rollouts WHERE stage_id = ? AND sample != ?"
            " GROUP BY item_id",
            (stage_id, GREEDY),
        )
        return dict(rows.fetchall())

    def sampling_totals(self, stage_id: int) -> dict[str, float]:
        """Items, rollouts and tokens of a stage, and the share of its rollouts that were cut off."""
        row = self._db.execute(
            "SELECT COUNT(DISTINCT item_id), COUNT(*), TOTAL(LENGTH(token_ids)) / 4, TOTAL(finish_reason = 'length')"
            " FROM rollouts WHERE stage_id = ?",
            (stage_id,),
        ).fetchone()
        return {"items": row[0], "rollouts": row[1], "tokens": int(row[2]), "truncated_rate": row[3] / max(1, row[1])}

    def asked(self, stage_id: int) -> set[str]:
        """The items of which a stage has any completion. An item's completions are stored all at once."""
        rows = self._db.execute("SELECT DISTINCT item_id FROM rollouts WHERE stage_id = ?", (stage_id,))
        return {row[0] for row in rows}

    def sampled(self, stage_id: int) -> dict[str, int]:
        """How many samples (the greedy one apart) each item of a stage has."""
        rows = self._db.execute(
            "SELECT item_id, COUNT(*) FROM rollouts WHERE stage_id = ? AND sample != ? GROUP BY item_id",
            (stage_id, GREEDY),
        )
        return dict(rows.fetchall())

    def count(self, table: str) -> int:
        assert table in {"items", "stages", "rollouts", "outcomes", "tallies", "verdicts", "batches", "metrics"}
        return int(self._db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])

    # -- measurements --------------------------------------------------------------------------------------

    def save_tallies(self, stage_id: int, tallies: Iterable[Tally]) -> None:
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO tallies VALUES (?,?,?,?,?,?,?,?,?)",
                [
                    (
                        stage_id,
                        tally.item_id,
                        tally.cluster,
                        tally.floor,
                        tally.n,
                        tally.c,
                        tally.abstained,
                        None if tally.greedy_correct is None else int(tally.greedy_correct),
                        to_json(dict(tally.votes)),
                    )
                    for tally in tallies
                ],
            )

    def tallies(self, stage_id: int) -> list[Tally]:
        rows = self._db.execute(
            "SELECT item_id, cluster, floor, n, c, abstained, greedy_correct, votes FROM tallies"
            " WHERE stage_id = ? ORDER BY item_id",
            (stage_id,),
        )
        return [
            Tally(
                item_id=row[0],
                cluster=row[1],
                floor=row[2],
                n=row[3],
                c=row[4],
                abstained=row[5],
                greedy_correct=None if row[6] is None else bool(row[6]),
                votes=json.loads(row[7]),
            )
            for row in rows
        ]

    def verdicts(self, stage_id: int) -> dict[str, VerdictRow]:
        """A measuring stage's verdicts by stratum."""
        rows = self._db.execute(
            "SELECT stratum, kind, reason, verdict, support FROM verdicts WHERE stage_id = ? ORDER BY stratum",
            (stage_id,),
        )
        return {row[0]: VerdictRow(row[0], row[1], row[2], json.loads(row[3]), json.loads(row[4])) for row in rows}

    # -- training ------------------------------------------------------------------------------------------

    def log_step(self, stage_id: int, step: int, metrics: Mapping[str, float], item_ids: Sequence[str]) -> None:
        """Record one optimizer step: its metrics and the items it was computed from."""
        with self.transaction():
            self._db.execute("INSERT INTO batches VALUES (?,?,?)", (stage_id, step, to_json(list(item_ids))))
            self._db.executemany(
                "INSERT INTO metrics VALUES (?,?,?,?)",
                [(stage_id, step, name, _finite(value)) for name, value in metrics.items()],
            )

    def rewind(self, stage_id: int, step: int) -> None:
        """Forget the optimizer steps after `step`, which a resumed stage takes again; rollouts stay."""
        with self.transaction():
            self._db.execute("DELETE FROM metrics WHERE stage_id = ? AND step > ?", (stage_id, step))
            self._db.execute("DELETE FROM batches WHERE stage_id = ? AND step > ?", (stage_id, step))

    def metrics(self, stage_id: int) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for step, name, value in self._db.execute(
            "SELECT step, name, value FROM metrics WHERE stage_id = ? ORDER BY step", (stage_id,)
        ):
            found.setdefault(name, []).append((step, float("nan") if value is None else value))
        return found

    def trained_items(self, stage_id: int) -> list[list[str]]:
        """Item ids of each optimizer step of a stage, in order."""
        rows = self._db.execute("SELECT item_ids FROM batches WHERE stage_id = ? ORDER BY step", (stage_id,))
        return [json.loads(row[0]) for row in rows]


def _refuse_full_disk(path: Path, error: sqlite3.DatabaseError) -> None:
    """Say what a disk that is full or fails means for the run; any other error is left to the caller."""
    code = getattr(error, "sqlite_errorcode", 0)  # the module's own errors have none
    if code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        why = "the disk is full" if code == sqlite3.SQLITE_FULL else f"the disk can't be written to ({error})"
        raise MedbridgeError(
            f"{path}: {why}. All that was stored before is kept, and nothing is stored by halves. Make room and run "
            "the same command again: it goes on from there."
        ) from error


def _among(item_ids: Sequence[str] | None) -> tuple[str, list[str]]:
    """A condition on item ids, with its arguments. The ids go as one JSON text: SQLite bounds how many it takes."""
    if item_ids is None:
        return "", []
    return " AND item_id IN (SELECT value FROM json_each(?))", [json.dumps(list(item_ids))]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def to_json(value: Any) -> str:
    """JSON as any tool reads it: NaN and infinities become null."""
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    return value
