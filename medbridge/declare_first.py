"""Puts `medbridge.torchvision_ops.declare` before the first import of what would fail without it.

It costs nothing until then: neither torch nor anything else is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGERS = frozenset({"transformers", "datasets", "torchvision", "torchaudio", "torchcodec"})


def declare_first() -> None:
    """Have `declare` called when one of these packages is first imported, or now if one is there already."""
    if not _TRIGGERS.isdisjoint(sys.modules):
        _declare()
    elif not any(isinstance(finder, _DeclareFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareFirst())


def _declare() -> None:
    from medbridge.torchvision_ops import declare

    declare()


class _Imported(Loader):
    """Hands the import system a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module ran when it was first imported."""


class _DeclareFirst(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TRIGGERS:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _declare()
        if fullname in sys.modules:
            if sys.modules[fullname] is None:
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
            return ModuleSpec(fullname, _Imported(sys.modules[fullname]))
        return None
