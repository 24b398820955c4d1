"""Whether training would find the ends of the documents that a plan counts as masked.

Training looks for the end-of-document token of the launch's tokenizer and warns where the data's
documents end in another one (`document_ends`). A plan says the same where this machine has the
tokenizer's files; where it has not, nothing is known, and a plan does without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_skyladder.data import document_ends, tokenizer_flags
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.planning.training_data import TrainingData
from megatron_skyladder.planning.visible_context import weights_and_prefixes


def note(
    flags: argparse.Namespace, config: SkyLadderConfig, data: TrainingData, words: Sequence[str]
) -> str:
    """Return what a reader has to know of documents that would not be masked; empty: nothing.

    Args:
        flags: the plan's.
        config: the schedule and the masks.
        data: that was measured.
        words: of the launch, with the tokenizer's flags that a plan has no other use for.
    """
    if not config.intra_document or not flags.tokenizer_type:
        return ""
    _, prefixes = weights_and_prefixes(data.blend, data.flag)
    found = [
        document_ends.message(prefixes, token, flags.tokenizer_type)
        for token in _end_of_document(flags, words)
    ]
    if not found or None in found:
        return ""
    what = "stops" if config.require_documents else "warns"
    head, *pairs, advice = (line.strip() for line in str(found[0]).splitlines())
    return (
        f"Counted with documents masked, which training would not do: it {what}, as {head} "
        f"{'; '.join(pairs)}. {advice}"
    )


def _end_of_document(flags: argparse.Namespace, words: Sequence[str]) -> tuple[int, ...]:
    """Return the tokens that can be the tokenizer's, by release; none where it is not known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    tokenizer_flags.add_arguments(parser)
    try:
        args, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return ()
    for name in ("tokenizer_type", "tokenizer_model", "vocab_size"):
        setattr(args, name, getattr(flags, name))
    tokenizer = tokenizer_flags.build_from_files(args)
    if tokenizer is None:
        return ()
    if args.tokenizer_type == "NullTokenizer" and args.null_tokenizer_eod_id is None:
        return tokenizer.eod, tokenizer.vocab_size  # the second before Megatron 0.18
    return (tokenizer.eod,)
