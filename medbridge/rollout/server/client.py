"""HTTP to one server: many requests at a time from a thread of its own, and what each way of failing means.

It knows nothing of completions.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

Result = TypeVar("Result")

CONNECT_S = 10.0
"""Seconds that a connection may take."""

KEEP_ALIVE_S = 2.0
"""Seconds that an idle connection is kept: less than vLLM's 5, so that it is seldom closed under a request."""


class ServerDown(Exception):
    """No connection, a connection that broke, or an answer of the kind 5xx."""


class ServerSilent(Exception):
    """No answer within the time allowed."""


class ServerRefusal(Exception):
    """An answer of the kind 4xx: the server works, and does not take this request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class Client:
    """One server at `url`. Its methods may be called from any thread."""

    def __init__(self, url: str, key: str | None, *, proxies: bool) -> None:
        """`proxies`: heed the environment's proxies, which must not get between this machine and itself."""
        self.url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"client of {url}", daemon=True)
        self._thread.start()
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=proxies,
        )

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run `work` in the client's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> str:
        """`ask`, waited for."""
        return self.submit(self.ask(method, path, body, timeout_s=timeout_s)).result()

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None
    ) -> str:
        """The text of the answer; None waits for it as long as it takes.

        Raises:
            ServerDown, ServerSilent, ServerRefusal.
        """
        content = None if body is None else json.dumps(body).encode()
        try:
            try:
                answer = await self._send(method, path, content, timeout_s)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A kept connection may be closed by the server at the very moment that it is used again.
                answer = await self._send(method, path, content, timeout_s)
        except httpx.TimeoutException as error:
            raise ServerSilent(f"no answer from {self.url}{path} within {timeout_s or CONNECT_S:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise ServerDown(f"{self.url}: {str(error) or type(error).__name__}") from error
        if answer.status_code >= 500:
            raise ServerDown(f"{self.url}{path}: HTTP {answer.status_code}: {_message(answer)}")
        if not answer.is_success:
            raise ServerRefusal(answer.status_code, _message(answer))
        return answer.text

    async def _send(self, method: str, path: str, content: bytes | None, timeout_s: float | None) -> httpx.Response:
        return await self._http.request(
            method, path, content=content, headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s or CONNECT_S)),
        )  # fmt: skip

    def close(self) -> None:
        """Cut all connections and end the thread. Calling it again does nothing."""
        if self._loop.is_closed():
            return
        self.submit(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()
        await self._loop.shutdown_default_executor()


def _message(answer: httpx.Response) -> str:
    """What an error answer says, on one line."""
    text = answer.text
    try:
        found = answer.json()
        error = found.get("error", found) if isinstance(found, dict) else found
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split())[:500] or "without a word"
