"""Bridge against the Megatron-LM entry point: the largest differences, by layout and mask.

    PYTHONPATH=. .venv-bridge/bin/python tests/bridge/parity.py

Same weights, same documents, 8 iterations of a tiny Llama in fp32 on the CPU; the window goes from
8 to 128 tokens, the length of the sequences. The entry point runs on one process. Both trainers
share a process that has Bridge imported.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_runs import LADDER, BridgeRuns, differences, new_pool

LOSS_TOLERANCE = 2e-6  # absolute, of losses near 5
NORM_TOLERANCE = 5e-6  # relative

MASKS: dict[str, dict[str, Any]] = {
    "local, documents": LADDER,
    "local": {"start_window": 8},
    "sliding": {"start_window": 8, "mask": "sliding"},
    "sliding, documents": {**LADDER, "mask": "sliding"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": (1, {}),
    "TP2": (2, {"tp": 2}),
    "TP2 + SP": (2, {"tp": 2, "sp": True}),
    "TP2 + SP + recompute": (2, {"tp": 2, "sp": True, "recompute": True}),
    "PP2": (2, {"pp": 2}),
    "PP4": (4, {"pp": 4}),
    "PP2 x VPP2": (2, {"pp": 2, "vpp": 2}),
    "CP2": (2, {"cp": 2}),
    "CP2 x TP2 + SP": (4, {"cp": 2, "tp": 2, "sp": True}),
    "DP2, distributed optimizer": (2, {}),
    "DP2": (2, {"distributed_optimizer": False}),
}


@dataclass(frozen=True)
class Case:
    """One line of the table: keys of the tables above."""

    layout: str
    mask: str

    def __str__(self) -> str:
        return f"{self.layout}: {self.mask}"


CASES = (
    *(Case(layout, "local, documents") for layout in LAYOUTS),
    *(Case(layout, "local") for layout in ("1 process", "PP2", "CP2")),
    *(Case(layout, "sliding") for layout in ("1 process", "TP2", "CP2")),
    Case("PP2 x VPP2", "sliding, documents"),
)


def measure(runs: BridgeRuns, case: Case) -> tuple[float, float]:
    """Return the largest difference of losses and of gradient norms (relative)."""
    num_processes, layout = LAYOUTS[case.layout]
    settings = MASKS[case.mask]
    run = runs.bridge(num_processes, ladder=settings, **layout)
    return differences(runs.reference(settings), run)


def table(runs: BridgeRuns, cases: tuple[Case, ...]) -> Iterator[str]:
    """Yield the table's lines as they are measured."""
    yield f"{'layout':28} {'mask':20} {'loss':>9} {'norm':>9}"
    for case in cases:
        loss, norm = measure(runs, case)
        yield f"{case.layout:28} {case.mask:20} {loss:9.1e} {norm:9.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only this one")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    started = time.monotonic()
    cases = tuple(case for case in CASES if not options.layout or case.layout in options.layout)
    with tempfile.TemporaryDirectory() as folder, new_pool() as pool:
        for line in table(BridgeRuns(pool, Path(folder)), cases):
            print(line, flush=True)
    print(f"{len(cases)} runs of Bridge in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
