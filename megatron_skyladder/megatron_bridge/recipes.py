"""The recipe that a command line names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_skyladder.errors import UsageError

PACKAGE = "megatron.bridge.recipes"


def find(name: str) -> Callable[[], Any]:
    """Return the function that makes a configuration.

    Args:
        name: a function of Bridge's recipes; ``module:function``, where modules are also looked for
            in the working directory; or ``file.py:function``.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    where, _, function = name.rpartition(":")
    module = _module(name, where)
    recipe = getattr(module, function, None)
    if callable(recipe):
        return recipe
    close = difflib.get_close_matches(function, dir(module), 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(f"--recipe {name}: there is no such function in {module.__name__}.{meant}")


def _module(name: str, where: str) -> ModuleType:
    if where.endswith(".py"):
        return _from_file(name, Path(where))
    if where and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(where or PACKAGE)
    except ModuleNotFoundError as error:
        raise UsageError(f"--recipe {name}: {error}. Give module:function.") from None


def _from_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"--recipe {name}: there is no file {path.absolute()}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # of any file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # as for a script: what it defines can be pickled
    spec.loader.exec_module(module)
    return module
