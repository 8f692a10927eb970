"""Does sharpening teach? Each loss preset for a fixed budget of steps, three seeds, beside TRL's GRPO at the same.

    python bench/learning_check.py --data FOLDER --out RUNS [--only NAME ...] [--write]

FOLDER holds medmnist/breastmnist.npz and slake/ (both published under CC BY 4.0). For each of the two a small model is
made from nothing, taught the answer form and bridged on one part of the training questions. Then every method starts
from that model and trains on the other part: the same questions in the same order under the same option orders, the
same number of steps, prompts, completions, learning rate and schedule, and the same reward. The first seed's settings
are everybody's: nothing was tuned to what comes out. Acc@1 and support are measured on the test split before and after.

What is finished in RUNS is not done again. Figures go to bench/results/learning.json, and with --write the table into
docs/learning-check.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import write_results

from medbridge.config import RunSettings, parse_config
from medbridge.data import DataSettings, Item, build_prompt, grade, open_items, permutation
from medbridge.data.importers.jsonl import item_to_row
from medbridge.data.settings import SourceSettings
from medbridge.ledger import VerdictRow
from medbridge.pipeline import Run
from medbridge.progress import Reporter
from medbridge.support.routing import hashed_fraction
from medbridge.train.optimization import Shuffle
from medbridge.train.rewards import reward

PAGE = Path(__file__).parents[1] / "docs" / "learning-check.md"
MARKS = ("<!-- learning: begin -->", "<!-- learning: end -->")
PRESETS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo")
PEER = "TRL GRPO"
SEEDS = (0, 1, 2)
STEPS = 60
RESERVED = 0.4
"""Share of the training questions that bridging does not see."""

CONFIG = """
name: learning check
model: {from_nothing: {vocab_size: VOCAB, image_size: SIZE, format_steps: 20}}
data:
  sources: [{kind: jsonl, path: FOLDER, image_root: /}]
  prompt: {answer_style: text, system: ""}
rollout: {max_new_tokens: 16, batch_size: 512, engine: transformers}
diagnosis: {samples: 16, controls: []}
sft: {batch_size: 32, micro_batch_size: 16, learning_rate: 1.0e-3, warmup_steps: 10}
rl: {prompts_per_step: 16, completions: 8, learning_rate: 2.0e-4, schedule: cosine, warmup_steps: 5}
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One data set: its source, the model's vocabulary and image side, and how long it is bridged."""

    source: SourceSettings
    vocab_size: int
    image_size: int
    bridge_steps: int
    closed: bool = False

    def settings(self, folder: Path, *overrides: str) -> RunSettings:
        text = CONFIG.replace("VOCAB", str(self.vocab_size)).replace("SIZE", str(self.image_size))
        return parse_config(text.replace("FOLDER", str(folder)), source="learning_check", overrides=overrides)


def jobs(data: Path) -> dict[str, Job]:
    return {
        "BreastMNIST": Job(
            SourceSettings(kind="medmnist", path=str(data / "medmnist" / "breastmnist.npz")), 512, 56, 60
        ),
        "SLAKE closed": Job(SourceSettings(kind="slake", path=str(data / "slake")), 1536, 84, 150, closed=True),
    }


def prepare(job: Job, folder: Path) -> tuple[Path, Path]:
    """Folders of the questions that bridging trains on and of those that sharpening does; the test split is in both."""
    parts = folder / "bridge", folder / "sharpen"
    if all(part.is_dir() for part in parts):
        return parts
    items = open_items(DataSettings(sources=[job.source]), base_dir=folder, cache_dir=folder / "data").items
    chosen = [item for item in items if item.options is not None] if job.closed else list(items)
    for part, reserved in zip(parts, (False, True), strict=True):
        part.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            members = [item for item in chosen if item.split == split]
            if split == "train":
                members = [i for i in members if (hashed_fraction("learning", 0, i.id) < RESERVED) == reserved]
            _write(part / f"{split}.jsonl", members)
    return parts


def _write(path: Path, items: Iterable[Item]) -> None:
    rows = [
        item_to_row(item, item.id, [str(Path(image).resolve().relative_to("/")) for image in item.images])
        for item in items
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_base(job: Job, folder: Path, questions: Path) -> str:
    """The model that all methods start from."""
    settings = job.settings(questions, f"sft.steps={job.bridge_steps}")
    run = Run(folder / "base", settings, base_dir=folder, reporter=Reporter())
    try:
        strata = sorted({item.stratum(run.strata_keys) for item in run.items.split("train")})
        return str((run.folder / run.bridge(0, run.base_model(), strata)).resolve())
    finally:
        run.close()


def sharpened(job: Job, folder: Path, questions: Path, base: str, preset: str, seed: int) -> tuple[str, float]:
    """The model that a preset makes of the base, and its seconds."""
    settings = job.settings(questions, f"model.path={base}", f"seed={seed}", f"rl.steps={STEPS}", f"rl.loss={preset}")
    run = Run(folder, settings, base_dir=folder, reporter=Reporter())
    try:
        strata = sorted({item.stratum(run.strata_keys) for item in run.items.split("train")})
        made = str((run.folder / run.sharpen(0, base, strata)).resolve())
        [stage] = [stage for stage in run.ledger.stages() if stage.kind == "sharpen"]
        return made, stage.summary["seconds"]
    finally:
        run.close()


def sharpened_by_trl(job: Job, folder: Path, questions: Path, base: str, seed: int) -> tuple[str, float]:
    """The model that TRL's GRPOTrainer makes of the base, and its seconds."""
    out = folder / "model"
    if (folder / "seconds.json").is_file():
        return str(out.resolve()), json.loads((folder / "seconds.json").read_text())
    import datasets
    import trl
    from transformers import AutoProcessor

    settings = job.settings(questions)
    items = open_items(settings.data, base_dir=folder, cache_dir=folder / "data").split("train")
    by_id = {item.id: item for item in items}
    rl, prompts = settings.rl, settings.data.prompt
    order = Shuffle(len(items), seed)
    rows = []
    for step in range(1, STEPS + 1):
        for index, _ in order.take((step - 1) * rl.prompts_per_step, rl.prompts_per_step):
            item = items[index]
            shown = permutation(item, seed, step)
            [message] = build_prompt(item, shown, prompts)
            text = message["content"][-1]["text"]
            rows.append(
                {"prompt": [{"role": "user", "content": text}], "image": item.images[0], "item": item.id,
                 "order": list(shown)}
            )  # fmt: skip

    def earned(completions: list[Any], item: list[str], order: list[list[int]], **_: Any) -> list[float]:
        return [
            reward(grade(by_id[name], tuple(shown), completion[0]["content"], prompts), rl.format_weight)
            for completion, name, shown in zip(completions, item, order, strict=True)
        ]

    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.padding_side = "left"  # as it asks for; it does not set it itself
    trainer = trl.GRPOTrainer(
        model=base, processing_class=processor, reward_funcs=earned,
        train_dataset=datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()),
        args=trl.GRPOConfig(
            output_dir=str(folder / "trainer"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, seed=seed, max_steps=STEPS, shuffle_dataset=False,
            per_device_train_batch_size=rl.prompts_per_step * rl.completions, num_generations=rl.completions,
            steps_per_generation=1, max_completion_length=settings.rollout.max_new_tokens, temperature=1.0, top_p=1.0,
            top_k=0, beta=0.0, loss_type="grpo",
            learning_rate=rl.learning_rate, warmup_steps=rl.warmup_steps,
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, adam_beta1=rl.beta1,
            adam_beta2=rl.beta2, weight_decay=rl.weight_decay, max_grad_norm=rl.max_gradient_norm,
        ),
    )  # fmt: skip
    began = time.time()
    trainer.train()
    seconds = time.time() - began
    trainer.save_model(str(out))
    processor.save_pretrained(out)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return str(out.resolve()), seconds


def measured(job: Job, folder: Path, questions: Path, model: str) -> dict[str, Any]:
    """Acc@1, mean accuracy of samples and support on the test split, each with its interval."""
    run = Run(folder, job.settings(questions, f"model.path={model}"), base_dir=folder, reporter=Reporter())
    try:
        [row] = run.evaluate(model).values()
        return read(row)
    finally:
        run.close()


def read(row: VerdictRow) -> dict[str, Any]:
    support = row.support
    return {
        name: {key: round(support[name][key], 4) for key in ("value", "low", "high")}
        for name in ("acc_at_1", "accuracy", "support")
    } | {"items": support["items"], "confidence": support["confidence"]}


def check(name: str, job: Job, folder: Path, methods: Sequence[str]) -> dict[str, Any]:
    """All figures of a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    to_bridge, to_sharpen = prepare(job, folder)
    base = make_base(job, folder, to_bridge)
    figures: dict[str, Any] = {"before": measured(job, folder / "base-measured", to_sharpen, base)}
    for method in methods:
        for seed in SEEDS:
            place = folder / f"{method.replace(' ', '-').lower()}-{seed}"
            place.mkdir(exist_ok=True)
            if method == PEER:
                model, seconds = sharpened_by_trl(job, place, to_sharpen, base, seed)
            else:
                model, seconds = sharpened(job, place / "run", to_sharpen, base, method, seed)
            after = measured(job, place / "measured", to_sharpen, model)
            figures.setdefault(method, {})[str(seed)] = {**after, "seconds": round(seconds, 1)}
            print(f"{name}, {method}, seed {seed}: {after['acc_at_1']}, support {after['support']}", flush=True)
    return figures


def table(figures: dict[str, Any]) -> str:
    """Markdown: a row for each data set and method, its three seeds side by side."""

    def cell(entry: dict[str, Any], name: str) -> str:
        return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**entry[name])

    def mean(runs: dict[str, Any], name: str) -> float:
        return sum(entry[name]["value"] for entry in runs.values()) / len(runs)

    lines = []
    for data, methods in figures.items():
        before = methods["before"]
        lines += [
            f"### {data}: {before['items']} test questions",
            "",
            f"Before: Acc@1 {cell(before, 'acc_at_1')}, mean accuracy of samples {cell(before, 'accuracy')}, support "
            f"above the floor {cell(before, 'support')}.",
            "",
            "| method | Acc@1, mean | Acc@1 by seed | samples, mean | support, mean | support by seed |",
            "|---|---|---|---|---|---|",
        ]
        for method, runs in methods.items():
            if method != "before":
                by_seed = ["; ".join(cell(entry, name) for entry in runs.values()) for name in ("acc_at_1", "support")]
                lines.append(
                    f"| {method} | {mean(runs, 'acc_at_1'):.3f} | {by_seed[0]} | {mean(runs, 'accuracy'):.3f} "
                    f"| {mean(runs, 'support'):.3f} | {by_seed[1]} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with medmnist/ and slake/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; what is there is not done again")
    parser.add_argument("--only", action="append", choices=[*PRESETS, PEER], help="methods to run; default: all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/learning-check.md")
    options = parser.parse_args()
    methods = options.only or [*PRESETS, PEER]
    found = {
        name: check(name, job, options.out.resolve() / name.replace(" ", "-").lower(), methods)
        for name, job in jobs(options.data.resolve()).items()
    }
    print(table(found))
    if set(methods) != {*PRESETS, PEER}:
        return
    write_results("learning", "python bench/learning_check.py --write", {"steps": STEPS, **found})
    if options.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n{table(found)}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    from medbridge.torchvision_ops import declare

    declare()  # before TRL imports transformers' processors
    main()
