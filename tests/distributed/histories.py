"""Runs that were interrupted and went on, as one history to compare with an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from runs import Run, Trainer

from megatron_skyladder.testing import read_checkpoint

STEPS = 8
BASE = f"--train-samples {8 * STEPS} --split 80,20,0 --eval-iters 1 --eval-interval 3"
LADDER = "--skyladder-start-window 8 --skyladder-alpha 9"
WINDOWS = dict(zip(range(0, 64, 8), (8, 17, 26, 35, 44, 53, 62, 64), strict=True))
# Optimizer state by parameter. Otherwise the distributed optimizer saves its buckets as they lie in
# memory: no other TP or PP can load them, and between the parameters stands whatever was there.
RESHARDABLE = "--ckpt-fully-parallel-save --dist-ckpt-optim-fully-reshardable"


class History:
    """Attempts of one run, one after the other, in one checkpoint folder."""

    def __init__(self, trainer: Trainer, flags: str, num_processes: int = 1) -> None:
        self.trainer = trainer
        self.folder = trainer.new_folder("checkpoints")
        self.flags = f"{BASE} {flags} --save {self.folder} --load {self.folder} "
        self.flags += "--save-interval 3"
        self.num_processes = num_processes
        self.attempts: list[Run] = []

    def go_on(self, flags: str = "", **options: object) -> Run:
        """Start, or resume from the latest checkpoint."""
        options.setdefault("num_processes", self.num_processes)
        run = self.trainer.train(f"{self.flags} {flags}", load=False, **options)
        self.attempts.append(run)
        return run

    def merged(self, name: str) -> dict[int, object]:
        """What all attempts recorded; what was done twice has to be the same twice."""
        return merge(record(run, name) for run in self.attempts)

    def last_checkpoint(self) -> Path:
        """The folder of the checkpoint that a resume would take."""
        iteration = int((self.folder / "latest_checkpointed_iteration.txt").read_text())
        return self.folder / f"iter_{iteration:07d}"


def record(run: Run, name: str) -> dict[int, object]:
    """Return a record by the samples before it."""
    if name in ("learning_rate", "grad_norm"):
        return run.steps(name)
    return getattr(run, name)


def merge(records: Iterable[dict[int, object]]) -> dict[int, object]:
    merged: dict[int, object] = {}
    for entries in records:
        for key, value in entries.items():
            assert merged.setdefault(key, value) == value, key
    return dict(sorted(merged.items()))


def assert_same_history(history: History, whole: History) -> None:
    for name in ("tokens", "labels", "windows", "learning_rate", "losses", "grad_norm"):
        assert history.merged(name) == whole.merged(name), name
    assert_same_checkpoints(history.last_checkpoint(), whole.last_checkpoint())


def assert_same_checkpoints(folder: Path, other: Path) -> None:
    assert folder.name == other.name
    tensors, others = read_checkpoint(folder), read_checkpoint(other)
    assert tensors.keys() == others.keys()
    assert any("exp_avg" in name for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
