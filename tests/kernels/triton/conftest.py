"""Triton's interpreter made fit for tests: it rounds as GPUs do, and what a kernel leaves unwritten is NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medbridge_kernels import triton as backend


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> Iterator[None]:
    if not backend.interpreted():
        yield
        return
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang
    patched: set[int] = set()

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if str(source) == "fp32" and str(target) == "bf16":  # the interpreter cuts off where GPUs round to nearest even
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def patch_once(function: Any) -> Any:  # not anew for each helper that is called, which takes half of the time
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_convert_float", rounded)
        changes.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
