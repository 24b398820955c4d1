"""The arithmetic of the tables: means over seeds, differences of pairs, losses at equal time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_skyladder.study.records import Checked, Record

NOISE = 0.01  # nats: what the paper counts as no difference; used until seeds say more


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
        """Return the mean, and the lowest and highest seed where there are several."""
        sign = "+" if signed else ""
        shown = [f"{scale * value:{sign},.{digits}f}" for value in (self.mean, *self.values)]
        if len(self.values) == 1:
            return shown[0]
        low, high = (scale * pick(self.values) for pick in (min, max))
        return f"{shown[0]} ({low:{sign},.{digits}f} to {high:{sign},.{digits}f})"


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
    """Return the difference of the last validation losses, in nats."""
    return record.last.loss - other.last.loss


def time_saved(record: Record, other: Record) -> float | None:
    """Return by which share of 1 a run took less CPU time than another."""
    if record.seconds is None or not other.seconds:
        return None
    return 1 - record.seconds / other.seconds


def equal_time_difference(record: Record, other: Record, length: int | None = None) -> float | None:
    """Return the difference of the losses when the quicker of the two has ended, in nats.

    Args:
        record: what is compared.
        other: with what.
        length: of the context, one of those that were measured; None: whole sequences.
    """
    if record.seconds is None or other.seconds is None:
        return None
    quicker = min(record.seconds, other.seconds)
    return loss_after(record, quicker, length) - loss_after(other, quicker, length)


def loss_after(record: Record, seconds: float, length: int | None = None) -> float:
    """Return the validation loss after so much CPU time, linear between two validations.

    Before the first validation it is the first one's, behind the last one the last one's.
    """
    before = record.validations[0]
    for after in record.validations:
        assert before.seconds is not None and after.seconds is not None
        if seconds <= after.seconds:
            if after is before:
                break
            share = (seconds - before.seconds) / (after.seconds - before.seconds)
            return (1 - share) * _loss(before, length) + share * _loss(after, length)
        before = after
    return _loss(before, length)


def _loss(checked: Checked, length: int | None) -> float:
    return checked.loss if length is None else checked.by_length[length]


def noise(reference: Arm) -> float:
    """Return what a difference has to exceed: how far the reference's seeds lie apart.

    `NOISE` where there is one seed, and at least that.
    """
    losses = [record.last.loss for record in reference.records]
    return max(NOISE, max(losses) - min(losses))
