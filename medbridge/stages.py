"""The training stages of a run: bridge (SFT), sharpen (GRPO), both at once (mixed), and the answer form at first.

When which one comes is decided in `pipeline`; how a step trains stands in `train`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from medbridge.data import Item, permutation
from medbridge.followers import training
from medbridge.ledger import Stage
from medbridge.material import Material
from medbridge.model import Policy, Prompter, pick_device
from medbridge.recording import Recorder
from medbridge.results import better_checkpoint, restored, save_adapter
from medbridge.rollout.choose import Choice
from medbridge.scoring import HeldOut
from medbridge.stage_folder import Method, result_of, strata_by_method
from medbridge.stage_rollouts import StageRollouts
from medbridge.train import RlSettings, SftSettings, Supervision, train_rl, train_sft
from medbridge.train.engine_memory import Sampling
from medbridge.train.examples import RandomAnswers
from medbridge.train.memory import device_memory, plan_memory
from medbridge.train.ranks import Ranks
from medbridge.train.sft import Examples, OnStep

_PROMPTS_MEASURED = 32
"""Training items whose prompts are counted for the memory plan."""


class Training(Material):
    """A run's folder with the stages that train. A stage that is asked for again goes on, or is read if it is done."""

    profile = 0
    """Steps of each training stage that are profiled, behind its first one."""

    ranks = Ranks()
    """The processes that train; this one leads them."""

    def teach_form(self, model: str, strata: Sequence[str], steps: int) -> str:
        """Answers in the right form and drawn at random, for a model made from nothing; the new model's folder."""
        stage = self._stage_of(0, ("format",)) or self._begin(0, "format", model, strata)
        if stage.status == "running":
            plan = self.settings.sft.model_copy(update={"steps": steps, "source": "answers", "replay_share": 0.0})
            out = self._held_out_ids
            items = [item for item in self.items.split("train") if item.id not in out]
            examples = RandomAnswers(items, self.settings.data.prompt, seed=self.settings.seed)
            stage = self._train_supervised(stage, examples, None, plan, [], {"source": "random answers"})
        return result_of(stage)

    def bridge(self, round: int, model: str, strata: Sequence[str]) -> str:
        """Supervised fine-tuning on the training items of weak strata; returns the new model's folder."""
        stage = self._stage_of(round, ("bridge",))
        if stage is not None and stage.status == "done":
            return result_of(stage)
        items, others = self.bridged_items(strata if stage is None else stage.strata)
        if stage is not None:  # begun: its own model and strata, and the routing made for it
            model, strata = stage.model, stage.strata
        items = self.routed(round, "bridge", model, strata, items)
        stage = stage or self._begin(round, "bridge", model, strata)  # only now: nothing above can fail any more
        examples = self.examples(stage, items, strata)
        replay = self.answers(others) if others else None
        settings = self.settings.sft
        asked = self._asked_while_training(stage)
        return result_of(self._train_supervised(stage, examples, replay, settings, asked, {"source": settings.source}))

    def sharpen(self, round: int, model: str, strata: Sequence[str]) -> str:
        """GRPO on the training items of supported strata; returns the new model's folder."""
        stage = self._stage_of(round, ("sharpen",))
        if stage is not None and stage.status == "done":
            return result_of(stage)
        items, _ = self.training_items(strata if stage is None else stage.strata, reserved=True)
        if stage is not None:  # begun: its own model and strata, and the routing made for it
            model, strata = stage.model, stage.strata
        items = self.routed(round, "sharpen", model, strata, items)
        stage = stage or self._begin(round, "sharpen", model, strata)
        return result_of(self._train_by_rewards(stage, items, None, {"items": len(items)}))

    def mixed(self, round: int, model: str, strata: Mapping[Method, Sequence[str]]) -> str:
        """GRPO on supported strata and supervised fine-tuning on weak ones, in each step; the new model's folder."""
        stage = self._stage_of(round, ("mixed",))
        if stage is not None:
            if stage.status == "done":
                return result_of(stage)
            model, strata = stage.model, strata_by_method(stage)
        items, _ = self.training_items(strata["sharpen"], reserved=True)
        weak, _ = self.bridged_items(strata["bridge"])
        others = self._replayed([*strata["bridge"], *strata["sharpen"]])
        items = self.routed(round, "sharpen", model, strata["sharpen"], items)
        weak = self.routed(round, "bridge", model, strata["bridge"], weak)
        named = {method: list(names) for method, names in strata.items()}
        every = [*strata["bridge"], *strata["sharpen"]]
        stage = stage or self._begin(round, "mixed", model, every, {"strata": named})
        examples = self.examples(stage, weak, strata["bridge"])
        replay = self.answers(others) if others else None
        supervision = Supervision(examples, replay, self.settings.sft)
        summary = {"items": len(items), "examples": len(examples), "source": self.settings.sft.source}
        return result_of(self._train_by_rewards(stage, items, supervision, summary))

    def _replayed(self, trained: Sequence[str]) -> list[Item]:
        """Training items of the strata that a mixed stage trains in neither way."""
        train = self._train_split(reserved=False)
        return [item for item in train if item.stratum(self.strata_keys) not in trained]

    # -- the two ways --------------------------------------------------------------------------------------

    def _train_supervised(
        self,
        stage: Stage,
        examples: Examples,
        replay: Examples | None,
        settings: SftSettings,
        asked: Sequence[Item],
        summary: dict[str, Any],
    ) -> Stage:
        policy = self._loaded(stage, settings, len(asked))
        with Recorder(self, stage, policy, settings.steps, "SFT") as recorder:
            self._tell(stage, "sft", sft=settings.model_dump(mode="json"))
            train_sft(
                policy, examples, replay, settings, model=self.settings.model, prompts=self.settings.data.prompt,
                images=self.images, seed=self._seed(stage), checkpoints=self._checkpoints(stage),
                on_start=recorder.on_start, on_step=self._recorded(recorder, stage, policy, settings.steps),
                say=self.reporter.say, score=self._score(policy, asked), ranks=self.ranks,
            )  # fmt: skip
        return self._finish(stage, policy, {**summary, "items": len(examples)})

    def _loaded(self, stage: Stage, settings: SftSettings | RlSettings, asked: int) -> Policy:
        """The stage's model, to be trained; what won't fit in memory is said, or refused where that is sure.

        `asked` is how many held-out items are sampled at a checkpoint.

        Raises:
            MedbridgeError: weights, optimizer and what else is held all the time need more than there is.
        """
        self.engines.release()
        model, path = self.settings.model, self._path(stage.model)
        available = device_memory(pick_device(model.device))
        plan = plan_memory(
            path, model, settings, available=available, ranks=self.ranks.count,
            sampling=self._sampled(path, settings, asked),
        )  # fmt: skip
        if plan.hopeless:
            plan.require()
        if not plan.fits:
            self.reporter.say(f"{stage.kind}: training may not fit in memory\n{plan.table()}")
        return Policy.load(path, model, trainable=True)

    def _sampled(self, path: str, settings: SftSettings | RlSettings, asked: int) -> Sampling | None:
        """What is sampled while a stage trains. Held-out items are asked by the model in training itself."""
        choice = self.engines.choice() if isinstance(settings, RlSettings) else Choice("transformers", "")
        drawn = settings.prompts_per_step * settings.completions if isinstance(settings, RlSettings) else 0
        if not drawn and not asked:
            return None
        longest = self._longest_prompt(path) if choice.engine == "transformers" else 0
        rollout, completions = self.settings.rollout, max(asked, drawn)
        return Sampling(choice.engine, rollout, len(choice.groups), completions, longest)

    def _longest_prompt(self, path: str) -> int:
        """Tokens of the longest of a few training items' prompts."""
        prompter, prompts, seed = Prompter.load(path), self.settings.data.prompt, self.settings.seed
        items = self.items.split("train")
        some = items[:: math.ceil(len(items) / _PROMPTS_MEASURED)] if items else []
        lengths = (prompter.length(item, permutation(item, seed, 0), prompts, self.images) for item in some)
        return max(lengths, default=0)

    def _tell(self, stage: Stage, kind: str, **more: Any) -> None:
        """Have the other ranks train this stage too."""
        told = training(
            kind, self.settings, self._path(stage.model), self._seed(stage), self._checkpoints(stage), **more
        )
        self.ranks.share(lambda: told)

    def _train_by_rewards(
        self, stage: Stage, items: Sequence[Item], supervision: Supervision | None, summary: dict[str, Any]
    ) -> Stage:
        by_id = {item.id: item for item in items}
        settings = self.settings.rl
        asked = self._asked_while_training(stage)
        policy = self._loaded(stage, settings, len(asked))
        seed = self._seed(stage)
        rollouts = StageRollouts(
            self.ledger.path, stage, self.engines.of_policy(policy), policy, self.settings,
            grade=lambda rollout: self.graded(rollout, by_id, settings.format_weight), probes=items,
            images=self.images, scratch=self.folder / "weights", seed=seed,
        )  # fmt: skip
        method = "GRPO" if supervision is None else "GRPO + SFT"
        with closing(rollouts), Recorder(self, stage, policy, settings.steps, method) as recorder:
            diagnosed = self._diagnosed_k(stage)
            self._tell(stage, "rl", mixed=supervision is not None, diagnosed_k=diagnosed)
            train_rl(
                policy, items, settings, rollouts, model=self.settings.model, prompts=self.settings.data.prompt,
                images=self.images, rollout=self.settings.rollout, seed=seed, checkpoints=self._checkpoints(stage),
                on_start=recorder.on_start,
                on_step=self._recorded(recorder, stage, policy, settings.steps, rollouts.take_metrics),
                say=self.reporter.say, score=self._score(policy, asked), supervised=supervision,
                diagnosed_k=diagnosed, ranks=self.ranks,
            )  # fmt: skip
        shares = self._loss_shares(stage)
        if shares:
            plain = f" (plain torch: {shares['loss_share_plain']:.1%})" if "loss_share_plain" in shares else ""
            self.reporter.say(
                f"{stage.kind}: the loss took {shares['loss_share']:.1%} of the training steps' time{plain}"
            )
        return self._finish(stage, policy, summary | shares)

    def _diagnosed_k(self, stage: Stage) -> int | None:
        """The largest k at which guessing leaves room, in each of the strata that are sharpened; None if unknown."""
        verdicts = self._standing_verdicts(stage.round)
        found = [
            verdicts[name].verdict.get("evidence", {}).get("k")
            for name in strata_by_method(stage)["sharpen"]
            if name in verdicts
        ]
        known = [int(k) for k in found if k is not None]
        return min(known) if known else None

    def _loss_shares(self, stage: Stage) -> dict[str, float]:
        """Share of the training time that went into the loss and the output layer, and would have with plain torch."""
        series = {name: dict(values) for name, values in self.ledger.metrics(stage.stage_id).items()}
        loss, plain = series.get("seconds_loss", {}), series.get("seconds_loss_plain", {})
        training = {step: series["seconds_training"][step] for step in loss}
        shares = {}
        if any(loss.values()):  # a step whose groups all agree has no loss
            shares["loss_share"] = sum(loss.values()) / sum(training.values())
        if plain:
            others = sum(training[step] - loss[step] for step in plain)
            shares["loss_share_plain"] = sum(plain.values()) / (others + sum(plain.values()))
        return shares

    def _recorded(
        self,
        recorder: Recorder,
        stage: Stage,
        policy: Policy,
        steps: int,
        more: Callable[[], dict[str, float]] = dict,
    ) -> OnStep:
        """Records each step with `more` metrics; behind the last one adapters are written, which are merged then."""

        def on_step(step: int, metrics: dict[str, float], ids: list[str]) -> None:
            recorder.on_step(step, metrics | more(), ids)
            if step == steps and self.settings.model.lora is not None:
                save_adapter(policy, self._adapter_folder(stage))

        return on_step

    # -- held-out accuracy, and the end --------------------------------------------------------------------

    def _asked_while_training(self, stage: Stage) -> list[Item]:
        if not self.settings.held_out.share:
            return []
        items = self.held_out_items(stage.strata)
        if not items:
            self.reporter.say(
                f"{stage.kind}: none of the held-out training items is of {', '.join(stage.strata)}: its accuracy "
                "isn't measured while it trains, and the last weights are kept (held_out.share)"
            )
        return items

    def _score(self, policy: Policy, items: Sequence[Item]) -> HeldOut | None:
        return HeldOut(policy, items, self.settings, self.images) if items else None

    def _finish(self, stage: Stage, policy: Policy, summary: dict[str, Any]) -> Stage:
        """Save the result: the last weights, or where the settings say so and it is another, the best checkpoint's."""
        folder = self._result_folder(stage)
        metrics = {name: dict(values) for name, values in self.ledger.metrics(stage.stage_id).items()}
        scores = metrics.get("held_out_accuracy", {})
        if scores:
            kept = max(scores)  # the last step
            keeps_best = self.settings.held_out.keep == "best"
            best = better_checkpoint(self._checkpoints(stage), scores[kept]) if keeps_best else None
            if best is not None:
                kept = best.step
                policy = restored(best, self._path(stage.model), self.settings.model, self._adapter_folder(stage))
            summary |= {"held_out_accuracy": scores[kept], "kept_step": kept}
        policy.save(folder)
        losses = [value for _, value in sorted(metrics.get("loss", {}).items())]
        summary |= {
            "seconds": time.time() - stage.started,
            "steps": len(losses),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
        }
        done = self.ledger.finish_stage(stage.stage_id, result_model=self._relative(folder), summary=summary)
        self.keep_time()
        shutil.rmtree(self._checkpoints(stage), ignore_errors=True)
        return done
