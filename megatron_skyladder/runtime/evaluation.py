"""Validation loss at several context lengths, measured with every plain validation.

Plain validation sees whole sequences. Some of them are then run again, once for each shorter length
l, under blocked windows of l tokens (0..l-1, l..2l-1, ... of the sequence, whatever mask training
uses), so that no token sees more than l tokens. Every length is measured on the same tokens: the
losses at the full length are those of the same sequences, taken from the plain pass, and so are the
losses by position. What is reported:

* ``skyladder/loss_at_<l>``: mean loss under blocked windows of l tokens;
* ``skyladder/loss_positions_<a>_<b>``: mean loss of the tokens at positions a..b (both included)
  of the sequence, all of which is visible; their mean, weighted by tokens, is ``loss_at_<seq>``.

The sequences run again are so few that the extra passes cost at most `EXTRA_WORK` of plain
validation (less, in truth: short windows are cheaper). The data order, the clock, random states and
Megatron's counters are not touched: nothing is read and nothing is drawn.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_skyladder.attention import prediction_heads
from megatron_skyladder.ladder import clock, fragments
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS
from megatron_skyladder.runtime import pipeline, trainer
from megatron_skyladder.runtime.document_mask import BATCH_KEYS

EXTRA_WORK = 0.9  # sequences passed again, relative to the sequences of plain validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """The sequences of one data-parallel rank that are run at every length.

    Args:
        num_rows: a multiple of ``micro_batch_size``.
        micro_batch_size: sequences per forward pass.
    """

    num_rows: int
    micro_batch_size: int

    @property
    def num_microbatches(self) -> int:
        """Forward passes for one length."""
        return self.num_rows // self.micro_batch_size


def choose_sample(
    num_iterations: int, rows_per_iteration: int, micro_batch_size: int, num_passes: int
) -> Sample:
    """Return which sequences can be passed ``num_passes`` more times within `EXTRA_WORK`.

    Whole iterations where possible: these are the same sequences under any data-parallel size.

    Args:
        num_iterations: of one plain validation.
        rows_per_iteration: of this rank.
        micro_batch_size: sequences in each of its micro-batches.
        num_passes: lengths below the sequence's, at least 1.
    """
    affordable = EXTRA_WORK / num_passes
    rows = int(affordable * num_iterations) * rows_per_iteration
    rows = rows or max(1, int(affordable * num_iterations * rows_per_iteration))
    batch = min(rows, micro_batch_size)
    rows -= rows % batch
    return Sample(rows, batch)


_announced: set[object] = set()


def announce(rows: int, sample: Sample, windows: tuple[int, ...], seq_length: int) -> None:
    """Say once what is measured.

    Args:
        rows: sequences of plain validation that this rank has read; 0: it has nothing to say.
        sample: those that are run again.
        windows: tokens, ascending, all below ``seq_length``.
        seq_length: tokens in a sequence.
    """
    key = (rows, windows)
    if not rows or key in _announced:
        return
    _announced.add(key)
    logger.info(
        "losses by length: blocked windows of %s tokens, on the same %d of the %d validation "
        "sequences of each data-parallel rank",
        ", ".join(str(length) for length in (*windows, seq_length)),
        sample.num_rows,
        rows,
    )
    if sample.num_rows * len(windows) > EXTRA_WORK * rows:
        logger.warning(
            "losses by length cost more than plain validation itself: %d more passes, but only %d "
            "row(s) to choose from. Raise --eval-iters to make them cheap in proportion.",
            len(windows),
            rows,
            extra=SAME_ON_ALL_RANKS,
        )


class _Recorder:
    """A data iterator that keeps the first sequences it hands on, still on the host.

    Args:
        iterator: yields micro-batches, of any number of sequences each.
        num_kept: sequences to keep; the last micro-batch is kept whole.
    """

    def __init__(self, iterator: Iterator[dict[str, Any]], num_kept: int) -> None:
        self._iterator = iterator
        self._num_kept = num_kept
        self.kept: list[dict[str, Any]] = []
        self.num_reads = self.num_kept = self.num_seen = 0

    def __iter__(self) -> _Recorder:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._iterator)
        self.keep(batch)
        return batch

    def keep(self, batch: dict[str, Any]) -> None:
        """Count a micro-batch, and keep it while there are too few."""
        num_sequences = len(batch["tokens"])
        self.num_reads += 1
        self.num_seen += num_sequences
        if num_sequences and self.num_kept < self._num_kept:
            self.kept.append({key: batch[key] for key in BATCH_KEYS})
            self.num_kept += num_sequences


class Taps:
    """What is kept of a plain validation: its first sequences, and their losses.

    Args:
        data_iterator: Megatron's: an iterator, a list of them (one for each model chunk), or None
            on ranks that read nothing.
        forward_step: Megatron's ``forward_step_func``.
        num_kept: sequences to keep.
    """

    def __init__(self, data_iterator: Any, forward_step: Any, num_kept: int) -> None:
        self._forward_step = forward_step
        self._num_kept = num_kept
        self._num_losses = 0
        chunks = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        self._recorders = [
            None if iterator is None else _Recorder(iterator, num_kept) for iterator in chunks
        ]
        self.data_iterator: Any = self._recorders
        if not isinstance(data_iterator, list):
            self.data_iterator = self._recorders[0]
        self.plain_losses: list[torch.Tensor] = []  # [sequences, tokens on this CP rank] each

    def forward_step(
        self, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run a step; where it ends in losses per token, keep them."""
        output, loss_func = self._forward_step(data_iterator, model, *args, **kwargs)
        return output, self.keeping_losses(loss_func)

    def keeping_losses(self, loss_func: Any) -> Any:
        """Return a loss function that keeps the losses it is called with."""

        def keep_losses(losses: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(losses) and self._num_losses < self._num_kept:
                self.plain_losses.append(losses.detach().float())
                self._num_losses += len(losses)
            return loss_func(losses, *args, **kwargs)

        return keep_losses

    def keep_batch(self, chunk: int, batch: dict[str, Any]) -> None:
        """Keep what a model chunk has read, where the trainer hands iterators out one by one."""
        recorder = self._recorders[chunk]
        assert recorder is not None
        recorder.keep(batch)

    def agree(self, sample: Sample, num_passes: int) -> Sample | None:
        """Return the part of a sample that every rank can run; all ranks have to ask.

        A validation may have had fewer sequences than was counted on: micro-batches of one sequence
        whatever the flag says (``--full-validation``), a last one that is not full, none at all.

        Args:
            sample: what was planned.
            num_passes: as in `choose_sample`.

        Returns:
            A sample of the same micro-batches or smaller ones; None where there is nothing to run.
        """
        affordable = EXTRA_WORK / num_passes
        counts = [
            min(recorder.num_kept, max(1, int(affordable * recorder.num_seen)))
            for recorder in self._recorders
            if recorder is not None and recorder.num_reads  # middle stages have unread ones
        ]
        smallest = min([sample.num_rows, *counts])
        common = torch.tensor(smallest, dtype=torch.int64, device="cuda")
        torch.distributed.all_reduce(common, op=torch.distributed.ReduceOp.MIN)
        num_rows = int(common)
        if num_rows == 0:
            return None
        batch = min(num_rows, sample.micro_batch_size)
        return Sample(num_rows - num_rows % batch, batch)

    @property
    def num_seen(self) -> int:
        """Sequences of the plain validation; 0 on ranks that read none."""
        return max((recorder.num_seen for recorder in self._recorders if recorder), default=0)

    def rows(self, sample: Sample) -> list[list[dict[str, Any]] | None]:
        """Return the sample in micro-batches of its own size, for each model chunk."""
        return [
            _rebatch(recorder.kept, sample) if recorder is not None and recorder.kept else None
            for recorder in self._recorders
        ]


def shorter_lengths(config: SkyLadderConfig) -> tuple[int, ...]:
    """Return the context lengths that take passes of their own; the whole sequence takes none."""
    return tuple(length for length in config.eval_lengths if length < config.seq_length)


def losses_by_length(
    model: list[Any], taps: Taps, planned: Sample, windows: tuple[int, ...]
) -> dict[str, Any]:
    """Run part of a validation again under each window; all ranks have to call this.

    Args:
        model: this rank's model chunks.
        taps: what was kept of the validation.
        planned: of `choose_sample`.
        windows: of `shorter_lengths`.

    Returns:
        What the trainer is to report beside its own losses; empty but on the last pipeline stage.
    """
    sample = taps.agree(planned, len(windows))
    if sample is None:
        logger.warning(
            "no losses by length: a rank has seen no sequence in this validation",
            extra=SAME_ON_ALL_RANKS,  # they have agreed on it
        )
        return {}
    seq_length = trainer.current().seq_length
    announce(taps.num_seen, sample, windows, seq_length)
    pieces = run(model, taps.rows(sample), windows, sample)
    if not taps.plain_losses:
        return {}
    plain = torch.cat(taps.plain_losses)[: sample.num_rows]
    return report(plain, pieces, windows, seq_length)


def _rebatch(batches: list[dict[str, Any]], sample: Sample) -> list[dict[str, Any]]:
    whole = {
        key: None if batches[0][key] is None else torch.cat([batch[key] for batch in batches])
        for key in BATCH_KEYS
    }
    size = sample.micro_batch_size
    return [
        {key: None if rows is None else rows[i : i + size] for key, rows in whole.items()}
        for i in range(0, sample.num_rows, size)
    ]


@dataclass(frozen=True)
class _Piece:
    """What one forward pass left on the last pipeline stage, on this context-parallel rank."""

    window_len: int
    losses: torch.Tensor  # [sequences, tokens]
    loss_mask: torch.Tensor  # [sequences, tokens], 1 where a token counts
    positions: torch.Tensor  # [1, tokens], in the whole sequence


def run(
    model: list[Any],
    rows: list[list[dict[str, Any]] | None],
    windows: tuple[int, ...],
    sample: Sample,
) -> list[_Piece]:
    """Pass the sample through the pipeline once for each window, without gradients."""
    seq_length = trainer.current().seq_length
    masks = {window: _blocked_mask(seq_length, window, sample) for window in windows}

    def forward_step(iterator: Any, chunk: Any) -> tuple[Any, Any]:
        window, host_rows = next(iterator)
        batch = _share(host_rows, _used_by(chunk), sample.micro_batch_size, seq_length)
        with clock.current().override(window):
            output = chunk(
                batch["tokens"], batch["position_ids"], masks[window], labels=batch["labels"]
            )

        def piece(losses: torch.Tensor, non_loss_data: bool = True) -> _Piece:
            return _Piece(window, losses.float(), batch["loss_mask"], batch["positions"])

        return output, piece

    items = [(window, index) for window in windows for index in range(sample.num_microbatches)]
    padded = items + items[:1] * (pipeline.num_microbatches(model, len(items)) - len(items))
    iterators = [
        iter([(window, chunk_rows[index] if chunk_rows else None) for window, index in padded])
        for chunk_rows in rows
    ]
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    config = get_attr_wrapped_model(model[0], "config")
    timers, config.timers = config.timers, None
    with torch.no_grad():
        pieces = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=len(padded),
            seq_length=seq_length,
            micro_batch_size=sample.micro_batch_size,
            decoder_seq_length=seq_length,
            forward_only=True,
            collect_non_loss_data=True,
        )
    config.timers = timers
    for chunk, mode in zip(model, modes, strict=True):
        chunk.train(mode)
    return pieces[: len(items)]


def _used_by(chunk: Any) -> list[str]:
    """Return which keys of a batch a model chunk has a use for.

    Prediction heads embed tokens as the first stage does, and are on the last one.
    """
    model = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    embeds = model.pre_process or prediction_heads.heads(model) is not None
    return [
        *(("tokens", "position_ids") if embeds else ()),
        *(("labels", "loss_mask") if model.post_process else ()),
    ]


def _blocked_mask(seq_length: int, window_len: int, sample: Sample) -> torch.Tensor:
    """Return int32 cu_seqlens on the host: the same blocks for local and sliding masks."""
    no_documents = np.empty(0, dtype=np.int32)
    row = fragments.fragment_cu_seqlens(no_documents, seq_length=seq_length, window_len=window_len)
    return torch.from_numpy(fragments.rows_cu_seqlens([row] * sample.micro_batch_size))


def _share(
    host_rows: dict[str, Any] | None, keys: list[str], num_rows: int, seq_length: int
) -> dict[str, Any]:
    """Give tensor-parallel rank 0's sequences to its group, cut for this context-parallel rank.

    Args:
        host_rows: on tensor-parallel rank 0, unless there are no keys.
        keys: what the pipeline stage has a use for; the others of the batch are None.
    """
    group = trainer.current().groups.tp
    source = torch.distributed.get_process_group_ranks(group)[0]
    batch: dict[str, Any] = dict.fromkeys(BATCH_KEYS)
    for key in keys:
        if host_rows is not None:
            tensor = host_rows[key].to("cuda")
        else:
            dtype = torch.float32 if key == "loss_mask" else torch.int64
            tensor = torch.empty(num_rows, seq_length, dtype=dtype, device="cuda")
        torch.distributed.broadcast(tensor, source, group=group)
        batch[key] = tensor
    batch["positions"] = torch.arange(seq_length, device="cuda")[None]
    return trainer.current().cut_for_context_parallel(batch)


def report(
    plain: torch.Tensor, pieces: list[_Piece], windows: tuple[int, ...], seq_length: int
) -> dict[str, torch.Tensor]:
    """Return what is reported, over all data- and context-parallel ranks.

    Args:
        plain: the sample's losses from plain validation, [sequences, tokens on this CP rank].
        pieces: those of the extra passes, windows one after the other.
        windows: tokens, ascending, all below ``seq_length``.
    """
    first = [piece for piece in pieces if piece.window_len == windows[0]]
    loss_mask = torch.cat([piece.loss_mask for piece in first]).float()
    positions = first[0].positions
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, losses: torch.Tensor, weights: torch.Tensor) -> None:
        sums[name] = torch.stack([(losses * weights).sum(), weights.sum()]).double()

    for window in windows:
        losses = torch.cat([piece.losses for piece in pieces if piece.window_len == window])
        add(f"skyladder/loss_at_{window}", losses, loss_mask)
    add(f"skyladder/loss_at_{seq_length}", plain, loss_mask)
    edges = (0, *windows, seq_length)
    for start, stop in itertools.pairwise(edges):
        in_band = (positions >= start) & (positions < stop)
        add(f"skyladder/loss_positions_{start}_{stop - 1}", plain, loss_mask * in_band)
    totals = torch.stack(list(sums.values()))
    torch.distributed.all_reduce(totals, group=trainer.current().groups.dp_cp)
    counted = zip(sums, totals, strict=True)  # no token counts where all of them are padding
    return {name: total / count for name, (total, count) in counted if count > 0}
