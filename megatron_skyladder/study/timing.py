"""What the steps of an arm take by the clock of the timing runs, which is one for all arms.

Arms are trained for hours beside other work, on cores that share caches and memory, so the CPU time
that an arm took says as much about its neighbours as about its windows. A timing run is short and
goes over all windows several times, staying at the full one each time, so that its own neighbours,
who come and go, meet short and long ones alike. Each step of an arm counts what steps of such a
window took there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_skyladder.study import commands
from megatron_skyladder.study.records import Record

Kind = tuple[str, bool]  # the mask, and whether documents are masked

_GROUPS = 16  # of windows, equally wide; steps of a group take about as long


@dataclass(frozen=True)
class Costs:
    """What a step takes by its window; linear between these points, constant outside.

    Args:
        windows: tokens, ascending.
        seconds: CPU time of a step, for each of them.
    """

    windows: tuple[float, ...]
    seconds: tuple[float, ...]

    def of(self, windows: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the seconds of steps with these windows, [N]."""
        return np.asarray(np.interp(windows, self.windows, self.seconds))


def kind_of(record: Record) -> Kind:
    """Return what decides, beside the window, what a step of a run takes."""
    given = commands.values(record.command)
    (mask,) = given.get("--skyladder-mask", ("local",))
    return mask, "--skyladder-intra-document" in given


def clock(records: Sequence[Record]) -> list[Record]:
    """Return the timing runs of one machine: of several, the one whose runs time the most arms."""
    by_machine: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in records:
        if record.is_timing:
            by_machine.setdefault(tuple(sorted(record.machine.items())), []).append(record)
    arms = [kind_of(record) for record in records if record.is_compared]

    def timed(runs: Sequence[Record]) -> int:
        kinds = {kind_of(record) for record in runs}
        return sum(kind in kinds for kind in arms)

    return max(by_machine.values(), key=timed, default=[])


def costs_of(timing_runs: Sequence[Record]) -> dict[Kind, Costs]:
    """Return the medians over groups of windows of the timing runs, by kind.

    The widest window is a group of its own: it is what a third of a run has.
    """
    steps: dict[Kind, list[tuple[int, float]]] = {}
    for record in timing_runs:
        found = steps.setdefault(kind_of(record), [])
        for step, _, window in record.curve:
            if window is not None and step <= len(record.step_seconds):
                found.append((window, record.step_seconds[step - 1]))
    return {kind: _medians(found) for kind, found in steps.items() if found}


def _medians(steps: Sequence[tuple[int, float]]) -> Costs:
    widest = max(window for window, _ in steps)
    groups: dict[int, list[tuple[int, float]]] = {}
    for window, seconds in steps:
        groups.setdefault(_GROUPS * window // widest, []).append((window, seconds))
    places = [np.median(np.array(groups[group]), axis=0) for group in sorted(groups)]
    return Costs(*zip(*((float(w), float(s)) for w, s in places), strict=True))


def retimed(record: Record, costs: Costs | None) -> Record:
    """Return a run whose validations have the time that its steps take by these costs, or none."""
    if costs is None:
        return replace(record, validations=[replace(it, seconds=None) for it in record.validations])
    ends = [end for end, _, _ in record.curve]
    windows = [window or costs.windows[-1] for _, _, window in record.curve]
    of_steps = np.interp(np.arange(1, record.steps + 1), ends, windows)
    so_far = np.cumsum(costs.of(of_steps))
    checked = [replace(it, seconds=float(so_far[it.iteration - 1])) for it in record.validations]
    return replace(record, validations=checked)


def retime(records: Sequence[Record]) -> list[Record] | None:
    """Return the arms' runs on the timing runs' clock.

    Returns:
        Runs, without a time where no timing run of their kind is on that clock; None where there is
        no clock that times an arm.
    """
    costs = costs_of(clock(records))
    arms = [record for record in records if record.is_compared]
    if not any(kind_of(record) in costs for record in arms):
        return None
    return [retimed(record, costs.get(kind_of(record))) for record in arms]
