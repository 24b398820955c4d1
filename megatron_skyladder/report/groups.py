"""Runs that are seeds of one configuration, which the report draws as one band."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from megatron_skyladder.report.curves import Run

# Where a run lives says nothing about what it is.
PLACES = (
    "save",
    "load",
    "tensorboard_dir",
    "data_cache_path",
    "wandb_exp_name",
    "wandb_save_dir",
    "rank",
    "wandb_id",
)
SEED = "seed"


@dataclass(frozen=True)
class Group:
    """Runs of one configuration: one, or several that differ in their seed alone.

    Args:
        name: of the only run, or what the runs' names have in common and their count.
        runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def is_band(self) -> bool:
        """Whether it is drawn as a band."""
        return len(self.runs) > 1


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return the runs in groups, in the order of their first runs.

    Runs are seeds of one configuration where their logs show the same schedule and the same
    arguments but for places and --seed, and where no two of the seeds are equal: the same seed
    twice is a comparison of something that the arguments do not say, such as two versions.
    """
    found: dict[object, list[Run]] = {}
    for index, run in enumerate(runs):
        found.setdefault(_configuration(run) or index, []).append(run)
    groups = []
    for same in found.values():
        seeds = [run.log.settings.get(SEED) for run in same]
        if len(same) > 1 and len(set(seeds)) == len(seeds):
            groups.append(Group(f"{_common_name(same)} ({len(same)} seeds)", tuple(same)))
        else:
            groups += [Group(run.name, (run,)) for run in same]
    places = {run.name: place for place, run in enumerate(runs)}
    return sorted(groups, key=lambda group: places[group.runs[0].name])


def _configuration(run: Run) -> object:
    """Return what seeds have in common; None where the log does not show the arguments."""
    settings = run.log.settings
    if SEED not in settings:
        return None
    return run.log.schedule, tuple(
        sorted((name, value) for name, value in settings.items() if name not in {SEED, *PLACES})
    )


def _common_name(runs: Sequence[Run]) -> str:
    """Return how the names begin, without what counts the seeds, such as ``-seed`` or ``_s``."""
    letters = zip(*(run.name for run in runs), strict=False)
    common = "".join(same[0] for same in takewhile(lambda each: len(set(each)) == 1, letters))
    return re.sub(r"(?:[-_. ]*seed|[-_. ]+s|)[-_. =]*\d*$", "", common) or runs[0].name
