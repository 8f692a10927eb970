"""Sharpening: GRPO on items whose answers the model can already reach.

Each step samples a group of completions per item, rewards them, and moves probability towards those that did
better than their group. Where several processes (ranks) train, all of them run this loop, and rank 0 alone samples.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from medbridge.data.images import ImageCache
from medbridge.data.items import Item
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.model.settings import ModelSettings
from medbridge.rollout.engine import SamplingSettings
from medbridge.train.groups import GroupSampler, Rollouts
from medbridge.train.learner import Learner
from medbridge.train.optimization import Trainable
from medbridge.train.pipelining import Pipeline
from medbridge.train.ranks import Ranks
from medbridge.train.rl_settings import RlSettings
from medbridge.train.sft import OnStep, Score, SupervisedTerm, Supervision, scored


def train_rl(
    policy: Policy,
    items: Sequence[Item],
    settings: RlSettings,
    rollouts: Rollouts,
    *,
    model: ModelSettings,
    prompts: PromptSettings,
    images: ImageCache,
    rollout: SamplingSettings,
    seed: int,
    checkpoints: Path,
    on_start: Callable[[int], None],
    on_step: OnStep,
    say: Callable[[str], None] = warnings.warn,
    score: Score | None = None,
    supervised: Supervision | None = None,
    diagnosed_k: int | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Train `policy` in place with GRPO; resumes from the latest checkpoint under `checkpoints`.

    Of `rollout` the length and the stop texts are read; temperature and nucleus are the settings' own. `on_start` is
    told the step from which training goes on, `say` of skipped steps and damaged checkpoints. `diagnosed_k` is the k
    that `pass_k: diagnosed` means.

    With `supervised`, its gradient is added to that of each step before the one update. Both kinds of loss are
    normalised by their own counts, so that neither dilutes the other; the metrics tell them apart (loss, sft_loss).

    Several ranks call it together; items, rollouts, supervision and what is called back, and `policy` in the end, are
    rank 0's then.

    Raises:
        MedbridgeError: sampling ahead from weights that are trained meanwhile; rollouts of other weights than promised;
            a k that was to be diagnosed and was not.
    """
    if rollouts.shares_weights and (settings.staleness or settings.sync_every > 1):
        raise MedbridgeError(
            f"rl.staleness is {settings.staleness} and rl.sync_every {settings.sync_every}, and the transformers "
            "engine samples from the very weights that are trained: it can't keep older ones, nor sample while they "
            "change. Set them to 0 and 1, or rollout.engine to vllm."
        )
    sampling = SamplingSettings(
        temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=rollout.max_new_tokens, stop=rollout.stop
    )
    first_k = settings.first_k(diagnosed_k, say)
    ranks = ranks or Ranks()
    trainable = Trainable(policy, model, settings, settings.steps, seed=seed, say=say, ranks=ranks)
    policy = trainable.policy
    if settings.keeps_average:
        trainable.keep_average(settings.ema_decay, settings.ema_every)
    term = None if supervised is None else SupervisedTerm(policy, supervised, prompts, images, seed=seed, ranks=ranks)
    learner = Learner(
        policy, settings, prompts, images, rollout.max_new_tokens, first_k=first_k, supervised=term, ranks=ranks
    )  # before `restore`: it may keep the first weights
    start = trainable.restore(checkpoints)
    ranks.lead(on_start, start)
    position = int(trainable.extra.get("position", 0))
    sampler = GroupSampler(items, settings, rollouts, sampling, seed=seed, position=position, first_k=first_k)
    pipeline = Pipeline(sampler, settings, start=start)
    with ExitStack() as stack:
        ranks.lead(stack.enter_context, pipeline)
        for step in range(start + 1, settings.steps + 1):
            batch = ranks.share(pipeline.take, step)
            examples = [] if term is None else term.batch(step)
            began = time.perf_counter()
            trainable.begin(step)
            learner.loss.comparing = step == 1  # not again in a run that resumes
            metrics = learner.update(step, batch, trainable, examples)
            metrics["seconds_training"] = time.perf_counter() - began - metrics.pop("seconds_comparing", 0.0)
            trainable.publish()
            ranks.lead(pipeline.trained, step)
            saves = step % settings.checkpoint_every == 0 and step < settings.steps
            held_out = ranks.share(scored, score if saves or step == settings.steps else None, step)
            if held_out is not None:
                metrics["held_out_accuracy"] = held_out
            trained = [*(group.request.item for group in batch.groups), *(example.item for example in examples)]
            ranks.lead(on_step, step, metrics | pipeline.take_seconds(), [item.id for item in trained])
            if saves:
                trainable.save(checkpoints, step, {"position": batch.position}, score=held_out)
    trainable.finish()
