"""What several plans of one command take from the same files."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_skyladder.planning.visible_context import Documents, measure
from megatron_skyladder.report.runlog import RunLog, read_run


class FilesRead:
    """Data and logs, each read once: a table of twelve rows would read them twelve times."""

    def __init__(self) -> None:
        self._documents: dict[tuple[tuple[str, ...], int], Documents] = {}
        self._logs: dict[str, RunLog] = {}

    def documents(self, data_path: Sequence[str], seq_length: int, *, flag: str) -> Documents:
        """Return what `visible_context.measure` finds."""
        key = tuple(data_path), seq_length
        if key not in self._documents:
            self._documents[key] = measure(data_path, seq_length, flag=flag)
        return self._documents[key]

    def log(self, path: str) -> RunLog:
        """Return what `runlog.read_run` finds."""
        if path not in self._logs:
            self._logs[path] = read_run(path)
        return self._logs[path]
