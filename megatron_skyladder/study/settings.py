"""What a study is: one INI file, such as ``examples/study.ini``."""

from __future__ import annotations

import configparser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.errors import UsageError
from megatron_skyladder.study import commands
from megatron_skyladder.study.packages import Package

EVAL_LENGTHS = "--skyladder-eval-lengths"
LOWEST_PRIORITY = 19  # of nice: whatever else runs goes first
CUE = 4  # tokens of a second copy that do not count

# [section] -> the keys it knows; None: any, which are names
_SECTIONS: dict[str, tuple[str, ...] | None] = {
    "study": ("records", "page"),
    "corpus": ("packages", "validation-share", "vocab-size"),
    "training": ("flags",),
    "sweep": None,
    "timing": None,
    "arms": None,
    "against": None,
    "queue": ("runs",),
    "copying": ("distances", "span", "samples"),
}


@dataclass(frozen=True)
class Copying:
    """How copying is tested; see `copying`.

    Args:
        distances: tokens from a random token to its repetition.
        span: tokens that are repeated.
        samples: sequences for each distance.
    """

    distances: tuple[int, ...] = ()
    span: int = 32
    samples: int = 64

    def check(self, seq_length: int) -> None:
        """Raise where the copies do not fit into a sequence."""
        for distance in self.distances:
            if not self.span <= distance <= seq_length - self.span:
                raise UsageError(
                    f"[copying]: a span of {self.span} tokens cannot stand {distance} tokens apart "
                    f"in a sequence of {seq_length}. Give distances from {self.span} to "
                    f"{seq_length - self.span}."
                )


@dataclass(frozen=True)
class Planned:
    """A run of the queue.

    Args:
        arm: its name in the file.
        seed: of weights and data order.
        flags: of Megatron and SkyLadder, those of every run first, the arm's and --seed behind.
        own: the arm's alone, as text.
        is_sweep: whether it tries a setting, and is no arm of the comparison.
        is_timing: whether it measures how long a step takes, and is no arm either.
    """

    arm: str
    seed: int
    flags: tuple[str, ...]
    own: str = ""
    is_sweep: bool = False
    is_timing: bool = False

    @property
    def is_compared(self) -> bool:
        """Whether it is an arm of the comparison."""
        return not (self.is_sweep or self.is_timing)

    @property
    def name(self) -> str:
        """Of its folder and its record."""
        return f"{self.arm}-seed{self.seed}"

    def value(self, flag: str) -> str:
        """Return what a flag is given, by the last word on it.

        Raises:
            UsageError: it is not given.
        """
        given = commands.values(self.flags).get(flag)
        if not given:
            raise UsageError(f"[training] gives no {flag}, which a study has to know.")
        return given[0]

    @property
    def train_iters(self) -> int:
        """Steps."""
        return self._number("--train-iters")

    @property
    def seq_length(self) -> int:
        """Tokens of a sequence."""
        return self._number("--seq-length")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self._number("--global-batch-size") * self.seq_length

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Context lengths for which a loss is measured at the end, the whole sequence last."""
        if EVAL_LENGTHS not in self.flags:
            return (self.seq_length,)
        words = self.value(EVAL_LENGTHS).split(",")
        return (*sorted({self._whole(EVAL_LENGTHS, word) for word in words}), self.seq_length)

    def _number(self, flag: str) -> int:
        return self._whole(flag, self.value(flag))

    def _whole(self, flag: str, word: str) -> int:
        if not word.isdecimal() or not int(word):
            raise UsageError(f"{self.arm} has {flag} {word}. Give a whole number above 0.")
        return int(word)


@dataclass(frozen=True)
class Study:
    """A study, resolved.

    Args:
        records: folder of the finished runs' records, kept with the documentation.
        page: the page that is written from them.
        packages: whose text is trained on.
        validation_share: of the documents.
        vocab_size: of the tokenizer.
        flags: of every run.
        runs: in the order in which they are started.
        arms: name -> the arm's own flags, those of [arms] alone, in the file's order.
        against: arm -> the arm that it varies, beside the first one.
        copying: what is tested at the end of each run.
    """

    records: Path
    page: Path
    packages: tuple[Package, ...]
    validation_share: float
    vocab_size: int
    flags: tuple[str, ...]
    runs: tuple[Planned, ...]
    arms: dict[str, str]
    against: dict[str, str]
    copying: Copying

    @property
    def main(self) -> Planned:
        """The first run that is compared; the first one where none is."""
        return next((run for run in self.runs if run.is_compared), self.runs[0])


def read(path: Path) -> Study:
    """Read a study.

    Raises:
        UsageError: the file holds something else.
    """
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(" #",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names may have capitals
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except configparser.Error as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    _check_names(parser, path)
    sections = {name: dict(parser[name]) if name in parser else {} for name in _SECTIONS}
    common = tuple(_of(sections, "training", "flags", path).split())
    _check_words(common, "[training]", path)
    for section in ("sweep", "timing", "arms"):
        for name, text in sections[section].items():
            _check_words(text.split(), f"{name} in [{section}]", path)
    packages = _of(sections, "corpus", "packages", path).strip().splitlines()
    runs = [
        _planned(word, sections, common, path)
        for word in _of(sections, "queue", "runs", path).split()
    ]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"{path} has {twice} in [queue] twice.")
    for run in runs:
        _ = run.train_iters, run.step_tokens, run.context_lengths  # said now, not after hours
    for name in (it for pair in sections["against"].items() for it in pair):
        if name not in sections["arms"]:
            known = ", ".join(sections["arms"])
            raise UsageError(f"{path} has {name} in [against]. The arms are: {known}.")
    copying = _copying(sections["copying"], path)
    for run in runs:
        copying.check(run.seq_length)
    return Study(
        records=Path(sections["study"].get("records", "docs/experiments")),
        page=Path(sections["study"].get("page", "docs/experiments.md")),
        packages=tuple(Package.parse(line) for line in packages),
        validation_share=_number(sections["corpus"], "validation-share", 0.02, path),
        vocab_size=int(_number(sections["corpus"], "vocab-size", 4096, path)),
        flags=common,
        runs=tuple(runs),
        arms={name: " ".join(flags.split()) for name, flags in sections["arms"].items()},
        against=sections["against"],
        copying=copying,
    )


def _copying(section: dict[str, str], path: Path) -> Copying:
    words = section.get("distances", "").split()
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise UsageError(f"{path}: distances has {wrong}. Give tokens, such as 64 256 1024.")
    numbers = [
        int(_number(section, key, getattr(Copying, key), path)) for key in ("span", "samples")
    ]
    copying = Copying(tuple(map(int, words)), *numbers)
    if copying.span <= CUE or copying.samples < 1:
        raise UsageError(
            f"{path}: span = {copying.span}, samples = {copying.samples} in [copying]. Give a span "
            f"above {CUE} tokens, as many as are the cue, and at least one sample."
        )
    return copying


def _check_names(parser: configparser.ConfigParser, path: Path) -> None:
    for section in parser.sections():
        if section not in _SECTIONS:
            raise UsageError(
                f"{path} has a section [{section}]. Known are: {', '.join(_SECTIONS)}."
            )
        known = _SECTIONS[section]
        for key in parser[section]:
            if known is not None and key not in known:
                raise UsageError(
                    f"{path} has {key} in [{section}]. Known there are: {', '.join(known)}."
                )


def _check_words(words: Sequence[str], where: str, path: Path) -> None:
    """Raise for ``--flag=value``, which would not be found where a flag's value is looked up."""
    joined = next((word for word in words if word.startswith("--") and "=" in word), None)
    if joined:
        flag, _, value = joined.partition("=")
        raise UsageError(f"{path}: {where} has {joined}. Write it as two words: {flag} {value}.")


def _of(sections: dict[str, dict[str, str]], section: str, key: str, path: Path) -> str:
    if not sections[section].get(key, "").strip():
        raise UsageError(f"{path} gives no {key} in [{section}]; examples/study.ini has all.")
    return sections[section][key]


def _number(section: dict[str, str], key: str, default: float, path: Path) -> float:
    try:
        return float(section.get(key, default))
    except ValueError:
        raise UsageError(f"{path}: {key} = {section[key]} is not a number.") from None


def _planned(
    word: str, sections: dict[str, dict[str, str]], common: Sequence[str], path: Path
) -> Planned:
    arm, _, seed = word.partition(":")
    known = {**sections["sweep"], **sections["timing"], **sections["arms"]}
    if arm not in known or not seed.isdigit():
        raise UsageError(
            f"{path} has {word} in [queue]. Give ARM:SEED, with an arm of: {', '.join(known)}."
        )
    own = known[arm].split()
    return Planned(
        arm,
        int(seed),
        (*common, *own, "--seed", seed),
        " ".join(own),
        is_sweep=arm in sections["sweep"],
        is_timing=arm in sections["timing"],
    )
