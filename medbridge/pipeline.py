"""The loop: measure support, decide, bridge or sharpen, measure again, until nothing is left to do.

Read `Run.execute` from top to bottom. A run resumes by being executed again: each stage that the ledger holds as
done is taken from it, one that was cut off goes on from its last checkpoint or batch, and the decisions, which
depend on stored verdicts only, come out as before.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medbridge.config import RunSettings
from medbridge.data import Item, grade, permutation
from medbridge.engines import Engines
from medbridge.errors import MedbridgeError
from medbridge.ledger import Stage, VerdictRow
from medbridge.measurement import (
    Sampler,
    by_stratum,
    came_out,
    compare_stages,
    control_items,
    frequent_answer_baseline,
    measured_items,
    read_otherwise,
    run_control,
    run_measurement,
    summarise_sampling,
    tally_items,
)
from medbridge.model import Policy, init_model
from medbridge.progress import Reporter
from medbridge.rollout import Engine, Graded, Request
from medbridge.run_folder import RunFolder
from medbridge.stage_rollouts import StageRollouts
from medbridge.support.routing import hashed_fraction, route
from medbridge.train import Example, train_rl, train_sft
from medbridge.train.examples import Accepted, Answers, RandomAnswers
from medbridge.train.rewards import reward
from medbridge.train.sft import Examples, OnStep


@dataclass(frozen=True, slots=True)
class Plan:
    """The next training stage, or why there is none."""

    kind: str  # "bridge", "sharpen" or "stop"
    strata: tuple[str, ...]
    reason: str


class Run(RunFolder):
    """The loop and its stages, on one run folder."""

    def __init__(self, folder: Path, settings: RunSettings, *, base_dir: Path, reporter: Reporter) -> None:
        """As `RunFolder`."""
        super().__init__(folder, settings, base_dir=base_dir, reporter=reporter)
        self.engines = Engines(settings, self.images, folder / "logs", reporter.say)
        try:
            self.engines.choice()  # what isn't installed is said now, and not after hours of training
        except MedbridgeError:
            self.close()
            raise

    def close(self) -> None:
        self.engines.release()
        super().close()

    # -- the loop ------------------------------------------------------------------------------------------

    def execute(self) -> dict[str, VerdictRow]:
        """Run to the end, or on from where an earlier process stopped; returns the last verdicts."""
        base = model = self.base_model()
        round = 0
        while True:
            model, verdicts = self.assess(round, model)
            plan = self._plan(round, verdicts)
            if plan.kind == "stop":
                break
            self.reporter.say(f"round {round}: {plan.reason}")
            train = self.bridge if plan.kind == "bridge" else self.sharpen
            model = train(round, model, plan.strata)
            round += 1
        for measured in dict.fromkeys([base, model]):
            self.evaluate(measured)
        self.ledger.set_meta("finished", {"reason": plan.reason})
        self.ledger.set_meta("outcome", {s: {"kind": v.kind, "reason": v.reason} for s, v in verdicts.items()})
        return verdicts

    def train_once(self, kind: str, strata: Sequence[str] | None) -> str:
        """One stage by itself, on the named strata or on those whose last verdict is `kind`; the model's folder.

        Goes on with a stage that was cut off.
        """
        round = self.next_round()
        begun = self._stage_of(round, ("bridge", "sharpen"))
        if begun is not None and begun.kind != kind:
            raise MedbridgeError(
                f"{self.folder}: a {begun.kind} stage was cut off here. Finish it with `medbridge {begun.kind}`, or "
                "use another run folder."
            )
        if begun is not None and strata and set(strata) != set(begun.strata):
            raise MedbridgeError(
                f"{self.folder}: a {begun.kind} stage on {', '.join(begun.strata)} was cut off here, and would go on. "
                "Leave --stratum out to finish it."
            )
        model = self.current_model()
        chosen = tuple(strata or ())
        if not chosen and begun is None:
            measured = self._stage_of(round, ("diagnose",))
            verdicts = {} if measured is None else self.ledger.verdicts(self._standing(round).stage_id)
            chosen = tuple(name for name, row in verdicts.items() if row.kind == kind)
            if not chosen:
                found = ", ".join(f"{name}: {row.kind}" for name, row in verdicts.items())
                raise MedbridgeError(
                    f"no stratum's last verdict is {kind} ({found or 'this model has not been diagnosed here'}). Run "
                    "`medbridge diagnose` with the same --run first, or name strata with --stratum."
                )
        return (self.bridge if kind == "bridge" else self.sharpen)(round, model, chosen)

    def next_round(self) -> int:
        """The round that the next measurement or stage belongs to: training stages finished so far."""
        return sum(stage.kind in ("bridge", "sharpen") and stage.status == "done" for stage in self.ledger.stages())

    def current_model(self) -> str:
        """The result of the last finished training stage that was not taken back, or the base model."""
        measured = self._stage_of(self.next_round(), ("diagnose",))
        if measured is not None and measured.status == "done":
            return self._standing(measured.round).model
        done = [stage for stage in self.ledger.stages() if stage.kind in ("bridge", "sharpen") and stage.result_model]
        return _result(done[-1]) if done else self.base_model()

    def _plan(self, round: int, verdicts: Mapping[str, VerdictRow]) -> Plan:
        """The next stage: bridge what is weak, and only then sharpen, since every bridge moves the whole model."""
        begun = self._stage_of(round, ("bridge", "sharpen"))
        if begun is not None:
            return Plan(begun.kind, begun.strata, f"going on with {begun.kind} of {', '.join(begun.strata)}")
        budget = self.settings.budget
        trained = [stage for stage in self.ledger.stages() if stage.kind in ("bridge", "sharpen")]
        times = Counter((stage.kind, name) for stage in trained for name in stage.strata)
        limits = {"bridge": budget.bridges_per_stratum, "sharpen": budget.sharpens_per_stratum}
        spoilt = {name for stage in trained if self._taken_back(stage) for name in stage.strata}
        taught = {
            "bridge": {item.stratum(self.strata_keys) for item in self._train_split(reserved=False)},
            "sharpen": {item.stratum(self.strata_keys) for item in self._train_split(reserved=True)},
        }
        wanted = {
            kind: tuple(
                name
                for name, row in verdicts.items()
                if row.kind == kind
                and times[kind, name] < limits[kind]
                and name in taught[kind]
                and not (kind == "sharpen" and name in spoilt)
            )
            for kind in limits
        }
        open_strata = [name for name, row in verdicts.items() if row.kind in limits]
        if not open_strata:
            undecided = [name for name, row in verdicts.items() if row.kind == "undecided"]
            return Plan("stop", (), f"undecided: {', '.join(undecided)}" if undecided else "every stratum is done")
        if not any(wanted.values()):
            bare = [name for name in open_strata if name not in taught[verdicts[name].kind]]
            back = [name for name in open_strata if verdicts[name].kind == "sharpen" and name in spoilt]
            used = [name for name in open_strata if name not in bare and name not in back]
            reasons = [f"sharpening cost support and was taken back for {', '.join(back)}"] if back else []
            reasons += [f"stages per stratum are used up for {', '.join(used)}"] if used else []
            reasons += [f"there are no training items for {', '.join(bare)}"] if bare else []
            return Plan("stop", (), "; ".join(reasons))
        if len(trained) >= budget.stages:
            return Plan("stop", (), f"the budget of {budget.stages} training stages is used up")
        if budget.minutes is not None and self.minutes() >= budget.minutes:
            return Plan("stop", (), f"the budget of {budget.minutes:g} minutes is used up")
        kind = "bridge" if wanted["bridge"] else "sharpen"
        return Plan(kind, wanted[kind], f"{kind} {', '.join(wanted[kind])}")

    # -- the base model ------------------------------------------------------------------------------------

    def base_model(self) -> str:
        """The model the run starts from; made from nothing, and taught the answer form, where none is named."""
        settings = self.settings.model
        if settings.path is not None:
            beside = self.base_dir / settings.path  # as for data, a relative path starts at the configuration's folder
            return self._remember_base(str(beside.resolve()) if beside.is_dir() else settings.path)
        made = self.folder / "models" / "from-nothing"
        if not made.is_dir():
            texts = sorted({text for item in self.items.split("train") for text in item_texts(item)})
            self.reporter.say(f"making a {settings.from_nothing.architecture} from nothing in {made}")
            init_model(made, settings.from_nothing, texts, seed=self.settings.seed)
        if settings.from_nothing.format_steps == 0:
            return self._remember_base(self._relative(made))
        strata = sorted({item.stratum(self.strata_keys) for item in self.items.split("train")})
        if not strata:
            raise MedbridgeError(
                "model.from_nothing.format_steps teaches the answer form on training items, and the data has none. Add "
                "a source with a train split, or set it to 0."
            )
        stage = self._stage_of(0, ("format",)) or self._begin(0, "format", self._relative(made), strata)
        if stage.status == "running":
            plan = self.settings.sft.model_copy(
                update={"steps": settings.from_nothing.format_steps, "source": "answers", "replay_share": 0.0}
            )
            examples = RandomAnswers(self.items.split("train"), self.settings.data.prompt, seed=self.settings.seed)
            stage = self._train_supervised(stage, examples, None, plan, {"source": "random answers"})
        return self._remember_base(_result(stage))

    def _remember_base(self, model: str) -> str:
        self.ledger.set_meta("base_model", model)
        return model

    # -- measuring -----------------------------------------------------------------------------------------

    def assess(self, round: int, model: str) -> tuple[str, dict[str, VerdictRow]]:
        """Measure and judge a model; where sharpening cost support, the one before it comes back with its verdicts."""
        self.diagnose(round, model)
        standing = self._standing(round)
        return standing.model, self.ledger.verdicts(standing.stage_id)

    def diagnose(self, round: int, model: str) -> dict[str, VerdictRow]:
        """Measure support on the diagnosis split, judge every stratum, and compare with the model before."""
        stage = self._stage_of(round, ("diagnose",))
        if stage is None or stage.status == "running":
            # data and model first: what fails here has begun no stage, and its settings can still be mended
            strata = self._split(self.settings.diagnosis.split)
            engine = self._engine(model if stage is None else stage.model)
            stage = stage or self._begin(round, "diagnose", model, ())
            trained = self._stage_of(round - 1, ("bridge", "sharpen"))
            before = self._standing(round - 1) if trained and self._stage_of(round - 1, ("diagnose",)) else None
            # the loss of support is read on the same questions: all that the model before was asked
            again = self.ledger.tallies(before.stage_id) if before and trained and trained.kind == "sharpen" else []
            rows = run_measurement(
                self.ledger, stage, engine, strata, self.settings, self.reporter,
                limit=self.settings.diagnosis.max_items_per_stratum, sequential=self.settings.diagnosis.sequential,
                at_least={tally.item_id for tally in again if tally.n},
            )  # fmt: skip
            rows = self._check(stage, engine, strata, rows)
            summary = {} if before is None else compare_stages(self.ledger, before, stage, strata, self.settings)
            if before is not None and trained is not None and trained.kind == "sharpen":
                summary["forecasts"] = came_out(self.ledger.verdicts(before.stage_id), rows, trained.strata)
            if again and summary["lost"]:
                self.reporter.say(f"round {round}: sharpening is taken back: {'; '.join(summary['lost'].values())}")
            elif "lost" in summary:
                del summary["lost"]  # bridging may trade one stratum's support for another's; only RL is held to it
            self._finish_measuring(stage, rows, summary)
        return self.ledger.verdicts(stage.stage_id)

    def _taken_back(self, trained: Stage) -> bool:
        """Whether the diagnosis after a training stage went back to the model before it."""
        after = self._stage_of(trained.round + 1, ("diagnose",))
        return after is not None and bool(after.summary.get("lost"))

    def _standing(self, round: int) -> Stage:
        """The diagnosis that a round goes on from: its own, or an earlier one where sharpening was taken back."""
        stage = self._stage_of(round, ("diagnose",))
        assert stage is not None
        return self._standing(round - 1) if stage.summary.get("lost") else stage

    def evaluate(self, model: str) -> dict[str, VerdictRow]:
        """Measure a model on the held-out test split, beside the most frequent answer; nothing is trained on it."""
        split = self.settings.diagnosis.test_split
        if split is None or not self.items.split(split):
            return {}
        known = [s for s in self.ledger.stages() if s.kind == "evaluate" and s.model == model]
        stage = known[0] if known else self._begin(self._last_round(), "evaluate", model, ())
        if stage.status == "running":
            strata = self._split(split)
            baseline = frequent_answer_baseline(self.items.split("train"), strata, self.settings)
            rows = run_measurement(self.ledger, stage, self._engine(model), strata, self.settings, self.reporter)
            self._finish_measuring(stage, rows, {"split": split, "baseline": baseline})
        return self.ledger.verdicts(stage.stage_id)

    def _check(
        self, stage: Stage, engine: Engine, strata: Mapping[str, Sequence[Item]], rows: Sequence[VerdictRow]
    ) -> list[VerdictRow]:
        """The verdicts with what became of them under other readings and other images."""
        measured = measured_items(self.ledger, stage, strata)
        checks = read_otherwise(self.ledger, stage, measured, self.settings)
        for kind in self.settings.diagnosis.controls:
            shown = control_items(kind, self.ledger, stage, measured, self.settings, self.folder / "controls")
            if any(shown.values()):
                control = self._stage_of(stage.round, ("control",), kind) or self._begin(
                    stage.round, "control", stage.model, (kind,)
                )
                found = run_control(self.ledger, control, stage, engine, measured, shown, self.settings, self.reporter)
                if control.status == "running":
                    totals = summarise_sampling(self.ledger, control)
                    self.ledger.finish_stage(control.stage_id, result_model=None, summary=totals)
                for name, entry in found.items():
                    checks[name][kind] = entry
        return [replace(row, verdict={**row.verdict, "checks": checks.get(row.stratum, {})}) for row in rows]

    def _finish_measuring(self, stage: Stage, rows: Sequence[VerdictRow], summary: Mapping[str, Any]) -> None:
        """Finish the stage with its verdicts."""
        totals = summarise_sampling(self.ledger, stage)
        self.ledger.finish_stage(stage.stage_id, result_model=None, summary={**totals, **summary}, verdicts=rows)
        self.keep_time()

    def _split(self, name: str) -> dict[str, list[Item]]:
        items = self.items.split(name)
        if not items:
            have = Counter(item.split for item in self.items.items)
            raise MedbridgeError(
                f"the data has no items of split {name!r} (it has {dict(have)}). Name another split under "
                "diagnosis.split, or add a source."
            )
        self.ledger.add_items(items, self.strata_keys)
        return by_stratum(items, self.strata_keys, self.settings.seed, self.settings.diagnosis.cluster)

    # -- training ------------------------------------------------------------------------------------------

    def bridge(self, round: int, model: str, strata: Sequence[str]) -> str:
        """Supervised fine-tuning on the training items of weak strata; returns the new model's folder."""
        stage = self._stage_of(round, ("bridge",))
        if stage is not None and stage.status == "done":
            return _result(stage)
        settings = self.settings.sft
        items, others = self._training_items(strata if stage is None else stage.strata, reserved=False)
        if settings.source == "traces":
            items = [item for item in items if item.trace]
            if not items:
                raise MedbridgeError("sft.source is traces, and no training item has one. Use auto or answers.")
        if stage is not None:  # begun: its own model and strata, and the routing made for it
            model, strata = stage.model, stage.strata
        items = self._routed(round, "bridge", model, strata, items)
        stage = stage or self._begin(round, "bridge", model, strata)  # only now: nothing above can fail any more
        examples: Examples = self._answers(items)
        if settings.source == "rejection":
            examples = Accepted(self._rejection_sample(stage, items))
        replay = self._answers(others) if others else None
        return _result(self._train_supervised(stage, examples, replay, settings, {"source": settings.source}))

    def _answers(self, items: Sequence[Item]) -> Answers:
        settings = self.settings
        traces = settings.sft.source != "answers"
        return Answers(items, settings.data.prompt, seed=settings.seed, traces=traces)

    def _train_supervised(
        self, stage: Stage, examples: Examples, replay: Examples | None, settings: Any, summary: dict[str, Any]
    ) -> Stage:
        self.engines.release()
        policy = Policy.load(str(self._path(stage.model)), self.settings.model, trainable=True)
        with self._recording(stage, "SFT", settings.steps, "loss") as (on_start, on_step):
            train_sft(
                policy, examples, replay, settings, model=self.settings.model, prompts=self.settings.data.prompt,
                images=self.images, seed=self._seed(stage), checkpoints=self._checkpoints(stage),
                on_start=on_start, on_step=on_step, say=self.reporter.say,
            )  # fmt: skip
        return self._finish_training(stage, policy, {**summary, "items": len(examples)})

    def _rejection_sample(self, stage: Stage, items: Sequence[Item]) -> list[Example]:
        """The model's own correct, well-formed completions of training items, each different one once."""
        settings = self.settings
        done = self.ledger.sampled(stage.stage_id)
        numbers = tuple(range(settings.sft.rejection_samples))
        requests = [
            Request(item, numbers, tuple(permutation(item, settings.seed, number) for number in numbers))
            for item in items
            if item.id not in done
        ]
        by_id = {item.id: item for item in items}
        if requests:
            engine = self._engine(stage.model)
            with self.reporter.task("bridge: sampling own answers", len(requests), "items") as meter:
                for batch in engine.generate(requests, settings.rollout, seed=self._seed(stage)):
                    self.ledger.save_rollouts(stage.stage_id, 0, [self._grade(rollout, by_id) for rollout in batch])
                    meter.advance(len({rollout.item_id for rollout in batch}))
        accepted = {
            (entry.rollout.item_id, entry.rollout.permutation, entry.rollout.text)
            for entry in self.ledger.rollouts(stage.stage_id, step=0)
            if entry.outcome.status == "correct" and entry.outcome.well_formed
        }
        if not accepted:
            raise MedbridgeError(
                "sft.source is rejection, and the model gave no correct, well-formed answer to any training item of "
                f"{', '.join(stage.strata)}: there is nothing to imitate. Start another run with "
                "sft.source auto, or with more sft.rejection_samples."
            )
        return [Example(by_id[item_id], order, text) for item_id, order, text in sorted(accepted)]

    def sharpen(self, round: int, model: str, strata: Sequence[str]) -> str:
        """GRPO on the training items of supported strata; returns the new model's folder."""
        stage = self._stage_of(round, ("sharpen",))
        if stage is not None and stage.status == "done":
            return _result(stage)
        items, _ = self._training_items(strata if stage is None else stage.strata, reserved=True)
        if stage is not None:  # begun: its own model and strata, and the routing made for it
            model, strata = stage.model, stage.strata
        items = self._routed(round, "sharpen", model, strata, items)
        stage = stage or self._begin(round, "sharpen", model, strata)
        by_id = {item.id: item for item in items}
        settings = self.settings.rl
        self.engines.release()
        policy = Policy.load(str(self._path(stage.model)), self.settings.model, trainable=True)
        seed = self._seed(stage)
        rollouts = StageRollouts(
            self.ledger.path, stage, self.engines.of_policy(policy), policy, self.settings,
            grade=lambda rollout: self._grade(rollout, by_id, settings.format_weight), probes=items,
            images=self.images, scratch=self.folder / "weights", seed=seed,
        )  # fmt: skip
        with (
            closing(rollouts),
            self._recording(stage, "GRPO", settings.steps, "reward") as (on_start, on_step),
        ):
            train_rl(
                policy, items, settings, rollouts, model=self.settings.model, prompts=self.settings.data.prompt,
                images=self.images, rollout=self.settings.rollout, seed=seed, checkpoints=self._checkpoints(stage),
                on_start=on_start,
                on_step=lambda step, metrics, ids: on_step(step, metrics | rollouts.take_metrics(), ids),
                say=self.reporter.say,
            )  # fmt: skip
        shares = self._loss_shares(stage)
        if shares:
            plain = f" (plain torch: {shares['loss_share_plain']:.1%})" if "loss_share_plain" in shares else ""
            self.reporter.say(f"sharpen: the loss took {shares['loss_share']:.1%} of the training steps' time{plain}")
        return _result(self._finish_training(stage, policy, {"items": len(items), **shares}))

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

    @contextmanager
    def _recording(
        self, stage: Stage, method: str, steps: int, shown: str
    ) -> Iterator[tuple[Callable[[int], None], OnStep]]:
        """Callbacks of a training stage that keep its steps in the ledger, on the bar and, if asked, in TensorBoard."""
        writer = None
        with self.reporter.task(f"{stage.kind}: {method}", steps, "steps") as meter:

            def on_start(step: int) -> None:
                nonlocal writer
                self.ledger.rewind(stage.stage_id, step)
                meter.advance(step)
                if self.settings.tensorboard:
                    writer = _tensorboard(self.folder / "tensorboard" / f"{stage.stage_id:02d}-{stage.kind}", step + 1)

            def on_step(step: int, metrics: dict[str, float], ids: list[str]) -> None:
                self.ledger.log_step(stage.stage_id, step, metrics, ids)
                self.keep_time()
                meter.advance(1, f"{shown} {metrics[shown]:.3f}")
                if writer is not None:
                    for name, value in metrics.items():
                        writer.add_scalar(name, value, step)

            try:
                yield on_start, on_step
            finally:
                if writer is not None:
                    writer.close()

    def _finish_training(self, stage: Stage, policy: Policy, summary: dict[str, Any]) -> Stage:
        folder = self.folder / "models" / f"{stage.stage_id:02d}-{stage.kind}"
        policy.save(folder)
        losses = [value for _, value in self.ledger.metrics(stage.stage_id).get("loss", [])]
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

    def _routed(self, round: int, kind: str, model: str, strata: Sequence[str], items: list[Item]) -> list[Item]:
        """The training items that a stage of this kind can use, by what the model makes of them now."""
        settings = self.settings.routing
        if settings.samples == 0:
            return items
        wanted_for = (kind, *strata)
        begun = [s for s in self.ledger.stages() if s.round == round and s.kind == "route" and s.strata == wanted_for]
        stage = begun[0] if begun else self._begin(round, "route", model, wanted_for)
        if stage.status == "running":
            sampler = Sampler(
                self.ledger,
                stage,
                self._engine(stage.model),
                self.settings,
                samples=settings.samples,
                greedy=False,
            )
            with self.reporter.task(f"route: sampling for {kind}", len(items), "items") as meter:
                sampler.complete(items, meter)
            tallies = tally_items(self.ledger, stage.stage_id, items, self.settings.diagnosis.cluster)
            self.ledger.save_tallies(stage.stage_id, tallies)
        routes = route(self.ledger.tallies(stage.stage_id), settings, seed=self.settings.seed)
        chosen = routes.bridge if kind == "bridge" else routes.sharpen
        if stage.status == "running":
            counted = {name: len(getattr(routes, name)) for name in ("bridge", "sharpen", "anchor", "left_out")}
            summary = {**summarise_sampling(self.ledger, stage), "routes": counted}
            self.ledger.finish_stage(stage.stage_id, result_model=None, summary=summary)
        if not chosen:
            self.reporter.say(f"routing: none of {len(items)} training items is one to {kind}; all of them are used")
            return items
        wanted = {*chosen, *routes.anchor}
        return [item for item in items if item.id in wanted]

    def _training_items(self, strata: Sequence[str], *, reserved: bool) -> tuple[list[Item], list[Item]]:
        """Training items of the strata, and of all others: those reserved for sharpening, or the rest."""
        train = self._train_split(reserved=reserved)
        known = {item.stratum(self.strata_keys) for item in train}
        for name in strata:
            if name not in known:
                share = " (rl.reserved_share may have left none of it here)" if self.settings.rl.reserved_share else ""
                raise MedbridgeError(
                    f"no training items of stratum {name!r}; training strata are: {', '.join(sorted(known)) or 'none'}."
                    f"{share}"
                )
        chosen = [item for item in train if item.stratum(self.strata_keys) in strata]
        self.ledger.add_items(chosen, self.strata_keys)
        return chosen, [item for item in train if item.stratum(self.strata_keys) not in strata]

    def _train_split(self, *, reserved: bool) -> list[Item]:
        """The training items that sharpening uses (`reserved`), or those that bridging does."""
        share = self.settings.rl.reserved_share
        return [
            item
            for item in self.items.split("train")
            if share == 0 or (hashed_fraction("reserve", self.settings.seed, item.id) < share) == reserved
        ]

    # -- small things --------------------------------------------------------------------------------------

    def _grade(self, rollout: Any, by_id: Mapping[str, Item], format_weight: float | None = None) -> Graded:
        outcome = grade(by_id[rollout.item_id], rollout.permutation, rollout.text, self.settings.data.prompt)
        return Graded(rollout, outcome, None if format_weight is None else reward(outcome, format_weight))

    def _engine(self, model: str) -> Engine:
        return self.engines.of(str(self._path(model)))

    def _begin(self, round: int, kind: str, model: str, strata: Sequence[str]) -> Stage:
        own = {"format": ["sft"], "bridge": ["sft"], "sharpen": ["rl"], "route": ["routing"]}
        sections = own.get(kind, ["diagnosis", "gate", "guard"])
        plan = self.settings.model_dump(mode="json", include=set(sections))
        return self.ledger.begin_stage(round=round, kind=kind, model=model, strata=strata, plan=plan)

    def _stage_of(self, round: int, kinds: Sequence[str], stratum: str | None = None) -> Stage | None:
        return next(
            (
                stage
                for stage in self.ledger.stages()
                if stage.round == round and stage.kind in kinds and (stratum is None or stratum in stage.strata)
            ),
            None,
        )

    def _last_round(self) -> int:
        return max((stage.round for stage in self.ledger.stages()), default=0)

    def _seed(self, stage: Stage) -> int:
        return self.settings.seed + 1000 * stage.stage_id

    def _checkpoints(self, stage: Stage) -> Path:
        return self.folder / "checkpoints" / f"{stage.stage_id:02d}-{stage.kind}"

    def _path(self, model: str) -> Path | str:
        inside = self.folder / model
        return inside if model.startswith("models/") and inside.is_dir() else model

    def _relative(self, folder: Path) -> str:
        return folder.relative_to(self.folder).as_posix()


def item_texts(item: Item) -> list[str]:
    """The texts of an item that a tokenizer should know."""
    return [item.question, item.answer, *(item.options or ()), *([item.trace] if item.trace else [])]


def _result(stage: Stage) -> str:
    assert stage.result_model is not None
    return stage.result_model


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MedbridgeError(
            "tensorboard is true, and the package is not installed: pip install 'medbridge[train]', or set it to false."
        ) from error
    return SummaryWriter(str(folder), purge_step=first_step)
