"""Which Megatron releases are known and what each does its own way.

Nothing else asks for a version.

Standard library only, and Megatron is found without being imported, so that this works where
Megatron does not even load.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.settings import SAME_ON_A_NODE

logger = logging.getLogger(__name__)

ALLOW_VARIABLE = "SKYLADDER_ALLOW_UNTESTED_MEGATRON"
SCRIPTS = ("pretrain_gpt.py", "pretrain_hybrid.py")  # of a checkout, that the patch is for
PACKAGE_INFO = "package_info.py"  # in megatron/core: MAJOR, MINOR, PATCH, PRE_RELEASE


class MegatronMismatchError(UsageError):
    """The Megatron that is installed does not have what SkyLadder needs."""


class Trainer(Enum):
    """How ``megatron.training.pretrain`` wants to be called."""

    ITS_OWN_SCRIPT = "only its own script starts it"
    PARSES_ARGUMENTS = "it parses the arguments itself and takes a model provider"
    TAKES_PROVIDER = "it takes parsed arguments as a configuration, and a model provider"
    TAKES_MODEL_CONFIG = "it takes parsed arguments and the model as configurations"


@dataclass(frozen=True)
class Release:
    """One release line of Megatron.

    Args:
        line: major and minor version, as in the name of its patch.
        trainer: how its trainer is called.
        wheel: the megatron-core wheel that was tested, or None where it has no trainer.
        checkout: the Megatron-LM checkout that was tested.
    """

    line: str
    trainer: Trainer
    wheel: str | None
    checkout: str


RELEASES = {
    release.line: release
    for release in (
        Release("0.11", Trainer.ITS_OWN_SCRIPT, None, "core_v0.11.0"),
        Release("0.12", Trainer.ITS_OWN_SCRIPT, None, "core_v0.12.3"),
        Release("0.13", Trainer.ITS_OWN_SCRIPT, None, "core_v0.13.1"),
        Release("0.14", Trainer.ITS_OWN_SCRIPT, None, "core_v0.14.0"),
        Release("0.15", Trainer.ITS_OWN_SCRIPT, None, "core_v0.15.3"),
        Release("0.16", Trainer.PARSES_ARGUMENTS, None, "core_v0.16.1"),
        Release("0.17", Trainer.PARSES_ARGUMENTS, "0.17.1", "core_v0.17.1"),
        Release("0.18", Trainer.TAKES_PROVIDER, "0.18.2", "core_v0.18.2"),
        Release("0.19", Trainer.TAKES_MODEL_CONFIG, "0.19.2", "core_v0.19.0"),
        Release("0.20", Trainer.TAKES_MODEL_CONFIG, None, "main (d98e8a6, August 2026)"),
    )
}


@dataclass(frozen=True)
class Megatron:
    """A Megatron that Python finds.

    Args:
        version: as its package says.
        folder: where its ``megatron`` folder lies: a checkout, or site-packages.
    """

    version: str
    folder: Path

    @property
    def line(self) -> str:
        """Major and minor version: 0.19 for 0.19.2."""
        return ".".join(self.version.split(".")[:2])

    @property
    def is_checkout(self) -> bool:
        """Whether it is a source tree with a script of its own that trains."""
        return bool(self.scripts)

    @property
    def scripts(self) -> list[str]:
        """The names of those scripts that it has."""
        return [name for name in SCRIPTS if (self.folder / name).exists()]


def megatron_in(folder: Path) -> Megatron | None:
    """Return the Megatron whose ``megatron`` folder lies in a folder, or None."""
    package_info = folder / "megatron" / "core" / PACKAGE_INFO
    return Megatron(_version(package_info), folder) if package_info.is_file() else None


def installed() -> Megatron:
    """Return the Megatron that ``import megatron.core`` gets, without importing it.

    Raises:
        MegatronMismatchError: there is none, it has no trainer, or the trainer is another's.
    """
    folder = _folder_of("core")
    found = megatron_in(folder) if folder else None
    if found is None:
        raise MegatronMismatchError(
            "no Megatron is installed for this Python. Either pip install "
            "'megatron-core[training]==0.19.2', or put your Megatron-LM checkout first on the "
            "path: PYTHONPATH=/path/to/Megatron-LM."
        )
    trainer_folder = _folder_of("training")
    if trainer_folder is None:
        raise MegatronMismatchError(
            f"the Megatron in {found.folder} (megatron-core {found.version}) has no trainer: needed"
            " is megatron.training, which the wheels have from 0.17 on. Install a newer wheel, or "
            "put a Megatron-LM checkout first on the path: PYTHONPATH=/path/to/Megatron-LM."
        )
    if trainer_folder != found.folder:
        raise MegatronMismatchError(
            f"two Megatrons are mixed: megatron.core comes from {found.folder} ({found.version}), "
            f"megatron.training from {trainer_folder}. Uninstall one, or put the one you mean "
            "first on the path: PYTHONPATH=/path/to/Megatron-LM."
        )
    return found


def _folder_of(part: str) -> Path | None:
    """Return the folder that holds the ``megatron`` folder of ``megatron.<part>``, or None."""
    try:
        spec = importlib.util.find_spec(f"megatron.{part}")
    except ModuleNotFoundError:
        return None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]).parents[1] if locations else None


def release_of(found: Megatron) -> Release:
    """Return the known release a Megatron belongs to.

    Raises:
        MegatronMismatchError: it is none of ``RELEASES``, and the override is not set.
    """
    known = RELEASES.get(found.line)
    if known is not None:
        return known
    nearest = min(RELEASES.values(), key=lambda release: _distance(release.line, found.line))
    if os.environ.get(ALLOW_VARIABLE):
        logger.warning(
            "Megatron %s is untested; treating it as %s, as %s says.",
            found.version,
            nearest.line,
            ALLOW_VARIABLE,
            extra=SAME_ON_A_NODE,
        )
        return nearest
    raise MegatronMismatchError(
        f"Megatron {found.version} (in {found.folder}) is not among the tested releases: needed is "
        f"one of {', '.join(RELEASES)}. Use one of them, or set {ALLOW_VARIABLE}=1 to try it the "
        f"way {nearest.line} works; the start-up probe still tells whether the mask is applied."
    )


def check_for_our_start(found: Megatron) -> None:
    """Make sure that SkyLadder's entry point, or ``--spec``, can start training.

    Raises:
        MegatronMismatchError: it is too old for that, or not known.
    """
    if release_of(found).trainer is Trainer.ITS_OWN_SCRIPT:
        first = next(
            line for line, each in RELEASES.items() if each.trainer is not Trainer.ITS_OWN_SCRIPT
        )
        raise MegatronMismatchError(
            f"Megatron {found.version} (in {found.folder}) is started by its own pretrain_gpt.py "
            f"only: SkyLadder's entry point and --spec need {first} or later. Patch the checkout, "
            f"skyladder patch apply {found.folder}, and start its pretrain_gpt.py with the same "
            "--skyladder-* flags."
        )


def _version(package_info: Path) -> str:
    """Read the version from the constants of ``package_info.py``."""
    constants = {
        target.id: statement.value.value
        for statement in ast.parse(package_info.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    numbers = ".".join(str(constants.get(name, "?")) for name in ("MAJOR", "MINOR", "PATCH"))
    return numbers + str(constants.get("PRE_RELEASE", ""))


def _distance(line: str, other: str) -> tuple[int, ...]:
    """Return how far two release lines are apart; an unreadable version is far from all."""
    pairs = zip(line.split("."), other.split("."), strict=False)
    return tuple(abs(int(a) - int(b)) if b.isdigit() else 1 << 16 for a, b in pairs)
