"""What the processes of test_resume.py run: a launch of training, as one from a shell."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def train(flags: list[str], script: str | None) -> None:
    """Train with our entry point, or with a checkout's own ``pretrain_gpt.py``."""
    sys.argv = [script or "pretrain_gpt", *flags]
    if script is None:
        from megatron_skyladder import pretrain_gpt

        pretrain_gpt.main()
    else:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
