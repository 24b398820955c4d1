"""Whether sequences hold end-of-document tokens at all, once the first global batch has been seen.

Where they do not, masking documents changes nothing, and no loss or figure looks wrong.
"""

from __future__ import annotations

import logging

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.console import is_first_rank

logger = logging.getLogger(__name__)

REFUSE = "(--skyladder-require-documents refuses such a run.)"


def check_first_batch(config: SkyLadderConfig, num_sequences: int, num_with_end: int) -> None:
    """Say so where documents are to be masked and no sequence has the token that ends them.

    Args:
        config: the checked configuration.
        num_sequences: of the first global batch, over all data-parallel ranks.
        num_with_end: those with an end-of-document token; the same on every rank.

    Raises:
        UsageError: there is none, and --skyladder-require-documents was given.
    """
    if num_with_end or not num_sequences:
        return
    eod = trainer.current().end_of_document
    message = (
        f"none of the first {num_sequences} sequences has the end-of-document token {eod}, so "
        "--skyladder-intra-document has masked nothing. Where documents are longer than "
        f"--seq-length={config.seq_length} this can be right; otherwise the data end in another "
        f"token, or in none. To look: skyladder inspect PREFIX --eod-id {eod} "
        f"--seq-length {config.seq_length}"
    )
    if config.require_documents:
        raise UsageError(f"--skyladder-require-documents: {message}")
    if is_first_rank():
        logger.warning("%s %s", message, REFUSE)
