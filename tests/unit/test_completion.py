"""Tab completion, asked for by the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent

BASH = """\
eval "$(skyladder completion bash)"
COMP_LINE={line!r} COMP_POINT={point} COMP_TYPE=9
_python_argcomplete skyladder
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = "skyladder completion fish | source; complete -C {line!r}"
ZSH = """\
autoload -Uz compinit; compinit -u -d "$ZDOTDIR/dump"
eval "$(skyladder completion zsh)"
typeset -a words; words=(skyladder); BUFFER={line!r}; CURSOR={point}
_describe() {{ print -l -- "${{completions[@]}}" }}
_python_argcomplete
"""


def offered(shell: str, line: str, folder: Path) -> set[str]:
    """What the shell offers at a tab behind the line: first words, without descriptions."""
    script = {"bash": BASH, "fish": FISH, "zsh": ZSH}[shell].format(line=line, point=len(line))
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here")
    (folder / "script").write_text(script)
    done = subprocess.run(
        [program, str(folder / "script")],
        env={
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "ZDOTDIR": str(folder),
        },
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert not done.stderr, done.stderr
    lines = [line.replace("\\:", "\0").partition(":")[0] for line in done.stdout.splitlines()]
    return {line.replace("\0", ":").split()[0] for line in lines if line.strip()}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_a_tab_offers(shell: str, tmp_path: Path) -> None:
    assert offered(shell, "skyladder pl", tmp_path) == {"plan"}
    assert {"doctor", "prepare", "completion"} <= offered(shell, "skyladder ", tmp_path)
    assert offered(shell, "skyladder plan --pres", tmp_path) == {"--preset"}
    assert {"1b-8k", "1b-32k"} <= offered(shell, "skyladder plan --preset 1b", tmp_path)
    assert "--skyladder-round-to" in offered(shell, "skyladder doctor --skyladder-r", tmp_path)
    assert offered(shell, "skyladder completion z", tmp_path) == {"zsh"}
    (tmp_path / "train.sh").touch()
    assert "train.sh" in offered(shell, "skyladder plan --from-script tra", tmp_path)
