"""Start runs of Bridge and of the Megatron-LM entry point on one small model, and read them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_skyladder.testing import ProcessPool

HERE = Path(__file__).resolve().parent
LADDER = {"start_window": 8, "intra_document": True}


def new_pool() -> ProcessPool:
    """Return a pool whose processes have Bridge imported."""
    return ProcessPool([HERE], preload=["bridge_preload"])


@dataclass
class BridgeRun:
    """What a run left behind."""

    folder: Path
    exit_codes: list[int] = field(default_factory=list)

    def steps(self) -> list[dict[str, Any]]:
        """Return iteration, loss, gradient norm and window of every step."""
        return self._lines("history.jsonl")

    def evaluations(self) -> list[dict[str, float]]:
        """Return the losses of every evaluation, the test set last."""
        return self._lines("evaluations.jsonl")

    def facts(self) -> dict[str, Any]:
        """Return what a body wrote down beside."""
        return json.loads((self.folder / "facts.json").read_text())

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def log(self, rank: int = 0) -> str:
        """Return what a rank printed."""
        return (self.folder / f"log.{rank}.txt").read_text(errors="replace")

    @property
    def checkpoint(self) -> Path:
        """Where it saved."""
        return self.folder / "checkpoint"


class BridgeRuns:
    """Starts runs that have the same data and begin with the same weights.

    Args:
        pool: where they run.
        folder: gets a folder per run.
    """

    def __init__(self, pool: ProcessPool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self._count = 0
        self._references: dict[str, BridgeRun] = {}

    def start(
        self,
        body: str,
        *,
        num_processes: int = 1,
        exit_codes: tuple[int, ...] = (0,),
        environment: dict[str, str] | None = None,
        timeout_seconds: float = 300,
        body_module: str = "bridge_bodies",
        **arguments: Any,
    ) -> BridgeRun:
        """Run a function of a module of this folder on every rank."""
        self._count += 1
        run = BridgeRun(self.folder / f"{self._count:03d}-{body}")
        run.exit_codes = self.pool.run(
            f"{body_module}:{body}",
            num_processes=num_processes,
            folder=run.folder,
            arguments={"folder": str(run.folder), "data": str(self.data)} | arguments,
            environment={"SKYLADDER_TRACEBACK": "1", **(environment or {})},
            exit_codes=exit_codes,
            timeout_seconds=timeout_seconds,
        )
        return run

    @cached_property
    def data(self) -> Path:
        """The prefix of a dataset of short documents."""
        import bridge_bodies

        return bridge_bodies.make_data(self.folder / "documents")

    @cached_property
    def weights(self) -> Path:
        """A checkpoint of the entry point's after one step, from which all others begin."""
        return self.start("train_megatron_lm", iterations=1, save=True).checkpoint

    def bridge(self, num_processes: int = 1, **options: Any) -> BridgeRun:
        """Train with Bridge; see ``bridge_bodies.train_bridge``."""
        begin = {} if "load" in options else {"weights": str(self.weights)}
        return self.start("train_bridge", num_processes=num_processes, **{**begin, **options})

    def megatron_lm(self, **options: Any) -> BridgeRun:
        """Train with the entry point on one process."""
        begin = {} if "load" in options else {"weights": str(self.weights)}
        return self.start("train_megatron_lm", **{**begin, **options})

    def reference(self, ladder: dict[str, Any], **options: Any) -> BridgeRun:
        """Return the entry point's run on one process under some settings; each runs once."""
        key = json.dumps([ladder, options], sort_keys=True)
        if key not in self._references:
            self._references[key] = self.megatron_lm(ladder=ladder, **options)
        return self._references[key]


def differences(one: BridgeRun, other: BridgeRun, first: int = 0) -> tuple[float, float]:
    """Return the largest difference of losses, and of gradient norms (relative).

    Windows and iterations have to be the same.

    Args:
        one: has all steps.
        other: has those from ``first`` on.
        first: steps of ``one`` that ``other`` does not have.
    """
    pairs = list(zip(one.steps()[first:], other.steps(), strict=True))
    assert [a["iteration"] for a, _ in pairs] == [b["iteration"] for _, b in pairs]
    assert [a["window"] for a, _ in pairs] == [b["window"] for _, b in pairs]
    losses = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    norms = max(abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in pairs)
    return losses, norms
