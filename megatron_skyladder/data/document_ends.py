"""Whether the documents of a .bin/.idx pair end in the token that a run takes for their end.

Training finds documents by the end-of-document token of its tokenizer. Data that were made with
another tokenizer, or without that token, train as if all documents were one, and nothing goes
wrong that could be seen. What is asked here costs a few reads per pair, whatever its size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from megatron_skyladder.data.indexed import last_tokens
from megatron_skyladder.data.record import misfit, read_record

SAMPLED = 512  # documents, over all pairs
MIN_SAMPLED = 8  # of each pair
NAMED = 5  # pairs that a message names
ENOUGH = 0.5  # share of documents with the token: those that were cut up have it only at their end


def complaints(prefixes: Sequence[str], eod: int) -> list[tuple[str, str]]:
    """Return (prefix, what is wrong) for each pair whose documents do not end in the token.

    A pair that cannot be read here (a remote path, a damaged index) is left to the trainer.

    Args:
        prefixes: paths without ``.bin``/``.idx``.
        eod: the end-of-document token that training looks for.
    """
    count = max(MIN_SAMPLED, SAMPLED // max(1, len(prefixes)))
    found = ((prefix, _complaint(prefix, eod, count)) for prefix in dict.fromkeys(prefixes))
    return [(prefix, text) for prefix, text in found if text is not None]


def message(prefixes: Sequence[str], eod: int, tokenizer: str) -> str | None:
    """Return what is wrong with data, one line for each of the first few pairs; None: nothing.

    Args:
        prefixes: paths without ``.bin``/``.idx``.
        eod: the tokenizer's end-of-document token.
        tokenizer: its name.
    """
    found = complaints(prefixes, eod)
    if not found:
        return None
    lines = [f"\n  {prefix}: {text}" for prefix, text in found[:NAMED]]
    if len(found) > len(lines):
        lines.append(f"\n  and {len(found) - len(lines)} more")
    return (
        f"the documents of the training data do not end in the tokenizer's end-of-document token "
        f"({tokenizer}: {eod}), so their ends cannot be found and they are not masked:"
        f"{''.join(lines)}\nGive the tokenizer that the data were made with, or prepare the data "
        f"again. To look: skyladder inspect {found[0][0]} --eod-id {eod}"
    )


def _complaint(prefix: str, eod: int, count: int) -> str | None:
    if not (os.path.exists(f"{prefix}.idx") and os.path.exists(f"{prefix}.bin")):
        return None
    recorded = _recorded(prefix)
    if recorded is not None and recorded != eod:
        return f"prepared with the end-of-document token {recorded}"
    try:
        tokens = last_tokens(prefix, count)
    except (ValueError, OSError):
        return None
    with_eod = int((tokens == eod).sum())
    if with_eod >= ENOUGH * len(tokens):
        return None
    values, counts = np.unique(tokens, return_counts=True)
    most, times = int(values[counts.argmax()]), int(counts.max())
    instead = (
        f"{times} end in {most}"
        if times >= ENOUGH * len(tokens) and most != eod
        else "they were written without an end-of-document token"
    )
    return f"{with_eod} of {len(tokens)} sampled documents end in it; {instead}"


def _recorded(prefix: str) -> int | None:
    """Return the token that ``skyladder prepare`` noted, where it appended one.

    None where the pair beside the record is another one: then its own documents alone count.
    """
    try:
        record = read_record(prefix)
        if record is None or misfit(prefix, record):
            return None
    except (ValueError, OSError):
        return None
    settings = record["settings"]
    return settings.get("eod") if settings.get("append_eod", True) else None
