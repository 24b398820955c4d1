"""What ``skyladder evaluate`` found, as a section of the report: its table and its picture."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from megatron_skyladder.errors import UsageError

RESULTS, PICTURE = "results.json", "results.svg"


def section(folder: Path) -> str:
    """Return the section for a folder that ``skyladder evaluate --out`` wrote.

    Raises:
        UsageError: it holds no results.
    """
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        head, *lines = found["cells"]
        table = "\n".join([_line("th", head), *(_line("td", line) for line in lines)])
        note = escape(found["note"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / RESULTS} cannot be read ({error}). Give the folder that skyladder evaluate "
            "--out names."
        ) from None
    parts = ["<h2>Benchmarks</h2>", f"<p>{note}</p>"]
    parts.append(f'<div class="scroll"><table>\n{table}\n</table></div>')
    picture = folder / PICTURE
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img src="data:image/svg+xml;base64,{data}" alt="Benchmarks">')
    return "\n".join(parts)


def _line(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
