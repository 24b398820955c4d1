"""Megatron's console logs as records: what a run printed, for reports and calibration.

Needs nothing but the standard library and no Megatron. What a log may contain and is coped with:
colours, the prefixes of torchrun and srun (``[default3]:``, ``7: ``), lines of anything else, and
several attempts of a requeued run one after the other: where an attempt starts again at an earlier
iteration, what the one before had logged from there on was lost work and is left out.

Megatron from 0.16 on prints a line after the first iteration of every attempt without resetting its
sums, so the next line's mean loss and time contain that iteration again. Both are corrected here:
each record covers the iterations since the record before. Up to 0.15 there is no such line.
Iterations that a stopped attempt ran after its last line, and kept, are in no line at all; the
first record of the next attempt covers them too. Bridge has no line after the first iteration.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from megatron_skyladder.report import log_files

UNTIL_015 = "retro_add_retriever"  # an argument that releases up to 0.15 have, and print
LOSS, SKIPPED = "lm loss", "number of skipped iterations"
RATES = ("skyladder/tflops_per_gpu", "throughput per GPU (TFLOP/s/GPU)")  # the best known first

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ITERATION = re.compile(r"(?:\[([\d:. -]{19,})\]\s*)?iteration\s+(\d+)/\s*(\d+) \|(.*)")
_OURS = re.compile(r"SkyLadder: iteration (\d+)/(\d+) \| (.*)")  # a line of its own, in Bridge
_BRIDGES_TIME = re.compile(r"\[[\d-]{10} [\d:]{8}\]\s*iteration\s+\d+/")  # Megatron's: microseconds
_VALIDATION = re.compile(r"validation(\S*) loss at iteration (\d+)(?: on (\w+) set)? \|(.*)")
_VALUE = " value"  # as in "lm loss value: 4.1"; the other field is its perplexity
_SETTING = re.compile(r"^(?:\S{0,24}:)? {1,3}(\w+) \.{2,} ?(.*)$")
_ATTEMPT = re.compile(r"- arguments -")
_FINGERPRINT = re.compile(
    r"SkyLadder: (.*; step of \d+ samples; .* mask; documents (?:not )?masked.*)"
)
_PADDED_VOCAB = re.compile(r"> padded vocab \(size: \d+\).*\(new size: (\d+)\)")
_WORLD_SIZE = re.compile(r"using world size: (\d+)")
_AT_LENGTH = re.compile(r"skyladder/loss_at_(\d+)$")
_AT_POSITIONS = re.compile(r"skyladder/loss_positions_(\d+)_(\d+)$")


@dataclass(frozen=True)
class Iteration:
    """One line of the training log.

    Args:
        iteration: the last of the iterations that this record covers.
        consumed_samples: training samples consumed by then.
        num_iterations: how many iterations the record covers; means are over these.
        elapsed_ms: mean time of one iteration, evaluation and checkpoints left out.
        values: every number of the line by its name, such as ``lm loss``, ``learning rate``,
            ``grad norm``, ``skyladder/window``.
        time: when the line was printed, if it says.
        num_gpus: the world size of its attempt, if the log says.
        seq_length: tokens in a sequence of its attempt, if the log says.
        is_first: whether its line is of one iteration, the first one of an attempt, which is slow.
    """

    iteration: int
    consumed_samples: int
    num_iterations: int
    elapsed_ms: float
    values: dict[str, float]
    time: datetime | None = None
    num_gpus: int | None = None
    seq_length: int | None = None
    is_first: bool = False

    @property
    def loss(self) -> float | None:
        """Mean training loss; NaN where Megatron left it out, None where all were skipped."""
        return self.values.get(LOSS)

    @property
    def window(self) -> int | None:
        """The attention window of the last iteration, in tokens."""
        window = self.values.get("skyladder/window")
        return None if window is None or not math.isfinite(window) else int(window)

    @property
    def tflops_per_gpu(self) -> float | None:
        """Floating-point operations per second and GPU, in 1e12, if the log says."""
        return next((self.values[name] for name in RATES if name in self.values), None)

    @property
    def attention_fraction(self) -> float | None:
        """Attention work of the last iteration relative to full causal."""
        return self.values.get("skyladder/attention_fraction")


@dataclass(frozen=True)
class Validation:
    """One validation line.

    Args:
        iteration: after which it ran.
        dataset: ``validation`` or ``test``, with the name Megatron gives one of several sets.
        values: every loss by its name, ``lm loss`` first of all.
    """

    iteration: int
    dataset: str
    values: dict[str, float]

    @property
    def loss(self) -> float | None:
        """The plain validation loss, whole sequences visible."""
        return self.values.get(LOSS)

    @property
    def by_length(self) -> dict[int, float]:
        """Loss by context length in tokens (blocked windows), ascending."""
        found = ((_AT_LENGTH.match(name), value) for name, value in self.values.items())
        return dict(sorted((int(match[1]), value) for match, value in found if match))

    @property
    def by_positions(self) -> dict[tuple[int, int], float]:
        """Loss by position in the sequence, (first, last) both included, ascending."""
        found = ((_AT_POSITIONS.match(name), value) for name, value in self.values.items())
        return dict(
            sorted(((int(match[1]), int(match[2])), value) for match, value in found if match)
        )


_Validations = dict[tuple[int, str], Validation]  # by iteration and dataset, as they came


@dataclass
class RunLog:
    """Everything the logs of one run say.

    Args:
        path: the file or folder it was read from.
        settings: Megatron's arguments as text, those of the last attempt.
        schedule: what SkyLadder printed at the start, or None where it was off.
        num_gpus: the world size of the last attempt, if the log says.
        padded_vocab_size: rows of the embedding, if the log says.
        num_attempts: how often the run was started.
        total_iterations: of the whole run, if the log says.
    """

    path: Path
    iterations: list[Iteration] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    schedule: str | None = None
    num_gpus: int | None = None
    padded_vocab_size: int | None = None
    num_attempts: int = 0
    total_iterations: int | None = None

    def number(self, setting: str) -> float | None:
        """Return one of Megatron's arguments as a number, or None where it is not one."""
        try:
            return float(self.settings[setting])
        except (KeyError, ValueError):
            return None

    @property
    def seq_length(self) -> int | None:
        """Tokens in a sequence, of the last attempt."""
        length = self.number("seq_length")
        return None if length is None else int(length)

    def tokens(self) -> list[int]:
        """Return the training tokens at the end of each record; samples where no length is known.

        A run may go on with another length; the tokens it has seen stay what they were.
        """
        total, samples, tokens = 0, 0, []
        for record in self.iterations:
            length = record.seq_length or self.seq_length or 1
            total += (record.consumed_samples - samples) * length
            samples = record.consumed_samples
            tokens.append(total)
        return tokens

    def elapsed_seconds(self) -> list[float]:
        """Return the training time at the end of each record, from the first iteration on."""
        total, seconds = 0.0, []
        for record in self.iterations:
            total += record.num_iterations * record.elapsed_ms / 1e3
            seconds.append(total)
        return seconds


def read_run(path: str | Path) -> RunLog:
    """Read the log of a run.

    Args:
        path: a console log, or the folder of a run: its log files, those below its folder ``logs``
            and those of its ``attempts`` are read, see `log_files`.

    Raises:
        ValueError: there is no training line of Megatron in it.
        OSError: it cannot be read.
    """
    path = Path(path)
    logs = log_files.logs_of_starts(path, _ITERATION.search, _ATTEMPT.search)
    is_bridges = _is_bridges(block for log in logs for block in log.blocks())
    run = _parse((line for log in logs for line in log.lines()), is_bridges=is_bridges)
    run.path = path
    if not run.iterations:
        files_read = (
            f"the {', '.join(log_files.SUFFIXES)} files of {path}, {path / log_files.ATTEMPTS} "
            f"and {path / 'logs'}"
        )
        where = files_read if path.is_dir() else str(path)
        raise ValueError(
            f"no training line of Megatron (' iteration 1/ 100 | ...') in {where}. Give the "
            "console output of a run; the last rank prints these lines."
        )
    return run


def parse(text: str) -> RunLog:
    """Return what the text of a log says; see `read_run`."""
    return _parse(text.splitlines(), is_bridges=_is_bridges([text]))


def _parse(lines: Iterable[str], *, is_bridges: bool) -> RunLog:
    """Return what the lines of a log say; they are forgotten one by one."""
    run = RunLog(path=Path())
    validations: _Validations = {}
    ours: dict[int, dict[str, float]] = {}  # by iteration, until the trainer's line comes
    first: Iteration | None = None  # the line whose iteration the next line contains again
    lost: dict[int, Iteration] = {}  # by the iteration that an attempt began again at
    attempt_began = False
    for raw in lines:
        line = _ANSI.sub("", raw)
        if _ATTEMPT.search(line):
            run.num_attempts += 1
            attempt_began = True
        elif match := _OURS.search(line):
            _add_ours(run, ours, int(match[1]), _numbers(match[3]))
        elif match := _ITERATION.search(line):
            record = _iteration(match, run)
            if record is None:  # damaged: there is no place for it
                continue
            run.total_iterations = int(match[3])
            dropped = _drop_from(run, validations, record.iteration)
            if dropped is not None and not dropped.is_first:
                lost[record.iteration] = dropped
            record.values.update(ours.pop(record.iteration, {}))
            if is_bridges:
                before = run.iterations[-1].iteration if run.iterations else 0
                record = replace(record, num_iterations=record.iteration - before)
            elif attempt_began or record.iteration == 1:
                if UNTIL_015 in run.settings:
                    record = replace(record, num_iterations=_log_interval(run))
                else:
                    record = replace(record, is_first=True)
                    first = record  # one iteration, whatever the log interval
            elif run.iterations:
                covered = record.iteration - run.iterations[-1].iteration
                record = replace(record, num_iterations=covered)
                if first is not None:
                    record, first = _without(first, record), None
            attempt_began = False
            run.iterations.append(record)
        elif match := _VALIDATION.search(line):
            _add_validation(validations, match)
        else:
            _note_setting(run, line)
    run.validations = list(validations.values())
    if UNTIL_015 not in run.settings:
        _cover_start(run.iterations)
    _cover_kept(run.iterations, lost)
    _note_nan(run.iterations)
    return run


def _is_bridges(blocks: Iterable[str]) -> bool:
    """Whether a log is Bridge's: with SkyLadder's own line, or without it as its time shows."""
    has_time = has_arguments = False
    for block in blocks:
        if _OURS.search(block):
            return True
        has_time = has_time or bool(_BRIDGES_TIME.search(block))
        has_arguments = has_arguments or bool(_ATTEMPT.search(block))
    return has_time and not has_arguments


def _cover_start(records: list[Iteration]) -> None:
    """Let the first record of a log that begins in the middle of a run cover a log interval.

    Its line is of one iteration if it is an attempt's first: after Megatron's arguments, or, where
    the log lacks them, off the multiples of the interval, at which all other lines are.
    """
    if len(records) < 2 or records[0].is_first or records[1].is_first:
        return
    interval = records[1].iteration - records[0].iteration
    covered = interval if records[0].iteration % interval == 0 else 1
    records[0] = replace(records[0], num_iterations=covered)


def _note_nan(records: list[Iteration]) -> None:
    """Give records the loss NaN that Megatron left out: it prints a mean only where it is >= 0.

    Other lines have no loss for another reason: all lines of a log whose loss has another name,
    one that is cut off, and one whose iterations were all skipped.
    """
    if any(record.loss is not None for record in records):
        for record in records:
            if record.loss is None and record.values.get(SKIPPED) == 0:
                record.values[LOSS] = math.nan


def _cover_kept(records: list[Iteration], lost: dict[int, Iteration]) -> None:
    """Let the first record of an attempt cover what the one before ran after its last line.

    Log interval 10, stopped at 25, where a checkpoint was saved:

        lines     1    10    20         | 26    30    40
        records   1  2-10 11-20         | 21-26 27-30 31-40

    Args:
        records: get these records in place of those of single iterations.
        lost: by a record's iteration, the line that it came in place of, whose time is that of
            the iterations before a restart. Where there is none it is the nearest line's.
    """
    for place in range(1, len(records)):
        record, before = records[place], records[place - 1].iteration
        kept = record.iteration - record.num_iterations - before
        if kept <= 0:
            continue
        nearest = (*reversed(records[:place]), *records[place + 1 :])
        usual = next((each for each in nearest if not each.is_first), record)
        total_ms = kept * lost.get(record.iteration, usual).elapsed_ms
        total_ms += record.num_iterations * record.elapsed_ms
        count = kept + record.num_iterations
        records[place] = replace(_paced(record, total_ms / count), num_iterations=count)


def _add_ours(
    run: RunLog, ours: dict[int, dict[str, float]], iteration: int, values: dict[str, float]
) -> None:
    """Put SkyLadder's own line to the trainer's of the same iteration, before or after it."""
    if run.iterations and run.iterations[-1].iteration == iteration:
        run.iterations[-1].values.update(values)
    else:
        ours[iteration] = values


def _log_interval(run: RunLog) -> int:
    """Return how many iterations a line covers, as Megatron's arguments say."""
    text = run.settings.get("log_interval", "")
    return int(text) if text.isdigit() and int(text) else 1


def _iteration(match: re.Match[str], run: RunLog) -> Iteration | None:
    """Return the record of a line; None where it does not say how far training is.

    Args:
        match: of the line.
        run: as far as it has been read.
    """
    values = _numbers(match[4])
    samples = values.pop("consumed samples", 0.0)
    elapsed_ms = values.pop("elapsed time per iteration (ms)", 0.0)
    if not math.isfinite(samples):
        return None
    if values.get(LOSS) == 0 and values.get(SKIPPED):
        del values[LOSS]  # the mean of none: every iteration was skipped
    return Iteration(
        iteration=int(match[2]),
        consumed_samples=int(samples),
        num_iterations=1,
        elapsed_ms=elapsed_ms if math.isfinite(elapsed_ms) else 0.0,
        values=values,
        time=datetime.fromisoformat(match[1].strip()) if match[1] else None,
        num_gpus=run.num_gpus,
        seq_length=run.seq_length,
    )


def _numbers(fields: str) -> dict[str, float]:
    """Parse ``name: 1.5 | other name: nan |``; what is not a number is left out."""
    numbers = {}
    for part in fields.split("|"):
        name, _, text = part.rpartition(":")
        try:
            numbers[sys.intern(name.strip())] = float(text)  # the same names in every line
        except ValueError:
            continue
    return numbers


def _drop_from(run: RunLog, validations: _Validations, iteration: int) -> Iteration | None:
    """Leave out what an earlier attempt logged from this iteration on; return its first record."""
    dropped = None
    while run.iterations and run.iterations[-1].iteration >= iteration:
        dropped = run.iterations.pop()
    while validations and next(reversed(validations))[0] >= iteration:
        validations.popitem()
    return dropped


def _without(first: Iteration, record: Iteration) -> Iteration:
    """Take the attempt's first iteration out of the means of the line after it."""
    count = record.num_iterations + 1
    elapsed = (count * record.elapsed_ms - first.elapsed_ms) / record.num_iterations
    record = _paced(record, max(0.0, elapsed))
    skipped = first.values.get(SKIPPED) or record.values.get(SKIPPED)
    if record.loss is not None and first.loss is not None and not skipped:
        record.values[LOSS] = (count * record.loss - first.loss) / record.num_iterations
    return record


def _paced(record: Iteration, elapsed_ms: float) -> Iteration:
    """Return a record whose iterations took another time; its rates are of the same work."""
    values = dict(record.values)
    for name in RATES:
        if name in values and elapsed_ms > 0:
            values[name] *= record.elapsed_ms / elapsed_ms
    return replace(record, elapsed_ms=elapsed_ms, values=values)


def _add_validation(validations: _Validations, match: re.Match[str]) -> None:
    """Add a line's losses at the end, in the place of those of the same iteration and dataset."""
    dataset = ("test" if match[3] == "test" else "validation") + match[1]
    numbers = _numbers(match[4])
    values = {name[: -len(_VALUE)]: x for name, x in numbers.items() if name.endswith(_VALUE)}
    key = int(match[2]), dataset
    validations.pop(key, None)
    validations[key] = Validation(*key, values)


def _note_setting(run: RunLog, line: str) -> None:
    if match := _FINGERPRINT.search(line):
        run.schedule = match[1].strip()
    elif match := _PADDED_VOCAB.search(line):
        run.padded_vocab_size = int(match[1])
    elif match := _WORLD_SIZE.search(line):
        run.num_gpus = int(match[1])
    elif match := _SETTING.match(line):
        run.settings[match[1]] = match[2].strip()
