"""At start-up, whether the documents of a run's data can be separated, and whose fault it is.

The files say more than sequences do: which token was meant, and how to look. Sequences are looked
at too, once training has begun (`runtime.found_documents`), whatever dataset they come from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_skyladder.data import document_ends
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.runtime.console import is_first_rank
from megatron_skyladder.runtime.found_documents import REFUSE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a trainer knows of its data.

    Args:
        prefixes: of the .bin/.idx pairs that training reads.
        end_of_document: the tokenizer's token.
        tokenizer: its name, for messages.
        overwritten: whether the dataset takes that token for padding and overwrites it.
    """

    prefixes: Sequence[str]
    end_of_document: int
    tokenizer: str
    overwritten: bool = False


def is_due(config: SkyLadderConfig) -> bool:
    """Return whether this rank is to look: the first, or all where a run may be refused."""
    return config.intra_document and (config.require_documents or is_first_rank())


def check(config: SkyLadderConfig, data: TrainingData) -> None:
    """Say where documents are to be masked and their ends are not in the data.

    The first rank reads and warns; where the run is to be refused, every rank comes to the same
    conclusion.

    Raises:
        UsageError: it is so, and --skyladder-require-documents was given.
    """
    if data.overwritten:
        message: str | None = _overwritten(data)
    else:
        message = document_ends.message(data.prefixes, data.end_of_document, data.tokenizer)
    if message is None:
        return
    if config.require_documents:
        raise UsageError(f"--skyladder-require-documents: {message}")
    logger.warning("%s %s", message, REFUSE)


def _overwritten(data: TrainingData) -> str:
    """Return what is wrong where the dataset takes end-of-document tokens for padding."""
    return (
        f"the tokenizer's padding token is its end-of-document token ({data.end_of_document}), and "
        "with --allow-ambiguous-pad-tokens Megatron's dataset overwrites it, so no document can be "
        "masked. Leave that flag out, or give the tokenizer a padding token of its own."
    )
