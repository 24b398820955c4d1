"""At start-up, see that the mask is really applied: on the real model, backend and layout.

A mask that nothing reads is silent: training goes on, only with the wrong attention (Megatron-LM
issue 2357). So before the first step the model sees three rows: a base row, one in which every
token that some queries must not see has changed, and one in which a token they must see has. The
losses of those queries have to stay the same to the bit, and to move, respectively.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_skyladder.ladder import fragments
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.trainer import Trainer

logger = logging.getLogger(__name__)

_VARIANTS = ("base", "hidden", "seen")
_SMALLEST_WINDOW = 4  # tokens; with fewer there is hardly a token that has to be seen


class MaskProbeError(RuntimeError):
    """The model does not attend as the schedule says."""


@dataclass(frozen=True)
class Question:
    """What one probe asks of one row.

    Args:
        name: for messages.
        window_len: tokens.
        queries: the positions whose losses are watched, [start, stop).
        hidden: bool [seq_length], True where no query may see the token.
        seen: a position that all queries but itself see.
        document_end: where a document ends in the row, or None.
    """

    name: str
    window_len: int
    queries: tuple[int, int]
    hidden: np.ndarray
    seen: int
    document_end: int | None = None


def questions(clock: Clock, num_layers: int) -> list[Question]:
    """Return what to ask under the current window, and about documents where they are masked."""
    config = clock.config
    length = config.seq_length
    window = min(max(clock.window(training=True), _SMALLEST_WINDOW), length)
    positions = np.arange(length)
    if config.mask == "sliding":
        # what a query sees reaches back a window per layer: ask where that stays within the row
        window = min(window, max(2, length // (2 * num_layers)))
        reach = num_layers * (window - 1)
        start = length - 1
        hidden = positions < start - reach
        asked = [Question("sliding window", window, (start, length), hidden, start - 1)]
    elif window < length:
        start = (length // 2 + window - 1) // window * window
        start = start if start < length - 1 else 0
        stop = min(start + window, length)
        hidden = (positions < start) | (positions >= stop)
        asked = [Question("window", window, (start, stop), hidden, start)]
    else:
        stop = length // 2
        asked = [Question("causal order", length, (0, stop), positions >= stop, 0)]
    if config.intra_document:
        start = length // 2
        hidden = positions < start
        asked.append(Question("document", length, (start, length), hidden, start, start))
    return asked


def probe_mask(model: list[Any], clock: Clock) -> None:
    """Ask all questions of the model; every rank has to call this.

    Args:
        model: this rank's model chunks, as Megatron wraps them.
        clock: the process's clock.

    Raises:
        MaskProbeError: on every rank, where the model attends otherwise.
    """
    started = time.perf_counter()
    chunks = [chunk.module if hasattr(chunk, "ddp_config") else chunk for chunk in model]
    training = trainer.current()
    for question in questions(clock, training.num_layers):
        with clock.override(question.window_len):
            hidden, seen = _differences(chunks, question, training, clock.config.intra_document)
        if hidden != 0.0 or not seen > 0.0:
            raise MaskProbeError(_complaint(question, hidden, seen))
    logger.info("mask probe passed in %.1f s", time.perf_counter() - started)


def _complaint(question: Question, hidden: float, seen: float) -> str:
    start, stop = question.queries
    what = (
        f"changing tokens that the positions {start}..{stop - 1} must not see moved their losses "
        f"by up to {hidden:.3g}"
        if hidden != 0.0
        else f"changing token {question.seen}, which the positions after it in {start}..{stop - 1} "
        f"must see, did not move their losses ({seen})"
    )
    return (
        f"the attention mask is not applied as the schedule says ({question.name} of "
        f"{question.window_len} tokens): {what}. Check that the model is built with SkyLadder's "
        "layer spec and that nothing else replaces its core attention. "
        "--skyladder-no-probe skips this check, for debugging only."
    )


def _differences(
    chunks: list[Any], question: Question, training: Trainer, intra_document: bool
) -> tuple[float, float]:
    """Return how far the watched losses moved for hidden and for seen tokens, on every rank."""
    rows = _rows(question, training.seq_length, training.vocab_size, training.micro_batch_size)
    mask = None
    if intra_document:
        ends = [] if question.document_end is None else [question.document_end]
        row = fragments.fragment_cu_seqlens(
            np.array(ends, dtype=np.int32),
            seq_length=training.seq_length,
            window_len=question.window_len,
        )
        mask = torch.from_numpy(fragments.rows_cu_seqlens([row] * training.micro_batch_size))
    losses = _losses(chunks, rows, mask, training)
    moved = torch.zeros(2, dtype=torch.float64, device="cuda")
    if losses:
        base, hidden, seen = (losses[name] for name in _VARIANTS)
        start, stop = question.queries
        positions = rows["positions"]
        watched = (positions >= start) & (positions < stop)
        after = watched & (positions > question.seen)
        moved[0] = ((hidden - base).abs() * watched).max()
        moved[1] = ((seen - base).abs() * after).max()
    torch.distributed.all_reduce(moved, op=torch.distributed.ReduceOp.MAX)
    return float(moved[0]), float(moved[1])


def _rows(
    question: Question, seq_length: int, vocab_size: int, num_rows: int
) -> dict[str, torch.Tensor]:
    """Return this context-parallel rank's part of the rows, each [num_rows, length] on the device.

    Keys: the variants' tokens, ``labels`` and ``positions`` (in the whole row).
    """
    generator = np.random.default_rng(0)
    base = generator.integers(0, vocab_size, seq_length)
    other = (base + generator.integers(1, vocab_size, seq_length)) % vocab_size
    positions = np.arange(seq_length)
    rows = {
        "base": base,
        "hidden": np.where(question.hidden, other, base),
        "seen": np.where(positions == question.seen, other, base),
        "labels": generator.integers(0, vocab_size, seq_length),
        "positions": positions,
    }
    batch = {
        name: torch.from_numpy(row).to("cuda").repeat(num_rows, 1) for name, row in rows.items()
    }
    return trainer.current().cut_for_context_parallel(batch)


def _losses(
    chunks: list[Any], rows: dict[str, torch.Tensor], mask: torch.Tensor | None, training: Trainer
) -> dict[str, torch.Tensor]:
    """Run every variant through the pipeline; the last stage gets the losses [rows, length]."""

    def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        name = next(data_iterator)
        output = model(rows[name], rows["positions"], mask, labels=rows["labels"])
        return output, lambda losses, non_loss_data=True: {name: losses.detach().float()}

    # interleaved schedules want a multiple of the pipeline's length
    pipeline_size = training.groups.pp.size()
    num_microbatches = -(-len(_VARIANTS) // pipeline_size) * pipeline_size
    names = list(itertools.islice(itertools.cycle(_VARIANTS), num_microbatches))
    iterators = [iter(names) for _ in chunks]
    for chunk in chunks:
        chunk.eval()
    config = get_attr_wrapped_model(chunks[0], "config")
    timers, config.timers = config.timers, None
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=num_microbatches,
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            decoder_seq_length=training.seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )
    config.timers = timers
    for chunk in chunks:
        chunk.train()
    return {name: losses for result in results for name, losses in result.items()}
