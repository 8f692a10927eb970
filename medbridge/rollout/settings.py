"""What may be chosen about the rollout engines. Which engine follows from it is decided in `choose`."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from medbridge.rollout.engine import SamplingSettings

CPU_BLOCK = 32
"""Tokens of a block of vLLM's prefix cache on a CPU. Prompts share whole blocks, and its own 128 is long."""

EngineName = Literal["auto", "vllm", "vllm-server", "transformers"]


class VllmSettings(BaseModel):
    """How vLLM holds the model; for the engine vllm, and for the servers that we start ourselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: int | None = Field(
        None,
        ge=1,
        description="Engine vllm: how many engines share out the requests, each with the whole model (data parallel). "
        "null: as many as the visible GPUs hold at tensor_parallel GPUs each; 1 on a CPU.",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that hold one copy of the model between them.")
    gpu_memory: float = Field(
        0.85,
        gt=0,
        le=1,
        description="Share of each GPU's memory that vLLM may take. The trainer needs its own share beside it "
        "where `sleep` is false.",
    )
    kv_cache_gb: float = Field(1.0, gt=0, description="Key-value cache on a CPU in GiB; on a GPU gpu_memory decides.")
    max_seqs: int = Field(256, ge=1, description="Most completions that one engine decodes at a time.")
    max_length: int | None = Field(
        None, ge=2, description="Longest prompt and completion together in tokens; null: what the model was made for."
    )
    eager: bool | None = Field(
        None, description="Run the model without graph capture and compilation; null: on a CPU only."
    )
    sleep: bool = Field(
        True, description="Give the GPU's memory to the trainer between rollouts. A CPU engine does not sleep."
    )
    lora: Literal["merged", "adapter"] = Field(
        "merged",
        description="How trained low-rank adapters reach vLLM: added into the weights, or beside them as an adapter "
        "(less to copy, each token a little slower).",
    )
    prefix_cache: bool = Field(True, description="Compute what prompts have in common, as in a group, only once.")


class ServerSettings(BaseModel):
    """`vllm serve` processes, asked over HTTP: the user's or our own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: tuple[str, ...] = Field(
        (),
        description="Servers that run already and serve this very model, such as http://gpu1:8000. Empty: servers of "
        "our own are started, bound to this machine.",
    )
    launch: int = Field(1, ge=1, description="How many servers of our own are started where urls is empty.")
    api_key_env: str = Field(
        "MEDBRIDGE_SERVER_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key of the servers in urls. Our own get a random key.",
    )

    @field_validator("urls")
    @classmethod
    def _are_servers(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        bases = tuple(re.sub(r"(/v1)?/*$", "", url) for url in urls)
        for url, base in zip(urls, bases, strict=True):
            try:
                parts = urlsplit(base)
                good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:  # a port that is none, brackets that don't close
                good = False
            if not good or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is not the address of a server; write it as http://host:8000")
            if parts.username or parts.password:
                raise ValueError("an address is stored with the run and holds no key; set the key under api_key_env")
            if bases.count(base) > 1:
                raise ValueError(f"{url!r} stands twice; each server is named once")
        return bases

    @model_validator(mode="after")
    def _one_kind(self) -> ServerSettings:
        if self.urls and self.launch > 1:
            raise ValueError("urls names servers that run already, and launch asks to start others; give one of them")
        return self


class FailureSettings(BaseModel):
    """What is done about an engine that dies, hangs or runs out of memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    restarts: int = Field(
        3, ge=0, description="Restarts after a failure, of all engines together; then the run stops and can be resumed."
    )
    start_timeout_s: float = Field(
        900, gt=0, allow_inf_nan=False, description="Seconds that an engine may take to start."
    )
    stall_timeout_s: float = Field(
        300,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without a token or another sign of life after which an engine counts as hung.",
    )


class RolloutSettings(SamplingSettings):
    """Engine and sampling of measurements; sharpening takes its temperature from `rl`."""

    engine: EngineName = Field(
        "auto",
        description="What draws completions. vllm: vLLM engines on this machine. vllm-server: `vllm serve` processes, "
        "here or elsewhere. transformers: the model in this process. auto: vllm-server where server.urls names any, "
        "else vllm on a GPU where it is installed, else transformers.",
    )
    batch_size: int = Field(
        512,
        ge=1,
        description="Engine transformers: completions decoded together, as many items as fit, one item at least.",
    )
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="How vLLM holds the model.")
    server: ServerSettings = Field(default_factory=ServerSettings, description="The engine vllm-server.")
    failure: FailureSettings = Field(default_factory=FailureSettings, description="Engines that fail.")

    @field_validator("stop")
    @classmethod
    def _say_something(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every completion at once; leave it out")
        return stop

    @field_validator("vllm")
    @classmethod
    def _leaves_room(cls, vllm: VllmSettings, info: ValidationInfo) -> VllmSettings:
        answer = info.data.get("max_new_tokens")
        if vllm.max_length is not None and answer is not None and vllm.max_length <= answer:
            raise ValueError(
                f"max_length {vllm.max_length} holds the prompt too, and max_new_tokens alone is {answer}; raise "
                "max_length or lower max_new_tokens"
            )
        return vllm

    @field_validator("server")
    @classmethod
    def _is_asked(cls, server: ServerSettings, info: ValidationInfo) -> ServerSettings:
        engine = info.data.get("engine")
        if server.urls and engine in ("vllm", "transformers"):
            raise ValueError(f"urls names servers, and engine {engine} asks none; set engine to vllm-server or auto")
        return server
