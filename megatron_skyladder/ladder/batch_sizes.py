"""Samples in each global batch, from Megatron's flags; pure arithmetic on the standard library.

Where the batch grows (``--step-batch-size-schedule``), Megatron's own ``args.global_batch_size`` is
only micro-batch size x data-parallel size: it depends on the layout and is no batch of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.numbers import real

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSizes:
    """The size of a global batch as a function of the samples consumed before it.

    Args:
        stages: (consumed samples, samples per batch from there on), ascending from 0 samples.
    """

    stages: tuple[tuple[int, int], ...]

    @property
    def final(self) -> int:
        """Samples in a batch once it has grown: one step of the window's schedule."""
        return self.stages[-1][1]

    def flag(self, seq_length: int) -> str:
        """Return the value of Megatron's ``--step-batch-size-schedule``, thresholds in tokens."""
        return " ".join(f"{start * seq_length}:{size}" for start, size in self.stages)

    def samples_in(self, num_batches: int) -> int:
        """Return the samples that a run of so many batches consumes.

        Example, 4 samples a batch, 8 from sample 10 on: four batches are 4 + 4 + 4 + 8 = 20.
        """
        for start, size, count in self._stretches():
            if count is None or num_batches <= count:
                return start + num_batches * size
            num_batches -= count
        raise AssertionError("the last stage has no end")

    def batches_in(self, samples: int) -> int:
        """Return the batches of a run that goes on until it has consumed so many samples."""
        batches = 0
        for start, size, count in self._stretches():
            needed = max(0, -(-(samples - start) // size))
            if count is None or needed <= count:
                return batches + needed
            batches += count
        raise AssertionError("the last stage has no end")

    def latest_start(self, consumed: int) -> int:
        """Return the samples before the batch that ended with ``consumed``; 0 before any.

        Where a run was resumed with another batch, its batches of the last size need not begin
        where those of a run of its own would.
        """
        *_, (first_begins, size, _) = self._stretches()
        if consumed - size >= first_begins:
            return consumed - size
        return self.samples_in(max(0, self.batches_in(consumed) - 1))

    def ahead(self, consumed: int) -> tuple[tuple[int, int], ...]:
        """Return the stages of the batches that begin at ``consumed`` samples and after it."""
        ends = [start for start, _ in self.stages[1:]]
        pairs = itertools.zip_longest(self.stages, ends)
        return tuple(stage for stage, end in pairs if end is None or consumed < end)

    def _stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """Yield (samples before its first batch, size, number of batches) of each stage.

        A batch that begins before the next stage belongs to its own, also where it goes past it.
        """
        at = 0
        ends = [start for start, _ in self.stages[1:]]
        for (_, size), end in zip(self.stages, [*ends, None], strict=True):
            count = None if end is None else max(0, -(-(end - at) // size))
            yield at, size, count
            at += (count or 0) * size


def batch_sizes(args: Any) -> BatchSizes:
    """Return the batch sizes of a run.

    Args:
        args: a namespace with Megatron's ``global_batch_size``, ``seq_length`` and, where there is
            one, ``step_batch_size_schedule``: ``THRESHOLD:SIZE ...``, thresholds in tokens. A
            release that has no such flag, up to 0.17, makes the batches of ``rampup_batch_size``.

    Raises:
        UsageError: the batch size schedule cannot be read.
    """
    text = getattr(args, "step_batch_size_schedule", None)
    ramp = getattr(args, "rampup_batch_size", None)
    if ramp and not hasattr(args, "step_batch_size_schedule"):
        first, increment, samples = map(int, ramp)
        return BatchSizes(tuple(_ramped(first, increment, samples, args.global_batch_size)))
    if text is None:
        return BatchSizes(((0, args.global_batch_size),))
    try:
        stages = []
        for entry in text.replace(",", " ").split():
            threshold, size = entry.split(":")
            stages.append((_number(threshold) // args.seq_length, _number(size)))
    except ValueError:
        stages = []
    stages.sort()
    starts = [start for start, _ in stages]
    if starts[:1] != [0] or len(set(starts)) < len(starts) or min(s for _, s in stages) < 1:
        raise UsageError(
            f"--step-batch-size-schedule={text!r} cannot be read. Give TOKENS:SAMPLES pairs that "
            'start at 0, such as "0:768 250B:1536".'
        )
    return BatchSizes(tuple(stages))


def _ramped(first: int, increment: int, samples: int, final: int) -> Iterator[tuple[int, int]]:
    """Yield the stages of ``--rampup-batch-size FIRST INCREMENT SAMPLES``.

    The batch is ``first + increment * int(consumed / samples_per_increment)``, in Megatron's float
    arithmetic; samples_per_increment = samples / number of increments.
    """
    count = (final - first) // increment
    yield 0, first
    for number in range(1, count + 1):
        start = number * samples // count
        while int(start / (samples / count)) < number:
            start += 1
        yield start, first + number * increment


def _number(text: str) -> int:
    """Parse 1536, 250B or 1.5M as Megatron does."""
    text = text.strip().upper()
    factor = _SUFFIXES.get(text[-1:], 1)
    return int(real(float(text[:-1] if factor > 1 else text)) * factor)
