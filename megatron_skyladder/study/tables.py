"""The tables of the study's page, from records; the arithmetic is in `results`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_skyladder.study import commands, records, results, timing
from megatron_skyladder.study.markdown import NONE, date, table
from megatron_skyladder.study.records import Record
from megatron_skyladder.study.results import Arm, Figure
from megatron_skyladder.study.settings import CUE, Planned, Study

COPYING = """\
A span of {span} random tokens stands twice in held-out text. How many tokens of the second copy
(without the first {cue}) are the likeliest ones to the model, by the distance between the copies in
tokens; {samples} sequences. Guessing gets {chance:.2f} %."""

NOTHING_COPIED = """
No model gets more than {best:,.0f} of {tokens:,} tokens right at any distance: at this scale none
has learnt to copy, and the test says nothing about windows."""


BEYOND = "*"  # behind a loss at equal time that no two runs of the reference enclose


@dataclass(frozen=True)
class Given:
    """What a page is made of.

    Args:
        study: what there was to run.
        found: records of finished runs of this study.
        failures: starts that failed.
        corpus: what is known about the text; None before it is made.
    """

    study: Study
    found: list[Record]
    failures: list[dict[str, Any]]
    corpus: dict[str, Any] | None

    @cached_property
    def retimed(self) -> list[Record] | None:
        """The arms' runs on one clock; None where timing runs are missing."""
        return timing.retime(self.found)

    @property
    def is_of_one_machine(self) -> bool:
        """Whether all arms ran on the same processor, with the same versions."""
        return len({machine_of(it) for it in self.found if it.is_compared}) < 2

    @cached_property
    def arms(self) -> list[Arm]:
        """Those that have finished runs, on one clock where there is one, else by their own.

        Without a time where they have no clock and are of several machines.
        """
        runs = self.found if self.retimed is None else self.retimed
        if self.retimed is None and not self.is_of_one_machine:
            runs = [timing.retimed(it, None) for it in runs]
        return results.arms_of([it for it in runs if it.losses], list(self.study.arms))

    def budgets(self, seed: int) -> list[Record]:
        """Return the reference's run of a seed, and those that differ from it in length alone."""
        own = [it for arm in self.arms for it in arm.records if it.seed == seed]
        base = [] if self.reference is None else self.reference.records
        first = next((it for it in base if it.seed == seed), None)
        return [] if first is None else [it for it in own if results.is_shorter(it, first)]

    def is_reference(self, arm: Arm) -> bool:
        """Return whether an arm is the reference, or differs from it in length alone."""
        return any(arm.records[0] is it for it in self.budgets(arm.records[0].seed))

    @property
    def reference(self) -> Arm | None:
        """The arm that others are compared with: the file's first."""
        first = next(iter(self.study.arms), None)
        return next((arm for arm in self.arms if arm.name == first), None)


def losses(given: Given) -> list[list[str]]:
    """Return the losses by length, and the difference of whole sequences to the reference."""
    lengths = _lengths(given)
    head = ["arm", "tokens (millions)", "seeds", *(f"at {length:,}" for length in lengths)]
    rows = [[*head, f"difference at {max(lengths, default=0):,}"]]
    for arm in given.arms:
        tokens = f"{arm.records[0].tokens / 1e6:.1f}"
        cells = [f"`{arm.name}`", tokens, str(len(arm.records))]
        for length in lengths:
            cells.append(_cell(arm.figure(_at_length(length)), 3))
        cells.append(_against(arm, given.reference, results.final_difference, 3))
        rows.append(cells)
    return rows


def times(given: Given) -> list[list[str]]:
    """Return CPU time, and losses at equal time."""
    lengths = _lengths(given)
    head = [f"at {length:,}, equal time" for length in lengths]
    rows = [["arm", "core hours", "time saved (%)", *head]]
    for arm in given.arms:
        hours = arm.figure(lambda it: it.seconds)
        rows.append(
            [
                f"`{arm.name}`",
                NONE if hours is None else hours.text(2, scale=1 / 3600),
                _against(arm, given.reference, results.time_saved, 0, scale=100),
                *(_at_equal_time(given, arm, length) for length in lengths),
            ]
        )
    return rows


def copying_part(given: Given) -> str:
    """Return the paragraph and the table about copying; nothing where it was not measured."""
    arms = [arm for arm in given.arms if any(it.copying for it in arm.records)]
    distances = sorted({key for arm in arms for it in arm.records for key in it.copying})
    if not distances:
        return ""
    options = given.study.copying
    rows = [["arm", *(f"{distance:,} (%)" for distance in distances)]]
    for arm in arms:
        cells = [f"`{arm.name}`"]
        for distance in distances:
            found = arm.figure(_copied(distance))
            cells.append(NONE if found is None else found.text(1, scale=100))
        rows.append(cells)
    text = COPYING.format(
        span=options.span,
        cue=CUE,
        samples=options.samples,
        chance=100 / (given.study.vocab_size - 1),
    )
    best = max(
        100 * it.accuracy for arm in arms for run in arm.records for it in run.copying.values()
    )
    if best < results.NOTHING:
        tokens = options.samples * (options.span - CUE)
        text += NOTHING_COPIED.format(best=tokens * best / 100, tokens=tokens)
    return f"\n{text}\n\n{table(rows)}"


def _lengths(given: Given) -> list[int]:
    return sorted({key for arm in given.arms for it in arm.records for key in it.losses})


def at_equal_time(given: Given, arm: Arm, length: int | None = None) -> Figure | None:
    """Return the difference to the reference at equal time, of a context length or the longest."""
    return arm.figure(
        lambda record: results.equal_time_difference(record, given.budgets(record.seed), length)
    )


def _at_equal_time(given: Given, arm: Arm, length: int) -> str:
    if given.is_reference(arm):
        return ""
    found = at_equal_time(given, arm, length)
    if found is None:
        return NONE
    return found.text(3, signed=True) + (BEYOND if is_extrapolated(given, arm) else "")


def is_extrapolated(given: Given, arm: Arm) -> bool:
    """Return whether a run of an arm took less or more time than all runs of the reference.

    Of the seeds that have a difference at equal time.
    """
    budgets = [(it, given.budgets(it.seed)) for it in arm.records]
    return any(
        results.is_beyond(record, of_seed)
        for record, of_seed in budgets
        if results.equal_time_difference(record, of_seed) is not None
    )


def _at_length(length: int) -> Callable[[Record], float | None]:
    return lambda record: record.losses.get(length)


def _copied(distance: int) -> Callable[[Record], float | None]:
    def accuracy(record: Record) -> float | None:
        return record.copying[distance].accuracy if distance in record.copying else None

    return accuracy


def runs(given: Given) -> list[list[str]]:
    """Return every run of the queue, finished or not."""
    found = {record.name: record for record in given.found}
    head = ["run", "seed", "machine", "state", "started (UTC)", "finished (UTC)", "starts"]
    rows = [[*head, "CPU hours", "last validation", "held-out text"]]
    letters = dict(machines(given))
    for planned in given.study.runs:
        record = found.get(planned.name)
        if record is None:
            rows.append([f"`{planned.arm}`", str(planned.seed), NONE, "not finished", *[NONE] * 6])
            continue
        starts = [it["time"] for it in record.events if it["event"] == "started"]
        ends = [it["time"] for it in record.events if it["event"] == "finished"]
        seconds = record.seconds
        rows.append(
            [
                *(f"`{record.arm}`", str(record.seed), letters[machine_of(record)]),
                "finished" if record.is_whole else "trained, not measured",
                *(date(starts[:1]), date(ends[-1:]), str(len(starts))),
                NONE if seconds is None else f"{seconds / 3600:.2f}",
                f"{record.last.loss:.4f}",
                f"{record.loss:.4f}" if record.losses else NONE,
            ]
        )
    return rows


def machines(given: Given) -> list[tuple[str, str]]:
    """Return the machines of finished runs with a letter for each, in the order of the queue."""
    names = dict.fromkeys(machine_of(record) for record in given.found)
    return [(name, chr(ord("A") + place)) for place, name in enumerate(names)]


def machine_of(record: Record) -> str:
    """Return a run's processor, with the instructions it has, and versions."""
    known = dict(record.machine)
    processor = known.pop("processor", "unknown processor")
    instructions = known.pop(records.INSTRUCTIONS, None)
    if instructions is None:  # an early record
        processor += " (instructions not recorded)"
    elif instructions:
        processor += f" with {instructions}"
    return ", ".join([processor, *(f"{name} {value}" for name, value in known.items())])


def rates(given: Given) -> list[list[str]]:
    """Return the runs at several learning rates, arms that were tried at others among them."""
    found = {record.name: record for record in given.found}
    rows = [["run", "steps", "learning rate", "validation loss"]]
    for run in sorted(_tried(given.study), key=lambda it: (it.train_iters, _rate(it))):
        record = found.get(run.name)
        loss = "not finished" if record is None else f"{record.last.loss:.4f}"
        rows.append([f"`{run.arm}`", f"{run.train_iters:,}", run.value("--lr"), loss])
    return rows


def best_rate(given: Given) -> tuple[str, int] | None:
    """Return the rate with the lowest loss of the reference's window, and after how many steps.

    Returns:
        Of the longest runs of which one has the rate of the arms; None where there are none.
    """
    main = given.study.main
    found = {record.name: record for record in given.found}
    alike = [
        run
        for run in given.study.runs
        if run.name in found
        and not commands.differences(run.flags, main.flags, commands.RATE | commands.LENGTH)
    ]
    for steps in sorted({run.train_iters for run in alike}, reverse=True):
        runs = [run for run in alike if run.train_iters == steps]
        if len(runs) > 1 and any(_rate(run) == _rate(main) for run in runs):
            best = min(runs, key=lambda run: found[run.name].last.loss)
            return best.value("--lr"), steps
    return None


def _tried(study: Study) -> list[Planned]:
    swept = [run for run in study.runs if run.is_sweep]
    return [
        run
        for run in study.runs
        if any(not commands.differences(run.flags, it.flags, commands.RATE) for it in swept)
    ]


def _rate(run: Planned) -> float:
    return float(run.value("--lr"))


def _against(
    arm: Arm, reference: Arm | None, value: Any, digits: int, *, scale: float = 1.0
) -> str:
    if reference is None or arm is reference:
        return ""
    found = results.difference(arm, reference, value)
    return NONE if found is None else found.text(digits, signed=True, scale=scale)


def _cell(found: Figure | None, digits: int) -> str:
    return NONE if found is None else found.text(digits)
