"""What each rank of the runs in test_same_settings does: train as its own node has it."""

from __future__ import annotations

import os
from typing import Any

import recorded_training


def train_on_nodes(
    folder: str,
    flags: list[str],
    nodes: list[dict[str, Any]],
    script: str | None = None,
) -> None:
    """Train with what differs from node to node; each rank is one.

    Args:
        folder: of the record.
        flags: the command line, of all.
        nodes: for each rank ``folder``, where relative paths begin, and ``variables``.
        script: instead of the entry point.
    """
    node = nodes[int(os.environ["RANK"])]
    if "folder" in node:
        os.chdir(node["folder"])
    os.environ.update(node.get("variables", {}))
    recorded_training.train(folder, flags, script=script)
