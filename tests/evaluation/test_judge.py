"""The judge against a real HTTP server that speaks as OpenAI's endpoint does."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medbridge.cli import app
from medbridge.data import Item
from medbridge.data.answers import Outcome
from medbridge.errors import MedbridgeError
from medbridge.evaluation.answered import Answered
from medbridge.evaluation.evaluate import _JUDGED
from medbridge.evaluation.judge import Judge
from medbridge.evaluation.judged import by_judge, to_compare
from medbridge.rollout import GREEDY


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


def test_a_judge_that_decides(endpoint: Endpoint, tmp_path: Path) -> None:
    """Synonyms are within reach: support, accuracy, readings and the verdict go by the judge; a choice stays."""
    spoken = ["<answer>hepar</answer>", "<answer>the hepatic organ</answer>", "<answer>lung</answer>", "no\nidea"]
    rows = [
        {
            "question": f"Which organ is {n}?",
            "answer": "liver",
            "completions": spoken,
            "dataset": "open",
            "greedy": "<answer>lung</answer>",
        }
        for n in range(30)
    ]
    rows += [
        {"question": f"Is {n} seen?", "options": ["yes", "no"], "answer": "yes", "completions": ["A", "B", "A", "B"],
         "dataset": "closed"}
        for n in range(30)
    ]  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(log), "--judge-url", endpoint.url, "--judge-model", "m", "--json",
               "--judge-store", str(tmp_path / "j.sqlite")]  # fmt: skip

    def strata(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["notes"] == ([_JUDGED] if more else [])
        return {row["stratum"]: row for row in found["strata"]}

    beside, deciding = strata(), strata("--judge-decides")
    assert beside["open"]["accuracy"]["value"] == 0 and beside["open"]["verdict"] == "bridge"
    assert beside["open"]["open_answers"]["judged"] == 0.5
    now = deciding["open"]
    assert now["accuracy"]["value"] == 0.5 and now["readings"]["strict"] == 0.5 and now["support"]["value"] == 1
    assert now["verdict"] == "sharpen", now["reason"]
    assert now["pass_at_k"] == [0.5, pytest.approx(5 / 6), 1.0, 1.0]
    assert now["majority"] == [] and now["open_answers"] == beside["open"]["open_answers"]
    assert deciding["closed"] == beside["closed"]
    assert len(endpoint.asked) == 90  # three answers a question, once
    table = CliRunner().invoke(
        app, [*command[:-3], *command[-2:], "--judge-decides", "--html", str(tmp_path / "e.html")]
    )
    assert table.exit_code == 0 and _JUDGED in table.output and _JUDGED in (tmp_path / "e.html").read_text()
    refused = CliRunner().invoke(app, ["evaluate", str(log), "--judge-decides"])
    assert isinstance(refused.exception, MedbridgeError) and "--judge-url" in str(refused.exception)


class Knows:
    """Takes every answer for the right one but the lung."""

    def prepare(self, compared: Iterable[tuple[str, str, str]]) -> None: ...

    def same(self, question: str, right: str, read: str) -> bool | None:
        return None if read == "lung" else True


def test_greedy_completions_are_judged_too() -> None:
    item = Item("d/test/1", "d", "test", "Which organ?", "liver", None, (), {}, 0.0)
    read = {
        sample: Outcome(status, None, answer, None, True)
        for sample, (status, answer) in {GREEDY: ("wrong", "hepar"), 0: ("wrong", "lung"), 1: ("abstain", None)}.items()
    }
    entry = Answered(item, "c", {"standard": read, "strict": {0: read[0]}})
    assert list(to_compare([entry], ["standard"], greedy=False)) == [("Which organ?", "liver", "lung")]
    assert {read for _, _, read in to_compare([entry], ["standard", "strict"], greedy=True)} == {"hepar", "lung"}
    judged = by_judge(entry, Knows())
    assert [outcome.status for outcome in judged.readings["standard"].values()] == ["correct", "wrong", "abstain"]
    choice = replace(entry, item=replace(item, options=("liver", "lung")))
    assert by_judge(choice, Knows()) is choice
