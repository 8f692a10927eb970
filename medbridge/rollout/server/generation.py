"""Completions as vLLM's /inference/v1/generate takes and gives them: prompts and answers as token ids.

That path, of all that a server has, takes a prompt as it is: /v1/chat/completions renders it anew, and /v1/completions
takes no images. This file says what is asked and reads what comes back; it asks nothing itself.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from medbridge.data.items import Permutation
from medbridge.errors import MedbridgeError
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import GREEDY, Request, Rollout, SamplingSettings
from medbridge.rollout.sampling import cut_at_stop, tokens_to_stop
from medbridge.rollout.vllm.draws import sample_seed

PATH = "/inference/v1/generate"
SEEDS = "medbridge_seeds"
"""As in `vllm.seeds`, which is for vLLM's processes only."""

BAN = -100.0
"""Bias of a token that must not be sampled; vLLM takes no stronger one."""

NO_LOGPROB = -9999.0
"""What vLLM sends in place of a log-probability that is not finite."""


@dataclass(frozen=True, slots=True)
class Part:
    """The samples of a request that one prompt answers: `samples[i]` stands at `positions[i]` of the request's."""

    item_id: str
    permutation: Permutation
    samples: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def greedy(self) -> bool:
        return self.samples[0] == GREEDY


def parts(request: Request, most: int) -> list[Part]:
    """Split a request by option order, the greedy sample by itself, into parts of at most `most` samples."""
    groups: dict[tuple[bool, Permutation], list[int]] = {}
    for position, (sample, order) in enumerate(zip(request.samples, request.permutations, strict=True)):
        groups.setdefault((sample == GREEDY, order), []).append(position)
    found = []
    for (greedy, order), positions in groups.items():
        size = 1 if greedy else most
        for start in range(0, len(positions), size):
            chunk = tuple(positions[start : start + size])
            found.append(Part(request.item.id, order, tuple(request.samples[at] for at in chunk), chunk))
    return found


def data_uri(image: Image.Image) -> str:
    """An image, unchanged, as text."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def generate_body(
    prompt_ids: Sequence[int], images: Sequence[str], sampling: Mapping[str, Any], **extra: Any
) -> dict[str, Any]:
    """One request: `images` are data URIs in the order of the prompt's placeholders."""
    body = {"token_ids": list(prompt_ids), "sampling_params": sampling, "return_token_ids": True, **extra}
    if images:
        body["content_parts"] = [{"type": "image_url", "url": uri} for uri in images]
    return body


def sampling_params(
    part: Part, sampling: SamplingSettings, prompter: Prompter, *, seed: int, max_tokens: int
) -> dict[str, Any]:
    """vLLM's sampling parameters; every one that a server could have another default for is named."""
    seeds = [sample_seed(seed, part.item_id, sample) for sample in part.samples]
    drawn: dict[str, Any] = {
        "n": len(seeds), "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seeds[0],
    }  # fmt: skip
    if len(seeds) > 1:
        drawn["extra_args"] = {SEEDS: seeds}
    return {
        **({"n": 1, "temperature": 0.0, "top_p": 1.0} if part.greedy else drawn),
        "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "max_tokens": max_tokens, "logprobs": 0, "ignore_eos": True,
        "stop": list(sampling.stop), "stop_token_ids": prompter.stop_ids,
        "logit_bias": {str(token): BAN for token in prompter.banned},
        "detokenize": bool(sampling.stop),  # the server needs texts for nothing else
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the prompt as the model saw it, and the rollouts with their positions in the request."""

    prompt_ids: list[int]
    images: int
    rollouts: list[tuple[int, Rollout]]
    aborted: bool


def read_answer(
    part: Part, text: str, sampling: SamplingSettings, prompter: Prompter, *, images: int, weights: int
) -> Answer:
    """Rollouts out of an answer's JSON.

    Raises:
        MedbridgeError: it lacks something, as the answer of another program or version would.
    """
    try:
        return _read(part, json.loads(text), sampling, prompter, images=images, weights=weights)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise MedbridgeError(
            f"item {part.item_id!r}: the server's answer lacks what vLLM 0.32's {PATH} gives "
            f"({type(error).__name__}: {error}). Serve the model with that version of vLLM."
        ) from error


def _read(
    part: Part, answer: Any, sampling: SamplingSettings, prompter: Prompter, *, images: int, weights: int
) -> Answer:
    prompt_ids = list(answer["prompt_token_ids"])
    seen = len((answer["mm_placeholders"] or {}).get("image", ()))
    if seen != images:
        raise MedbridgeError(
            f"item {part.item_id!r} has {images} image(s), and the server gave the model {seen}. Serve the model with "
            "vLLM 0.32, which takes images beside token ids."
        )
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    aborted = any(choice["finish_reason"] not in ("stop", "length") for choice in choices)
    rollouts = []
    for position, sample, choice in zip(part.positions, part.samples, choices, strict=True) if not aborted else ():
        ids = np.array(choice["token_ids"], np.int32)
        logprobs = np.array([step["logprob"] for step in choice["logprobs"]["content"]], np.float32)
        if len(logprobs) != len(ids) or not len(ids):
            raise ValueError(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
        if logprobs.min() <= NO_LOGPROB:
            raise MedbridgeError(
                f"item {part.item_id!r}: the model gives a token that was drawn no finite log-probability; its weights "
                "hold NaN or infinity, or the dtype is too narrow for it."
            )
        reason: Literal["stop", "length"] = choice["finish_reason"]
        closed = int(ids[-1]) in prompter.stop_ids
        said = ids[: len(ids) - closed].tolist()
        end = tokens_to_stop(said, sampling.stop, prompter.decode) if sampling.stop else None
        if end is not None:  # the same token ends it on every engine
            ids, logprobs, said, reason = ids[:end], logprobs[:end], said[:end], "stop"
        rollouts.append(
            (
                position,
                Rollout(
                    item_id=part.item_id, sample=sample, permutation=part.permutation,
                    text=cut_at_stop(prompter.decode(said), sampling.stop), token_ids=ids, logprobs=logprobs,
                    finish_reason=reason, prompt_tokens=len(prompt_ids), images=seen, weights=weights,
                ),
            )
        )  # fmt: skip
    return Answer(prompt_ids, seen, rollouts, aborted)
