"""What vLLM lacks for a sample's draw to depend on its own seed alone: one narrow change each, in its own process.

Imported in vLLM's processes only.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import vllm.v1.engine.llm_engine as llm_engine
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.parallel_sampling import ParentRequest

SEEDS = "medbridge_seeds"
"""Entry of a request's `extra_args`: one seed for each of its n samples."""


class SeededRequest(ParentRequest):
    """A request for n samples that gives each of them the seed in `SEEDS`.

    vLLM gives sample i the request's seed + i, so that a sample's draw would depend on which others it is asked with.
    """

    def _get_child_sampling_params(self, index: int) -> SamplingParams:
        seeds = (self.sampling_params.extra_args or {}).get(SEEDS)
        if seeds is None:
            return super()._get_child_sampling_params(index)
        params = copy(self.sampling_params)
        params.n, params.seed, params.extra_args = 1, seeds[index], None
        return params


def give_samples_their_seeds() -> None:
    """Have an `LLMEngine` of this process use `SeededRequest`."""
    llm_engine.ParentRequest = SeededRequest


def allow_seeds_on_cpu() -> None:
    """Have vLLM's CPU workers take seeds when prompts are computed in parts.

    A request whose prompt is computed over several steps takes part in sampling at each of them, and what it draws
    before the last is thrown away. vLLM then turns its generator back by the offset of one draw. Generators of CPUs
    have no offset ("CPU Generator does not use offset"), and the engine dies. Here such requests are without their
    generator while a step samples, so that there is nothing to turn back: what a generator has drawn is then one draw
    for each token that counted, whatever the steps were.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner.sample_tokens, "of_medbridge", False):
        return
    original = CPUModelRunner.sample_tokens

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        kept = {row: generators.pop(row) for row in unfinished.tolist() if row in generators}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(kept)

    sample_tokens.of_medbridge = True  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_tokens
