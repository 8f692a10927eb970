"""A run's models as ordinary Hugging Face folders, which transformers, vLLM or PEFT load without medbridge."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from medbridge.errors import MedbridgeError
from medbridge.ledger import TRAINING, Ledger, Stage
from medbridge.model import ModelSettings, Policy
from medbridge.model.initialise import replace_folder
from medbridge.rollout.weights import ADAPTER
from medbridge.stage_folder import model_path

DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: of which stage (None: the base model), in which folder, and of which type its weights are."""

    model: str
    out: Path
    dtype: str


def export_model(
    run: Path, out: Path, *, model: str = "last", adapter: bool = False, dtype: DtypeName | None = None
) -> Exported:
    """Write a model of a run to a folder (atomically): weights, processor, chat template and generation config.

    Args:
        run: run folder; it is only read, also while a process works in it.
        out: folder to write; one that exists must be empty.
        model: "last" (what the run goes on from), "best" (the highest Acc@1 on the diagnosis split, of models that
            stand), "base", or a training stage by its number or folder ("5", "05-sharpen").
        adapter: only the adapters, as PEFT writes them, for the stage's own base model.
        dtype: of the weights; None leaves them as they are.

    Raises:
        MedbridgeError: no such stage, no adapters, or a folder that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MedbridgeError(f"{out}: exists and is not an empty folder. Name another one.")
    ledger = Ledger(run / "run.sqlite", read_only=True)
    try:
        stages, base = ledger.stages(), ledger.meta("base_model")
        name, stage = _chosen(run, ledger, stages, base, model)
    finally:
        ledger.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        part = Path(temporary) / "model"
        if adapter:
            written = _adapter(run, name, stage, part, dtype)
        else:
            path = model_path(run, name)
            written = _model(path, part, dtype, inside=path != name)
        replace_folder(part, out)
    return Exported(name, out, written)


def _chosen(run: Path, ledger: Ledger, stages: list[Stage], base: str | None, model: str) -> tuple[str, Stage | None]:
    """The model's folder or id, and the training stage that made it."""
    if base is None:
        raise MedbridgeError(f"{run}: the run has no model yet. Let `medbridge run` or `diagnose` begin it.")
    made = {stage.result_model: stage for stage in stages if stage.result_model}
    measured = [stage for stage in stages if stage.kind == "diagnose" and stage.status == "done"]
    standing = [stage for stage in measured if not stage.summary.get("lost")]
    if model == "base":
        return base, made.get(base)
    if model == "last":
        trained = [stage for stage in stages if stage.kind in TRAINING and stage.result_model]
        last = str(trained[-1].result_model) if trained else base
        back = any(stage.model == last and stage.summary.get("lost") for stage in measured)
        found = standing[-1].model if back else last
        return found, made.get(found)
    if model == "best":
        if not standing:
            raise MedbridgeError(f"{run}: no model has been diagnosed, so none is the best. Give --model last or base.")
        scores = {stage.stage_id: _accuracy(ledger, stage) for stage in standing}
        best = max(standing, key=lambda stage: scores[stage.stage_id])  # of equals the earliest
        return best.model, made.get(best.model)
    for folder, stage in made.items():
        if folder is not None and model in (str(stage.stage_id), Path(folder).name, folder):
            return folder, stage
    names = ", ".join(Path(str(folder)).name for folder in made) or "none"
    raise MedbridgeError(f"{run}: no stage {model!r} has made a model. Give last, best, base, or one of: {names}.")


def _accuracy(ledger: Ledger, stage: Stage) -> float:
    greedy = [tally.greedy_correct for tally in ledger.tallies(stage.stage_id) if tally.greedy_correct is not None]
    return sum(greedy) / len(greedy) if greedy else 0.0


def _model(path: str, out: Path, dtype: DtypeName | None, *, inside: bool) -> str:
    """A folder of the run is copied where its type stays: it is what is wanted. Anything else is loaded and saved."""
    if dtype is None and inside:
        shutil.copytree(path, out)
        from transformers import AutoConfig

        return str(AutoConfig.from_pretrained(out).dtype).removeprefix("torch.")
    held: Literal["float32", "bfloat16"] = "bfloat16" if dtype == "bfloat16" else "float32"
    policy = Policy.load(path, ModelSettings(device="cpu", dtype=held))
    if dtype is not None:
        policy.stored_dtype = getattr(torch, dtype)
    policy.save(out)
    return str(policy.stored_dtype).removeprefix("torch.")


def _adapter(run: Path, model: str, stage: Stage | None, out: Path, dtype: DtypeName | None) -> str:
    folder = run / f"{model}-adapter"
    if stage is None or not folder.is_dir():
        raise MedbridgeError(
            f"{run}: {model} has no adapters beside it: they are kept where a stage trains with model.lora. Export the "
            "model itself, without --adapter."
        )
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    base = model_path(run, stage.model)
    config["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    tensors = load_file(folder / ADAPTER)
    if dtype is not None:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")
