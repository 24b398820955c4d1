"""What a check found, as one HTML page with its pictures in it."""

from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_skyladder import files
from megatron_skyladder.gpu_check.phases import PHASES, failures

PAGE = "check.html"


def write_page(report: dict[str, Any], folder: Path) -> Path:
    """Write the page and return its path; without matplotlib it has no pictures."""
    rows = report["phases"].get("timings", {}).get("figures", {}).get("rows", [])
    lengths = sorted({row["seq_length"] for row in rows})
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "heads": _heads}
    text = environment.get_template("page.html").render(
        report=report,
        wrong=failures(report),
        phases=PHASES,
        pictures=[_picture(rows, length) for length in lengths] if _can_draw() else [],
    )
    page = folder / PAGE
    files.write_text(page, text)
    return page


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _heads(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _picture(rows: list[dict[str, Any]], length: int) -> str:
    """Draw time against the window (measured, by FLOPs, by tiles, stock), PNG in base64."""
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
    stock = reference.get("stock_ms")
    if stock:
        axes.axhline(stock, color="#000000", linewidth=0.8, label="stock, full window")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.2 * max(stock or 0, *(row["ms"] for row in here)))
    axes.legend(frameon=False, fontsize=8)
    label(axes, f"Attention of a layer, {length:,} tokens", "window, tokens", "ms, both passes")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
