"""``skyladder evaluate MODEL...``: each model through each task, from prepared data alone.

OUT/MODEL/results/TASK....json    a task that is done; it is not run again
OUT/MODEL/exported/               the model, where it was a Megatron checkpoint
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_skyladder.data.identity import digest
from megatron_skyladder.data.sources import InputFile
from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import reading, results, ruler
from megatron_skyladder.evaluation.data import DataFolder
from megatron_skyladder.evaluation.results import Result
from megatron_skyladder.evaluation.tasks import (
    CHOICES,
    CLOZE,
    FORMULATIONS,
    GENERATIVE,
    RACE,
    RULER,
    STANDARD,
    STANDARD_TOKENS,
    SUITES,
    TITLES,
    Normalization,
)

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
EXPORTED = "exported"
GENERATED = "generated"
WAIT_SECONDS = 5.0  # between looks at another process's export


@dataclass(frozen=True)
class Settings:
    """What to ask, and how.

    Args:
        tasks: of ``SUITES``, or names of tasks.
        length: tokens of RULER's rows and of the model's input in the long tasks.
        full: all questions instead of the at most 1,000 of OLMES, and 100 of RULER.
        limit: the first so many of each task, to try things out.
        backend: hf or vllm.
        batch_size: a number, or auto.
        device: cuda or cpu.
    """

    tasks: tuple[str, ...] = SUITES
    length: int = 8192
    full: bool = False
    limit: int | None = None
    backend: str = "hf"
    batch_size: str = "auto"
    device: str = "cuda"

    @property
    def asked(self) -> str:
        """How questions are chosen, for the names of files."""
        if self.limit is not None:
            return f"first{self.limit}"
        return "full" if self.full else "sampled"

    def choose(self, task: str, rows: list[Any]) -> list[Any]:
        """Return the rows that are asked."""
        if self.limit is not None:
            return rows[: self.limit]
        if self.full:
            return rows
        if task in RULER:
            return rows[: ruler.ASKED]
        return [row for row in rows if getattr(row, "sampled", True)]


@dataclass(frozen=True)
class Job:
    """One task of one model.

    Args:
        task: a name in `tasks`.
        length: of `Settings`, where it decides what the model reads; None for standard tasks.
        files: of the data folder, by formulation.
    """

    task: str
    length: int | None
    files: dict[str, str]

    @property
    def max_length(self) -> int:
        """Tokens of input at most; what is longer loses its beginning."""
        return self.length or STANDARD_TOKENS


def go_offline() -> None:
    """Keep the libraries from looking anything up; before they are imported."""
    for name in OFFLINE:
        os.environ[name] = "1"


def folders_of(models: list[Path]) -> dict[str, Path]:
    """Return a short name for each model: the last part of its path that tells them apart.

    Raises:
        UsageError: one is not there, or two are the same.
    """
    for model in models:
        if not model.is_dir():
            raise UsageError(f"{model} is no folder. Give Hugging Face folders or checkpoints.")
    parts = [model.resolve().parts for model in models]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(each[-depth:]).strip("/").replace("/", "") for each in parts]
        if len({*names}) == len(names):
            return dict(zip(names, models, strict=True))
    raise UsageError(f"a model is given twice: {', '.join(map(str, models))}.")


def exported(model: Path, out: Path, report: Callable[[str], None]) -> Path:
    """Return a Hugging Face folder of a model: itself, or what it is exported to.

    Where another process is exporting it, as tasks of one job array do, that one is waited for.
    """
    if (model / "config.json").is_file():
        return model
    from megatron_skyladder.hugging_face.exporting import export
    from megatron_skyladder.hugging_face.output import InUseError

    waiting = False
    while True:
        try:
            return export(model, out / EXPORTED).folder
        except InUseError as error:
            if not waiting:
                report(f"waiting for another process: {error}")
            waiting = True
            time.sleep(WAIT_SECONDS)


def jobs(
    data: DataFolder, settings: Settings, tokenizer: str, report: Callable[[str], None]
) -> list[Job]:
    """Return the tasks that are wanted, in order; those of a suite as far as there is data.

    Args:
        data: what was prepared.
        settings: what to ask.
        tokenizer: of `ruler.tokenizer_hash`.
        report: gets a line for each task of a suite, but standard, that was not prepared.

    Raises:
        UsageError: the data for a task was not prepared, or a name is unknown.
    """
    known = (*SUITES, *CHOICES, *GENERATIVE)
    unknown = [name for name in settings.tasks if name not in known]
    if unknown:
        raise UsageError(f"--tasks {unknown[0]} is unknown. Choose of: {', '.join(known)}.")
    found: list[Job] = []
    optional: list[Job] = []
    for name in STANDARD:
        if "standard" in settings.tasks or name in settings.tasks:
            files = {each: f"standard/{name}.{each}.jsonl" for each in FORMULATIONS}
            found.append(Job(name, None, files))
    for name, task in GENERATIVE.items():
        if not (name in settings.tasks or task.suite in settings.tasks):
            continue
        file = f"{task.suite}/{name}.jsonl"
        if name in RULER:
            file = ruler.file_name(name, settings.length, tokenizer)
        optional.append(Job(name, settings.length, {GENERATED: file}))
    if RACE.name in settings.tasks or "reading" in settings.tasks:
        optional.append(Job(RACE.name, settings.length, {CLOZE: reading.RACE_PATH}))
    for job in optional:
        (file,) = job.files.values()
        if job.task in settings.tasks or file in data.entries:
            found.append(job)
        else:  # not everything can be had everywhere
            report(f"{TITLES[job.task]}: left out, as {data.path} has no {file}")
    for job in found:
        for file in job.files.values():
            data.check(file)
    return found


def evaluate(
    name: str,
    model: Path,
    out: Path,
    data: DataFolder,
    settings: Settings,
    report: Callable[[str], None],
    on_task: Callable[[int, int], None] = lambda done, tasks: None,
) -> list[Result]:
    """Evaluate one model on all tasks that are not done yet; return all results of this model.

    Args:
        name: of the model, in tables.
        model: a Hugging Face folder or a checkpoint.
        out: the folder of this model's results.
        data: what was prepared.
        settings: what to ask.
        report: gets a line for each task.
        on_task: called with how many tasks are done and how many there are, before each.
    """
    go_offline()
    folder = exported(model, out, report)
    weights = identity_of(folder)
    todo = jobs(data, settings, ruler.tokenizer_hash(folder), report)
    done = {(each.task, each.length, each.asked): each for each in results.read(out)}
    loaded: tuple[int, Any] | None = None
    began, ran = time.monotonic(), 0
    for number, job in enumerate(todo, start=1):
        on_task(number - 1, len(todo))
        known = done.get((job.task, job.length, settings.asked))
        if known is not None and (known.data, known.weights) == (_hashes(data, job), weights):
            report(f"{name}: {number}/{len(todo)} {_line(known)} (done before)")
            continue
        if loaded is None or loaded[0] != job.max_length:
            loaded = None  # frees the other one first
            loaded = job.max_length, _load(folder, job, settings)
        result = _ask(name, job, data, settings, loaded[1], weights)
        results.write(out, result)
        ran += 1
        left = (time.monotonic() - began) / ran * (len(todo) - number)
        more = f"; about {_minutes(left)} left" if number < len(todo) else ""
        report(f"{name}: {number}/{len(todo)} {_line(result)} ({_minutes(result.seconds)}{more})")
    return [each for each in results.read(out) if each.weights == weights]


def identity_of(folder: Path) -> str:
    """Return a short text that changes with a model's weights, settings or tokenizer.

    Small files are read whole, of large ones a sample.
    """
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".md" and not path.name.startswith(".")
    ]
    return digest([InputFile(path, path.name, "", path.stat().st_size) for path in paths])


def _load(folder: Path, job: Job, settings: Settings) -> Any:
    from megatron_skyladder.evaluation import engine

    return engine.load(
        folder,
        settings.backend,
        max_length=job.max_length,
        batch_size=settings.batch_size,
        device=settings.device,
    )


def _ask(
    name: str, job: Job, data: DataFolder, settings: Settings, model: Any, weights: str
) -> Result:
    from megatron_skyladder.evaluation import engine

    began = time.monotonic()
    scores: dict[str, list[float]] = {}
    rows: list[Any] = []
    for formulation, file in job.files.items():
        if job.task in CHOICES:
            task = CHOICES[job.task]
            rows = settings.choose(job.task, data.questions(file))
            rule = task.cloze if formulation == CLOZE else Normalization.NONE
            asked: Any = engine.OlmesTask(f"{job.task}_{formulation}", rows, rule)
        else:
            rows = settings.choose(job.task, data.prompts(file))
            asked = engine.GeneratedTask(GENERATIVE[job.task], rows)
        scores[formulation] = engine.scores(model, asked)
    return Result(
        model=name,
        task=job.task,
        length=job.length,
        asked=settings.asked,
        scores=scores,
        ids=[row.id for row in rows],
        groups=[row.group for row in rows],
        data=_hashes(data, job),
        weights=weights,
        seconds=time.monotonic() - began,
        versions=_asked_by(settings),
    )


def _hashes(data: DataFolder, job: Job) -> dict[str, str]:
    return {file: data.entries[file].sha256 for file in job.files.values()}


def _line(result: Result) -> str:
    each = ", ".join(f"{100 * result.score(key):.1f} {key}" for key in result.scores)
    return f"{result.title}: {result.percent:.1f} % of {len(result.ids):,} ({each})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _asked_by(settings: Settings) -> dict[str, str]:
    packages = [
        "lm_eval",
        "transformers",
        "torch",
        *(["vllm"] if settings.backend == "vllm" else []),
    ]
    versions = {each: _version(each) for each in packages}
    return {"backend": settings.backend, "device": settings.device, **versions}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
