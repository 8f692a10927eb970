"""Fabricated runs for the report's tests: real ledgers, PNG files and gate, but invented outcomes."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medbridge.data import Item, Outcome, PromptSettings, grade, permutation
from medbridge.ledger import Graded, Ledger, VerdictRow
from medbridge.report import write_report
from medbridge.rollout.engine import GREEDY, Rollout
from medbridge.support import GateSettings, SupportEstimate, Tally, Verdict, item_scores, judge, measure
from medbridge.support.change import compare, losses

PROMPT = PromptSettings(answer_style="text", system="")
GATE = GateSettings(replicates=200)


@dataclass
class Fabricated:
    """A run under construction. Each method adds one stage as the pipeline would."""

    folder: Path
    items: list[Item] = field(default_factory=list)
    samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.folder / "run.sqlite")
        self.standing: tuple[int, dict[str, list[Tally]]] | None = None  # the diagnosis that later ones compare with
        self.random = np.random.default_rng(self.seed)

    def describe(self, name: str = "brain demo", **config: Any) -> None:
        self.ledger.set_meta("name", name)
        self.ledger.set_meta(
            "config",
            {
                "name": name,
                "seed": 0,
                "model": {"path": None, "from_nothing": {"architecture": "qwen2_5_vl", "format_steps": 40}},
                "data": {
                    "sources": [{"kind": "brain"}],
                    "strata": ["task"],
                    "prompt": {"answer_style": "text"},
                },
                "diagnosis": {"split": "validation", "samples": self.samples, "test_split": "test"},
                "gate": GATE.model_dump(),
                **config,
            },
        )
        self.ledger.set_meta(
            "environment", {"medbridge": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "device": "CPU"}
        )
        self.ledger.set_meta("base_model", "models/01-format")

    def draw(
        self, stratum: str, split: str, count: int, options: Sequence[str] | None, question: str, **more: Any
    ) -> None:
        """Add items with a picture each."""
        pictures = self.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        for index in range(count):
            path = pictures / f"{re.sub('[^a-z]', '_', stratum[:20])}-{split}-{index:03d}.png"
            if index < more.get("pictures", 1000) and not path.exists():
                picture(path, index + len(stratum), more.get("noise", 56))
            answer = "liver" if options is None else options[index % len(options)]
            self.items.append(
                Item(
                    id=f"brain/{split}/{stratum}-{index}",
                    dataset=more.get("dataset", "brain"),
                    split=split,
                    question=question,
                    answer=answer,
                    options=None if options is None else tuple(options),
                    images=(str(path),),
                    tags={"task": stratum},
                    floor=1 / len(options) if options else 0.0,
                )
            )

    def split(self, name: str, strata: Iterable[str] | None = None) -> list[Item]:
        wanted = None if strata is None else set(strata)
        return [i for i in self.items if i.split == name and (wanted is None or i.tags["task"] in wanted)]

    def measure(
        self,
        kind: str,
        skill: Mapping[str, tuple[float, float, float]],
        *,
        round: int = 0,
        model: str = "models/01-format",
        finish: bool = True,
        write: Callable[[Item, str | None, int], str] | None = None,
        gate: GateSettings = GATE,
        checks: Mapping[str, Mapping[str, Any]] | None = None,
        lost: Mapping[str, str] | None = None,
    ) -> None:
        """A diagnosis or evaluation.

        `skill`: stratum -> (mean probability of a right sample, how alike the items are in it, share
        of samples without an answer). `checks`: stratum -> check -> what differs from `checked`. `lost`: stratum ->
        how it lost support, in place of what a comparison after sharpening says.
        """
        split = "test" if kind == "evaluate" else "validation"
        items = self.split(split, skill)
        self.ledger.add_items(items, ["task"])
        stage = self.ledger.begin_stage(
            round=round, kind=kind, model=model, strata=(), plan={"gate": gate.model_dump()}
        )
        tallies: dict[str, list[Tally]] = {name: [] for name in skill}
        batch: list[Graded] = []
        for item in items:
            mean, alike, silent = skill[item.tags["task"]]
            ability = float(self.random.beta(alike * mean, alike * (1 - mean)))
            graded = [self._sample(item, number, ability, silent, write) for number in (GREEDY, *range(self.samples))]
            batch.extend(graded)
            sampled = [entry.outcome for entry in graded[1:]]
            tallies[item.tags["task"]].append(
                Tally(
                    item_id=item.id,
                    cluster=item.images[0],
                    floor=item.floor,
                    n=len(sampled),
                    c=sum(outcome.status == "correct" for outcome in sampled),
                    abstained=sum(outcome.status == "abstain" for outcome in sampled),
                    greedy_correct=graded[0].outcome.status == "correct",
                )
            )
        self.ledger.save_rollouts(stage.stage_id, 0, batch)
        if not finish:
            return
        self.ledger.save_tallies(stage.stage_id, [tally for own in tallies.values() for tally in own])
        estimates = {name: measure(own, gate, seed=0) for name, own in tallies.items()}
        rows = []
        for name, verdict in judge(estimates, gate).items():
            stored, support = verdict.to_dict(), estimates[name].to_dict()
            if kind == "diagnose":
                stored["checks"] = checked(estimates[name], verdict, (checks or {}).get(name, {}))
                support["outlook"] = expected(estimates[name])
            rows.append(VerdictRow(name, verdict.kind, verdict.reason, stored, support))
        summary: dict[str, Any] = {
            "seconds": 21.4, "rollouts": len(batch), "tokens": 9 * len(batch), "truncated_rate": 0.004,
            "items": len(items),
        }  # fmt: skip
        if kind == "evaluate":
            summary["split"] = "test"
            summary["baseline"] = {
                name: {"accuracy": 0.34, "low": 0.26, "high": 0.43, "items": len(own)} for name, own in tallies.items()
            }
        else:
            summary |= self._changes(tallies, rows, gate, lost)
            if not summary.get("lost"):
                self.standing = (stage.stage_id, tallies)
        self.ledger.finish_stage(stage.stage_id, result_model=None, summary=summary, verdicts=rows)

    def _changes(
        self,
        tallies: dict[str, list[Tally]],
        rows: Sequence[VerdictRow],
        gate: GateSettings,
        lost: Mapping[str, str] | None,
    ) -> dict[str, Any]:
        """A diagnosis's summary of what changed since the one that stands."""
        if self.standing is None:
            return {}
        since, before = self.standing

        def scores(own: Sequence[Tally]) -> tuple[Any, Any]:
            found = item_scores(own, gate, self.samples)
            return found.top, found.bottom

        ks = sorted({1, self.samples})
        changes = {
            name: compare(before[name], own, scores=scores, ks=ks, alpha=gate.alpha, replicates=gate.replicates, seed=0)
            for name, own in tallies.items()
            if own and before.get(name)
        }
        summary: dict[str, Any] = {"since": since, "changes": {n: change.to_dict() for n, change in changes.items()}}
        trained = [s for s in self.ledger.stages() if s.kind in ("bridge", "sharpen")][-1:]
        if trained and trained[0].kind == "sharpen":
            found = {name: f"{name} lost support" for name in losses(changes, gate.alpha)}
            if lost or found:
                summary["lost"] = dict(lost or found)
            summary["forecasts"] = {
                row.stratum: {
                    "forecast": {"value": 0.7, "low": 0.55, "high": 0.9, "confidence": 0.9},
                    "acc_at_1": row.support["acc_at_1"],
                    "inside": True,
                }
                for row in rows
                if row.stratum in trained[0].strata and row.support["acc_at_1"]
            }
        return summary

    def aside(self, kind: str, purpose: str, *, round: int = 0, finish: bool = True) -> None:
        """A control (blank, shuffled) or a routing (bridge, sharpen), with its summary only."""
        stage = self.ledger.begin_stage(round=round, kind=kind, model="m", strata=(purpose,), plan={})
        summary: dict[str, Any] = {"seconds": 5.0, "items": 32, "rollouts": 544, "tokens": 4896, "truncated_rate": 0.0}
        if kind == "route":
            summary["routes"] = {"bridge": 5, "sharpen": 9, "anchor": 2, "left_out": 16}
        if finish:
            self.ledger.finish_stage(stage.stage_id, result_model=None, summary=summary)

    def _sample(
        self,
        item: Item,
        number: int,
        ability: float,
        silent: float,
        write: Callable[[Item, str | None, int], str] | None,
    ) -> Graded:
        order = permutation(item, 0, number)
        right = self.random.random() < ability
        wrong = [option for option in item.options or ("spleen", "kidney") if option != item.answer] or [item.answer]
        said: str | None = item.answer if right else wrong[int(self.random.integers(len(wrong)))]
        if self.random.random() < silent:
            said = None
        text = (write or completion)(item, said, number)
        outcome: Outcome = grade(item, order, text, PROMPT)
        tokens = np.arange(max(1, len(text) // 4))
        return Graded(
            Rollout(
                item_id=item.id,
                sample=number,
                permutation=order,
                text=text,
                token_ids=tokens,
                logprobs=np.zeros(len(tokens)),
                finish_reason="stop" if said is not None else "length",
                prompt_tokens=40,
            ),
            outcome,
        )

    def train(
        self,
        kind: str,
        strata: Sequence[str],
        *,
        round: int = 0,
        steps: int = 120,
        planned: int | None = None,
        model: str = "models/01-format",
        finish: bool = True,
        replay: int = 0,
    ) -> str:
        """A format, bridge or sharpen stage with plausible metrics."""
        items = self.split("train", strata)
        if kind != "format":
            self.ledger.add_items(items, ["task"])
        section = "rl" if kind == "sharpen" else "sft"
        stage = self.ledger.begin_stage(
            round=round, kind=kind, model=model, strata=strata, plan={section: {"steps": planned or steps}}
        )
        losses = []
        for step in range(1, steps + 1):
            noise = self.random.normal(0, 0.05)
            if kind == "sharpen":
                climb = 1 - np.exp(-step / (0.4 * steps))
                metrics = {
                    "reward": 0.55 + 0.38 * climb + noise, "accuracy": 0.48 + 0.4 * climb + noise,
                    "format": 0.97, "loss": 0.02 * noise, "kl": 1e-4 * step, "clip_low": 0.01,
                    "clip_high": 0.02,
                    "entropy": 0.9 - 0.6 * climb + noise, "gradient_norm": 0.6 + abs(noise),
                    "signal": 0.7 - 0.4 * climb,
                    "completion_length": 7 + noise, "seconds_sampling": 0.3, "seconds_training": 0.2,
                }  # fmt: skip
            else:
                metrics = {
                    "loss": 0.25 + 2.1 * np.exp(-step / (0.25 * steps)) + noise,
                    "learning_rate": 1e-3 * min(1, step / 10) * (1 - 0.9 * step / steps),
                    "gradient_norm": 0.8 + abs(noise), "tokens_per_second": 5200 + 300 * noise,
                }  # fmt: skip
            losses.append(float(metrics["loss"]))
            ids = [item.id for item in items[(4 * step) % max(1, len(items)) :][:4]]
            ids += [f"brain/train/other-{step}-{extra}" for extra in range(replay)]
            self.ledger.log_step(stage.stage_id, step, {k: float(v) for k, v in metrics.items()}, ids)
        if not finish:
            return model
        result = f"models/{stage.stage_id:02d}-{kind}"
        summary = {
            "seconds": 64.2,
            "steps": steps,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "items": len(items),
        }
        if kind != "sharpen":
            summary["source"] = "random answers" if kind == "format" else "auto"
        self.ledger.finish_stage(stage.stage_id, result_model=result, summary=summary)
        return result

    def finish(self, reason: str = "every stratum is done") -> None:
        assert self.standing is not None
        rows = self.ledger.verdicts(self.standing[0])
        self.ledger.set_meta("finished", {"reason": reason})
        self.ledger.set_meta("outcome", {name: {"kind": row.kind, "reason": row.reason} for name, row in rows.items()})

    def sql(self, statement: str, *arguments: Any) -> None:
        """Change the database behind the ledger's back, for contents that it would refuse."""
        with sqlite3.connect(self.folder / "run.sqlite") as database:
            database.execute(statement, arguments)
        database.close()


def checked(estimate: SupportEstimate, verdict: Verdict, differs: Mapping[str, Any]) -> dict[str, Any]:
    """Checks as a diagnosis stores them: readings that change nothing, and controls on which the model fails."""
    stored = estimate.to_dict()
    reading = {name: stored[name] for name in ("items", "support", "acc_at_1", "abstain_rate")} | {"kind": verdict.kind}
    control = {
        **reading,
        "items": min(8, estimate.items),
        "support": {"value": 0.02, "low": -0.25, "high": 0.3},
        "kind": "undecided",
        "visual": {
            "items": min(8, estimate.items),
            "support": {"value": 0.5, "low": 0.2, "high": 0.8, "p_loss": 1.0, "p_gain": 0.01, "items": 8},
            "acc_at_1": {"value": 0.4, "low": 0.1, "high": 0.7, "p_loss": 1.0, "p_gain": 0.02, "items": 8},
            "confidence": 0.9,
        },
    }
    found = {"strict": reading, "lenient": reading, "blank": control, "shuffled": control}
    return {name: {**entry, **differs.get(name, {})} for name, entry in found.items()}


def expected(estimate: SupportEstimate) -> dict[str, Any] | None:
    """An outlook as a diagnosis stores it."""
    if not estimate.items:
        return None
    ks = [estimate.n_min, 2 * estimate.n_min, 4 * estimate.n_min]
    return {
        "cover": {"value": 0.61, "low": 0.44, "high": 0.79},
        "reliable_k": ks[-1],
        "predicted": {"ks": ks, "pass_at_k": [0.91, 0.95, 0.97]},
        "forecast": {"value": 0.66, "low": 0.47, "high": 0.88, "confidence": 0.9, "ceiling": 0.75, "items": 24},
    }


def completion(item: Item, said: str | None, number: int) -> str:
    if said is None:
        return "<think>The slice shows the ventricles, and the"
    if number % 3 == 0:
        return f"<think>The outline and the ventricles look like this.</think><answer>{said}</answer>"
    return f"<answer>{said}</answer>"


def picture(path: Path, seed: int, size: int = 56) -> None:
    """A grey blob with some texture: a stand-in for a slice."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    head = ((x / 0.75) ** 2 + (y / 0.9) ** 2 < 1) * (120 + 60 * np.sin(6 * x * (1 + seed % 3)) * np.cos(5 * y))
    texture = np.clip(head + random.normal(0, 12, (size, size)) * (head > 0), 0, 255)
    Image.fromarray(texture.astype(np.uint8)).save(path)


QUESTIONS = {
    "plane": ("Which plane is this slice?", ("axial", "coronal", "sagittal")),
    "tissue": ("What does this map show?", ("T1", "grey matter", "white matter")),
    "level": ("Which third of the brain is this?", ("lower", "middle", "upper")),
    "rotation": ("How is this image turned?", ("upright", "turned left", "upside down", "turned right")),
}


def whole_run(folder: Path, *, count: int = 64) -> Fabricated:
    """A finished run: four strata, a bridge, a sharpen, and the test split before and after."""
    run = Fabricated(folder)
    run.describe()
    for name, (question, options) in QUESTIONS.items():
        for split in ("train", "validation", "test"):
            run.draw(name, split, count, options, question)
    base = {
        "plane": (0.33, 60, 0.02),
        "tissue": (0.6, 6, 0.05),
        "level": (0.3, 80, 0.25),
        "rotation": (0.25, 60, 0.0),
    }
    bridged = {
        "plane": (0.7, 8, 0.0),
        "tissue": (0.64, 8, 0.02),
        "level": (0.4, 9, 0.03),
        "rotation": (0.62, 9, 0.0),
    }
    sharpened = {
        "plane": (0.93, 6, 0.0),
        "tissue": (0.93, 5, 0.0),
        "level": (0.45, 6, 0.0),
        "rotation": (0.84, 5, 0.0),
    }
    model = run.train("format", list(QUESTIONS), steps=40, model="models/from-nothing")
    run.measure("diagnose", base)
    for control in ("blank", "shuffled"):
        run.aside("control", control)
    run.aside("route", "bridge")
    model = run.train("bridge", ["level", "plane", "rotation"], replay=1, model=model)
    run.measure("diagnose", bridged, round=1, model=model)
    run.aside("control", "blank", round=1)
    model = run.train("sharpen", ["plane", "rotation", "tissue"], round=1, steps=60, model=model)
    unseen = {"items": 8, "support": {"value": 0.01, "low": -0.2, "high": 0.2}}
    checks = {
        "level": {"strict": {"kind": "done", "support": {"value": 0.9, "low": 0.8, "high": 1.0}}},
        "plane": {"shuffled": {"kind": "bridge"}},
        "tissue": {"blank": {"visual": unseen}},
    }
    run.measure("diagnose", sharpened, round=2, model=model, checks=checks)
    run.measure("evaluate", base, round=2)
    run.measure("evaluate", sharpened, round=2, model=model)
    run.finish("stages per stratum are used up for level")
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, for tests that only read it."""
    run = whole_run(tmp_path_factory.mktemp("finished"), count=24)
    run.ledger.close()
    return run.folder


HOSTILE = (
    '</bdi></p><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">'
    "<svg onload='window.pwned = 3'></svg>\"'&lt;{{ 7 * 7 }}{% raw %}\u2069\u202egnirts desrever\u2066\u05d0\u05d1"
)
"""Markup, quotes, template syntax, writing-direction controls and right-to-left letters in one text."""


def hostile_run(folder: Path) -> Fabricated:
    """A run whose every text from data or model is hostile, one of them 100 kB long."""
    run = Fabricated(folder, samples=4)
    run.describe(HOSTILE)
    run.ledger.set_meta("environment", {HOSTILE: HOSTILE})
    for split in ("train", "validation", "test"):
        run.draw(HOSTILE, split, 4, (HOSTILE + "1", HOSTILE + "2"), HOSTILE, dataset=HOSTILE, pictures=3)
        run.draw("open\x00 \x1b[31m", split, 3, None, HOSTILE + "x" * 5000)
    skill = {HOSTILE: (0.5, 4.0, 0.2), "open\x00 \x1b[31m": (0.5, 4.0, 0.2)}

    def write(item: Item, said: str | None, number: int) -> str:
        if said is None:
            return HOSTILE + "y" * 100_000
        return f"<think>{HOSTILE}{'z' * (100_000 if number == 0 else 10)}</think><answer>{said}</answer>"

    run.measure("diagnose", skill, write=write, model=HOSTILE)
    model = run.train("bridge", [HOSTILE], steps=3, model=HOSTILE)
    run.measure("diagnose", skill, write=write, round=1, model=model)
    run.aside("control", HOSTILE, round=1)
    model = run.train("sharpen", [HOSTILE], steps=3, round=1, model=HOSTILE)
    differs = {HOSTILE: {"strict": {"kind": HOSTILE, "items": 1}, "blank": {"kind": HOSTILE}}}
    run.measure("diagnose", skill, write=write, round=2, model=model, checks=differs, lost={HOSTILE: HOSTILE})
    run.finish(HOSTILE)
    # The checks of the diagnosis that stands.
    run.sql(
        "UPDATE verdicts SET verdict = (SELECT verdict FROM verdicts AS other WHERE other.stratum = verdicts.stratum "
        "ORDER BY stage_id DESC LIMIT 1)"
    )
    # What the ledger would refuse: lone surrogates, as another tool's JSON may hold them.
    run.sql(
        "UPDATE items SET images = ? WHERE stratum = ?",
        '["/nowhere/\\ud800\\u0000.png"]',
        "open\x00 \x1b[31m",
    )
    run.sql("UPDATE meta SET value = ? WHERE key = 'environment'", '{"\\ud800<b>": "\\udfff"}')
    return run


@pytest.fixture(scope="session")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a hostile run."""
    run = hostile_run(tmp_path_factory.mktemp("hostile"))
    run.ledger.close()
    return write_report(run.folder)


@pytest.fixture
def fabricate(tmp_path: Path) -> Callable[..., Fabricated]:
    """Makes an empty run in a folder of its own."""

    def make(name: str = "run", **settings: Any) -> Fabricated:
        return Fabricated(tmp_path / name, **settings)

    return make
