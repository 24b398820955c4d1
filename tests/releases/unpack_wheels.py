"""Unpack the megatron-core wheels that are tested beside the installed one, each into a folder.

    python tests/releases/unpack_wheels.py FOLDER

Safe to run again: a folder that is there was finished, and is left alone.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_skyladder.megatron_lm.releases import RELEASES

INSTALLED = "0.19.2"  # by setup.py; all other tests run with it
OLDER = [release.wheel for release in RELEASES.values() if release.wheel not in (None, INSTALLED)]


def unpack(version: str, folder: Path) -> None:
    """Unpack one wheel into ``folder/version``, without what it depends on: that is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        target = Path(temporary) / version
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        command += ["install", "--no-deps", "--target", str(target), f"megatron-core=={version}"]
        subprocess.run(command, check=True)
        target.rename(folder / version)


if __name__ == "__main__":
    parent = Path(sys.argv[1])
    for version in OLDER:
        if not (parent / version).exists():
            unpack(version, parent)
