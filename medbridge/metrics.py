"""What the numbers of a training step are called and mean: one list for the terminal and the report."""

from __future__ import annotations

from typing import Literal, NamedTuple

Group = Literal["learning", "sampling", "safety", "speed"]


class Metric(NamedTuple):
    """A metric: its group, a label for a table, one sentence for a reader, and whether the report draws it in sight."""

    group: Group
    label: str
    meaning: str
    shown: bool = False


METRICS: dict[str, Metric] = {
    "reward": Metric(
        "learning", "Reward", "Mean over completions: 1 for a right answer, and the weight of its form.", True
    ),
    "accuracy": Metric("learning", "Accuracy of samples", "Share of the sampled completions that are right.", True),
    "held_out_accuracy": Metric(
        "learning", "Held-out Acc@1", "Greedy accuracy on training items that are never trained on.", True
    ),
    "format": Metric("learning", "Well-formed answers", "Share of the completions in the form asked for.", True),
    "loss": Metric(
        "learning",
        "Loss",
        "SFT: mean cross-entropy of a completion token, in nats. GRPO: says nothing about progress.",
        True,
    ),
    "sft_loss": Metric(
        "learning", "Loss of SFT", "Mean cross-entropy of a completion token in a mixed stage, in nats.", True
    ),
    "entropy": Metric(
        "learning",
        "Entropy (nats)",
        "How undecided the model is at a token; near 0 its samples are all alike and teach nothing.",
        True,
    ),
    "kl": Metric("learning", "KL to the reference", "How far the model has moved from its reference, nats a token."),
    "gradient_norm": Metric("learning", "Gradient norm", "Before clipping; sudden peaks precede trouble.", True),
    "learning_rate": Metric("learning", "Learning rate", "After warm-up and schedule."),
    "pass_k": Metric("learning", "k of the advantage", "The best of how many completions a group is credited for."),
    "consistency_bonus": Metric(
        "learning", "Consistency bonus", "Mean bonus for reasoning that makes the right answer likely."
    ),
    "answer_likelihood": Metric(
        "learning", "Likelihood of the answer", "Of right answers, given their reasoning, under the moving average."
    ),
    "completion_length": Metric("sampling", "Completion length (tokens)", "Mean over the completions.", True),
    "truncated": Metric("sampling", "Cut-off completions", "Share that reached the longest length without ending."),
    "masked": Metric("sampling", "Cut-off completions without a gradient", "Left out by rl.mask_truncated."),
    "signal": Metric(
        "sampling", "Groups with unequal rewards", "Share of the groups that teach anything: the others agree.", True
    ),
    "groups_sampled": Metric("sampling", "Groups sampled", "Those that were replaced included."),
    "groups_without_signal": Metric("sampling", "Groups with equal rewards", "They give no gradient."),
    "staleness_mean": Metric("sampling", "Steps by which rollouts are behind", "Age of the weights that drew them."),
    "clip_low": Metric("safety", "Clipped at the low end", "Share of tokens whose probability fell too far.", True),
    "clip_high": Metric("safety", "Clipped at the high end", "Share of tokens whose probability rose too far.", True),
    "ratio_mean": Metric("safety", "New over old, mean ratio", "Of a token's probability since the step began."),
    "ratio_max": Metric("safety", "New over old, largest ratio", "Of a token's probability since the step began."),
    "effective_sample_size": Metric(
        "safety", "Effective sample size", "Of the step's tokens, by those ratios; 1 is all of them."
    ),
    "skipped": Metric("safety", "Skipped updates", "Loss or gradient was not finite, and nothing was changed."),
    "rollout_ratio_mean": Metric("safety", "Trainer over engine, mean ratio", "1 where both say the same."),
    "rollout_ratio_max": Metric("safety", "Trainer over engine, largest ratio", "Of a token's probability."),
    "rollout_kl": Metric("safety", "KL of engine and trainer (nats a token)", "By rounding and age of the weights."),
    "rollout_effective_sample_size": Metric(
        "safety", "Effective sample size of the rollouts", "By the ratios of trainer over engine; 1 is all of them."
    ),
    "corrected": Metric("safety", "Tokens beyond the correction's limits", "Share truncated or masked."),
    "off_policy": Metric("safety", "Tokens left out as off-policy", "Share beyond rl.off_policy_threshold."),
    "probe_difference": Metric(
        "safety", "Probe after a sync: mean difference (nats a token)", "Engine against trainer, on the same tokens."
    ),
    "probe_worst": Metric("safety", "Probe after a sync: largest difference (nats)", "Of any token."),
    "tokens_per_second": Metric(
        "speed", "Tokens per second", "GRPO: tokens sampled while sampling. SFT: completion tokens trained on.", True
    ),
    "trained_tokens_per_second": Metric(
        "speed", "Trained tokens per second", "Prompt and completion tokens through forward and backward pass."
    ),
    "mfu": Metric(
        "speed",
        "MFU",
        "Operations that the model's arithmetic needs, over what the device could do while it trained.",
    ),
    "memory_gb": Metric("speed", "Peak memory (GB)", "Of the GPU; without one, of this process."),
    "seconds_sampling": Metric("speed", "Seconds waiting for rollouts", "0 where they were drawn ahead."),
    "seconds_syncing": Metric("speed", "Seconds bringing weights to the engine", "With the probe."),
    "seconds_probing": Metric("speed", "of them in the probe", "Comparing engine and trainer."),
    "seconds_training": Metric("speed", "Seconds training", "Forward, backward and update."),
    "seconds_loss": Metric("speed", "Seconds in the loss and output layer", "Of those of training."),
    "seconds_loss_plain": Metric("speed", "The same with plain torch (estimate)", "Measured on a few tokens once."),
}

PHASES = {
    "sampling": "seconds_sampling",
    "syncing": "seconds_syncing",
    "training": "seconds_training",
    "loss": "seconds_loss",
}
"""What a step's time goes into; the loss is a part of the training."""


def label(name: str) -> str:
    """The metric's label; of one that isn't listed, its name."""
    return METRICS[name].label if name in METRICS else name
