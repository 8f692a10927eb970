"""Whether an engine samples from the trainer's weights: a probe's log-probabilities against the trainer's own.

It stops a run. How far rollouts and trainer lie apart within the bound is measured in each step, elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medbridge.data.images import ImageCache
from medbridge.data.items import Item
from medbridge.data.prompts import PromptSettings, permutation
from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.rollout.engine import GREEDY, Engine, Request, Rollout, SamplingSettings
from medbridge_kernels import linear_token_logprobs, token_logprobs

PROBE_ITEMS = 4
PROBE_SAMPLES = (GREEDY, 0, 1)
PROBE_TOKENS = 32
"""Longest completion of a probe."""

WORST_BOUNDS = 10
"""One token may lie this many bounds away: the largest of some hundred roundings, where their mean is one."""

_SCALE_ROWS = 64


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far an engine's log-probabilities lie from the trainer's, in nats a token.

    Attributes:
        mean, worst: absolute difference over all tokens of the probe.
        tokens: how many these are.
        bound: what the mean over an item's tokens must not exceed, nor a single token tenfold.
    """

    mean: float
    worst: float
    tokens: int
    bound: float


def verify(
    engine: Engine,
    policy: Policy,
    items: Sequence[Item],
    prompts: PromptSettings,
    images: ImageCache,
    *,
    dtype: torch.dtype,
    version: int,
    seed: int,
) -> Mismatch:
    """Draw a few completions on the engine and compare their log-probabilities, token by token, with the trainer's.

    Args:
        items: the probe is made of the first of them, those with images before others.
        dtype: the type that the engine computes in.
        version: of the weights that the engine was given last.
        seed: of the probe's samples and option orders.

    Raises:
        MedbridgeError: rollouts of another version, prompts of another length or with other images than the trainer's,
            or log-probabilities further away than `bound` allows.
        EngineFailure: as for `Engine.generate`.
    """
    by_id = {item.id: item for item in sorted(items, key=lambda item: not item.images)[:PROBE_ITEMS]}
    requests = [
        Request(item, PROBE_SAMPLES, tuple(permutation(item, seed, sample) for sample in PROBE_SAMPLES))
        for item in by_id.values()
    ]
    sampling = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=PROBE_TOKENS)
    drawn: dict[str, list[Rollout]] = {}
    for batch in engine.generate(requests, sampling, seed=seed):
        for rollout in batch:
            drawn.setdefault(rollout.item_id, []).append(rollout)
    check_versions((rollout for group in drawn.values() for rollout in group), version)
    if {item_id: len(group) for item_id, group in drawn.items()} != dict.fromkeys(by_id, len(PROBE_SAMPLES)):
        raise MedbridgeError(f"Engine {engine.name!r} did not answer each request of its probe once.")

    differences: dict[str, np.ndarray] = {}
    scales = []
    for item_id, group in drawn.items():
        ours, scale = _trainer_logprobs(policy, by_id[item_id], group, prompts, images)
        differences[item_id] = np.abs(ours - np.concatenate([rollout.logprobs for rollout in group]))
        scales.append(scale)
    limit = bound(dtype, policy, float(np.mean(scales)))
    together = np.concatenate(list(differences.values()))
    found = Mismatch(float(together.mean()), float(together.max()), len(together), limit)
    for item_id, apart in differences.items():
        if not (apart.mean() <= limit and apart.max() <= WORST_BOUNDS * limit):  # NaN is beyond any bound
            raise MedbridgeError(_message(engine, item_id, apart, found, dtype, version))
    return found


def check_versions(rollouts: Iterable[Rollout], version: int) -> None:
    """Stop on rollouts that other weights have drawn, however little these differ.

    Raises:
        MedbridgeError: naming the item and both versions.
    """
    for rollout in rollouts:
        if rollout.weights != version:
            raise MedbridgeError(
                f"item {rollout.item_id!r}: its rollout was drawn by weights of version {rollout.weights}, and version "
                f"{version} was asked for: the engine missed a weight sync. Resume the run to start its engines anew."
            )


def bound(dtype: torch.dtype, policy: Policy, scale: float) -> float:
    """How far log-probabilities may lie apart, in nats a token in the mean, for rounding alone.

    Let u be the unit roundoff of the type (half its eps). Two programs for the same layer round at different places.
    Each of the L layers, and about as much as four more outside them (embedding, images, last norm, output layer), adds
    to the last hidden state an error of about u of its size, independent of the others': together u sqrt(L + 4). Logits
    are a linear map of it, so they are off by as much of *their* size: u sqrt(L + 4) s, where s, the `scale`, is their
    standard deviation over the vocabulary; and a log-probability is a difference of logits. The bound is six times
    that, and at least 0.001 for what float32 programs differ in besides (approximate exponentials, float32 products
    that a GPU shortens).

    Measured on probes of random models, vLLM against transformers on a CPU, mean difference in units of u s: in
    bfloat16 2.0 with 2 layers of width 128, 2.7 with 24, 2.5 with 6 of width 256, 4.6 with 16 of width 512 (a sixth to
    a twelfth of the bound), the same for s from 0.5 to 3.3; worst tokens 3 to 7 times the mean. In float32 4e-7 to
    4e-6 nats.
    """
    roundoff = max(torch.finfo(dtype).eps, torch.finfo(policy.compute_dtype).eps) / 2
    layers = policy.model.config.get_text_config().num_hidden_layers
    return max(1e-3, 6 * roundoff * math.sqrt(layers + 4) * scale)


@torch.inference_mode()
def _trainer_logprobs(
    policy: Policy, item: Item, rollouts: Sequence[Rollout], prompts: PromptSettings, images: ImageCache
) -> tuple[np.ndarray, float]:
    """Log-probabilities (float32) of the rollouts' tokens, one after the other, and the scale of their logits."""
    encoded = [policy.encode(item, [rollout.permutation], prompts, images)[0] for rollout in rollouts]
    for prompt, rollout in zip(encoded, rollouts, strict=True):
        if rollout.prompt_tokens != len(prompt.ids) or rollout.images not in (None, prompt.images):
            raise MedbridgeError(
                f"item {item.id!r}: the engine's prompt has {rollout.prompt_tokens} tokens and {rollout.images} "
                f"images, the trainer's {len(prompt.ids)} and {prompt.images}. They resize images or render prompts "
                "differently: have both use the same model folder and the same processor settings."
            )
    training = policy.model.training
    policy.model.eval()
    try:
        batch = policy.collate(encoded, [rollout.token_ids.tolist() for rollout in rollouts])
        hidden = policy.completion_hidden(batch)
        layer = policy.output_layer()
        with policy.autocast():
            if layer is None:
                logprobs = token_logprobs(policy.head(hidden), batch.labels)
            else:
                logprobs = linear_token_logprobs(hidden, token_ids=batch.labels, **layer._asdict())
            scale = _scale(policy, policy.head(hidden[:: math.ceil(len(hidden) / _SCALE_ROWS)]))
    finally:
        policy.model.train(training)
    return logprobs.float().cpu().numpy(), scale


def _scale(policy: Policy, logits: Tensor) -> float:
    """Standard deviation of logits [rows, vocabulary] over the tokens that may be sampled, mean over rows."""
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[policy.banned] = False
    return float(logits[:, allowed].float().std(-1).mean())


def _message(engine: Engine, item_id: str, apart: np.ndarray, found: Mismatch, dtype: torch.dtype, version: int) -> str:
    return (
        f"Engine {engine.name!r} does not sample from the trainer's weights of version {version}. Item {item_id!r}: "
        f"its log-probabilities lie {apart.mean():.3g} nats a token from the trainer's in the mean and "
        f"{apart.max():.3g} at worst, over {len(apart)} tokens; rounding in {str(dtype).removeprefix('torch.')} "
        f"explains {found.bound:.3g} in the mean and {WORST_BOUNDS * found.bound:.3g} at worst. (Whole probe: mean "
        f"{found.mean:.3g}, worst {found.worst:.3g}, {found.tokens} tokens.) Likely causes: the weights did not reach "
        "the engine, or not all of them (tied embeddings, adapters); the engine kept what it had cached of older "
        "weights; it runs another model, another type or a quantised one; images are processed differently."
    )
