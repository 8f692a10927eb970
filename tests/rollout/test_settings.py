"""Settings of the engines: what is refused, in which words, at which line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medbridge.config import dump_config, parse_config
from medbridge.errors import MedbridgeError
from medbridge.rollout import RolloutSettings, ServerSettings

DATA = "data:\n  sources:\n    - kind: brain\n"


def error_of(rollout: str) -> str:
    with pytest.raises(MedbridgeError) as caught:
        parse_config(DATA + rollout, source="run.yaml")
    return str(caught.value)


def test_what_is_left_out_runs_anywhere() -> None:
    settings = RolloutSettings()
    assert settings.engine == "auto" and settings.server.urls == () and settings.vllm.engines is None
    assert parse_config(dump_config(parse_config(DATA, source="x")), source="y").rollout == settings


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_servers_are_named_for_engines_that_ask_servers_only(engine: str) -> None:
    message = error_of(f"rollout:\n  engine: {engine}\n  server:\n    urls: [http://gpu:8000]\n")
    assert message.startswith("run.yaml:6: rollout.server is ")
    assert f"engine {engine} asks none; set engine to vllm-server or auto" in message


def test_servers_are_named_or_started_but_not_both() -> None:
    assert "give one of them" in error_of("rollout:\n  server:\n    urls: [http://gpu:8000]\n    launch: 2\n")


def test_addresses_are_kept_in_one_form() -> None:
    given = ("http://gpu1:8000/", "https://gpu2:8000/v1", "http://[::1]:8000/v1/", "http://host/proxy/v1")
    assert ServerSettings(urls=given).urls == (
        "http://gpu1:8000", "https://gpu2:8000", "http://[::1]:8000", "http://host/proxy",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gpu1:8000", "write it as http://host:8000"),
        ("ftp://gpu1:8000", "write it as http://host:8000"),
        ("http://", "write it as http://host:8000"),
        ("http://gpu1:8000/?key=x", "write it as http://host:8000"),
        ("http://gpu1:eight", "write it as http://host:8000"),
        ("http://gpu1:70000", "write it as http://host:8000"),
        ("http://me:secret@gpu1:8000", "set the key under api_key_env"),
    ],
)
def test_what_is_no_address_or_holds_a_key_is_refused(url: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServerSettings(urls=(url,))


def test_a_server_is_named_once() -> None:
    with pytest.raises(ValidationError, match="stands twice"):
        ServerSettings(urls=("http://gpu1:8000", "http://gpu1:8000/v1"))


def test_a_length_that_leaves_no_prompt_is_refused() -> None:
    message = error_of("rollout:\n  max_new_tokens: 512\n  vllm:\n    max_length: 512\n")
    assert message.startswith("run.yaml:6: rollout.vllm is ")
    assert "max_length 512 holds the prompt too, and max_new_tokens alone is 512" in message
    assert RolloutSettings.model_validate({"max_new_tokens": 512, "vllm": {"max_length": 513}}).vllm.max_length == 513


def test_an_empty_stop_text_is_refused() -> None:
    assert "would end every completion at once" in error_of("rollout:\n  stop: ['###', '']\n")


@pytest.mark.parametrize(
    "section",
    [
        "vllm: {engines: 0}", "vllm: {tensor_parallel: 0}", "vllm: {gpu_memory: 1.2}", "vllm: {kv_cache_gb: 0}",
        "vllm: {max_seqs: 0}", "vllm: {lora: both}", "server: {launch: 0}", "server: {api_key_env: 'a b'}",
        "failure: {restarts: -1}", "failure: {start_timeout_s: 0}", "failure: {stall_timeout_s: .nan}",
        "failure: {stall_timeout_s: .inf}", "engine: sglang",
    ],
)  # fmt: skip
def test_values_outside_their_range_are_refused(section: str) -> None:
    assert error_of(f"rollout: {{{section}}}\n").startswith("run.yaml:4: rollout.")


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_one_clear_error(url: str) -> None:
    try:
        assert ServerSettings(urls=(url,)).urls[0].startswith(("http://", "https://"))
    except ValidationError as error:
        assert "urls" in str(error)
