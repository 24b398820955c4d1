"""The process of `testing.ProcessPool`, on top of the stubs."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where the package is not installed

import stubs
from reference_kernels import CALLS

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print must not look like an answer
    stubs.install()
    atexit.register(lambda: print(f"stubs called: {dict(CALLS)}"))  # ends each rank's log
    os.dup2(answers, 1)
    os.close(answers)
    from megatron_skyladder.testing import worker

    worker.main()
