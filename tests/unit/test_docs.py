"""The documentation: its tables are the code's, links lead somewhere, the front door is short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_skyladder.study import page as study_page
from megatron_skyladder.study import settings

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))
import write_tables  # noqa: E402

PAGES = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/*.md"),
    *REPOSITORY.glob("tests/*/README.md"),
    *REPOSITORY.glob("slurm/*.md"),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target in LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            lost.append(target)
    assert not lost


def test_tables_are_the_codes() -> None:
    done = subprocess.run(
        [sys.executable, "tools/write_tables.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"run python tools/write_tables.py: {done.stdout}{done.stderr}"


def test_the_studys_page_is_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = Path("examples/study.ini")
    study = settings.read(config)
    picture = (study.records / study_page.PICTURE).relative_to(study.page.parent)
    text = study_page.page(study_page.read(study), config, str(picture))
    assert text == study.page.read_text("utf-8"), "run skyladder study --write"


def test_a_page_with_a_wrong_mark_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no table 'windws'\. There are: schedules, "):
        write_tables.with_tables("<!-- windws -->\n<!-- end of windws -->\n")
    with pytest.raises(ValueError, match="the page has no line '<!-- end of presets -->' after"):
        write_tables.with_tables("# Presets\n\n<!-- presets -->\n")


def test_the_front_door_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_page_is_in_the_site() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    for page in REPOSITORY.glob("docs/*.md"):
        assert page.name == "index.md" or f"\n{page.stem}\n" in index, page.name


def test_messages_are_found_and_readable() -> None:
    """Of each part some; what a run fills in is dots."""
    text = write_tables.message_list()
    assert all(f"## {title}\n" in text for title in write_tables.MESSAGE_FOLDERS.values())
    assert "- --skyladder-alpha=... and --skyladder-expand-fraction=... both set the rate." in text
    assert "$start" not in text and "\n- $" not in text  # names as people type them
