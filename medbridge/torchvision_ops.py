"""Lets transformers and vLLM import torchvision, and pass over its siblings, beside a CPU build of torch.

torchvision's published wheel is linked against CUDA torch. Beside the CPU wheel its operators do not load, and
`import torchvision` fails on a missing operator *schema*. A VLM only resizes and normalises with torchvision, for
which the schema is enough. torchaudio and torchcodec (vLLM's CPU build asks for them) have the same flaw, and nothing
here needs them: where they cannot load, they are made to look absent, which transformers and vLLM cope with.

vLLM's worker processes call `declare` through the `vllm.general_plugins` entry point; its helper processes import
torchvision before that, and are reached by `prepare_children`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_library: torch.library.Library | None = None  # the schemas live as long as this object


def declare() -> None:
    """Make torchvision importable, and torchaudio and torchcodec invisible where they cannot load.

    To be called before transformers is imported; calling it again does nothing.
    """
    _declare_torchvision_schemas()
    for package in ("torchaudio", "torchcodec"):
        if package in sys.modules:
            continue
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        except (OSError, RuntimeError):
            _forget(package)
            sys.modules[package] = None  # type: ignore[assignment]  # find_spec then answers "absent"


def _declare_torchvision_schemas() -> None:
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError:
        return  # not installed: transformers says what it misses
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    import torch

    _forget("torchvision")
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def prepare_children() -> None:
    """Have Python processes that this one starts declare too, by a start-up file on their PYTHONPATH."""
    folder = str(Path(__file__).parent / "child_site")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, paths)])
