"""The curves of a run: its log's records against tokens, time and FLOPs. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_skyladder.report.log_files import ATTEMPTS
from megatron_skyladder.report.runlog import Iteration, RunLog, Validation, read_run

_MEANINGLESS = {"train", "log", "logs", "out", "output", "stdout", "console", "run"}


@dataclass(frozen=True)
class Axis:
    """One way to measure how far a run has come.

    Args:
        values: one for each training record.
        label: with the unit.
        name: as in a sentence.
    """

    values: np.ndarray
    label: str
    name: str


@dataclass(frozen=True)
class Run:
    """A run with the name it has in the report."""

    name: str
    log: RunLog

    @cached_property
    def iterations(self) -> np.ndarray:
        """The last iteration of each record."""
        return np.array([record.iteration for record in self.log.iterations])

    @cached_property
    def tokens(self) -> np.ndarray:
        """Training tokens at each record; samples where the log does not name --seq-length."""
        return np.array(self.log.tokens())

    @cached_property
    def seconds(self) -> np.ndarray:
        """Training time at each record, evaluation, checkpoints and restarts left out."""
        return np.array(self.log.elapsed_seconds())

    @cached_property
    def lines_without_loss(self) -> list[int]:
        """Iterations of the lines whose loss is infinite or not a number: the run diverged."""
        return [
            record.iteration
            for record in self.log.iterations
            if record.loss is not None and not math.isfinite(record.loss)
        ]

    @property
    def has_diverged(self) -> bool:
        """Whether losses are not finite, or ended above the first one."""
        known = self.losses[np.isfinite(self.losses)]
        return bool(self.lines_without_loss) or bool(known.size and known[-1] > known[0])

    @cached_property
    def flops(self) -> np.ndarray | None:
        """FLOPs spent at each record, by Megatron's count; None where a record has no rate or GPUs.

        A rate that is not finite is taken from the records around it. Stock Megatron prints one
        decimal of a TFLOP/s: a model whose rates are 0 most of the time is too small for it.
        """
        logged = [record.tflops_per_gpu for record in self.log.iterations]
        rates = finite(logged)
        known = np.flatnonzero(~np.isnan(rates))
        gpus = self.gpus
        if None in logged or not known.size or gpus is None:
            return None
        if np.median(rates[known]) <= 0:
            return None
        rates = np.interp(np.arange(rates.size), known, rates[known])
        seconds = np.diff(self.seconds, prepend=0.0)
        return np.cumsum(rates * 1e12 * gpus * seconds)

    @cached_property
    def gpus(self) -> np.ndarray | None:
        """GPUs at each record: a run may go on with another number; None where one is unknown."""
        found = [record.num_gpus for record in self.log.iterations]
        return None if None in found else np.array(found)

    @cached_property
    def losses(self) -> np.ndarray:
        """Mean training loss of each record."""
        return self.column(lambda record: record.loss)

    def column(self, value: object) -> np.ndarray:
        """Return a value of each record, NaN where there is none or it is not finite.

        Args:
            value: a name in the records' values, or a function of a record.
        """
        if callable(value):
            found = [value(record) for record in self.log.iterations]
        else:
            found = [record.values.get(str(value)) for record in self.log.iterations]
        return finite(found)

    def validations(self, dataset: str = "validation") -> list[Validation]:
        """Return the records of one validation set that lie within the training records."""
        return [
            record
            for record in self.log.validations
            if record.dataset == dataset and record.loss is not None
        ]

    def validation_losses(self, records: list[Validation]) -> np.ndarray:
        """Return the losses of validation records, NaN where one is not finite."""
        return finite([record.loss for record in records])

    def at(self, values: np.ndarray, records: list[Validation]) -> np.ndarray:
        """Return where validation records lie on an axis given for the training records."""
        where = [record.iteration for record in records]
        return np.interp(where, self.iterations, values)

    @property
    def last(self) -> Iteration:
        """The last training record."""
        return self.log.iterations[-1]


def finite(values: Iterable[float | None]) -> np.ndarray:
    """Return values as an array, NaN where there is none or it is not finite."""
    array = np.array([np.nan if x is None else x for x in values], dtype=float)
    array[~np.isfinite(array)] = np.nan
    return array


def load_runs(paths: list[str]) -> list[Run]:
    """Read the logs of runs.

    Args:
        paths: log files or folders of runs, each as ``PATH`` or ``NAME=PATH``.

    Raises:
        ValueError: a log holds no training, or a name is given twice.
    """
    runs: list[Run] = []
    for given in paths:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = "", given
        runs.append(Run(name or _name(Path(path)), read_run(path)))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"two runs are called {twice!r}. Name them: skyladder report first={paths[0]} "
            f"second={paths[1]}."
        )
    return runs


def _name(path: Path) -> str:
    """Return what tells a run from others: its folder, or its file unless that says nothing."""
    path = path.resolve()
    for folder in (path, *path.parents):
        if folder.parent.name == ATTEMPTS:  # one of the starts of a run
            return f"{folder.parents[1].name}-{folder.name}"
    if path.is_dir():
        return path.parent.name if path.name == ATTEMPTS else path.name
    return path.parent.name if path.stem.lower() in _MEANINGLESS else path.stem


def axes_of(runs: list[Run]) -> dict[str, list[Axis]]:
    """Return the axes that all runs have, in one unit each: tokens, time and FLOPs."""
    axes = {}
    what = "tokens" if all(run.log.seq_length for run in runs) else "samples"
    axes["tokens"] = _scaled([run.tokens for run in runs], _TOKENS, f"training {what}", what)
    axes["time"] = _scaled([run.seconds for run in runs], _SECONDS, "training time", "time")
    flops = [run.flops for run in runs]
    known = [values for values in flops if values is not None]
    if len(known) == len(runs):
        axes["flops"] = _scaled(known, _FLOPS, "compute spent", "compute")
    return axes


class _Unit(NamedTuple):
    from_value: float  # used for axes that reach at least this far
    size: float
    name: str


_TOKENS = tuple(
    _Unit(2 * size, size, name)
    for size, name in (
        (1e12, "trillions"),
        (1e9, "billions"),
        (1e6, "millions"),
        (1e3, "thousands"),
    )
)
_SECONDS = (
    _Unit(2 * 86400, 86400, "days"),
    _Unit(2 * 3600, 3600, "hours"),
    _Unit(120, 60, "minutes"),
    _Unit(0, 1, "seconds"),
)
_FLOPS = tuple(_Unit(10.0**power, 10.0**power, f"1e{power} FLOPs") for power in range(27, 8, -3))


def _scaled(
    columns: list[np.ndarray], units: tuple[_Unit, ...], what: str, name: str
) -> list[Axis]:
    largest = max(float(values[-1]) for values in columns)
    unit = next((unit for unit in units if largest >= unit.from_value), units[-1])
    label = f"{what} ({unit.name})"
    return [Axis(values / unit.size, label, name) for values in columns]
