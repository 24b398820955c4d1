"""Run tests of Megatron's own in one process on the CPU engine.

    python -m megatron_skyladder.cpu own_tests.py <words for pytest>

They run with gloo where they ask for NCCL; and where there is no Transformer Engine, it has the
version 0.0.0 in 0.16 too, whose tests trip over None, as it has in later releases.
"""

import functools
import sys

import pytest
import torch.distributed as dist
from megatron.core import utils
from packaging.version import Version

real = dist.init_process_group


@functools.wraps(real)
def over_gloo(backend=None, *args, **kwargs):
    return real("gloo", *args, **kwargs)


dist.init_process_group = over_gloo
if utils.get_te_version() is None:
    utils.get_te_version = lambda: Version("0.0.0")
sys.exit(pytest.main(sys.argv[1:]))
