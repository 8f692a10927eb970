"""The Triton back end: kernels for NVIDIA and AMD GPUs of what reference defines. Triton itself is imported with the
first kernel that is used, and needn't be there before.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medbridge_kernels.triton.advantages import group_advantages
    from medbridge_kernels.triton.policy import policy_terms
    from medbridge_kernels.triton.vocabulary import sweep, sweep_backward

__all__ = ["group_advantages", "interpreted", "policy_terms", "sweep", "sweep_backward", "why_missing"]

_HOMES = {
    "group_advantages": "advantages",
    "policy_terms": "policy",
    "sweep": "vocabulary",
    "sweep_backward": "vocabulary",
}


def why_missing() -> str | None:
    """Why triton can't be used, with the cure; None where it can. impl.py asks."""
    return None if find_spec("triton") else "triton isn't installed: pip install triton"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors: TRITON_INTERPRET=1. impl.py asks."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
