"""One rank of `test_parallel`: trains as a file of cases says; rank 0 writes what came of it. No test."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import PROMPT, Answers, Rollouts

from medbridge.data import DataSettings, ImageCache, SourceSettings, open_items
from medbridge.model import ModelSettings, Policy
from medbridge.rollout import SamplingSettings
from medbridge.train import RlSettings, SftSettings, Supervision, train_rl, train_sft
from medbridge.train.messages import decode, encode
from medbridge.train.optimization import Trainable
from medbridge.train.parallel import joined
from medbridge.train.ranks import Ranks

BASE: dict[str, Any] = {"steps": 5, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 2}


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    with joined() as ranks:
        for case in told["cases"]:
            _train(case, Path(told["data"]), Path(told["out"]), ranks)


def _train(case: dict[str, Any], data: Path, out: Path, ranks: Ranks) -> None:
    settings = DataSettings(sources=[SourceSettings(kind="jsonl", path=str(data))])
    items = [i for i in open_items(settings, base_dir=data, cache_dir=data / "cache").items if i.split == "train"]
    shown = case.get("images", "all")
    if shown != "all":
        items = [dataclasses.replace(i, images=()) if shown == "none" or n % 3 else i for n, i in enumerate(items)]
    model = ModelSettings.model_validate(case.get("model", {}))
    policy = Policy.load(case["path"], model, trainable=True)
    policy.model.to(getattr(torch, case.get("dtype", "float64")))
    log: dict[int, dict[str, float]] = {}

    def on_step(step: int, metrics: dict[str, float], ids: list[str]) -> None:
        if step == case.get("fails_at"):
            raise RuntimeError("as it was told")
        log[step] = {k: v for k, v in metrics.items() if not k.startswith(("seconds", "tokens_per"))}

    common: dict[str, Any] = {
        "model": model, "prompts": PROMPT, "images": ImageCache(16 << 20), "seed": 0,
        "checkpoints": out / case.get("checkpoints", case["name"]) / "checkpoints", "on_start": lambda step: None,
        "on_step": on_step, "ranks": ranks,
    }  # fmt: skip
    if case.get("kills") == ranks.rank:
        _die_at_step(case["at"])
    own = items if ranks.leads else []
    if case["kind"] == "sft":
        train_sft(policy, Answers(own), None, SftSettings(**{**BASE, **case["settings"]}), **common)
    else:
        kept = Path(case["rollouts"])
        store = {int(k): v for k, v in decode(kept.read_bytes()).items()} if kept.is_file() else {}
        rollouts = Rollouts(policy, common["images"], seed=0, store=store)
        plan = RlSettings(**{**BASE, **case["settings"]})
        if "supervised" in case:
            imitated = SftSettings(**case["supervised"])
            common["supervised"] = Supervision(Answers(own), Answers(own[:3]), imitated, weight=0.5)
        train_rl(policy, own, plan, rollouts, rollout=SamplingSettings(max_new_tokens=8), **common)
        if not kept.is_file():
            kept.write_bytes(encode({str(step): graded for step, graded in store.items()}))
    if ranks.leads:
        torch.save({"log": log, "weights": policy.model.state_dict()}, out / f"{case['name']}-{ranks.count}.pt")


def _die_at_step(step: int) -> None:
    """Have this process killed when it begins a step."""
    begin = Trainable.begin

    def dies(self: Trainable, now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self, now)

    Trainable.begin = dies  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
