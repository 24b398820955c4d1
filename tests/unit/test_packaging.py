"""What an installed package has: it works without the repository beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from megatron_skyladder.megatron_lm.patching import definitions
from megatron_skyladder.slurm import script

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ("setup.py", "pyproject.toml", "README.md", "megatron_skyladder", "patches", "slurm")
FIND_THEM = """
from megatron_skyladder.megatron_lm.patching import definitions
from megatron_skyladder.slurm import script
print(definitions.patch_file())
print(script.template())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel, built from a copy: building leaves things behind."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in NEEDED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run(installed: Path, *words: str) -> str:
    environment = {"PYTHONPATH": str(installed), "PATH": ""}  # no sbatch, which would say more
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=installed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_lies_beside_the_package_goes_into_it(installed: Path) -> None:
    patch, template = map(Path, run(installed, "-c", FIND_THEM).split())
    assert patch.is_relative_to(installed) and template.is_relative_to(installed)
    assert template.read_text() == script.template().read_text()
    assert patch.read_text() == definitions.patch_file().read_text()
    assert not [path for path in installed.rglob("*") if path.name.startswith("test_")]


def test_the_commands_that_read_it(installed: Path, tmp_path: Path) -> None:
    example = REPOSITORY / "examples" / "slurm" / "1b-8k.ini"
    skyladder = (installed, "-m", "megatron_skyladder")
    shown = run(*skyladder, "slurm", str(example), "--run-dir", str(tmp_path / "run"))
    assert "#SBATCH --nodes=1" in shown and "scontrol requeue" in shown
    assert "apply" in run(*skyladder, "patch", "--help")


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their bare name: two of one name stop a run of the whole suite."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
