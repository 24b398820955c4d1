"""At start-up, see that attention sees what it should: on the real model, kernels and layout.

A mask that nothing reads is silent: training goes on, only with the wrong attention (Megatron-LM
issue 2357). So before the first step the first micro-batch goes through the trainer's own forward
step, and each core attention in the model is asked, query by query, which keys it sees
(`questions`); what it has to see is stated a second time, by plain arithmetic (`statement`).

It is asked for training as it begins and for evaluation. The first global and the first local
layer of each model chunk are also asked which gradients come back to which key (`gradients`), and
about later windows: those of the first step that has others, and one for each kind of call that the
run will come to (`ahead`). Recurrent layers whose state is cut are asked by changing what they must
not see (`states`). Documents are those of the real sequences, and some that are planted beside the
boundaries. Nothing is consumed and nothing is left behind (`sequences`, `traces`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.probe import sequences, traces
from megatron_skyladder.runtime.probe.moments import clock_faults, moments, sequence_faults
from megatron_skyladder.runtime.probe.passes import Findings, Passes
from megatron_skyladder.runtime.probe.sequences import HostBatch

logger = logging.getLogger(__name__)

__all__ = ["MaskProbeError", "probe_mask"]


class MaskProbeError(RuntimeError):
    """The model does not attend as the schedule says."""


def probe_mask(
    model: list[Any], clock: Clock, forward_step: Callable[..., Any], data_iterator: Any
) -> Any:
    """Ask every attention layer of the model which keys it sees; every rank has to call this.

    Args:
        model: this rank's model chunks, as the trainer wraps them.
        clock: the process's clock.
        forward_step: the trainer's own, ``(data_iterator, model) -> (output, loss function)``.
        data_iterator: of training, one or a list with one for each chunk; None on ranks that read
            nothing.

    Returns:
        The data iterator to train with: it still begins with the first micro-batch.

    Raises:
        MaskProbeError: on every rank, where the model attends otherwise on any.
    """
    started = time.perf_counter()
    training, documents = trainer.current(), clock.config.intra_document
    batches, data_iterator = _peek(data_iterator)
    first = next((batch for batch in batches if batch is not None), None)
    # first: what follows takes for granted that ranks of one model share out the same sequences
    _refuse(sequence_faults(training, batches, documents=documents))
    times = moments(clock, training, first)
    faults = clock_faults(clock, training, times)
    with traces.none_left(model):
        reads = [batch is not None for batch in batches]
        found = Passes(model, training, clock, forward_step, times, reads).run()
    clock.window(training=True)  # its latest window is again that of the step that comes
    found.faults = faults + found.faults
    _judge(found)
    logger.info(
        "mask probe passed in %.1f s: windows of %s tokens%s%s, and evaluation; %s answers of %d "
        "attention layers%s on this rank",
        time.perf_counter() - started,
        _listed([moment.window_len for moment in (times.begins, *times.later)]),
        f" ({found.own_windows} at most in local layers)" if found.own_windows else "",
        _documents(first) if documents else "",
        f"{found.num_answers:,}",
        found.num_layers,
        f" and {found.num_states} recurrent ones" if found.num_states else "",
    )
    return data_iterator


def _peek(data_iterator: Any) -> tuple[list[HostBatch | None], Any]:
    """Return what each chunk reads first, and the iterators that will still hand it out."""
    several = isinstance(data_iterator, list)
    batches, iterators = [], []
    for iterator in data_iterator if several else [data_iterator]:
        batch, kept = sequences.peek(iterator)
        if batch is None and iterator is not None:
            batch = sequences.made_up(trainer.current())
        batches.append(batch)
        iterators.append(kept)
    return batches, iterators if several else iterators[0]


def _listed(windows: list[int]) -> str:
    """Return each once, as in "2, 26 and 128"."""
    *others, last = map(str, dict.fromkeys(windows))
    return f"{', '.join(others)} and {last}" if others else last


def _documents(batch: HostBatch | None) -> str:
    """Say how many documents end in the real sequences: none may be a fault of the data."""
    if batch is None or batch.get("cu_seqlens") is not None:
        return ", documents masked"
    tokens = batch["tokens"]
    ends = int((tokens == trainer.current().end_of_document).sum())
    return f", documents masked ({ends} end in the first {len(tokens)} sequences)"


def _judge(found: Findings) -> None:
    """Raise on all ranks what any of them found; all ranks have to call this."""
    not_finite = first_of_all(found.not_finite)
    if not_finite is not None and torch.distributed.get_rank() == 0:
        logger.warning(
            "the model's numbers are not finite: the queries, keys or values that %s makes of the "
            "first micro-batch hold NaN or infinity before they come to its attention. Look at the "
            "weights (the checkpoint, the initialization). The mask was probed with other numbers.",
            not_finite,
        )
    for faults in (found.faults, found.lost):  # a wrong mask has wrong gradients too
        _refuse(faults)


_SHOWN_FAULTS = 3


def _refuse(faults: list[str]) -> None:
    """Raise on all ranks where there is a fault on any; all ranks have to call this."""
    fault = first_of_all("; ".join(faults[:_SHOWN_FAULTS]) or None)
    if fault is not None:
        raise MaskProbeError(
            f"the attention mask is not applied as the schedule says. {fault}. Check that the "
            "model is built with SkyLadder's layer spec, that nothing else replaces its core "
            "attention, and that nothing else changes its batches or its masks. "
            "--skyladder-no-probe skips this check, for debugging only."
        )


def first_of_all(text: str | None) -> str | None:
    """Return the text of the first rank that has one, on all ranks."""
    size = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank() if text is not None else size
    first = torch.tensor(rank, device="cuda")
    torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
    if int(first) == size:
        return None
    texts = [text]
    torch.distributed.broadcast_object_list(texts, src=int(first))
    return f"rank {int(first)}: {texts[0]}"
