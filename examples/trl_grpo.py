"""TRL's GRPOTrainer with this package's loss. Everything but the loss is TRL's.

In a trainer of your own it takes two lines:

    class Trainer(MedbridgeLossMixin, GRPOTrainer):
        pass

and then `Trainer(...)` where you had `GRPOTrainer(...)`, with the same arguments. Options that the loss can't honour
raise when the trainer is made.

Here it first compares the two losses and their gradients on one batch, and then trains:

    python examples/trl_grpo.py                                   # a small model made from nothing, a minute on a CPU
    python examples/trl_grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct --data FOLDER --steps 200 --learning-rate 1e-6

Needs trl, and medbridge for the small model and the questions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import embedded  # isort: skip  # before all others: what cannot load beside a CPU build of torch is made to look absent
import datasets
import torch
from trl import GRPOConfig, GRPOTrainer

from medbridge_kernels.adapters.trl import MedbridgeLossMixin


class Trainer(MedbridgeLossMixin, GRPOTrainer):
    """TRL's trainer with the loss from hidden states."""


def reward(completions: list[Any], target: list[str], **columns: Any) -> list[float]:
    """How much of the right completion is there."""
    texts = [completion[0]["content"] for completion in completions]
    return [embedded.likeness(text, aim) for text, aim in zip(texts, target, strict=True)]


def compare(trainer: Trainer) -> tuple[float, float]:
    """Relative difference between TRL's loss and this one on a batch of samples, and between their gradients."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    old = batch["old_per_token_logps"]
    batch["old_per_token_logps"] = old + 0.5 * torch.randn_like(old)  # off the policy, so that something is clipped
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    found = []
    for kind in (GRPOTrainer, Trainer):
        loss = kind._compute_loss(trainer, trainer.model, batch)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (theirs, their_gradient), (ours, our_gradient) = found
    print(f"loss of TRL {theirs:.8f}, of medbridge_kernels {ours:.8f}")
    trainer._metrics["train"].clear()
    trainer._step, trainer._buffered_inputs = 0, None
    return (
        float((ours - theirs).abs() / theirs.abs()),
        float((our_gradient - their_gradient).norm() / their_gradient.norm()),
    )


def main() -> None:
    """Compare the losses on one batch, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face id or folder; default: a small one made from nothing")
    parser.add_argument("--data", help="folder of questions as JSON lines; default: slices of an average brain")
    parser.add_argument("--work", type=Path, default=Path("runs/trl_grpo"), help="where models and data are put")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--completions", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=12, help="longest completion")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--loss-type", default="dapo", choices=["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
    parser.add_argument("--beta", type=float, default=0.02, help="weight of the KL term")
    options = parser.parse_args()

    rows = embedded.questions(options.work, options.data)
    columns = [
        {"prompt": [{"role": "user", "content": row["text"]}], "image": row["image"], "target": row["target"]}
        for row in rows
    ]
    trainer = Trainer(
        model=options.model or embedded.model_from_nothing(options.work, rows),
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_list(columns).cast_column("image", datasets.Image()),
        args=GRPOConfig(
            output_dir=str(options.work / "out"),
            max_steps=options.steps,
            per_device_train_batch_size=options.prompts * options.completions // 2,
            gradient_accumulation_steps=2,
            num_generations=options.completions,
            num_iterations=2,
            max_completion_length=options.tokens,
            learning_rate=options.learning_rate,
            loss_type=options.loss_type,
            epsilon_high=5.0 if options.loss_type == "cispo" else 0.28,
            beta=options.beta,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    of_loss, of_gradients = compare(trainer)
    print(f"relative difference of the loss {of_loss:.1e}, of the gradients {of_gradients:.1e}")
    limit = 2e-2 if trainer.args.bf16 else 1e-5  # bfloat16 has 8 bits
    if of_loss > limit or of_gradients > limit:
        raise SystemExit(f"more than {limit}: the two losses are not the same")
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"trained {trainer.state.global_step} steps, reward {rewards[0]:.3f} to {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
