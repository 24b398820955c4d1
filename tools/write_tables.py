"""Write the tables of README.md and docs/ that the code itself decides.

    python tools/write_tables.py            write them
    python tools/write_tables.py --check    exit 1 where a page is out of date, naming it

A table stands between two marks, ``<!-- NAME -->`` and ``<!-- end of NAME -->``, on any page.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_skyladder.cli import main as skyladder
from megatron_skyladder.ladder.flags import add_arguments, flag_of
from megatron_skyladder.ladder.kernels import (
    KERNELS,
    Call,
    TransformerEngine,
    value_width,
    why_no_sink,
)
from megatron_skyladder.ladder.presets import SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import SCHEDULES, all_settings, schedules_with
from megatron_skyladder.ladder.settings import SettingError, rename
from megatron_skyladder.study import page as study_page
from megatron_skyladder.study import settings as study_settings
from megatron_skyladder.study import verdicts

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "examples/study.ini"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TOKENS = 100_000_000_000
START, SHARE = 32, 0.64
LENGTHS = (8_192, 32_768, 131_072)
_LLAMA_8B = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --vocab-size 128256 "
    "--untie-embeddings-and-output-weights --attention-dropout 0"
)
MODELS = {"1B": "--preset 1b-8k", "3B": "--preset 3b-8k", "8B": _LLAMA_8B}
# folders and files whose errors a user can meet, in the order of a run
MESSAGE_FOLDERS = {
    "ladder": "Schedules and windows",
    "planning": "`plan`, `compare`, `doctor`, `example`",
    "data": "`prepare`, `inspect`",
    "megatron_lm": "Megatron-LM: starting, patching, resuming",
    "megatron_bridge": "Megatron Bridge",
    "attention": "Attention and kernels",
    "runtime": "While training: the probe, documents, evaluation",
    "cpu": "The CPU engine",
    "slurm": "`slurm`",
    "report": "`report`",
    "hugging_face": "`export-hf`, `import-hf`",
    "evaluation": "`evaluate`",
    "gpu_check": "`check-gpu`",
    "study": "`study`",
    "cli": "Commands",
    "files.py": "Whatever writes files",
}
_NOT_FOR_USERS = {"NotImplementedError", "AssertionError", "AttributeError", "TypeError"}
_HOLE = "..."  # what a run fills in
_SHORTEST = 40  # characters beside holes; below it is a message for programmers
_LONGEST_WORDING = 25  # characters without a hole that an entry has at least somewhere


def schedule_table() -> str:
    """Return the schedules as a Markdown table."""
    rows = [("schedule", "the window", "at step x of a ramp of T steps")]
    rows += [(f"`{name}`", kind.summary, kind.formula) for name, kind in SCHEDULES.items()]
    return _markdown(rows)


def parameter_table() -> str:
    """Return what can be set in which schedule, as a Markdown table."""
    rows = [("flag", "for", "")]
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
    rows = [("preset", "the window", "source")]
    rows += [(f"`{name}`", it.summary, it.source) for name, it in SCHEDULE_PRESETS.items()]
    return _markdown(rows)


def flag_tables() -> str:
    """Return every training flag with its help, a table for each group."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    parts = []
    for group in parser._action_groups:
        rows = [("flag", "")]
        for action in group._group_actions:
            value = f" {action.metavar}" if action.metavar else ""
            rows.append((f"`{action.option_strings[0]}{value}`", str(action.help)))
        if len(rows) > 1:
            parts.append(f"**{group.title}**\n\n{_markdown(rows)}")
    return "\n\n".join(parts)


def value_width_table() -> str:
    """Return what each kernel makes of values that are narrower than keys."""
    devices = {"8.x": (8, 0), "9.x": (9, 0), "10.x, 11.x": (10, 0), "12.x": (12, 0)}
    rows: list[Sequence[str]] = [("keys, values", "kernel", *devices)]
    for key_size, value_size in ((192, 128), (96, 64)):
        for name, kernel in KERNELS.items():
            cells = []
            for device in devices.values():
                width = value_width(name, key_size, value_size, device)
                if device < kernel.capability or width is None:
                    cells.append("no")
                else:
                    cells.append("as they are" if width == value_size else f"padded to {width}")
            rows.append((f"{key_size}, {value_size}", f"`{name}`", *cells))
    return _markdown(rows)


def sink_table() -> str:
    """Return which kernel takes softmax sinks on which device, heads of 128, cuDNN 9.26."""
    devices = {"8.x": (8, 0), "9.x": (9, 0), "10.x, 11.x": (10, 0), "12.x": (12, 0)}
    calls = {"full": Call.FULL, "windows": Call.WINDOWS, "packed": Call.PACKED}
    rows: list[Sequence[str]] = [("kernel", *devices, "`--deterministic-mode`")]
    for name, kernel in KERNELS.items():
        cells = []
        for device in devices.values():
            taken = [
                word
                for word, call in calls.items()
                if device >= kernel.capability and _takes_sink(name, call, device)
            ]
            cells.append("yes" if len(taken) == len(calls) else ", ".join(taken) or "no")
        repeats = any(
            _takes_sink(name, Call.PACKED, d, deterministic=True) for d in devices.values()
        )
        rows.append((f"`{name}`", *cells, "yes" if repeats else "no"))
    return _markdown(rows)


def _takes_sink(
    name: str, call: Call, device: tuple[int, int], *, deterministic: bool = False
) -> bool:
    why = why_no_sink(
        name,
        call,
        device,
        TransformerEngine((2, 20), (9, 26, 0)),
        softmax_type="learnable",
        heads=(128, 128),
        deterministic=deterministic,
    )
    return why is None


def saving_table() -> str:
    """Return what ``skyladder plan`` predicts for three models at three lengths."""
    rows: list[Sequence[str]] = [("model", *(f"{length // 1024}K" for length in LENGTHS))]
    for name, flags in MODELS.items():
        cells = []
        for length in LENGTHS:
            time = _planned(flags, length)["time"]
            low, high = time["saved_percent_range"]
            cells.append(f"{time['saved_percent']:.0f} % ({low:.0f} to {high:.0f})")
        rows.append((name, *cells))
    return _markdown(rows)


def _planned(flags: str, length: int) -> dict:
    words = f"plan {flags} --seq-length {length} --max-position-embeddings {length} "
    words += f"--micro-batch-size 1 --global-batch-size {4_194_304 // length} "
    words += f"--train-samples {TOKENS // length} --skyladder-start-window {START} "
    words += f"--skyladder-final-window {length} "
    words += f"--skyladder-expand-fraction {SHARE} --device h100 --gpus 8 --json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = skyladder(words.split())
    if code:
        raise SystemExit(f"skyladder {words} ended with {code}")
    return json.loads(printed.getvalue())


def study_verdicts() -> str:
    """Return what the study's records say of the schedules that have several seeds."""
    study = study_settings.read(STUDY)
    given = study_page.read(replace(study, records=REPOSITORY / study.records))
    planned = [run.arm for run in study.runs]
    arms = [arm for arm in given.arms if planned.count(arm.name) > 1]
    names = [arm.name for arm in arms if not given.is_reference(arm)]
    return verdicts.text(given, names).strip()


def message_list() -> str:
    """Return the errors of the package, with ... for what a run fills in, by part."""
    parts = []
    for folder, title in MESSAGE_FOLDERS.items():
        found = []
        place = REPOSITORY / "megatron_skyladder" / folder
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            found += [text for text in _messages(path) if text not in found]
        if found:
            parts.append("\n".join([f"## {title}\n", *(f"- {text}" for text in found)]))
    return "\n\n".join(parts)


def _messages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        name = node.exc.func
        if isinstance(name, ast.Name) and name.id not in _NOT_FOR_USERS and node.exc.args:
            text = _text(node.exc.args[0])
            if name.id == SettingError.__name__:  # a template, see there
                text = rename(text, flag_of).replace(f"${_HOLE}", f"--skyladder-{_HOLE}")
            text = re.sub(r"\s+", " ", re.sub(r"(\.{3}){2,}", _HOLE, text)).strip()
            if _can_be_found(text):
                yield re.sub(r"([*_<>|`\[\]])", r"\\\1", text)


def _can_be_found(text: str) -> bool:
    """Return whether enough of a message is wording, by which somebody can search for it."""
    wording = [part.strip() for part in re.split(r"\.{3,}", text)]
    return (
        not re.match(r"\.\.\.|[a-z]+_[a-z]", text)  # a hole, or a name in the code
        and sum(map(len, wording)) >= _SHORTEST
        and max(map(len, wording)) >= _LONGEST_WORDING
    )


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return _HOLE


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


TABLES: dict[str, Callable[[], str]] = {
    "schedules": schedule_table,
    "parameters": parameter_table,
    "presets": preset_table,
    "flags": flag_tables,
    "value widths": value_width_table,
    "sinks": sink_table,
    "predicted savings": saving_table,
    "messages": message_list,
    "study": study_verdicts,
}


def with_tables(text: str) -> str:
    """Return a page with the tables between their marks made anew.

    Raises:
        ValueError: the mark at a table's end is missing, or names no table.
    """
    for name in re.findall(r"^<!-- (?!end of )(.+) -->$", text, re.MULTILINE):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}. There are: {', '.join(TABLES)}.")
        if end not in text:
            raise ValueError(f"the page has no line {end!r} after {begin.strip()!r}. Put it in.")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{TABLES[name]()}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Write the pages, or name those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(REPOSITORY)}: {'out of date' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
