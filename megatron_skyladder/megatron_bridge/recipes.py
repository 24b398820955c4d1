"""The recipe that a command line names."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_skyladder.errors import UsageError

PACKAGE = "megatron.bridge.recipes"


def find(name: str) -> Callable[[], Any]:
    """Return the function that makes a configuration.

    Args:
        name: a function of Bridge's recipes, or ``module:function``; modules are also looked for in
            the working directory.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    module_name, colon, function = name.rpartition(":")
    if colon and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name if colon else PACKAGE)
    except ModuleNotFoundError as error:
        raise UsageError(f"--recipe {name}: {error}. Give module:function.") from None
    recipe = getattr(module, function, None)
    if callable(recipe):
        return recipe
    close = difflib.get_close_matches(function, dir(module), 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(f"--recipe {name}: there is no such function in {module.__name__}.{meant}")
