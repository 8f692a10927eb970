"""The loop: measure support, decide, bridge or sharpen, measure again, until nothing is left to do.

Read `Run.execute` from top to bottom. A run resumes by being executed again: each stage that the ledger holds as
done is taken from it, one that was cut off goes on from its last checkpoint or batch, and the decisions, which
depend on stored verdicts only, come out as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medbridge.data import Item
from medbridge.errors import MedbridgeError
from medbridge.ledger import TRAINING, Stage, VerdictRow
from medbridge.measurement import (
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
)
from medbridge.model import init_model
from medbridge.rollout import Engine
from medbridge.stage_folder import METHODS, Method, result_of, strata_by_method
from medbridge.stages import Training


@dataclass(frozen=True, slots=True)
class Plan:
    """The next training stage, or why there is none. `wanted`: the strata that a mixed stage bridges and sharpens."""

    kind: str  # "bridge", "sharpen", "mixed" or "stop"
    strata: tuple[str, ...]
    reason: str
    wanted: Mapping[Method, tuple[str, ...]] = field(default_factory=dict)


class Run(Training):
    """The loop, on one run folder."""

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
            model = self._train(round, model, plan)
            round += 1
        for measured in dict.fromkeys([base, model]):
            self.evaluate(measured)
        self.ledger.set_meta("finished", {"reason": plan.reason})
        self.ledger.set_meta("outcome", {s: {"kind": v.kind, "reason": v.reason} for s, v in verdicts.items()})
        return verdicts

    def train_once(self, kind: Method, strata: Sequence[str] | None) -> str:
        """One stage by itself, on the named strata or on those whose last verdict is `kind`; the model's folder.

        Goes on with a stage that was cut off.
        """
        round = self.next_round()
        begun = self._trained_in(round)
        if begun is not None and begun.kind != kind:
            command = "run" if begun.kind == "mixed" else begun.kind
            raise MedbridgeError(
                f"{self.folder}: a {begun.kind} stage was cut off here. Finish it with `medbridge {command}`, or "
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
            verdicts = self._standing_verdicts(round)
            chosen = tuple(name for name, row in verdicts.items() if row.kind == kind)
            if not chosen:
                found = ", ".join(f"{name}: {row.kind}" for name, row in verdicts.items())
                raise MedbridgeError(
                    f"no stratum's last verdict is {kind} ({found or 'this model has not been diagnosed here'}). Run "
                    "`medbridge diagnose` with the same --run first, or name strata with --stratum."
                )
        return self._train(round, model, Plan(kind, chosen, ""))

    def next_round(self) -> int:
        """The round that the next measurement or stage belongs to: training stages finished so far."""
        return sum(stage.status == "done" for stage in self._trained())

    def current_model(self) -> str:
        """The result of the last finished training stage that was not taken back, or the base model."""
        measured = self._stage_of(self.next_round(), ("diagnose",))
        if measured is not None and measured.status == "done":
            return self._standing(measured.round).model
        done = [stage for stage in self._trained() if stage.result_model]
        return result_of(done[-1]) if done else self.base_model()

    def _trained(self) -> list[Stage]:
        """The training stages so far, an unfinished one too."""
        return [stage for stage in self.ledger.stages() if stage.kind in TRAINING]

    def _train(self, round: int, model: str, plan: Plan) -> str:
        if plan.kind == "mixed":
            return self.mixed(round, model, plan.wanted)
        return (self.bridge if plan.kind == "bridge" else self.sharpen)(round, model, plan.strata)

    # -- what comes next -----------------------------------------------------------------------------------

    def _plan(self, round: int, verdicts: Mapping[str, VerdictRow]) -> Plan:
        """The next stage: bridge what is weak, and only then sharpen, since every bridge moves the whole model.

        Or both at once, where the settings say so.
        """
        begun = self._trained_in(round)
        if begun is not None:
            reason = f"going on with {begun.kind} of {', '.join(begun.strata)}"
            return Plan(begun.kind, begun.strata, reason, strata_by_method(begun))
        budget = self.settings.budget
        trained = self._trained()
        limits: dict[Method, int] = {"bridge": budget.bridges_per_stratum, "sharpen": budget.sharpens_per_stratum}
        times = Counter(
            (method, name) for stage in trained for method, names in strata_by_method(stage).items() for name in names
        )
        spoilt = {name for stage in trained if self._taken_back(stage) for name in strata_by_method(stage)["sharpen"]}
        taught = {
            method: {item.stratum(self.strata_keys) for item in self._train_split(reserved=method == "sharpen")}
            for method in METHODS
        }
        wanted = {
            method: tuple(
                name
                for name, row in verdicts.items()
                if row.kind == method
                and times[method, name] < limits[method]
                and name in taught[method]
                and not (method == "sharpen" and name in spoilt)
            )
            for method in METHODS
        }
        if not any(wanted.values()):
            return Plan("stop", (), _nothing_to_train(verdicts, taught, spoilt))
        if len(trained) >= budget.stages:
            return Plan("stop", (), f"the budget of {budget.stages} training stages is used up")
        if budget.minutes is not None and self.minutes() >= budget.minutes:
            return Plan("stop", (), f"the budget of {budget.minutes:g} minutes is used up")
        if budget.mixed and all(wanted.values()):
            said = " and ".join(f"{method} {', '.join(names)}" for method, names in wanted.items())
            return Plan("mixed", (*wanted["bridge"], *wanted["sharpen"]), f"{said} at once", wanted)
        method: Method = "bridge" if wanted["bridge"] else "sharpen"
        return Plan(method, wanted[method], f"{method} {', '.join(wanted[method])}")

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
        return self._remember_base(self.teach_form(self._relative(made), strata, settings.from_nothing.format_steps))

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
            trained = self._trained_in(round - 1)
            before = self._standing(round - 1) if trained and self._stage_of(round - 1, ("diagnose",)) else None
            sharpened = strata_by_method(trained)["sharpen"] if trained else ()
            # the loss of support is read on the same questions: all that the model before was asked
            again = self.ledger.tallies(before.stage_id) if before and sharpened else []
            rows = run_measurement(
                self.ledger, stage, engine, strata, self.settings, self.reporter,
                limit=self.settings.diagnosis.max_items_per_stratum, sequential=self.settings.diagnosis.sequential,
                at_least={tally.item_id for tally in again if tally.n},
            )  # fmt: skip
            rows = self._check(stage, engine, strata, rows)
            summary = {} if before is None else compare_stages(self.ledger, before, stage, strata, self.settings)
            if before is not None and sharpened:
                summary["forecasts"] = came_out(self.ledger.verdicts(before.stage_id), rows, sharpened)
            if again and summary["lost"]:
                self.reporter.say(f"round {round}: sharpening is taken back: {'; '.join(summary['lost'].values())}")
            elif "lost" in summary:
                del summary["lost"]  # bridging may trade one stratum's support for another's; only RL is held to it
            self._finish_measuring(stage, rows, summary)
        return self.ledger.verdicts(stage.stage_id)

    def evaluate(self, model: str) -> Stage | None:
        """Measure a model on the held-out test split, beside the most frequent answer; nothing is trained on it.

        The finished stage, with its verdicts in the ledger; None where there is no such split.
        """
        split = self.settings.diagnosis.test_split
        if split is None or not self.items.split(split):
            return None
        known = [s for s in self.ledger.stages() if s.kind == "evaluate" and s.model == model]
        stage = known[0] if known else self._begin(self._last_round(), "evaluate", model, ())
        if stage.status == "running":
            strata = self._split(split)
            baseline = frequent_answer_baseline(self.items.split("train"), strata, self.settings)
            rows = run_measurement(self.ledger, stage, self._engine(model), strata, self.settings, self.reporter)
            self._finish_measuring(stage, rows, {"split": split, "baseline": baseline})
        return next(s for s in self.ledger.stages() if s.stage_id == stage.stage_id)

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


def item_texts(item: Item) -> list[str]:
    """The texts of an item that a tokenizer should know."""
    return [item.question, item.answer, *(item.options or ()), *([item.trace] if item.trace else [])]


def _nothing_to_train(verdicts: Mapping[str, VerdictRow], taught: Mapping[Method, set[str]], spoilt: set[str]) -> str:
    """Why no stage is wanted."""
    open_strata: dict[str, Method] = {
        name: method for name, row in verdicts.items() for method in METHODS if row.kind == method
    }
    if not open_strata:
        undecided = [name for name, row in verdicts.items() if row.kind == "undecided"]
        return f"undecided: {', '.join(undecided)}" if undecided else "every stratum is done"
    bare = [name for name, method in open_strata.items() if name not in taught[method]]
    back = [name for name, method in open_strata.items() if method == "sharpen" and name in spoilt]
    used = [name for name in open_strata if name not in bare and name not in back]
    reasons = [f"sharpening cost support and was taken back for {', '.join(back)}"] if back else []
    reasons += [f"stages per stratum are used up for {', '.join(used)}"] if used else []
    reasons += [f"there are no training items for {', '.join(bare)}"] if bare else []
    return "; ".join(reasons)
