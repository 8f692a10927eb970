"""Start-up file of child Python processes (see `medbridge.torchvision_ops.prepare_children`).

It puts `declare` before the first import of what would fail without it. It must cost nothing until then.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGERS = {"transformers", "datasets", "torchvision", "torchaudio", "torchcodec"}


class _Imported(Loader):
    """Hands the import system a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module ran when it was first imported."""


class _DeclareFirst(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname not in _TRIGGERS:
            return None
        sys.meta_path.remove(self)
        from medbridge.torchvision_ops import declare

        declare()
        if fullname in sys.modules:
            if sys.modules[fullname] is None:
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
            return ModuleSpec(fullname, _Imported(sys.modules[fullname]))
        return None


sys.meta_path.insert(0, _DeclareFirst())
