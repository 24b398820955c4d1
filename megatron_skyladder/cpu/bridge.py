"""Megatron Bridge without a GPU and without Transformer Engine: beside the CPU engine.

Nothing of Bridge's training has to be changed beyond what the engine does. What is left are imports
at module level of packages that training without a GPU never calls. Each is satisfied for the
length of that one import, by a module of empty classes that is taken away again, so that everything
else (Megatron's HAVE_TE, HAVE_NVRX and the like) still sees that the package is not there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

Modules = dict[str, types.ModuleType]


def _module(name: str, **members: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    module.__path__ = []  # a package
    return module


def _transformer_engine() -> Modules:
    import torch

    class Absent(torch.nn.Module):
        """A class that no module is an instance of."""

    names = ("Linear", "LayerNormLinear", "GroupedLinear", "LayerNorm", "RMSNorm")
    members: dict[str, object] = {name: type(name, (Absent,), {}) for name in names}
    operations = types.SimpleNamespace(Sequential=Absent)
    pytorch = _module("transformer_engine.pytorch", ops=operations, **members)
    return {
        "transformer_engine": _module("transformer_engine", pytorch=pytorch),
        "transformer_engine.pytorch": pytorch,
    }


def _resiliency() -> Modules:
    wrapper = type("CallWrapper", (), {})
    inprocess = _module("nvidia_resiliency_ext.inprocess", CallWrapper=wrapper)
    return {
        "nvidia_resiliency_ext": _module("nvidia_resiliency_ext", inprocess=inprocess),
        "nvidia_resiliency_ext.inprocess": inprocess,
    }


# Bridge's module -> the package that it imports, and what is lent to it
_LENT: dict[str, tuple[str, Callable[[], Modules]]] = {
    "megatron.bridge.peft.lora_layers": ("transformer_engine", _transformer_engine),
    "megatron.bridge.training.pretrain": ("nvidia_resiliency_ext", _resiliency),
}


class _Lender(importlib.abc.MetaPathFinder):
    """Finds the modules in question, and lends them what they import while they load."""

    def __init__(self, lent: dict[str, Callable[[], Modules]]) -> None:
        self._lent = lent

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        make = self._lent.get(name)
        if make is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            modules = make()
            sys.modules.update(modules)
            try:
                execute(module)
            finally:
                for key in modules:
                    del sys.modules[key]

        loader.exec_module = exec_module
        return spec


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_lender: _Lender | None = None


def install() -> None:
    """Prepare the imports of Bridge that need what is not installed; before Bridge is imported."""
    global _lender
    if _lender is not None:
        return
    _lender = _Lender(
        {name: make for name, (package, make) in _LENT.items() if not _is_installed(package)}
    )
    sys.meta_path.insert(0, _lender)
