"""What a check found, as one HTML page with its pictures in it."""

from __future__ import annotations

import base64
import importlib.util
import io
from html import escape
from pathlib import Path
from typing import Any

from megatron_skyladder.gpu_check.phases import PHASES, failures

PAGE = "check.html"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #e4e4e4 }
img { max-width: 100% } .bad { color: #b00020 }
"""


def write_page(report: dict[str, Any], folder: Path) -> Path:
    """Write the page and return its path; without matplotlib it has no pictures."""
    wrong = failures(report)
    verdict = f"{len(wrong)} failures" if wrong else "passed"
    parts = [
        f"<h1>SkyLadder on {escape(report['device'])}: {verdict}</h1>",
        f"<p>{escape(report['date'])}, torch {escape(report['torch'])}, backends "
        f"{escape(', '.join(report['backends']))}.</p>",
        *(f'<p class="bad">{escape(text)}</p>' for text in wrong),
    ]
    rows = report["phases"].get("timings", {}).get("figures", {}).get("rows", [])
    if rows and importlib.util.find_spec("matplotlib"):
        parts += [_picture(rows, length) for length in sorted({row["seq_length"] for row in rows})]
    for name, entry in report["phases"].items():
        parts.append(f"<h2>{escape(name)}: {escape(PHASES[name].what)}</h2>")
        parts.append(f"<p>{entry['seconds']:g} s, {len(entry['failures'])} failures</p>")
        parts.append(_table(entry["figures"]))
    page = folder / PAGE
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SkyLadder check-gpu'
        f"</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _table(figures: dict[str, Any]) -> str:
    rows = figures.get("rows")
    if rows:
        heads = list(dict.fromkeys(key for row in rows for key in row))
        lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
        lines += ["".join(f"<td>{_cell(row.get(key, ''))}</td>" for key in heads) for row in rows]
    else:
        lines = [f"<th>{escape(k)}</th><td>{_cell(v)}</td>" for k, v in figures.items()]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{escape(str(k))}: {_cell(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "<br>".join(_cell(each) for each in value)
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _picture(rows: list[dict[str, Any]], length: int) -> str:
    """Draw time against the window: measured, by FLOPs, by the kernel's tiles, and stock."""
    from megatron_skyladder.report.images import colour_of, label, make_panels

    figure, ((axes,),) = make_panels(1, 1, (8, 4.5))
    here = [
        row
        for row in rows
        if row["seq_length"] == length and row["micro_batch"] == 1 and row["kind"] != "PACKED"
    ]
    for index, name in enumerate(dict.fromkeys(row["backend"] for row in here), 1):
        own = sorted((row for row in here if row["backend"] == name), key=lambda r: r["window"])
        windows, full = [row["window"] for row in own], own[-1]["ms"]
        colour = colour_of(index)
        axes.plot(windows, [row["ms"] for row in own], color=colour, marker="o", label=name)
        tiles = [full * row["percent_of_tiles"] / 100 for row in own]
        axes.plot(windows, tiles, color=colour, linestyle=":", label=f"{name}, by its tiles")
    reference = own[-1]
    flops = [reference["ms"] * row["percent_of_pairs"] / 100 for row in own]
    axes.plot(windows, flops, color="#999999", linestyle="--", label="by FLOPs")
    axes.axhline(reference["stock_ms"], color="#000000", linewidth=0.8, label="stock, full window")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.2 * max(reference["stock_ms"], *(row["ms"] for row in here)))
    axes.legend(frameon=False, fontsize=8)
    label(axes, f"Attention of a layer, {length:,} tokens", "window, tokens", "ms, both passes")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="window against time" src="data:image/png;base64,{data}">'
