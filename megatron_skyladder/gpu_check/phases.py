"""The phases one by one: each is kept as soon as it is done, so that a check can be resumed."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from megatron_skyladder import __version__, files
from megatron_skyladder.attention.backends import facts
from megatron_skyladder.gpu_check import costs, kernels, training
from megatron_skyladder.gpu_check.bench import Bench
from megatron_skyladder.gpu_check.kernels import Result
from megatron_skyladder.ladder import measured
from megatron_skyladder.ladder.kernels import Call
from megatron_skyladder.ladder.measured import Measured

FILE = "check.json"
TOY_TABLE = "attention.json"
_SAY_WHAT_IS_WRONG = ("numerics", "exchange")  # each failure begins with the kernel
_DECIDE = (*_SAY_WHAT_IS_WRONG, "timings")


@dataclass(frozen=True)
class Phase:
    """A part of the check.

    Args:
        name: as ``--phase`` takes it.
        what: it does, for people.
        run: does it.
        minutes: it takes on an H100, about.
    """

    name: str
    what: str
    run: Callable[[Bench, Path], Result]
    minutes: float


def _on_bench(run: Callable[[Bench], Result]) -> Callable[[Bench, Path], Result]:
    return lambda bench, folder: run(bench)


PHASES = {
    phase.name: phase
    for phase in (
        Phase("facts", "versions, and the kernels that run", _on_bench(kernels.facts), 0.5),
        Phase("numerics", "against float32, hidden tokens", _on_bench(kernels.numerics), 5),
        Phase("timings", "window against time", _on_bench(costs.timings), 5),
        Phase("churn", "windows that grow by one token", _on_bench(costs.churn), 1),
        Phase("memory", "peak of one call", _on_bench(costs.memory), 1),
        Phase("no-sync", "nothing waits for the device", _on_bench(kernels.no_sync), 1),
        Phase("determinism", "two passes, the same bits", _on_bench(kernels.determinism), 1),
        Phase("exchange", "context-parallel ranks' launches", _on_bench(kernels.exchange), 1),
        Phase("megatron", "the 1B model, stock and ours", training.megatron, 8),
        Phase("smokes", "recompute, experts, FP8", training.smokes, 4),
    )
}


def run(
    bench: Bench,
    folder: Path,
    names: list[str],
    *,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run phases and return all that is known so far, written to ``check.json`` after each.

    Args:
        bench: where they run.
        folder: for results and logs.
        names: of phases; those that were done on this device, with the same versions, are kept.
        fresh: do them again.
        tell: is called with a line of progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = _resume(bench, folder / FILE, fresh=fresh, tell=tell)
    for number, name in enumerate(names, 1):
        phase = PHASES[name]
        head = f"[{number}/{len(names)}] {name}: {phase.what}"
        if name in report["phases"] and "error" not in report["phases"][name]:
            tell(f"{head}: done before")
            continue
        tell(f"{head}, about {phase.minutes:g} min" if not bench.toy else head)
        began = time.perf_counter()
        entry: dict[str, Any]
        if name not in report["phases"]:  # one that ended early goes on with what it has
            shutil.rmtree(folder / name, ignore_errors=True)
        try:
            entry = asdict(phase.run(bench, folder / name))
        except Exception as error:  # the other phases still have something to say
            (folder / f"{name}.traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
            text = str(error).strip().splitlines() or [""]
            entry = {"figures": {}, "error": f"{type(error).__name__}: {text[0]}"}
            entry["failures"] = [f"the phase ended early: {entry['error']}"]
        entry["seconds"] = round(time.perf_counter() - began, 1)
        report["phases"][name] = entry
        _write(folder / FILE, report)
        verdict = f"{len(entry['failures'])} failures" if entry["failures"] else "passed"
        tell(f"    {verdict}, {entry['seconds']:.0f} s")
    return report


def _resume(
    bench: Bench, file: Path, *, fresh: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    identity = {
        "device": bench.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "version": __version__,
        "megatron-core": facts.version("megatron-core"),
        "backends": bench.backends,
        "kernels": facts.gpu_facts(),
    }
    if file.exists() and not fresh:
        try:
            before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key, value in identity.items() if before.get(key) != value]
            if not changed:
                return before
            tell(f"not kept, as it was found with another {', '.join(changed)}: {file}")
        except ValueError:
            pass  # of a run that was cut off while it wrote: nothing to keep
    return {**identity, "date": date.today().isoformat(), "phases": {}}


def _write(file: Path, report: dict[str, Any]) -> None:
    files.write_text(file, json.dumps(report, indent=1, default=str) + "\n")


def failures(report: dict[str, Any]) -> list[str]:
    """Return all that is wrong, the phase before it."""
    return [
        f"{name}: {failure}"
        for name, entry in report["phases"].items()
        for failure in entry["failures"]
    ]


def table(report: dict[str, Any], seq_length: int) -> Measured | None:
    """Return what `auto` is to read: mean times of kernels that compute the right thing.

    Args:
        report: with the phases of `_DECIDE`; None where one of them was not run, or ended early.
        seq_length: of the calls that decide.
    """
    phases = report["phases"]
    if _undecided(report):
        return None
    wrong = {
        failure.split(",")[0] for name in _SAY_WHAT_IS_WRONG for failure in phases[name]["failures"]
    }
    means = costs.mean_times(phases["timings"]["figures"]["rows"], seq_length)
    right: dict[Call, dict[str, float]] = {
        call: {name: ms for name, ms in times.items() if name not in wrong}
        for call, times in means.items()
        if call is not Call.FULL  # stock's own call, whatever is faster
    }
    if not any(right.values()):
        return None
    return Measured(report["device"], report["date"], right)


def without_table(report: dict[str, Any]) -> str:
    """Return which phases `auto`'s table still needs; empty where all have come to their end."""
    missing = _undecided(report)
    return f"no table for auto yet: it needs {', '.join(missing)} too" if missing else ""


def _undecided(report: dict[str, Any]) -> list[str]:
    """Return the phases of `_DECIDE` that were not run, or ended early."""
    known = report["phases"]
    return [name for name in _DECIDE if "error" in known.get(name, {"error": "was not run"})]


def write_table(bench: Bench, report: dict[str, Any], folder: Path) -> Path | None:
    """Write the table where `auto` reads it; a toy's into the folder alone."""
    found = table(report, bench.sizes.timed_lengths[0])
    if found is None:
        return None
    return measured.write(found, folder / TOY_TABLE if bench.toy else None)
