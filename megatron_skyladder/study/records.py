"""What is kept of a finished run: one JSON file, small enough for the repository."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_skyladder import __version__
from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import write_text
from megatron_skyladder.report.runlog import Iteration, read_run
from megatron_skyladder.study import commands
from megatron_skyladder.study.settings import Copying, Planned, Study
from megatron_skyladder.study.training import Training, read_rows, step_seconds

CORPUS, FAILURES, SUFFIX = "corpus.json", "failures.jsonl", ".json"
POINTS = 200
INSTRUCTIONS = "instructions"  # for products of matrices: the widest that a machine has
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # as Linux names them
_BEFORE = Copying(span=32, samples=64)  # of records that do not say, all of one study


@dataclass(frozen=True)
class Checked:
    """One validation.

    Args:
        iteration: after which it ran.
        loss: whole sequences visible, nats per token.
        by_length: loss under blocked windows of so many tokens, on fewer sequences. Each validation
            takes the next sequences: compare runs at the same step only.
        seconds: CPU time of training until then; None where the machine did not say.
    """

    iteration: int
    loss: float
    by_length: dict[int, float]
    seconds: float | None = None


@dataclass(frozen=True)
class Copied:
    """How well a model repeats random tokens from one distance.

    Args:
        accuracy: share of the tokens that were likeliest, 0 to 1.
        loss: nats per token.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Record:
    """A finished run.

    Args:
        arm: its name in the study's file.
        seed: of weights and data order.
        is_sweep: whether it tried a setting, and is no arm of the comparison.
        command: words after ``python``, relative to the study's folder.
        schedule: as SkyLadder logged it.
        steps: of training.
        step_tokens: tokens of a step.
        curve: at most `POINTS` of (step, mean training loss of the steps since the point before,
            window of the step).
        validations: ascending.
        copying: by distance in tokens.
        losses: of the trained model on all held-out text, by context length in tokens; the longest
            is the whole sequence. Empty where only its training counts.
        events: starts, stops and failures, with their times.
        machine: processor and versions.
        corpus: what identifies the text.
        is_timing: whether it measured how long a step takes, and is no arm either.
        step_seconds: CPU time of each step, where that is what the run is for; of a step that was
            not timed, that of its neighbours.
        copying_test: what the study said of copying when it was measured.
    """

    arm: str
    seed: int
    is_sweep: bool
    command: list[str]
    schedule: str
    steps: int
    step_tokens: int
    curve: list[tuple[int, float, int | None]]
    validations: list[Checked]
    copying: dict[int, Copied] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    corpus: str = ""
    is_timing: bool = False
    step_seconds: list[float] = field(default_factory=list)
    copying_test: Copying = field(default_factory=Copying)

    @property
    def is_compared(self) -> bool:
        """Whether it is an arm of the comparison."""
        return not (self.is_sweep or self.is_timing)

    @property
    def name(self) -> str:
        """As `Planned.name`."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.steps * self.step_tokens

    @property
    def is_whole(self) -> bool:
        """Whether all is there that the run is for."""
        return bool(self.losses) or not self.is_compared

    @property
    def loss(self) -> float:
        """Of the trained model on all held-out text, whole sequences visible."""
        return self.losses[max(self.losses)]

    @property
    def last(self) -> Checked:
        """The last validation."""
        return self.validations[-1]

    @property
    def seconds(self) -> float | None:
        """CPU time of training, validation and checkpoints left out."""
        return self.last.seconds


@dataclass(frozen=True)
class Measured:
    """What a trained model can do.

    Args:
        losses: see `Record`.
        copying: see `Record`.
        copying_test: see `Record`.
    """

    losses: dict[int, float] = field(default_factory=dict)
    copying: dict[int, Copied] = field(default_factory=dict)
    copying_test: Copying = field(default_factory=Copying)

    @classmethod
    def read(cls, path: Path, copying_test: Copying) -> Measured:
        """Read what `measuring` wrote when it was asked for this test."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(_by_number(values["losses"]), _copied(values["copying"]), copying_test)


def record_of(training: Training, measured: Measured) -> Record:
    """Return the record of a run that is complete.

    Raises:
        ValueError: its log does not show a whole run.
    """
    planned: Planned = training.planned
    log = read_run(training.log)
    by_step = {record.iteration: record for record in log.iterations}
    missing = [step for step in range(1, planned.train_iters + 1) if step not in by_step]
    spent = step_seconds(read_rows(training.folder / "steps.jsonl"), planned.train_iters)
    checked = [
        Checked(
            record.iteration,
            record.loss,
            record.by_length,
            None if spent is None else round(sum(spent[: record.iteration]), 1),
        )
        for record in log.validations
        if record.loss is not None and record.dataset == "validation"
    ]
    lacks = [f"step {missing[0]}"] if missing else []
    if len(missing) > 1:
        lacks = [f"{len(missing)} steps from {missing[0]} to {missing[-1]}"]
    if not checked or checked[-1].iteration != planned.train_iters:
        lacks.append("the last validation")
    if lacks:
        raise ValueError(
            f"{training.log} lacks {' and '.join(lacks)}, so the run has no record. Move "
            f"{training.folder} away to train it anew."
        )
    return Record(
        arm=planned.arm,
        seed=planned.seed,
        is_sweep=planned.is_sweep,
        command=training.command(),
        schedule=log.schedule or "SkyLadder off",
        steps=planned.train_iters,
        step_tokens=planned.step_tokens,
        curve=_curve(by_step, planned.train_iters),
        validations=checked,
        copying=measured.copying,
        losses=measured.losses,
        events=read_rows(training.folder / "events.jsonl"),
        machine=machine(),
        corpus=training.corpus,
        is_timing=planned.is_timing,
        step_seconds=spent if planned.is_timing and spent is not None else [],
        copying_test=measured.copying_test,
    )


def _curve(by_step: Mapping[int, Iteration], steps: int) -> list[tuple[int, float, int | None]]:
    every = -(-steps // POINTS)
    points = []
    for end in range(every, steps + 1, every):
        losses = [by_step[step].loss or 0.0 for step in range(end - every + 1, end + 1)]
        points.append((end, round(sum(losses) / every, 5), by_step[end].window))
    return points


def machine() -> dict[str, str]:
    """Return processor and versions, of which a run's speed and rounding depend."""
    found = {**_processor(), "python": platform.python_version()}
    for name in ("torch", "megatron-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "megatron-skyladder": __version__}


def _processor() -> dict[str, str]:
    """Return its name and the widest of its instructions for products, which the name hides."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    found = fields.get("flags", "").split()
    widest = next((it for it in _INSTRUCTIONS if it in found), "")
    return {"processor": name, INSTRUCTIONS: widest}


def _with_instructions(machine: dict[str, str]) -> dict[str, str]:
    """Return a record's machine as `machine` has it: once they stood behind the name."""
    name, _, widest = machine.get("processor", "").rpartition(" with ")
    if widest not in _INSTRUCTIONS:
        return machine
    return {**machine, "processor": name, INSTRUCTIONS: widest}


def write(record: Record, folder: Path) -> Path:
    """Write a record, whole or not at all; columns stand on one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}{SUFFIX}"
    values = asdict(record)
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def read(path: Path) -> Record:
    """Read a record that `write` wrote.

    Raises:
        ValueError: the file is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["validations"] = [
            Checked(**{**it, "by_length": _by_number(it["by_length"])})
            for it in values["validations"]
        ]
        values["curve"] = [tuple(point) for point in values["curve"]]
        values["copying"] = _copied(values["copying"])
        values["losses"] = _by_number(values.get("losses", {}))
        values["copying_test"] = _copying_test(values)
        values["machine"] = _with_instructions(values["machine"])
        return Record(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of a run of the study: {error}") from None


def read_all(folder: Path, order: Sequence[str] = ()) -> list[Record]:
    """Return the records of a folder, in the order of these names, others behind."""
    paths = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.name != CORPUS]
    found = [read(path) for path in paths]
    places = {name: place for place, name in enumerate(order)}
    return sorted(found, key=lambda record: places.get(record.name, len(places)))


def check(found: Sequence[Record], study: Study, folder: Path, corpus: str = "") -> None:
    """Raise where a record is of other flags, other text or another test than the study's.

    Args:
        found: records, by the names of the runs.
        study: what they are to be records of.
        folder: where the records are, for the message.
        corpus: what identifies the text; empty: the text of the first record.

    Raises:
        UsageError: naming the record and what differs.
    """
    planned = {run.name: run for run in study.runs}
    for record in found:
        run = planned.get(record.name)
        if run is None:
            continue
        corpus = corpus or record.corpus
        differs = "other text" if record.corpus != corpus else ""
        command = Training(run, folder, "").command()
        changed = commands.differences(command, record.command, but=commands.FOLDER)
        if changed:
            differs = f"other flags ({', '.join(changed)})"
        if differs:
            raise UsageError(
                f"{folder / record.name}{SUFFIX} is of a run with {differs} than the study's, so "
                "they cannot be compared. Give the arm another name, or move the record and the "
                "run's folder away to train it anew."
            )
        _check_copying(record, study.copying, folder)


def _check_copying(record: Record, wanted: Copying, folder: Path) -> None:
    """Raise where a model was tested otherwise than the page would say."""
    tested = record.copying_test
    if not record.losses or not (tested.distances or wanted.distances):
        return  # not measured, or nothing to test
    now = _copying_lines(wanted)
    then = [line for line in _copying_lines(tested) if line not in now]
    if then:
        raise UsageError(
            f"{folder / record.name}{SUFFIX} was measured with other values in [copying] than the "
            f"study's, so they cannot be compared. Give those of then ({', '.join(then)}), or move "
            "the record away: --run measures the trained model anew, where the run's folder is "
            "still there."
        )


def _copying_lines(copying: Copying) -> list[str]:
    """Return what stands in [copying]; the order of distances decides nothing."""
    distances = " ".join(map(str, sorted(copying.distances)))
    return [f"distances = {distances}", f"span = {copying.span}", f"samples = {copying.samples}"]


def _copying_test(values: Mapping[str, Any]) -> Copying:
    """Return how a record's model was tested, also where an earlier version did not note it."""
    noted = values.get("copying_test")
    if noted is None:
        return replace(_BEFORE, distances=tuple(sorted(values["copying"])))
    return Copying(tuple(noted["distances"]), noted["span"], noted["samples"])


def _copied(values: Mapping[str, Any]) -> dict[int, Copied]:
    return {distance: Copied(**found) for distance, found in _by_number(values).items()}


def _by_number(values: Mapping[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in values.items()}
