"""The report as one HTML page that needs no other file, no server and no network."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_skyladder import files
from megatron_skyladder.report import drawing, tables
from megatron_skyladder.report.benchmarks import read_benchmarks
from megatron_skyladder.report.curves import Run
from megatron_skyladder.report.groups import group_runs
from megatron_skyladder.report.panels import runs_of
from megatron_skyladder.report.pictures import PICTURES
from megatron_skyladder.report.sentences import sentences

PAGE = "report.html"


def write_report(runs: list[Run], folder: Path, evaluation: Path | None = None) -> Path:
    """Write the page and return its file.

    Args:
        runs: the first is what the others are compared with.
        folder: made if it is not there; an earlier report is replaced.
        evaluation: a folder of ``skyladder evaluate``, for a section with its table.
    """
    benchmarks = None if evaluation is None else read_benchmarks(evaluation)
    groups = group_runs(runs)
    runs = runs_of(groups)
    drawn = [(picture, picture.draw(groups)) for picture in PICTURES]
    shown = [(picture, panels) for picture, panels in drawn if panels]
    script, places = drawing.draw([panels for _, panels in shown])
    has_settings = any(run.log.settings for run in runs)
    differing = tables.differing_settings(runs) if len(runs) > 1 else []
    different = {row.label for row in differing}
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        runs=runs,
        groups=groups,
        colours=[
            drawing.colour_of(place) for place, group in enumerate(groups) for _ in group.runs
        ],
        colour_of=drawing.colour_of,
        sentences=sentences(groups, [picture.name for picture, _ in shown]),
        titles={picture.name: picture.title for picture, _ in shown},
        summary=tables.summary(runs),
        benchmarks=benchmarks,
        pictures=[
            (picture, list(zip(panels, map(Markup, divs), strict=True)))
            for (picture, panels), divs in zip(shown, places, strict=True)
        ],
        stability=tables.stability_rows(runs),
        schedules=tables.schedule_settings(runs),
        has_settings=has_settings,
        differing=differing,
        same=[
            tables.Row(row.label, row.cells[:1])
            for row in tables.main_settings(runs)
            if row.label not in different
        ],
        everything=tables.all_settings(runs),
        library=Markup(drawing.library() if places else ""),
        script=Markup(script),
        date=f"{datetime.now():%d %B %Y}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / PAGE, text)
    return folder / PAGE
