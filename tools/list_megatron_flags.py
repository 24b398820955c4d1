"""Write the table of Megatron's flag names: which release has which flag, and nothing else.

    python tools/list_megatron_flags.py 0.16=CHECKOUT 0.17=CHECKOUT ... [dev=CHECKOUT]

Each checkout's own parser is asked, in a process of its own, with the torch of this Python. Names
are facts of an interface; no help text and no code of Megatron's is taken over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_skyladder.megatron_lm import flag_names, releases

REPOSITORY = Path(__file__).resolve().parents[1]
WITHOUT_A_GPU = """
from megatron_skyladder.cpu import engine
engine.install_where_no_gpu()
"""
HEADER = """\
# Names of Megatron's flags and the releases that have each. Written by
# tools/list_megatron_flags.py from the releases' own parsers; not edited by hand.
#
"""


def flags_of(checkout: Path) -> list[str]:
    """Return the flags of one checkout's parser."""
    found = releases.megatron_in(checkout)
    if found is None:
        sys.exit(f"there is no Megatron in {checkout}: give a folder that holds megatron/core.")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU + flag_names.PRINT_FLAGS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(REPOSITORY)])},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{checkout}: its parser does not load.\n{done.stderr}")
    flags: list[str] = json.loads(done.stdout.splitlines()[-1])
    return flags


def main() -> None:
    """Ask each checkout and write the table."""
    if len(sys.argv) < 2 or not all("=" in word for word in sys.argv[1:]):
        sys.exit(__doc__)
    lines_of: dict[str, list[str]] = {}
    asked = []
    for word in sys.argv[1:]:
        line, _, folder = word.partition("=")
        found = releases.megatron_in(Path(folder))
        asked.append(f"# {line}: {found.version if found else 'unknown'}\n")
        for flag in flags_of(Path(folder).resolve()):
            lines_of.setdefault(flag, []).append(line)
    rows = [f"{flag} {' '.join(lines)}\n" for flag, lines in sorted(lines_of.items())]
    flag_names.TABLE.write_text(HEADER + "".join(asked) + "".join(rows), encoding="utf-8")
    print(f"{len(rows)} flags in {flag_names.TABLE}")


if __name__ == "__main__":
    main()
