"""What ``skyladder evaluate`` found, as a section of the report: its table and its picture."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.errors import UsageError

RESULTS, PICTURE = "results.json", "results.svg"


@dataclass(frozen=True)
class Benchmarks:
    """The section: a note, the table with its head, the picture in base64 if there is one."""

    note: str
    head: list[str]
    lines: list[list[str]]
    picture: str


def read_benchmarks(folder: Path) -> Benchmarks:
    """Return the section for a folder that ``skyladder evaluate --out`` wrote.

    Raises:
        UsageError: it holds no results.
    """
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        head, *lines = [[str(cell) for cell in line] for line in found["cells"]]
        note = str(found["note"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / RESULTS} cannot be read ({error}). Give the folder that skyladder evaluate "
            "--out names."
        ) from None
    picture = folder / PICTURE
    data = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    return Benchmarks(note, head, lines, data)
