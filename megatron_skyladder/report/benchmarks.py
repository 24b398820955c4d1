"""What ``skyladder evaluate`` found, as a section of the report: its table and its picture."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError

RESULTS, PICTURE = "results.json", "results.svg"


def section(folder: Path) -> str:
    """Return the section for a folder that ``skyladder evaluate --out`` wrote.

    Raises:
        UsageError: it holds no results.
    """
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        table = _table(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / RESULTS} cannot be read ({error}). Give the folder that skyladder evaluate "
            "--out names."
        ) from None
    parts = ["<h2>Benchmarks</h2>", f"<p>{escape(found['note'])}</p>", table]
    picture = folder / PICTURE
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img src="data:image/svg+xml;base64,{data}" alt="Benchmarks">')
    return "\n".join(parts)


def _table(found: dict[str, Any]) -> str:
    names = found["models"]
    has_paper = any(row["paper"] for row in found["rows"])
    heads = ["", *names]
    if len(names) == 2:
        heads += ["difference", "McNemar's p"]
    if has_paper:
        heads += ["paper: constant", "paper: SkyLadder"]
    lines = [_line("th", heads)]
    lines += [_line("td", _cells(row, len(names), has_paper)) for row in found["rows"]]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cells(row: dict[str, Any], models: int, has_paper: bool) -> list[str]:
    cells = [row["title"]]
    cells += [
        f"{score:.1f} ± {error:.1f}"
        for score, error in zip(row["scores"], row["errors"], strict=True)
    ]
    if models == 2:
        cells.append(f"{row['difference']:+.1f} ± {row['difference_error']:.1f}")
        cells.append("" if row["p"] is None else f"{row['p']:.2g}")
    if has_paper:
        cells += [f"{value:.1f}" for value in row["paper"]] if row["paper"] else ["", ""]
    return cells


def _line(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
