"""Train with every timer of Megatron's standing still, so that logged rates can be compared.

python -m megatron_skyladder.cpu stopped_clock.py <pretrain_gpt.py, or a module> <flags>
"""

import runpy
import sys
from pathlib import Path

from megatron.core.timers import Timer

MICROSECOND = 1e-6  # so that the rates of a small model have digits
Timer.elapsed = lambda self, reset=True, barrier=False: MICROSECOND
del sys.argv[0]
if Path(sys.argv[0]).is_file():
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
