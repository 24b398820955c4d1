"""What the lines call that ``skyladder patch`` inserts into a Megatron-LM checkout.

One function for each place. Without a ``--skyladder-*`` flag each leaves everything as it was.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import flags
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.runtime.console import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """In ``add_megatron_arguments``: add our flags, once.

    What comes next may read a checkpoint already (``--use-checkpoint-args``).
    """
    from megatron_skyladder.megatron_lm import resume

    resume.accept_old_checkpoints()
    if "--skyladder-preset" in parser._option_string_actions:
        return parser
    return flags.add_arguments(parser)


def switch_on() -> None:
    """In ``pretrain``, after Megatron is initialized: install the hooks where a flag was given.

    The guards of a resume are installed without a flag too.
    """
    from megatron_skyladder.megatron_lm import compat, flag_rules, hooks, resume

    options = compat.args()
    flag_rules.check_arrival(options, sys.argv[1:])
    configuration = resume.config_of_run(options)
    if hasattr(options, hooks.FINGERPRINT):
        return
    log_to_console()
    if configuration is None:
        hooks.install_guards()
    else:
        check_other_masks(configuration)
        hooks.install(configuration, options)


def check_other_masks(config: SkyLadderConfig) -> None:
    """Refuse a fork's own mask of documents beside ours, by the command line's flags.

    Raises:
        UsageError: the message names both.
    """
    if config.intra_document:
        from megatron_skyladder.attention import limits
        from megatron_skyladder.megatron_lm import flag_names

        limits.refuse(flag_names.other_masks(sys.argv[1:]))


def dataset_is_built_on_rank() -> bool | None:
    """In ``is_dataset_built_on_rank``: every stage reads sequences where documents are masked.

    Returns:
        What the function has to return, or None where it decides for itself.
    """
    from megatron.core import mpu

    from megatron_skyladder.ladder import clock

    if not clock.documents_masked():
        return None
    return mpu.get_tensor_model_parallel_rank() == 0


def watch_sequences(data_iterator: Any, model: Any) -> Any:
    """In ``forward_step``, before the batch: keep the next sequences, and order their tokens.

    Both while they are on the host. `layout_choice` looks whether a forward step calls this.

    Args:
        data_iterator: of this rank, or None.
        model: this stage's model chunk; in evaluation sequences keep their order.
    """
    from megatron_skyladder.ladder import clock
    from megatron_skyladder.ladder.sequence_layout import Kind
    from megatron_skyladder.runtime import document_mask, sequence_order

    active = clock.installed()
    if active is None:
        _check_switched_on()
    orders = active is not None and active.layout_kind is not Kind.ZIGZAG and model.training
    if data_iterator is None or not (orders or clock.documents_masked()):
        return data_iterator
    return document_mask.HostTap(data_iterator, sequence_order.in_order if orders else dict)


def watch(data_iterator: Any) -> Any:
    """Keep the next sequence, while it is on the host: what patches up to November 2026 call."""
    from megatron_skyladder.ladder import clock
    from megatron_skyladder.runtime import document_mask

    if clock.installed() is None:
        _check_switched_on()
    if data_iterator is None or not clock.documents_masked():
        return data_iterator
    return document_mask.HostTap(data_iterator)


@functools.cache
def _check_switched_on() -> None:
    """Refuse to train at the full window where flags are read and the call of `switch_on` is gone.

    Raises:
        UsageError: it is, which the merge of another branch can do.
    """
    from megatron_skyladder.megatron_lm import compat

    if flags.is_requested(compat.args()):
        raise UsageError(
            "--skyladder-* flags were given, but nothing switched SkyLadder on: the line that the "
            "patch inserts into pretrain (megatron/training/training.py) is not there, so training "
            "would go on at the full window. Apply the patch again: skyladder patch apply DIR."
        )


def document_mask(data_iterator: Any, attention_mask: Any, model: Any) -> Any:
    """In ``forward_step``, after the batch: return the mask that goes to the model.

    Args:
        data_iterator: what ``watch_sequences`` returned.
        attention_mask: Megatron's, which stays where SkyLadder masks no documents.
        model: this stage's model chunk; sequences are seen whole in evaluation.
    """
    from megatron_skyladder.ladder import clock
    from megatron_skyladder.runtime import document_mask

    if not (clock.documents_masked() and model.training):
        return attention_mask
    row_batch = None
    if data_iterator is not None:
        if data_iterator.latest is None:  # a middle pipeline stage: Megatron reads nothing there
            next(data_iterator)
        row_batch = data_iterator.latest
    return document_mask.training_mask(row_batch)
