"""The layers: `make lint` checks every import; here, that the check can fail, and what is light."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import megatron_skyladder

REPOSITORY = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")

pytestmark = pytest.mark.skipif(not LINT.exists(), reason="import-linter is not installed")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT, "--no-cache", "--config", folder / "pyproject.toml"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's modules and the contracts, without what they hold but imports."""
    for name in ("megatron_skyladder", "pyproject.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def replaced(folder: Path, module: str, line: str) -> None:
    """Put a copy in the place of the linked package, with a line added to one of its modules."""
    (folder / "megatron_skyladder").unlink()
    shutil.copytree(REPOSITORY / "megatron_skyladder", folder / "megatron_skyladder")
    path = folder / "megatron_skyladder" / module
    path.write_text(path.read_text() + f"\n{line}\n")


def test_the_layers_hold(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("runtime/metrics.py", "import megatron_skyladder.megatron_lm.compat", "Layers BROKEN"),
        ("ladder/clock.py", "import megatron_skyladder.attention.sdpa", "Layers BROKEN"),
        ("attention/sdpa.py", "def f(): import megatron_skyladder.runtime.metrics", "Layers"),
        ("ladder/schedules/base.py", "import megatron_skyladder.ladder.config", "circles BROKEN"),
    ],
)
def test_an_import_against_them_is_found(
    copy: Path, module: str, line: str, complaint: str
) -> None:
    replaced(copy, module, line)
    result = lint(copy)
    assert result.returncode == 1 and complaint in result.stdout, result.stdout


def test_the_package_is_light_and_offers_its_names() -> None:
    program = """
        import sys
        import megatron_skyladder as skyladder
        heavy = {"numpy", "torch", "megatron"}
        assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
        window = skyladder.WindowSchedule(start_window=8, final_window=64, alpha=1).window_at(3)
        assert window == 11, window
        skyladder.SkyLadderConfig, skyladder.fragment_cu_seqlens
        assert not {"torch", "megatron"} & set(sys.modules)
        assert set(skyladder.__all__) <= set(dir(skyladder))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'WindowShedule'"):
        megatron_skyladder.WindowShedule  # noqa: B018
