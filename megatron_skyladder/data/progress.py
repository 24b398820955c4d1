"""How far a run is, how fast, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_skyladder.data.output import ResumableOutput


@dataclass(frozen=True)
class Progress:
    """How far a run is. The ``_before`` figures are what an earlier run had done."""

    read_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    bad: int
    seconds: float
    read_bytes_before: int
    tokens_before: int

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - self.tokens_before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the rate so far; None before there is one."""
        done = self.read_bytes - self.read_bytes_before
        return self.seconds * (self.total_bytes - self.read_bytes) / done if done else None


class ProgressMeter:
    """Counts from where this process began, so that the rate is not that of an earlier run."""

    def __init__(
        self, output: ResumableOutput, total_bytes: int, report: Callable[[Progress], None]
    ) -> None:
        self._output, self._total_bytes, self._report = output, total_bytes, report
        self._began, self._tokens_before = time.monotonic(), output.num_tokens
        self._read_bytes_before: int | None = None if output.is_resumed else 0

    def show(self, read_bytes: int) -> None:
        if self._read_bytes_before is None:  # the first batch after a resume
            self._read_bytes_before = read_bytes
        position = next(iter(self._output.positions.values()))
        self._report(
            Progress(
                read_bytes=read_bytes,
                total_bytes=self._total_bytes,
                documents=position.num_documents,
                tokens=self._output.num_tokens,
                bad=self._output.counts["bad"],
                seconds=time.monotonic() - self._began,
                read_bytes_before=self._read_bytes_before,
                tokens_before=self._tokens_before,
            )
        )
