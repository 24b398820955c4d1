"""Tables, paragraphs and progress: in colours on a terminal, plain lines elsewhere."""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_skyladder import terminal
from megatron_skyladder.cli import main

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROWS = [["name", "share", "[x]"], ["a [red]b[/red]", "1", ""], ["c", "22", ":smile:"]]


def on_terminal(code: str, columns: int = 80, **environment: str) -> str:
    """Return what Python code writes to a terminal of its own."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM")
    }
    done = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**inherited, "TERM": "xterm-256color", **environment},
        cwd=Path(__file__).parents[2],
    )
    os.close(secondary)
    parts = []
    while True:
        try:
            part = os.read(primary, 65_536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    assert done.wait() == 0, b"".join(parts)
    os.close(primary)
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_table_without_a_terminal() -> None:
    assert terminal.table(ROWS, left=1).splitlines() == [
        "name            share      [x]",
        "a [red]b[/red]      1",
        "c                  22  :smile:",
    ]
    wide = terminal.table([["x" * 300, "y"], ["1", "2"]])  # grep wants one line
    assert len(wide.splitlines()) == 2


def test_a_share_is_a_percentage_without_a_terminal_and_a_bar_on_one() -> None:
    code = (
        "from megatron_skyladder.terminal import Share, table\n"
        "print(table([['a', 'b'], ['x', Share(0.25)]], left=1))"
    )
    assert terminal.table([["a", "b"], ["x", terminal.Share(0.25)]]).splitlines()[1] == "x  25.0%"
    shown = on_terminal(code)
    assert "%" not in shown and "━━━━━━" in ESCAPE.sub("", shown)


def test_colours_on_a_terminal_alone_and_not_with_no_color(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    code = (
        "from megatron_skyladder import terminal\n"
        "print(terminal.table([['a', 'b'], ['1', '2']], marked=[1]))\n"
        "print(terminal.paragraph('Note', 'text'))\n"
        "print(terminal.led('Fits: x', terminal.GOOD))"
    )
    shown = on_terminal(code)
    assert "\x1b[1;33m" in shown  # the marked row
    assert "\x1b[1;32mFits:" in shown and "\x1b[1;36mNote" in shown
    plain = on_terminal(code, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain) and "Fits: x" in ESCAPE.sub("", plain)
    assert "\x1b" not in terminal.paragraph("Note", "text") + terminal.led("Fits: x", "bold")


def test_a_paragraph_is_wrapped_behind_its_label() -> None:
    lines = terminal.paragraph("Note", "word " * 40).splitlines()
    assert lines[0].startswith("Note         word") and lines[1].startswith(" " * 13 + "word")
    assert max(map(len, lines)) <= terminal.WIDTH


STEPS = (
    "import sys, time\n"
    "from megatron_skyladder.terminal import Progress\n"
    "with Progress('work', sys.stdout, every={every}) as progress:\n"
    "    for step in range(1, 5):\n"
    "        progress.show(step / 4, f'{{step}} of 4 [x]')\n"
    "        if step == 2: progress.line('a result [y]')\n"
    "print('end')"
)


def test_progress_is_a_bar_on_a_terminal() -> None:
    shown = on_terminal(STEPS.format(every=None))
    text = ESCAPE.sub("", shown)
    assert "work ━" in text and "4 of 4 [x]" in text and "a result [y]" in text
    assert text.rstrip().endswith("end")
    assert text.index("a result") < text.index("4 of 4")


@pytest.mark.parametrize(
    ("every", "lines"),
    [
        (None, ["a result [y]", "end"]),
        (0.0, ["1 of 4 [x]", "2 of 4 [x]", "a result [y]", "3 of 4 [x]", "4 of 4 [x]", "end"]),
    ],
)
def test_progress_is_plain_lines_elsewhere(every: float | None, lines: list[str]) -> None:
    code = STEPS.format(every=every)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == lines and not done.stderr
    dumb = on_terminal(code, TERM="dumb")
    assert dumb.splitlines() == lines


@pytest.mark.parametrize(
    "command",
    [
        "plan --preset 1b-8k --device h100 --gpus 8 -v",
        "compare --preset 1b-8k --alpha 1/8 1/100 --evidence",
        "plan --list-devices",
    ],
)
def test_commands_cut_nothing_off_on_a_narrow_terminal(command: str) -> None:
    code = f"from megatron_skyladder.cli import main; main({command.split()!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "\x1b" not in done.stdout
    shown = ESCAPE.sub("", on_terminal(code, columns=60))
    letters = re.sub(r"\s", "", done.stdout)  # folded cells: as many letters, in another order
    assert sorted(re.sub(r"\s", "", shown)) == sorted(letters)


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_skyladder.cli.plan.run", interrupted)
    assert main(["plan", "--preset", "1b-8k"]) == 130
    assert capsys.readouterr().err == "\nskyladder plan: stopped\n"


def test_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["inspect", str(tmp_path / "none")]
    monkeypatch.delenv("SKYLADDER_TRACEBACK", raising=False)
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("skyladder inspect: ")
    monkeypatch.setenv("SKYLADDER_TRACEBACK", "1")
    with pytest.raises((OSError, ValueError)):
        main(words)

    def lacking(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr("megatron_skyladder.cli.inspect.run", lacking)
    with pytest.raises(ModuleNotFoundError):
        main(words)
    monkeypatch.delenv("SKYLADDER_TRACEBACK")
    assert main(words) == 1
    assert "needs the package absent, which is not installed here" in capsys.readouterr().err
