"""The judge against a real HTTP server that speaks as OpenAI's endpoint does."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medbridge.cli import app
from medbridge.errors import MedbridgeError
from medbridge.evaluation.judge import Judge


class Endpoint:
    """Says what it is given to say, in turn: a text, or an HTTP status; then that all mean the same but the lung."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.next: list[str | int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                told = outer.next.pop(0) if outer.next else ""
                if isinstance(told, int):
                    self.send_response(told)
                    self.end_headers()
                    return
                words = told or ("wrong" if "answer: lung" in body["messages"][0]["content"] else "Correct.")
                content = json.dumps({"choices": [{"message": {"content": words}}]}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *inputs: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def judge(endpoint: Endpoint, folder: Path, **options: Any) -> Judge:
    return Judge(endpoint.url, "model", folder / "judge.sqlite", wait=lambda seconds: None, **options)


def test_a_verdict_is_kept_with_its_prompt(endpoint: Endpoint, tmp_path: Path) -> None:
    with judge(endpoint, tmp_path, key="secret") as one:
        assert one.same("Which organ?", "liver", "hepar") and one.same("Which organ?", "liver", "hepar")
        assert not one.same("Which organ?", "liver", "lung")
    with judge(endpoint, tmp_path) as again:
        assert again.same("Which organ?", "liver", "hepar")
    assert len(endpoint.asked) == 2 and endpoint.keys == ["Bearer secret"] * 2
    assert endpoint.asked[0]["temperature"] == 0 and endpoint.asked[0]["model"] == "model"
    rows = sqlite3.connect(tmp_path / "judge.sqlite").execute("SELECT prompt, said, right FROM verdicts").fetchall()
    assert ("Correct.", 1) in [row[1:] for row in rows] and all("Right answer: liver" in row[0] for row in rows)
    assert b"secret" not in (tmp_path / "judge.sqlite").read_bytes()


def test_many_are_asked_at_once_and_each_once(endpoint: Endpoint, tmp_path: Path) -> None:
    read = ["hepar", "lung", "hepar", *(f"word {n}" for n in range(30))]
    compared = [("Which organ?", "liver", word) for word in read]
    told: list[tuple[int, int]] = []

    @contextmanager
    def bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        assert (description, unit) == ("asking model", "answers")
        yield lambda done, total: told.append((done, total))

    with judge(endpoint, tmp_path, bar=bar) as one:
        one.prepare(compared)
        assert len(endpoint.asked) == 32 and told == [(n, 32) for n in range(1, 33)]
        assert [one.same(*compared[place]) for place in (0, 1, 2, 9)] == [True, False, True, True]
        one.prepare(compared)
    assert len(endpoint.asked) == 32


def test_what_was_said_before_it_failed_is_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.next = [*["correct"] * 5, *[401] * 200]
    compared = [("q", "liver", f"word {n}") for n in range(200)]
    with judge(endpoint, tmp_path) as one, pytest.raises(MedbridgeError, match="refuses"):
        one.prepare(compared)
    first = len(endpoint.asked)
    assert first <= 5 + 8  # eight at once: behind the first failure each has at most one answer to come
    endpoint.next = []
    with judge(endpoint, tmp_path) as again:
        again.prepare(compared)
    assert len(endpoint.asked) == first + 195


def test_it_is_asked_again_where_it_is_busy(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.next = [429, 503, "correct"]
    with judge(endpoint, tmp_path) as one:
        assert one.same("q", "a", "b")
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([500] * 4, "can't be asked: status 500"),
        ([401], r"refuses \(status 401\).*MEDBRIDGE_JUDGE_KEY"),
    ],
)
def test_what_goes_wrong(endpoint: Endpoint, tmp_path: Path, told: list[str | int], message: str) -> None:
    endpoint.next = told
    with judge(endpoint, tmp_path) as one, pytest.raises(MedbridgeError, match=message):
        one.same("q", "a", "b")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("Incorrect.", False), ("It is not correct.", False), ("**Correct**", True), ("Wrong: incorrect.", False),
        ("<think>At first wrong, but then</think>correct", True), ("perhaps", None),
        ("It is not wrong, it is correct", None),
    ],
)  # fmt: skip
def test_what_replies_decide(endpoint: Endpoint, tmp_path: Path, said: str, verdict: bool | None) -> None:
    endpoint.next = [said]
    with judge(endpoint, tmp_path) as one:
        assert one.same("q", "a", "b") is verdict is one.same("q", "a", "b")
    [kept] = sqlite3.connect(tmp_path / "judge.sqlite").execute("SELECT said, right FROM verdicts").fetchall()
    assert kept == (said, verdict) and len(endpoint.asked) == 1


def test_nobody_there_and_a_store_that_is_none(tmp_path: Path) -> None:
    nobody = Judge("http://127.0.0.1:9/v1", "m", tmp_path / "j.sqlite", wait=lambda seconds: None)
    with nobody, pytest.raises(MedbridgeError, match="can't be asked"):
        nobody.same("q", "a", "b")
    (tmp_path / "text").write_text("no database, but long enough to be read as one " * 30)
    with pytest.raises(MedbridgeError, match="can't be kept here"):
        Judge("http://127.0.0.1:9/v1", "m", tmp_path / "text")


def test_the_command(endpoint: Endpoint, tmp_path: Path) -> None:
    row = {"question": "Which organ?", "answer": "liver", "image_id": 1}
    answers = ["<answer>liver</answer>", "<answer>hepar</answer>", "<answer>lung</answer>", "no\nidea"]
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({**row, "completions": answers}) + "\n")
    command = ["evaluate", str(log), "--judge-url", endpoint.url, "--judge-store", str(tmp_path / "j.sqlite")]
    shown = CliRunner().invoke(app, [*command, "--judge-model", "m"])
    assert shown.exit_code == 0 and "right by the judge 0.50" in shown.output
    assert "asking m" in shown.stderr
    assert len(endpoint.asked) == 2  # not where the words are equal, nor where nothing was read
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, MedbridgeError) and "--judge-model" in str(refused.exception)
