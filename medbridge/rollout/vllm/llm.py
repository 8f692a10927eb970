"""vLLM itself, as its process uses it: made from plain settings, given prompts, stepped, asked for its counters.

Imported in the engine's own process only. What arrives from where is `worker`'s business.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.metrics.reader import get_metrics_snapshot

from medbridge.data.images import ImageCache
from medbridge.rollout.settings import CPU_BLOCK
from medbridge.rollout.vllm import weights as weight_sync
from medbridge.rollout.vllm.seeds import SEEDS, allow_seeds_on_cpu, give_samples_their_seeds

BAN = -100.0
"""Bias of a token that must not be sampled; vLLM takes no stronger one."""

SLEEP_LEVEL = 1
"""Weights are kept in the host's memory while vLLM sleeps. Level 2 drops them, and then an engine that is woken up
without new weights, as after a measurement, would have none."""

COUNTERS = {
    "vllm:prefix_cache_queries": "prefix_queries", "vllm:prefix_cache_hits": "prefix_hits",
    "vllm:mm_cache_queries": "image_queries", "vllm:mm_cache_hits": "image_hits",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sampling:
    """What all draws of one call have in common."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str]
    stop_ids: list[int]
    banned: list[int]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The completions of one draw, in the order of its seeds."""

    draw: int
    token_ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    reasons: list[str]
    prompt_tokens: int
    images: int | None


class Llm:
    """vLLM's engine with the weights that it holds. Used by one thread."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        """`wanted` is what `engine_args` reads; starting takes from seconds to minutes."""
        on_cpu = current_platform.is_cpu()
        give_samples_their_seeds()
        if on_cpu:
            allow_seeds_on_cpu()
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when its configuration is made
        config = engine_args(wanted, on_cpu=on_cpu).create_engine_config(UsageContext.LLM_CLASS)
        # On a CPU all is done by this process: starting others takes longer, and changes made here would not reach
        # them. On a GPU a process of its own keeps the GPU busy while this one prepares prompts.
        self._engine = LLMEngine(
            config, Executor.get_class(config), log_stats=True, usage_context=UsageContext.LLM_CLASS,
            multiprocess_mode=not on_cpu,
        )  # fmt: skip
        # The caches' counters are kept all the same; the timings of each single completion, a tenth of all the work
        # with a tiny model, are not.
        self._engine.log_stats = self._engine.output_processor.log_stats = False
        gc.collect()
        gc.freeze()  # what is there now stays, and need not be looked through again and again
        self._images = ImageCache(int(wanted["image_cache_bytes"]))
        self._image_token: int | None = wanted["image_token"]
        self._adapter: LoRARequest | None = None
        self._can_sleep = bool(wanted["sleep"]) and not on_cpu
        self._asleep = False

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return int(self._engine.model_config.max_model_len)

    # -- sampling ------------------------------------------------------------------------------------------

    def add(self, draw: int, prompt_ids: list[int], images: Sequence[str], seeds: list[int], how: Sampling) -> None:
        """Have completions of a prompt drawn, one for each seed; no seed: one greedy completion.

        Args:
            draw: the number that `step` names them by.
            prompt_ids: with one placeholder for each image.
            images: their files, in order.
        """
        self._wake()
        prompt: dict[str, Any] = {"prompt_token_ids": prompt_ids}
        if images:
            prompt["multi_modal_data"] = {"image": [self._images.get(path) for path in images]}
            prompt["multi_modal_uuids"] = {"image": list(images)}  # spares hashing their pixels each time
        drawn = {
            "n": len(seeds), "temperature": how.temperature, "top_p": how.top_p, "seed": seeds[0],
            "extra_args": {SEEDS: seeds},
        } if seeds else {"temperature": 0.0}  # fmt: skip
        params = SamplingParams(
            **drawn, max_tokens=how.max_tokens, stop=how.stop, stop_token_ids=how.stop_ids, ignore_eos=True,
            logit_bias=dict.fromkeys(how.banned, BAN), logprobs=0, flat_logprobs=True, detokenize=bool(how.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self._engine.add_request(str(draw), prompt, params, lora_request=self._adapter)

    @property
    def busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    def step(self) -> Iterator[Drawn]:
        """Compute one step; gives the draws that it finished."""
        for output in self._engine.step():
            if isinstance(output, RequestOutput) and output.finished:
                yield self._read(output)

    def drop(self, draws: Sequence[int]) -> None:
        """Forget draws that are not finished."""
        self._engine.abort_request([str(draw) for draw in draws])
        while self.busy:
            self._engine.step()

    def _read(self, output: RequestOutput) -> Drawn:
        found = [completion for completion in output.outputs if completion.logprobs is not None]
        if len(found) != len(output.outputs):
            raise RuntimeError(f"vLLM gave a completion without log-probabilities: {output}")
        prompt_ids = output.prompt_token_ids or []
        return Drawn(
            draw=int(output.request_id),
            token_ids=[np.array(completion.token_ids, np.int32) for completion in found],
            logprobs=[_chosen(completion.logprobs, completion.token_ids) for completion in found],
            reasons=[str(completion.finish_reason) for completion in found],
            prompt_tokens=len(prompt_ids),
            images=None if self._image_token is None else _runs(np.array(prompt_ids), self._image_token),
        )

    # -- weights, memory, counters -------------------------------------------------------------------------

    def load(self, folder: Path, version: int, *, adapter: bool) -> None:
        """Sample from the weights in `folder`, or with the adapters in it.

        Raises:
            MedbridgeError: as `weights.load` and `weights.load_adapter`.
        """
        self._wake()
        if adapter:
            self._adapter = weight_sync.load_adapter(self._engine, folder, version)
        else:
            weight_sync.load(self._engine, folder, version)
            self._adapter = None

    def transfer(self, step: str, info: dict[str, Any]) -> None:
        """One step of a weight transfer from the trainer's GPU."""
        self._wake()
        weight_sync.transfer(self._engine, step, info)
        self._adapter = None

    def sleep(self) -> None:
        """Give the GPU's memory back; nothing on a CPU. What comes next wakes it up."""
        if self._can_sleep and not self._asleep:
            self._engine.sleep(SLEEP_LEVEL)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def counters(self) -> dict[str, int]:
        """Hits and queries of its caches since it was made, named as in `EngineStats`."""
        found = {
            COUNTERS[metric.name]: int(getattr(metric, "value", 0))
            for metric in get_metrics_snapshot()
            if metric.name in COUNTERS
        }
        return dict.fromkeys(COUNTERS.values(), 0) | found


def engine_args(wanted: Mapping[str, Any], *, on_cpu: bool) -> EngineArgs:
    """vLLM's arguments. Nothing is taken from the model's generation config."""
    vllm = wanted["vllm"]
    args: dict[str, Any] = {
        "model": wanted["model"], "dtype": wanted["dtype"], "seed": wanted["seed"],
        "max_model_len": vllm["max_length"] or -1,  # as long as the model was made for, and as the cache has room for
        "max_num_seqs": vllm["max_seqs"],
        "enforce_eager": on_cpu if vllm["eager"] is None else vllm["eager"],
        "enable_prefix_caching": vllm["prefix_cache"], "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs", "limit_mm_per_prompt": {"video": 0}, "trust_remote_code": False,
        "worker_extension_cls": weight_sync.EXTENSION,
    }  # fmt: skip
    if on_cpu:
        args |= {"kv_cache_memory_bytes": int(vllm["kv_cache_gb"] * (1 << 30)), "block_size": CPU_BLOCK}
    else:
        args |= {
            "gpu_memory_utilization": vllm["gpu_memory"], "tensor_parallel_size": vllm["tensor_parallel"],
            "enable_sleep_mode": wanted["sleep"],
        }  # fmt: skip
    if wanted["adapter_rank"]:
        args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _allowed_rank(wanted["adapter_rank"])}
    if wanted["transfer"]:
        args["weight_transfer_config"] = WeightTransferConfig(backend=wanted["transfer"])
    return EngineArgs(**args)


def _allowed_rank(rank: int) -> int:
    """The smallest rank, of those that vLLM makes room for, that holds adapters of this one."""
    return next(allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank)


def _chosen(logprobs: Any, token_ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities [tokens] float32 of the tokens that were drawn: the first that vLLM names at each place."""
    at = logprobs.start_indices
    if [logprobs.token_ids[index] for index in at] != list(token_ids):
        raise RuntimeError(f"vLLM's log-probabilities are not those of the tokens it drew: {logprobs.token_ids}")
    return np.array([logprobs.logprobs[index] for index in at], np.float32)


def _runs(ids: np.ndarray, token: int) -> int:
    """How many stretches of `token` there are: one for each image."""
    here = np.concatenate([[False], ids == token])
    return int(np.count_nonzero(here[1:] & ~here[:-1]))
