"""Flags of Megatron's tools/preprocess_data.py beside those that mean the same here.

Its command line can be given as it is: a flag changes nothing about the output and is taken, or it
would and is refused, each with the reason (Megatron 0.16 to main of August 2026).
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_SENTENCES = "sentences are split for BERT and T5; GPT trains on whole documents"
_TRIALS = "leave --workers out, then there is one for each core that the job has"
_WHITE_SPACE = "white space is treated as by Megatron's default"
_IN_THE_FILE = "is not read; convert it to a Hugging Face folder (tokenizer.json) and use that"


@dataclass(frozen=True)
class ToolFlag:
    """A flag that is only known for the sake of its command lines.

    Args:
        reason: why it changes nothing, or why it is refused.
        is_refused: whether the output would be another one with it.
        nargs: of argparse; 0: a switch.
        harmless: a value with which it is taken all the same.
    """

    reason: str
    is_refused: bool
    nargs: int | str = 0
    harmless: str | None = None


def _taken(reason: str, nargs: int | str = 0) -> ToolFlag:
    return ToolFlag(reason, False, nargs)


def _refused(reason: str, nargs: int | str = 0, harmless: str | None = None) -> ToolFlag:
    return ToolFlag(reason, True, nargs, harmless)


FLAGS = {
    "--partitions": _taken("one process reads for all workers; --workers is their number", 1),
    "--keep-sequential-samples": _taken("documents always keep the order of the input"),
    "--lang": _taken("it is the language of --split-sentences", 1),
    "--keep-newlines": _taken("it belongs to --split-sentences"),
    "--padded-vocab-size": _taken("padding is the model's, not the data's", 1),
    "--no-pad-vocab-size": _taken("padding is the model's, not the data's"),
    "--disable-pad-vocab-size": _taken("padding is the model's, not the data's"),
    "--make-vocab-size-divisible-by": _taken("padding is the model's, not the data's", 1),
    "--vocab-extra-ids": _taken("Megatron's tool sets it to 0, whatever is given", 1),
    "--null-tokenizer-pad-id": _taken("nothing is padded here", 1),
    "--tokenizer-hf-use-fast": _taken("it is the default"),
    "--tokenizer-hf-include-special-tokens": _taken("it is the default"),
    "--use-gigatoken": _taken("it is about speed; the usual tokenizer is used"),
    "--dataset-impl": _refused("only Megatron's mmap format is written", 1, "mmap"),
    "--split-sentences": _refused(_SENTENCES),
    "--find-optimal-num-workers": _refused(_TRIALS),
    "--workers-to-check": _refused(_TRIALS, "+"),
    "--max-documents": _refused(_TRIALS, 1),
    "--vocab-file": _refused(f"a vocabulary file {_IN_THE_FILE}", 1),
    "--merge-file": _refused(f"a merges file {_IN_THE_FILE}", 1),
    "--tokenizer-metadata": _refused("give --tokenizer-type and --tokenizer-model instead", 1),
    "--legacy-tokenizer": _refused("the ids are those of Megatron's present tokenizers"),
    "--chat-template": _refused("texts are encoded as they are; templates are for SFT data", 1),
    "--tokenizer-hf-no-use-fast": _refused(
        "the ids are those of the fast tokenizer, which Megatron trains with by default"
    ),
    "--tokenizer-sentencepiece-legacy": _refused("the legacy wrapper splits texts otherwise"),
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces": _refused(_WHITE_SPACE),
    "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces": _refused(_WHITE_SPACE),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, each with its reason as help."""
    group = parser.add_argument_group(
        "of Megatron's tool", "Taken, and without effect here, or refused, as each says."
    )
    for flag, entry in FLAGS.items():
        words = f"{'refused: ' if entry.is_refused else ''}{entry.reason}"
        if entry.nargs:
            nargs = None if entry.nargs == 1 else entry.nargs
            group.add_argument(flag, nargs=nargs, metavar="VALUE", dest=_dest(flag), help=words)
        else:
            group.add_argument(flag, action="store_const", const=True, dest=_dest(flag), help=words)


def check(args: argparse.Namespace) -> None:
    """Say which of the given flags have no effect.

    Raises:
        ValueError: one would make another output.
    """
    for flag, entry in FLAGS.items():
        value = getattr(args, _dest(flag))
        if value is None or value == entry.harmless:
            continue
        if entry.is_refused:
            raise ValueError(
                f"{flag} is a flag of Megatron's tool, and refused here: {entry.reason}."
            )
        logger.info("%s has no effect here: %s", flag, entry.reason)


def _dest(flag: str) -> str:
    return f"tool:{flag}"
