"""Which data a launch trains on, out of the flags that can name it, as Megatron reads them.

--data-path PREFIX ... and --data-args-path FILE name data of which --split takes a part;
--train-data-path PREFIX ... and --per-split-data-args-path FILE.json name what is trained on alone.
The first pair wins (get_blend_and_blend_per_split, the same from Megatron 0.16 to 0.20).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingData:
    """Data of a launch.

    Args:
        flag: that names it.
        blend: prefixes, or weights and prefixes in turn.
        notes: what the reader has to know about it.
    """

    flag: str
    blend: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether a data set of it can be read on this machine."""
        return any(Path(f"{word}.idx").exists() for word in self.blend)

    def __str__(self) -> str:
        return f"{self.flag} {' '.join(self.blend)}"


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags, as Megatron has them."""
    measured = "measure the documents in"
    group.add_argument(
        "--data-path", nargs="*", metavar="PREFIX", help=f"{measured} these .bin/.idx files"
    )
    group.add_argument("--data-args-path", metavar="FILE", help=f"{measured} what this file names")
    group.add_argument(
        "--train-data-path", nargs="*", metavar="PREFIX", help=f"{measured} these .bin/.idx files"
    )
    group.add_argument(
        "--per-split-data-args-path",
        metavar="FILE.json",
        help=f'{measured} what "train" names in this file',
    )


def training_data(flags: argparse.Namespace) -> TrainingData | None:
    """Return the data that the flags name, or None where they name none that is trained on.

    Raises:
        ValueError: a file that names data is there and cannot be understood.
        OSError: it is not there.
    """
    if flags.data_args_path:
        return _found("--data-args-path", Path(flags.data_args_path).read_text().split())
    if flags.data_path:
        return _found("--data-path", flags.data_path)
    if flags.per_split_data_args_path:
        words = _train_split(Path(flags.per_split_data_args_path))
        return _found("--per-split-data-args-path", words) if words else None
    return _found("--train-data-path", flags.train_data_path) if flags.train_data_path else None


def _train_split(path: Path) -> list[str]:
    try:
        splits = json.loads(path.read_text())
        train = splits["train"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--per-split-data-args-path={path}: Megatron wants a JSON object with train, valid "
            'and test, such as {"train": ["0.3", "a", "0.7", "b"], "valid": "v", "test": "t"}.'
        ) from None
    return train.split() if isinstance(train, str) else [str(word) for word in train or ()]


def _found(flag: str, words: Sequence[str]) -> TrainingData:
    """Return data; a path with the ending of its files stands for the one without."""
    blend, notes = [], []
    for word in words:
        prefix = word.removesuffix(".bin").removesuffix(".idx")
        if prefix != word and not Path(f"{word}.idx").exists():
            notes.append(
                f"Measured {prefix} where {flag} says {word}: Megatron wants the path without the "
                "ending."
            )
            word = prefix
        blend.append(word)
    return TrainingData(flag, tuple(blend), tuple(notes))
