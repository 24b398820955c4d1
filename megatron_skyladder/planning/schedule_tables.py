"""The tables of docs/schedules.md, from the schedules' and presets' own descriptions.

After a change to one of them:

    python -m megatron_skyladder.planning.schedule_tables docs/schedules.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_skyladder.ladder.flags import flag_of
from megatron_skyladder.ladder.presets import SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import SCHEDULES, all_settings, schedules_with

_BEGIN, _END = "<!-- {} -->", "<!-- end of {} -->"


def schedule_table() -> str:
    """Return the schedules as a Markdown table."""
    rows = [("schedule", "the window", "at step x of a ramp of T steps"), ("---", "---", "---")]
    rows += [(f"`{name}`", kind.summary, kind.formula) for name, kind in SCHEDULES.items()]
    return _markdown(rows)


def parameter_table() -> str:
    """Return what can be set in which schedule, as a Markdown table."""
    rows = [("flag", "for", ""), ("---", "---", "---")]
    for name, setting in all_settings().items():
        having = schedules_with(name)
        missing = [schedule for schedule in SCHEDULES if schedule not in having]
        used_by = ", ".join(having) if len(having) < len(missing) else "all"
        if used_by == "all" and missing:
            used_by = f"all but {', '.join(missing)}"
        rows.append((f"`{flag_of(name)} {setting.metavar}`", used_by, setting.help))
    return _markdown(rows)


def preset_table() -> str:
    """Return the presets as a Markdown table."""
    rows = [("preset", "the window", "source"), ("---", "---", "---")]
    rows += [(f"`{name}`", it.summary, it.source) for name, it in SCHEDULE_PRESETS.items()]
    return _markdown(rows)


TABLES = {"schedules": schedule_table, "parameters": parameter_table, "presets": preset_table}


def with_tables(text: str) -> str:
    """Return a page with the tables between their marks made anew.

    Raises:
        ValueError: a mark is missing.
    """
    for name, make in TABLES.items():
        begin, end = _BEGIN.format(name), _END.format(name)
        if begin not in text or end not in text:
            raise ValueError(f"the page has no lines {begin!r} and {end!r}. Put them in.")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
