"""A language model behind an OpenAI-compatible endpoint that says whether two open answers mean the same.

Every verdict is stored with its whole prompt and what the model said, so that it can be checked, and nothing is asked
twice. It sees question, right answer and answer; no images.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from medbridge.errors import MedbridgeError

PROMPT = """Two answers to a medical question about an image are compared. Does the given answer mean the same as the \
right one? A less precise answer is wrong; other words for the same are right.

Question: {question}
Right answer: {right}
Given answer: {read}

Reply with one word: correct or wrong."""

_TRIES = 4

Bar = Callable[[str, str], contextlib.AbstractContextManager[Callable[[int, int], None]]]
"""From a description and a unit to a progress bar, which takes (done, total)."""

_LONGEST = 2048
"""Tokens of a reply: one word is asked for, and some models reason first."""

_AT_ONCE = 8
"""Questions that are under way at once: endpoints batch them."""


class Judge:
    """Asks, and remembers in an SQLite file. A context, which closes both."""

    def __init__(
        self,
        url: str,
        model: str,
        store: Path,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        wait: Callable[[float], None] = time.sleep,
        bar: Bar = lambda description, unit: contextlib.nullcontext(lambda done, total: None),
    ) -> None:
        """`url`: of the endpoint, with its version (http://host:8000/v1). `wait` sleeps between tries; `bar` shows how
        far `prepare` is.

        Raises:
            MedbridgeError: the store can't be opened.
        """
        self.url, self.model, self._wait, self._bar = url.rstrip("/"), model, wait, bar
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(store)
            self._store.execute(
                "CREATE TABLE IF NOT EXISTS verdicts "
                "(key TEXT PRIMARY KEY, model TEXT, prompt TEXT, said TEXT, right INTEGER)"
            )
        except (OSError, sqlite3.DatabaseError) as error:
            raise MedbridgeError(
                f"{store}: the judge's verdicts can't be kept here ({error}). Name another file."
            ) from error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._store.close()

    def prepare(self, compared: Iterable[tuple[str, str, str]]) -> None:
        """Ask, several at once, all that `same` is going to be asked of: (question, right answer, answer read).

        Raises:
            MedbridgeError: as `same`. What was said until then is kept.
        """
        wanted = {prompt: key for prompt, key in map(self._prompt, dict.fromkeys(compared)) if not self._asked(key)}
        if not wanted:
            return
        failed = threading.Event()

        def ask(prompt: str) -> str | None:
            """None where another has failed, and the endpoint is let alone."""
            if failed.is_set():
                return None
            try:
                return self._ask(prompt)
            except BaseException:
                failed.set()
                raise

        def keep(answer: Future[str | None]) -> None:
            prompt, said = asked[answer], answer.result()
            if said is not None:
                self._keep(wanted[prompt], prompt, said)

        with self._bar(f"asking {self.model}", "answers") as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = {pool.submit(ask, prompt): prompt for prompt in wanted}
            try:
                for done, answer in enumerate(as_completed(asked), start=1):
                    keep(answer)
                    progress(done, len(asked))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                for answer in asked:  # what was answered meanwhile is not asked for again
                    if answer.done() and not answer.cancelled() and answer.exception() is None:
                        keep(answer)
                raise

    def same(self, question: str, right: str, read: str) -> bool | None:
        """Whether the answer that was read means the right one; None where the model did not decide.

        Raises:
            MedbridgeError: the endpoint can't be reached, or refuses.
        """
        prompt, key = self._prompt((question, right, read))
        if not self._asked(key):
            self._keep(key, prompt, self._ask(prompt))
        (verdict,) = self._store.execute("SELECT right FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if verdict is None else bool(verdict)

    def _prompt(self, compared: tuple[str, str, str]) -> tuple[str, str]:
        """What is asked, and the key it is kept under."""
        question, right, read = compared
        prompt = PROMPT.format(question=question, right=right, read=read)
        return prompt, hashlib.blake2b(f"{self.model}\0{prompt}".encode("utf-8", "replace"), digest_size=16).hexdigest()

    def _asked(self, key: str) -> bool:
        return self._store.execute("SELECT 1 FROM verdicts WHERE key = ?", (key,)).fetchone() is not None

    def _keep(self, key: str, prompt: str, said: str) -> None:
        with self._store:
            self._store.execute(
                "INSERT OR REPLACE INTO verdicts VALUES (?,?,?,?,?)", (key, self.model, prompt, said, _verdict(said))
            )

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model, "temperature": 0, "max_tokens": _LONGEST,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                self._wait(2.0**attempt)
            try:
                answer = self._client.post(f"{self.url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            if answer.status_code == 429 or answer.status_code >= 500:
                problem = f"status {answer.status_code}"
                continue
            if answer.status_code != 200:
                raise MedbridgeError(
                    f"the judge at {self.url} refuses (status {answer.status_code}): {answer.text[:200]}. Check the "
                    "model's name and the key (MEDBRIDGE_JUDGE_KEY)."
                )
            with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
                return str(answer.json()["choices"][0]["message"]["content"] or "")
            problem = f"no chat completion in {answer.text[:100]!r}"
        raise MedbridgeError(
            f"the judge at {self.url} can't be asked: {problem}. What it said so far is kept; try again."
        )


def _verdict(said: str) -> bool | None:
    """What a reply decides, behind its reasoning; None where it says both, or neither."""
    words = re.findall(r"\b(not\s{1,4}correct|incorrect|correct|wrong)\b", said.rpartition("</think>")[2].casefold())
    decided = {word == "correct" for word in words}
    return decided.pop() if len(decided) == 1 else None
