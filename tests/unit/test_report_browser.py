"""The report's page in a real browser: nothing is fetched, nothing fails, nothing is cut off."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_logs import write_log

from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.report.curves import load_runs

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("bokeh")
page_module = pytest.importorskip("megatron_skyladder.report.page")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here (make browser installs it)"),
]
LEGIBLE = 12  # pixels


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_log(folder / "constant" / "train.log", WindowSchedule(schedule="constant"))
    write_log(folder / "ladder-with-a-very-long-name-without-any-space-to-break-at" / "train.log",
              WindowSchedule(alpha="1/8"), advantage=0.03)  # fmt: skip
    for seed in (1, 2, 3):
        log = folder / f"short-seed{seed}" / "train.log"
        write_log(log, WindowSchedule("linear", 8, 8192, alpha="1/4"), advantage=0.01 * seed)
        text = log.read_text().replace("  bf16 ..", f"  seed ..... {seed}\n  bf16 ..")
        log.write_text(text.replace(f"/checkpoints/short-seed{seed}", "/checkpoints/short"))
    runs = sorted(str(path) for path in folder.iterdir())
    runs[0] = f"<b>constant={runs[0]}"
    file: Path = page_module.write_report(load_runs(runs), folder / "report")
    assert file.stat().st_size < 2_000_000
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as session:
        # containers have no user namespaces and little shared memory
        chromium = session.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=[1280, 400])
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    """The page at this width, with what the browser complained about and asked for."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.complaints, page.requests = [], []
    page.on("console", lambda m: m.type in ("error", "warning") and page.complaints.append(m.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.requests.append(asked.url))
    page.goto(report.as_uri())
    page.wait_for_function("window.Bokeh && Bokeh.documents[0] && Bokeh.documents[0].is_idle")
    yield page
    page.close()


def test_nothing_fails_and_nothing_is_fetched(opened: Any, report: Path) -> None:
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]


def test_the_page_is_as_wide_as_the_screen(opened: Any) -> None:
    """Tables may be wider, in a box of their own that scrolls."""
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    cut_off = opened.evaluate(
        """() => [...document.querySelectorAll('h1, h2, h3, p, li, summary, .panel')]
            .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
            .map(e => e.tagName + ': ' + e.textContent.slice(0, 50))"""
    )
    assert cut_off == []
    inside = opened.evaluate(
        """() => [...document.querySelectorAll('.scroll')].filter(e =>
            e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX != 'auto').length"""
    )
    assert inside == 0


def test_text_is_large_enough(opened: Any) -> None:
    smallest = opened.evaluate(
        """() => Math.min(...[...document.body.querySelectorAll('h3, p, li, td, th, small, span')]
            .filter(e => e.textContent.trim())
            .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= LEGIBLE
    labels = opened.evaluate(
        """() => [...Bokeh.documents[0]._all_models.values()]
            .filter(m => m.type.endsWith('Axis'))
            .flatMap(m => [m.major_label_text_font_size, m.axis_label_text_font_size])
            .map(size => parseFloat(size.value ?? size))"""
    )
    assert labels and min(labels) >= LEGIBLE


def test_no_picture_is_cut_off(opened: Any) -> None:
    """Labels are drawn, not written: one that is cut off leaves ink at the edge of its canvas."""
    from PIL import Image

    panels = opened.locator(".panel .bk-Figure").all()
    assert len(panels) > 15
    for panel in panels:
        shot = np.asarray(Image.open(io.BytesIO(panel.screenshot())).convert("L"))
        assert shot.min() < 128, "an empty picture"
        for edge in (shot[:, :2], shot[:, -2:], shot[-2:, :]):
            assert edge.min() > 240


def test_names_along_an_axis_do_not_touch(opened: Any) -> None:
    """Of the panels by position, whose names are the longest: white lies between the names."""
    from PIL import Image

    panel = opened.locator("#loss-by-length ~ .panels").first.locator(".bk-Figure").nth(1)
    box = panel.bounding_box()
    names = opened.evaluate(
        """() => [...Bokeh.documents[0]._all_models.values()]
            .filter(m => m.major_label_overrides?.size).map(m => m.major_label_overrides.size)"""
    )
    shot = np.asarray(Image.open(io.BytesIO(panel.screenshot())).convert("L"))
    strip = shot[-42:-24, :]  # the line of tick labels, above the axis' own
    ink = np.flatnonzero((strip < 200).any(axis=0))
    words = 1 + int((np.diff(ink) > 9).sum())
    assert words == names[1], (words, box)


def test_a_picture_is_zoomed_and_read_at_a_point(opened: Any) -> None:
    panel = opened.locator("#validation-loss ~ .panels").first.locator(".bk-Figure").first
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    middle = box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"]
    opened.mouse.move(*middle, steps=3)
    read = opened.locator(".bk-tooltip-content").first
    read.wait_for(timeout=5000)
    lines = read.inner_text().split("\n")
    assert [line.split(" ", 2)[2][:12] for line in lines[:3]] == [
        "<b>constant",
        "ladder-with-",
        "short (3 see",
    ]
    assert all(2 < float(line.split(" ")[1]) < 3 for line in lines[:3])
    assert lines[3].endswith("training tokens (billions)") and 50 < float(lines[3].split()[0]) < 80
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    ends = "() => { const r = Bokeh.documents[0].roots().map(f => f.x_range.end); return r }"
    before = opened.evaluate(ends)
    opened.mouse.down()
    opened.mouse.move(middle[0] + 0.2 * box["width"], middle[1] + 30, steps=5)
    opened.mouse.up()
    changed = [one != other for one, other in zip(before, opened.evaluate(ends), strict=True)]
    assert sum(changed) == 1  # of the panels of this picture none other has the same axis
