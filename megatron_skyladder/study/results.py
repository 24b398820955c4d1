"""The arithmetic of the tables: means over seeds, differences of pairs, losses at equal time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_skyladder.study import commands
from megatron_skyladder.study.records import Record

NO_DIFFERENCE = 0.01  # nats: below, the paper counts two losses as equal
CONFIDENCE = 0.95
NOTHING = 1.0  # percent: below, a model has not learnt to copy
BEYOND = (
    0.25  # of the time between the reference's runs: so far a line through them is extrapolated
)


@dataclass(frozen=True)
class Figure:
    """A value over seeds.

    Args:
        values: one for each seed, at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.values) / len(self.values)

    def text(self, digits: int, *, signed: bool = False, scale: float = 1.0) -> str:
        """Return the mean, and in parentheses the seeds in their order where they differ."""
        sign = "+" if signed else ""
        mean, *seeds = (f"{scale * it:{sign},.{digits}f}" for it in (self.mean, *self.values))
        return f"{mean} ({', '.join(seeds)})" if len(set(seeds)) > 1 else mean


@dataclass(frozen=True)
class Arm:
    """The finished runs of one arm.

    Args:
        name: of the arm.
        records: by ascending seed.
    """

    name: str
    records: tuple[Record, ...]

    def figure(self, value: Callable[[Record], float | None]) -> Figure | None:
        """Return a value over the seeds that have it; None where none has."""
        return figure(value(record) for record in self.records)


def figure(values: Iterable[float | None]) -> Figure | None:
    """Return the values that are there; None where there are none."""
    known = tuple(value for value in values if value is not None)
    return Figure(known) if known else None


def arms_of(records: Sequence[Record], order: Sequence[str]) -> list[Arm]:
    """Return the arms that have finished runs, in this order."""
    found = []
    for name in order:
        seeds = sorted((it for it in records if it.arm == name), key=lambda it: it.seed)
        if seeds:
            found.append(Arm(name, tuple(seeds)))
    return found


def difference(
    arm: Arm, reference: Arm, value: Callable[[Record, Record], float | None]
) -> Figure | None:
    """Return how the runs of two arms with the same seed differ; None where no seed is in both.

    The same seed is the same starting weights and the same order of the text, so what both have in
    common cancels out.

    Args:
        arm: what is compared.
        reference: with what.
        value: takes a run of each and returns the difference.
    """
    others = {record.seed: record for record in reference.records}
    return figure(
        value(record, others[record.seed]) for record in arm.records if record.seed in others
    )


def final_difference(record: Record, other: Record) -> float:
    """Return the difference of the losses on all held-out text, in nats."""
    return record.loss - other.loss


def time_saved(record: Record, other: Record) -> float | None:
    """Return by which share of 1 a run took less CPU time than another."""
    if record.seconds is None or not other.seconds:
        return None
    return 1 - record.seconds / other.seconds


def equal_time_difference(
    record: Record, whole: Sequence[Record], length: int | None = None
) -> float | None:
    """Return the difference to a run of the reference that ends after the same time, in nats.

    Args:
        record: what is compared.
        whole: runs of the reference with the same seed and different numbers of steps, each with a
            whole learning-rate schedule.
        length: of the context, one of those that were measured; None: whole sequences.

    Returns:
        None where these runs do not say what the reference comes to in that time.
    """
    if record.seconds is None:
        return None
    points = sorted(
        (other.seconds, _loss(other, length)) for other in whole if other.seconds is not None
    )
    own, loss = _loss(record, length), loss_after(points, record.seconds)
    return None if own is None or loss is None else own - loss


def is_beyond(record: Record, whole: Sequence[Record]) -> bool:
    """Return whether a run took less or more time than each of these, two at least."""
    times = [other.seconds for other in whole if other.seconds is not None]
    if record.seconds is None or len(times) < 2:
        return False
    return not min(times) <= record.seconds <= max(times)


def loss_after(points: Sequence[tuple[float, float | None]], seconds: float) -> float | None:
    """Return what the reference comes to in a time, linear between two of its runs.

    Args:
        points: (seconds, loss) of runs, ascending.
        seconds: from the first to the last of them, or beyond by `BEYOND` of that.
    """
    if len(points) < 2:
        return None
    slack = BEYOND * (points[-1][0] - points[0][0])
    if not points[0][0] - slack <= seconds <= points[-1][0] + slack:
        return None
    place = next((i for i in range(1, len(points) - 1) if seconds <= points[i][0]), len(points) - 1)
    (before, first), (after, second) = points[place - 1], points[place]
    if first is None or second is None or before == after:
        return None
    return first + (second - first) * (seconds - before) / (after - before)


def _loss(record: Record, length: int | None) -> float | None:
    return record.loss if length is None else record.losses.get(length)


def is_shorter(record: Record, reference: Record) -> bool:
    """Return whether a run is the reference with another number of steps."""
    but = commands.FOLDER | commands.LENGTH
    return not commands.differences(record.command, reference.command, but)


@dataclass(frozen=True)
class Scatter:
    """How far the differences of two arms lie apart from seed to seed.

    Args:
        deviation: the standard deviation of one seed's difference, in nats, pooled over arms.
        freedom: its degrees of freedom: the seeds of each arm but one, summed.
    """

    deviation: float
    freedom: int

    def bar(self, seeds: int) -> float:
        """Return what a mean over so many seeds has to exceed, in nats.

        Half of its 95 % interval by Student's t, at least `NO_DIFFERENCE`.
        """
        from scipy.stats import t

        quantile = float(t.ppf((1 + CONFIDENCE) / 2, self.freedom))
        return max(NO_DIFFERENCE, quantile * self.deviation / math.sqrt(seeds))


def scatter(differences: Iterable[Figure | None]) -> Scatter | None:
    """Return how far differences lie apart; None where none has several seeds.

    Args:
        differences: one for each pair of arms. Those to one reference share its runs, so that the
            degrees of freedom are a little flattered.
    """
    several = [it for it in differences if it is not None and len(it.values) > 1]
    freedom = sum(len(it.values) - 1 for it in several)
    if not freedom:
        return None
    squares = sum((value - it.mean) ** 2 for it in several for value in it.values)
    return Scatter(math.sqrt(squares / freedom), freedom)


def repeated(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return the runs whose command an earlier one of these had, each with that one."""
    pairs = []
    for place, record in enumerate(records):
        for first in records[:place]:
            if not commands.differences(record.command, first.command, commands.FOLDER):
                pairs.append((record, first))
                break
    return pairs
