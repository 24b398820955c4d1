"""What each rank of the runs in test_probe_runs does: start up, and probe once per breakage."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import breakages


def probe_broken(folder: str, flags: list[str], names: list[str]) -> None:
    """Start training as the entry point does; instead of the first step probe again and again.

    The probe that sits in Megatron's ``train`` is the installed one; only the training loop behind
    it is another.

    Args:
        folder: gets ``complaints.<rank>.json``: what the probe said under each breakage, or None.
        flags: the command line.
        names: functions of `breakages`; each is undone before the next.
    """
    from megatron.training import training

    from megatron_skyladder import pretrain_gpt
    from megatron_skyladder.runtime.probe import MaskProbeError

    complaints: dict[str, str | None] = {}

    def instead_of_training(*args: Any, **kwargs: Any) -> None:
        if complaints:  # the probe passed
            return
        for name in [*names, "nothing"]:
            complaints[name] = None
            try:
                with _broken(name):
                    training.train(*args, **kwargs)
            except MaskProbeError as error:
                complaints[name] = str(error)
        path = Path(folder) / f"complaints.{os.environ['RANK']}.json"
        path.write_text(json.dumps(complaints))
        sys.exit()

    instead_of_training.__signature__ = inspect.signature(training.train)  # type: ignore
    training.train = instead_of_training
    sys.argv = ["pretrain_gpt", *flags]
    pretrain_gpt.main()


def nothing() -> None:
    """Break nothing."""


@contextlib.contextmanager
def _broken(name: str) -> Iterator[None]:
    """Break something of the package, and put back every name in it afterwards."""
    from megatron_skyladder.attention import core_attention, segments

    owners = [module for key, module in sys.modules.items() if key.startswith("megatron_skyladder")]
    owners += {
        value
        for module in owners
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("megatron_skyladder")
    }
    before = [(owner, dict(vars(owner))) for owner in owners]
    getattr(breakages, name, nothing)()
    segments.grid_segments.cache_clear()  # made while all was well
    core_attention.forget_masks()
    try:
        yield
    finally:
        for owner, names in before:
            for key, value in names.items():
                if vars(owner).get(key) is not value:
                    setattr(owner, key, value)
