"""Packages of Debian and of the Python index that hold text: downloaded once, never installed."""

from __future__ import annotations

import fnmatch
import gzip
import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.errors import UsageError

logger = logging.getLogger(__name__)

DEBIAN, PYPI = "debian", "pypi"
_COMPRESSED = ".gz"


@dataclass(frozen=True)
class Package:
    """A package, and which of its files are documents.

    Args:
        kind: `DEBIAN` or `PYPI` (a wheel: nothing of it runs).
        name: in its registry.
        version: exactly this one, so that others get the same text.
        patterns: of file names inside it, such as ``*/_sources/*.txt``; ``.gz`` is not named.
    """

    kind: str
    name: str
    version: str
    patterns: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Package:
        """Read ``KIND NAME VERSION PATTERN ...``.

        Raises:
            UsageError: the line is another one.
        """
        words = line.split()
        if len(words) < 4 or words[0] not in (DEBIAN, PYPI):
            raise UsageError(
                f"a package of [corpus] reads {line!r}. Give: {DEBIAN} or {PYPI}, name, version, "
                "and at least one pattern of the files to take, such as *.txt."
            )
        return cls(words[0], words[1], words[2], tuple(words[3:]))

    def download(self, folder: Path) -> Path:
        """Return the package's file, downloaded into a folder of its own in ``folder``.

        A file that is there is taken, whoever put it there.

        Raises:
            UsageError: the registry does not give it.
        """
        folder = folder / f"{self.kind}-{self.name}-{self.version.replace(':', '%3a')}"
        found = _only_file(folder)
        if found is not None:
            return found
        logger.info("downloading %s %s %s", self.kind, self.name, self.version)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command, advice = _DOWNLOADS[self.kind](self, folder)
        try:
            done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
        except FileNotFoundError:
            raise UsageError(
                f"{self.name} is a {self.kind} package, and {command[0]} is not here. {advice}"
            ) from None
        if done.returncode or _only_file(partial) is None:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise UsageError(
                f"{self.kind} gives no {self.name} {self.version}: {' '.join(last)} {advice}"
            )
        partial.rename(folder)
        found = _only_file(folder)
        assert found is not None
        return found

    def texts(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield (name, text) of the documents in the package's file, by name.

        Args:
            path: as `download` returns it.
        """

        def is_wanted(name: str) -> bool:
            plain = name.removesuffix(_COMPRESSED)
            return any(fnmatch.fnmatchcase(plain, pattern) for pattern in self.patterns)

        for name, data in sorted(_READERS[self.kind](path, is_wanted)):
            text = gzip.decompress(data) if name.endswith(_COMPRESSED) else data
            yield name.removesuffix(_COMPRESSED), text.decode("utf-8", errors="replace")


def _only_file(folder: Path) -> Path | None:
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    return files[0] if len(files) == 1 else None


def _apt(package: Package, folder: Path) -> tuple[list[str], str]:
    command = ["apt-get", "download", "-q", f"{package.name}={package.version}"]
    advice = (
        "Run apt-get update; where Debian has moved on, or this is another system, put the .deb of "
        f"this version, which https://snapshot.debian.org/binary/{package.name}/ keeps, into "
        f"{folder}. Or name the version that apt-cache policy {package.name} shows: the text is "
        "then another one, and results with it."
    )
    return command, advice


def _pip(package: Package, _: Path) -> tuple[list[str], str]:
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", f"{package.name}=={package.version}"]
    return command, "Only wheels are taken, because a source archive would run its own code."


_DOWNLOADS: dict[str, Callable[[Package, Path], tuple[list[str], str]]] = {DEBIAN: _apt, PYPI: _pip}


def _of_deb(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield what a .deb would install; dpkg-deb unpacks it, whatever it is compressed with."""
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
            assert unpacking.stdout is not None
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    if file is not None and is_wanted(member.name):
                        yield member.name, file.read()
    except tarfile.TarError as error:
        raise UsageError(
            f"dpkg-deb cannot unpack {path} ({error}). Delete it to download it anew."
        ) from None


def _of_wheel(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in filter(is_wanted, archive.namelist()):
            yield name, archive.read(name)


_READERS = {DEBIAN: _of_deb, PYPI: _of_wheel}
