"""The folder of prepared data: one JSONL file per task, and a manifest with their hashes.

DATA/MANIFEST.json            what each file is, from where, how many rows, sha256
DATA/standard/TASK.cf.jsonl   the cloze formulation; .mcf: multiple choice
DATA/long/TASK.jsonl          generated answers; RULER's carry length and tokenizer in the name
"""

from __future__ import annotations

import datetime
import fcntl
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import lock, sha256, write_text

MANIFEST = "MANIFEST.json"
LOCK = ".manifest.lock"
FORMAT = 1


@contextmanager
def whole_file(path: Path) -> Iterator[None]:
    """Name a file that cannot be read to its end; gzip and json do not.

    Raises:
        UsageError: in the place of what they raise.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}. It was cut off, or is another file: fetch it again."
        ) from None


@dataclass(frozen=True)
class Question:
    """One question of a standard task, in one formulation.

    Args:
        id: as its source has it.
        contexts: one text before every choice, or one for each.
        continuations: the choices, each with its leading space.
        gold: the right one's place.
        group: MMLU's subject; None elsewhere.
        sampled: whether it is among the at most 1,000 that OLMES asks.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    group: str | None = None
    sampled: bool = True

    def context(self, choice: int) -> str:
        """Return the text before a choice."""
        return self.contexts[choice if len(self.contexts) > 1 else 0]


@dataclass(frozen=True)
class Prompt:
    """One prompt whose answer is generated.

    Args:
        id: its place, or as its source has it.
        prompt: what the model reads.
        answers: any of them is right, or all of them are asked for: see the task's metric.
        group: the place of the answer in the prompt, for MDQA; None elsewhere.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    group: str | None = None


@dataclass(frozen=True)
class Entry:
    """One file in the manifest.

    Args:
        path: in the folder.
        task: a name in `tasks`.
        rows: lines.
        sha256: of the whole file.
        source: where the rows came from.
        details: what else identifies them, such as RULER's length and tokenizer.
        date: of the preparation.
    """

    path: str
    task: str
    rows: int
    sha256: str
    source: str
    details: dict[str, str] = field(default_factory=dict)
    date: str = ""


class DataFolder:
    """A folder of prepared data.

    Args:
        path: it; need not be there yet.

    Raises:
        UsageError: its manifest is none, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_manifest(path / MANIFEST)

    def is_whole(self, name: str) -> bool:
        """Return whether a file is there as it was prepared."""
        entry = self.entries.get(name)
        path = self.path / name
        return entry is not None and path.is_file() and sha256(path) == entry.sha256

    def write(
        self,
        name: str,
        task: str,
        rows: Iterable[Question | Prompt],
        source: str,
        details: dict[str, str] | None = None,
    ) -> Entry:
        """Write one file and note it; what is there under its name stays until it is whole.

        Several processes may prepare one folder: what they have noted meanwhile is kept.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
        with self._locked():
            write_text(path, "".join(lines))
            entry = Entry(
                path=name,
                task=task,
                rows=len(lines),
                sha256=sha256(path),
                source=source,
                details=details or {},
                date=datetime.date.today().isoformat(),
            )
            self.entries = {**_read_manifest(self.path / MANIFEST), name: entry}
            files = [asdict(self.entries[each]) for each in sorted(self.entries)]
            text = json.dumps({"format": FORMAT, "files": files}, indent=1)
            write_text(self.path / MANIFEST, f"{text}\n")
        return entry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait until no other process writes here."""
        with (self.path / LOCK).open("w") as file:
            lock(file, fcntl.LOCK_EX, self.path)
            yield

    def questions(self, name: str) -> list[Question]:
        """Return the rows of a file of a standard task; errors as for `check`."""
        return [
            Question(
                **{
                    **row,
                    "contexts": tuple(row["contexts"]),
                    "continuations": tuple(row["continuations"]),
                }
            )
            for row in self.lines(name)
        ]

    def prompts(self, name: str) -> list[Prompt]:
        """Return the rows of a file of a generative task; errors as for `check`."""
        return [Prompt(**{**row, "answers": tuple(row["answers"])}) for row in self.lines(name)]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file; errors as for `check`."""
        self.check(name)
        # texts may hold other line ends than JSONL's
        text = (self.path / name).read_bytes().decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    def check(self, name: str) -> None:
        """Make sure that a file is there as it was prepared.

        Raises:
            UsageError: it is not there, or not what was prepared.
        """
        again = f"skyladder evaluate --prepare {self.path}"
        if name not in self.entries:
            raise UsageError(f"{self.path} has no {name}. Prepare it: {again}.")
        path = self.path / name
        if not self.is_whole(name):
            what = "is not what was prepared (its hash differs)" if path.exists() else "is gone"
            raise UsageError(f"{path} {what}. Prepare it anew: {again}.")


def _read_manifest(path: Path) -> dict[str, Entry]:
    """Return what a manifest lists, by path; nothing where it is not there."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        return {each["path"]: Entry(**each) for each in content["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no manifest of prepared data: {error}. Prepare into another folder."
        ) from None
