"""The report as one HTML page that needs no other file, and its pictures as PNG files."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from megatron_skyladder.report.benchmarks import section as section_of_benchmarks
from megatron_skyladder.report.curves import Run
from megatron_skyladder.report.drawing import colour_of
from megatron_skyladder.report.pictures import PICTURES, Picture
from megatron_skyladder.report.tables import (
    Row,
    all_settings,
    differing_settings,
    main_settings,
    stability_rows,
    summary,
)

PAGE = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
p, li { max-width: 48rem } .note { color: #666; font-size: .85rem }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.2rem .25rem 0;
         border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere }
th { font-weight: 600 } th:first-child { min-width: 10rem } td.note { border: 0 }
.scroll { overflow-x: auto }
"""

_INTRODUCTION = """
<p>Pretraining with SkyLadder: rows of text stay as long as ever, but attention looks only across
a window of tokens that grows over the run until it spans the row (arXiv:2503.15450). Short windows
make the early steps cheaper. This page compares what was logged.</p>
"""


def write_report(runs: list[Run], folder: Path, evaluation: Path | None = None) -> list[Path]:
    """Write the page and its pictures.

    Args:
        runs: the first is what the others are compared with.
        folder: made if it is not there; files of an earlier report are replaced.
        evaluation: a folder of ``skyladder evaluate``, for a section with its table.

    Returns:
        The files, the page first.
    """
    benchmarks = None if evaluation is None else section_of_benchmarks(evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(picture, _png(picture, runs)) for picture in PICTURES]
    pictures = [(picture, png) for picture, png in drawn if png is not None]
    files = [folder / PAGE]
    _write(files[0], _page(runs, pictures, benchmarks).encode())
    for picture, png in pictures:
        files.append(folder / f"{picture.name}.png")
        _write(files[-1], png)
    return files


def _png(picture: Picture, runs: list[Run]) -> bytes | None:
    figure = picture.draw(runs)
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _page(
    runs: Sequence[Run], pictures: Sequence[tuple[Picture, bytes]], benchmarks: str | None
) -> str:
    names = ", ".join(run.name for run in runs)
    sections = [
        f"<h1>SkyLadder: {escape(names)}</h1>",
        _INTRODUCTION,
        "<h2>In short</h2>",
        _table(summary(runs), runs),
        *([] if benchmarks is None else [benchmarks]),
        *(_section(picture, png) for picture, png in pictures),
        "<h2>Stability in figures</h2>",
        "<p>The four figures of the paper's Table 9, over all log lines of the run; lower is "
        "calmer. They depend on the log interval and the batch: compare runs with the same.</p>",
        _table(stability_rows(runs), runs),
        *_settings(runs),
        f'<p class="note">Made by skyladder report on {datetime.now():%d %B %Y}. '
        "Logs: " + ", ".join(escape(str(run.log.path)) for run in runs) + "</p>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>SkyLadder: {escape(names)}</title><style>{_STYLE}</style></head>\n"
        "<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _section(picture: Picture, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{escape(picture.title)}</h2>\n<p>{escape(picture.caption)}</p>\n"
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.title)}">'
    )


def _settings(runs: Sequence[Run]) -> list[str]:
    if not any(run.log.settings for run in runs):
        return []
    parts = ["<h2>Settings</h2>"]
    differing = differing_settings(runs)
    if len(runs) > 1:
        parts.append("<p>In which the runs differ, places on the disk left out:</p>")
        parts.append(_table(differing, runs) if differing else "<p>None.</p>")
        parts.append("<p>What else matters:</p>")
    different = {row.label for row in differing} if len(runs) > 1 else set()
    same = [row for row in main_settings(runs) if row.label not in different]
    everything = all_settings(runs)
    parts += [
        _table([Row(row.label, row.cells[:1]) for row in same], []),
        f"<details><summary>All {len(everything)} arguments</summary>",
        _table(everything, runs),
        "</details>",
    ]
    return parts


def _table(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """Return a table with a column for each run, or without a head where there are no runs."""
    heads = "".join(
        f'<th style="color:{colour_of(index)}">{escape(run.name)}</th>'
        for index, run in enumerate(runs)
    )
    lines = [f"<tr><th></th>{heads}</tr>"] if runs else []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
        note = f'<td class="note">{escape(row.note)}</td>' if row.note else ""
        lines.append(f"<tr><th>{escape(row.label)}</th>{cells}{note}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"
