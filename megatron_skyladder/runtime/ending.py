"""How a process of a launch ends when something is wrong: what it says, and its exit code."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_skyladder.errors import TRACEBACK_VARIABLE, UsageError
from megatron_skyladder.runtime import console

REFUSED = 2  # exit code, as that of argparse
GRACE_SECONDS = 10.0  # in which a launcher ends the other ranks when one has failed
NODE_SECONDS = 10.0  # more, in which that of a node ends the others there

logger = logging.getLogger(__name__)


@contextmanager
def explained() -> Iterator[None]:
    """Say what ends the block, so that nobody has to look for it.

    A `UsageError` is the same on every rank: its message is enough, once. Whatever else is raised
    may be news of this rank alone: it keeps its traceback and is named with the rank.
    """
    rank = console.rank()
    try:
        yield
    except UsageError as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _say_once(error, rank)
        sys.exit(REFUSED)
    except Exception as error:
        logger.error("rank %d failed with %s: %s", rank, type(error).__name__, error)
        raise


def _say_once(error: UsageError, rank: int) -> None:
    """Leave it to rank 0; but where rank 0 has no reason to end, nobody else would say it.

    Launchers of other nodes may never hear of rank 0. Then a node's first rank speaks before the
    others, whom its own launcher ends thereupon.
    """
    if rank != 0:
        time.sleep(GRACE_SECONDS if console.is_first_of_node() else GRACE_SECONDS + NODE_SECONDS)
    logger.error("error%s: %s", f" on rank {rank}" if rank else "", error)
