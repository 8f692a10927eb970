"""A server of our own that speaks as much of vLLM's HTTP API as the engine uses, and misbehaves on demand."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from medbridge.data import ImageCache
    from medbridge.model import Prompter
    from medbridge.rollout.server.engine import ServerEngine

KEY = "right-key"
KEY_VARIABLE = "MEDBRIDGE_TEST_SERVER_KEY"


class FakeServer:
    """Its completions are random tokens that the prompt, the seed and the sample decide.

    `answers` maps a path to what stands in for its usual answer: a status and a body, or a function of the request.
    """

    def __init__(self, prompter: Prompter, model: str, port: int = 0) -> None:
        self.prompter = prompter
        self.models = [{"id": model, "root": model, "max_model_len": 400}]
        self.version = "0.32.0"
        self.key: str | None = None
        self.processed = True
        self.tokens = 0
        self.delay_s = 0.0
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = _Quiet(("127.0.0.1", port), handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, path: str = "/inference/v1/generate") -> list[Any]:
        """What was asked there, but for the engine's probes."""
        return [
            body for at, body in self.asked
            if at == path and not (body and "allowed_token_ids" in body.get("sampling_params", {}))
        ]  # fmt: skip

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/v1/models":
            return 200, {"data": self.models}
        if path == "/metrics":
            values = {
                "generation_tokens": float(self.tokens), "prompt_tokens": 0.0,
                "prefix_cache_queries": 3 * self.tokens, "prefix_cache_hits": 2 * self.tokens,
            }  # fmt: skip
            lines = [f'vllm:{name}_total{{engine="0",model_name="a b"}} {value}' for name, value in values.items()]
            return 200, "\n".join(["# HELP vllm:generation_tokens_total Tokens.", *lines, ""])
        if path == "/inference/v1/generate":
            return 200, self._generate(body)
        if path == "/collective_rpc":
            return 200, {"results": [[]]}
        if path in ("/pause", "/resume", "/reset_mm_cache", "/reset_encoder_cache"):
            return 200, {}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        return 404, {"detail": "Not Found"}

    def _generate(self, body: Any) -> Any:
        params = body["sampling_params"]
        with self.lock:
            self.in_flight += params["n"]
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(self.delay_s)
        choices = []
        for index in range(params["n"]):
            rng = np.random.default_rng([params.get("seed", 0), index, *body["token_ids"]])
            ids = rng.integers(5, self.prompter.vocab_size, min(4, params["max_tokens"])).tolist()
            stops = params["max_tokens"] > 4
            ids += self.prompter.stop_ids[:1] if stops else []
            logprobs = (-rng.random(len(ids))).tolist()
            if allowed := params.get("allowed_token_ids"):
                ids, logprobs, stops = allowed, [0.0 if self.processed else -3.0], False
            content = [{"token_id": i, "logprob": lp} for i, lp in zip(ids, logprobs, strict=True)]
            choices.append(
                {
                    "index": index, "token_ids": ids, "logprobs": {"content": content},
                    "finish_reason": "stop" if stops else "length",
                }
            )  # fmt: skip
        ids, places = self._expand(body["token_ids"], body.get("content_parts", []))
        with self.lock:
            self.in_flight -= params["n"]
            self.tokens += sum(len(choice["token_ids"]) for choice in choices)
        return {
            "choices": choices[::-1], "prompt_token_ids": ids, "mm_placeholders": {"image": places} if places else None,
        }  # fmt: skip

    def _expand(self, ids: list[int], pictures: list[Any]) -> tuple[list[int], list[Any]]:
        expanded: list[int] = []
        places = []
        left = [Image.open(io.BytesIO(base64.b64decode(p["url"].split(",")[1]))) for p in pictures]
        for token in ids:
            count = 1
            if token == self.prompter.image_token_id:
                picture = left.pop(0)
                sizes = self.prompter.processor._get_num_multimodal_tokens(image_sizes=[picture.size[::-1]])
                count = sizes["num_image_tokens"][0]
                places.append({"offset": len(expanded), "length": count})
            expanded += [token] * count
        return expanded, places


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The engine has hung up, as it may."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        with self.fake.lock:
            self.fake.asked.append((path, body))
        status, answer = 401, {"error": "Unauthorized"}
        if self.fake.key is None or self.headers.get("Authorization") == f"Bearer {self.fake.key}":
            instead = self.fake.answers.get(path, self.fake.answer)
            status, answer = instead(path, body) if callable(instead) else instead
        if status == 0:  # cut the connection
            self.close_connection = True
            return
        text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET


@pytest.fixture(scope="session")
def prompter(model_folder: Callable[[str], Path]) -> Prompter:
    from medbridge.model import Prompter

    return Prompter.load(str(model_folder("qwen2_5_vl")))


@pytest.fixture
def fake(prompter: Prompter) -> Iterator[FakeServer]:
    server = FakeServer(prompter, prompter.path)
    yield server
    server.close()


@pytest.fixture
def connect(prompter: Prompter, images: ImageCache) -> Iterator[Callable[..., ServerEngine]]:
    """Engines on a server's address; keywords are those of the vLLM settings, but for the two times."""
    from medbridge.data import PromptSettings
    from medbridge.rollout import FailureSettings, ServerSettings, VllmSettings
    from medbridge.rollout.server.engine import ServerEngine

    made = []

    def make(url: str, *, stall_s: float = 20, start_s: float = 20, **vllm: Any) -> ServerEngine:
        engine = ServerEngine(
            prompter, PromptSettings(answer_style="text", system=""), images, url=url, model=prompter.path,
            settings=ServerSettings(urls=(url,), api_key_env=KEY_VARIABLE), vllm=VllmSettings(**vllm),
            failure=FailureSettings(stall_timeout_s=stall_s, start_timeout_s=start_s), dtype="float32",
        )  # fmt: skip
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
