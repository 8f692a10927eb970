"""The trainer's peers: TRL's `GRPOTrainer` and `SFTTrainer`, and models made from nothing that both sides train.

TRL's trainers are real ones. What is timed of a step is what their training loop does in one: `training_step` for each
micro-batch, clipping, the optimizer. Logging, data loading and the loop itself are left out, which favours TRL.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import relative_error
from torch import Tensor, nn

from medbridge.data import ImageCache, Item, PromptSettings, permutation
from medbridge.data.answers import Outcome
from medbridge.model import FromNothing, ModelSettings, Policy, Prompter, init_model
from medbridge.rollout.engine import Graded, Request, Rollout
from medbridge.train import Example, RlSettings, SftSettings
from medbridge.train.examples import Accepted
from medbridge.train.groups import Batch, Group
from medbridge.train.learner import Learner
from medbridge.train.optimization import Trainable
from medbridge.train.sft import SupervisedTerm, Supervision
from medbridge_kernels import group_advantages

PROMPTS = PromptSettings(answer_style="text", system="")
IMAGE_BYTES = 256 << 20
RATE = 1e-6
"""Learning rate of both sides: so small that all rounds train the same model."""


def make_model(folder: Path, shape: FromNothing, *, vocabulary: int, tied: bool) -> Path:
    """A Qwen2.5-VL of random weights whose output layer has `vocabulary` rows, of which its tokenizer uses the first.

    tied: input and output embeddings are one matrix, as in Qwen2.5-VL-3B.
    """
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    init_model(folder, shape, ["How bright is the square? dark grey bright"] * 50, seed=0)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = vocabulary
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, side: int) -> list[str]:
    """PNG files of noise, side x side pixels."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = [str(folder / f"{number}.png") for number in range(count)]
    for name in names:
        Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(name)
    return names


def questions(images: Sequence[str | None]) -> list[Item]:
    """A question for each image; for None, one that shows none."""
    return [
        Item(
            id=str(number), dataset="bench", split="train", question=f"What does finding {number} show?",
            answer="dark", options=("dark", "grey", "bright"), images=() if image is None else (image,), tags={},
            floor=1 / 3,
        )
        for number, image in enumerate(images)
    ]  # fmt: skip


def sampled(items: Sequence[Item], lengths: Sequence[int], tokens: range) -> Batch:
    """Groups of completions of these lengths, of random `tokens`; half of them earn a reward."""
    generator = np.random.default_rng(1)
    groups = []
    for item in items:
        request = Request(item, tuple(range(len(lengths))), (permutation(item, 0, 0),) * len(lengths))
        graded = tuple(
            Graded(
                Rollout(
                    item.id, sample, request.permutations[0], "", generator.integers(tokens.start, tokens.stop, length),
                    np.zeros(length, np.float32), "stop", 0,
                ),
                Outcome("correct" if sample % 2 else "wrong", None, None, None, True), float(sample % 2),
            )
            for sample, length in enumerate(lengths)
        )  # fmt: skip
        groups.append(Group(request, graded))
    return Batch(groups, [], 0, 0, 0.0)


@dataclass(slots=True)
class Gradients:
    """Stands for the optimizer: keeps the loss and the gradients that it is handed, and changes nothing."""

    model: nn.Module
    loss: float = 0.0
    found: dict[str, Tensor] | None = None

    def step(self, step: int, loss: float) -> dict[str, float]:
        self.loss = loss
        self.take()
        return {}

    def take(self) -> dict[str, Tensor]:
        """Of every parameter that has one, which is then cleared."""
        self.found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return self.found


def gradient_error(one: Gradients, other: Gradients) -> float:
    """Norm of the difference of all gradients over that of the other's. The same parameters must have one."""
    assert one.found is not None and other.found is not None and one.found.keys() == other.found.keys()
    names = sorted(one.found)
    flat = [torch.cat([side.found[name].flatten() for name in names]) for side in (one, other) if side.found]
    return relative_error(flat[0][:, None], flat[1][:, None])


# --- ours ---


@dataclass(slots=True)
class Ours:
    """A policy with its learner and optimizer. It bans no token, as TRL doesn't, so that losses are equal."""

    policy: Policy
    learner: Learner
    trainable: Trainable
    number: int = 0

    @classmethod
    def load(cls, model: str, settings: RlSettings, **options: Any) -> Ours:
        """options: of `ModelSettings`."""
        held = ModelSettings(**options)
        policy = Policy.load(model, held, trainable=True)
        policy.banned = []
        learner = Learner(policy, settings, PROMPTS, ImageCache(IMAGE_BYTES), 128)
        trainable = Trainable(policy, held, settings, steps=1_000_000, seed=0)
        return cls(policy, learner, trainable)

    def step(self, batch: Batch) -> None:
        self.number += 1
        self.learner.update(self.number, batch, self.trainable)

    def gradients(self, batch: Batch) -> Gradients:
        kept = Gradients(self.policy.model)
        self.learner.update(1, batch, kept)  # type: ignore[arg-type]
        return kept


def rl_settings(**options: Any) -> RlSettings:
    """The loss that TRL calls dapo: clipped, mean over the tokens of the step, nothing corrected."""
    return RlSettings(
        **{"loss": "bnpo", "correction": "none", "learning_rate": RATE, "warmup_steps": 0, "max_skipped_steps": 1}
        | options
    )


# --- TRL's trainers ---


class Peer:
    """A TRL trainer whose step is taken on micro-batches that are given."""

    def __init__(self, trainer: Any) -> None:
        """Does what a transformers trainer does before its first step, on one CPU."""
        self.trainer = trainer
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.create_optimizer()
        trainer.model.train()

    def step(self, inputs: Sequence[Mapping[str, Any]]) -> None:
        """As its loop does it."""
        self._accumulate(inputs)
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def gradients(self, inputs: Sequence[Mapping[str, Any]]) -> Gradients:
        kept = Gradients(self.trainer.model)
        kept.loss = self._accumulate(inputs)
        kept.take()
        return kept

    def _accumulate(self, inputs: Sequence[Mapping[str, Any]]) -> float:
        """Loss and gradients of a step."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(inputs)
        return sum(float(trainer.training_step(trainer.model, dict(each), None)) for each in inputs)


class Grpo(Peer):
    """A `GRPOTrainer` on the same weights that is given its completions instead of drawing them."""

    def __init__(self, model: str, **options: Any) -> None:
        import datasets
        import trl
        from transformers import AutoProcessor

        class Given(trl.GRPOTrainer):
            def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
                return inputs

        defaults: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(), "use_cpu": True, "bf16": False, "report_to": "none",
            "per_device_train_batch_size": 8, "num_generations": 8, "learning_rate": RATE,
            "max_completion_length": 128, "lr_scheduler_type": "constant",
        }  # fmt: skip
        self.processor = AutoProcessor.from_pretrained(model)
        trainer = Given(
            model=model, processing_class=self.processor, args=trl.GRPOConfig(**defaults | options),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["none"] * 64}),
        )  # fmt: skip
        super().__init__(trainer)

    def inputs(self, batch: Batch, model: str) -> list[dict[str, Any]]:
        """The batch as `_generate_and_score_completions` returns it: a micro-batch for each group.

        Images come once for each completion.
        """
        prompter = Prompter.load(model)
        counted = sum(len(entry.rollout.token_ids) for group in batch.groups for entry in group.graded)
        return [self._micro_batch(group, prompter, counted) for group in batch.groups]

    def _micro_batch(self, group: Group, prompter: Prompter, counted: int) -> dict[str, Any]:
        item, order = group.request.item, group.request.permutations[0]
        pictures = [ImageCache(IMAGE_BYTES).get(file) for file in item.images]
        text = prompter.render(item, order, PROMPTS)
        prompt = self.processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
        rows = [torch.from_numpy(entry.rollout.token_ids) for entry in group.graded]
        completions = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=prompter.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        rewards = torch.tensor(group.rewards)
        ids = prompt["input_ids"].expand(len(rows), -1)
        made: dict[str, Any] = {
            "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": completions,
            "completion_mask": (torch.arange(completions.shape[1]) < lengths[:, None]).long(),
            "advantages": group_advantages(rewards, torch.tensor([0, len(rows)])),
            "num_items_in_batch": torch.tensor(counted),
        }  # fmt: skip
        if pictures:
            types = nn.functional.pad(torch.as_tensor(prompt["mm_token_type_ids"]), (0, completions.shape[1]))
            made |= {name: torch.cat([prompt[name]] * len(rows)) for name in ("pixel_values", "image_grid_thw")}
            made |= {"mm_token_type_ids": types.expand(len(rows), -1), "num_images": [1] * len(rows)}
        return made


# --- supervised steps ---


def supervised(items: Sequence[Item], lengths: Sequence[int]) -> list[Example]:
    """Completions of so many tokens, the one that ends them among them: digits, which are a token each."""
    generator = np.random.default_rng(2)
    return [
        Example(item, permutation(item, 0, 0), "".join(map(str, generator.integers(0, 10, length - 1))))
        for item, length in zip(items, lengths, strict=True)
    ]


class OursSft:
    """Our supervised step on a policy that bans no token."""

    def __init__(self, model: str, settings: SftSettings) -> None:
        held = ModelSettings()
        self.policy = Policy.load(model, held, trainable=True)
        self.policy.banned = []
        self.trainable = Trainable(self.policy, held, settings, steps=1_000_000, seed=0)
        nothing = Supervision(Accepted([]), None, settings)
        self.term = SupervisedTerm(self.policy, nothing, PROMPTS, ImageCache(IMAGE_BYTES), seed=0)
        self.number = 0

    def step(self, batch: Sequence[Example]) -> None:
        self.number += 1
        loss, _ = self.term.backward(batch)
        self.trainable.step(self.number, loss)

    def gradients(self, batch: Sequence[Example]) -> Gradients:
        kept = Gradients(self.policy.model)
        kept.loss, _ = self.term.backward(batch)
        kept.take()
        return kept


class Sft(Peer):
    """An `SFTTrainer` on the same weights; its own collator makes the batches."""

    def __init__(self, model: str, **options: Any) -> None:
        import datasets
        import trl
        from transformers import AutoProcessor

        defaults: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(), "use_cpu": True, "bf16": False, "report_to": "none",
            "learning_rate": RATE, "lr_scheduler_type": "constant", "max_length": None, "completion_only_loss": True,
        }  # fmt: skip
        row = {"prompt": ["none"], "completion": ["none"], "images": [[]]}
        self.prompter = Prompter.load(model)
        trainer = trl.SFTTrainer(
            model=model, processing_class=AutoProcessor.from_pretrained(model),
            args=trl.SFTConfig(**defaults | options), train_dataset=datasets.Dataset.from_dict(row),
        )  # fmt: skip
        super().__init__(trainer)

    def inputs(self, batch: Sequence[Example], together: int) -> list[dict[str, Any]]:
        """Micro-batches of so many neighbours, padded."""
        end = self.prompter.tokenizer.convert_ids_to_tokens(self.prompter.stop_ids[0])
        rows = [
            {
                "prompt": self.prompter.render(one.item, one.order, PROMPTS), "completion": one.completion + end,
                "images": [ImageCache(IMAGE_BYTES).get(file) for file in one.item.images],
            }
            for one in batch
        ]  # fmt: skip
        starts = range(0, len(rows), together)
        return [dict(self.trainer.data_collator(rows[start : start + together])) for start in starts]
