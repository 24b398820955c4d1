"""The moments of a run that are asked about: what is read in them, and who may see whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.sequence_layout import Kind, Layout
from megatron_skyladder.runtime import document_mask
from megatron_skyladder.runtime.probe import ahead, sequences, statement
from megatron_skyladder.runtime.probe.sequences import HostBatch
from megatron_skyladder.runtime.probe.sight import Sight, held_positions, run_starts, sight
from megatron_skyladder.runtime.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Moment:
    """A moment of the run.

    Args:
        name: for messages, as in "in <name>".
        samples: consumed by training before it.
        window_len: tokens, by `statement`.
        training: False in evaluation.
        sight: who may see whom.
        batch: the sequences, on the host; None on ranks that read nothing.
        state_sight: the same for the state of recurrent layers; None where it is not cut.
        local_window: what a query of a local layer sees at most by a ladder of its own, by
            `statement`; None: none holds it back.
    """

    name: str
    samples: int
    window_len: int
    training: bool
    sight: Sight
    batch: HostBatch | None
    state_sight: Sight | None = None
    local_window: int | None = None

    def own_window(self, of_model: int | None) -> int | None:
        """Return what a query of a layer sees at most whose model says so; None: any number."""
        if of_model is None or self.local_window is None:
            return of_model
        return min(of_model, self.local_window)


@dataclass(frozen=True)
class Moments:
    """All that are asked about.

    Args:
        begins: training as it begins.
        later: training at the first step whose window is another, and at one step for each kind of
            call that is still ahead (`ahead`), in their order.
        evaluates: evaluation as it begins.
    """

    begins: Moment
    later: tuple[Moment, ...]
    evaluates: Moment


def moments(clock: Clock, trainer: Trainer, batch: HostBatch | None) -> Moments:
    """Return what to ask about; all ranks have to call this.

    Args:
        clock: the process's clock.
        trainer: whoever trains.
        batch: the first micro-batch; None on ranks that read nothing.
    """
    config, now = clock.config, trainer.consumed_samples
    group = trainer.groups.cp
    sharing = ahead.Sharing(1 if group is None else group.size(), clock.layout_kind)
    change = statement.next_change(config, now)
    asked = ahead.samples_to_ask(config, now, trainer.total_samples, sharing)
    later = sorted({*asked, *([] if change is None else [change])})

    def training(name: str, samples: int, number: int) -> Moment:
        window_len = statement.window(config, samples)
        asked = batch
        with trainer.at_samples(samples):
            held = held_positions(trainer, _layouts(clock, trainer, batch))
            if config.intra_document:
                if batch is not None:
                    places = sequences.marks(trainer.seq_length, window_len, run_starts(held[0]))
                    asked = sequences.planted(batch, trainer.end_of_document, places, number)
                held = held_positions(trainer, _layouts(clock, trainer, asked))
        seen = sight(trainer, config, held, window_len, asked, documents=config.intra_document)
        state = {"fragments": seen}.get(config.recurrent_state)
        if config.recurrent_state == "documents":
            state = sight(trainer, config, held, trainer.seq_length, asked, documents=True)
        name = f"{name} after {samples} samples, with a window of {window_len} tokens"
        of_local = statement.local_window(config, samples)
        return Moment(name, samples, window_len, True, seen, asked, state, of_local)

    length = trainer.seq_length
    whole = sight(trainer, config, held_positions(trainer), length, batch, documents=False)
    return Moments(
        begins=training("training", now, 0),
        later=tuple(training("training", at, 1 + n) for n, at in enumerate(later)),
        evaluates=Moment(
            "evaluation, which sees whole sequences", now, length, False, whole, batch, whole
        ),
    )


def _layouts(clock: Clock, trainer: Trainer, batch: HostBatch | None) -> tuple[Layout, ...]:
    """Return the layouts of a training micro-batch right now; all ranks have to call this."""
    group = trainer.groups.cp
    if group is None or group.size() == 1:
        return ()
    rule = clock.layout_rule(trainer.seq_length, group.size(), training=True)
    cu_seqlens = None
    if rule.kind is Kind.SEQUENCE:
        mask, _ = document_mask.document_mask(batch, clock.config, rule.window_len)
        cu_seqlens = mask.numpy()
    return rule.layouts(trainer.micro_batch_size, cu_seqlens)


def clock_faults(clock: Clock, trainer: Trainer, times: Moments) -> list[str]:
    """Return what the clock says otherwise than `statement`, at and between the moments."""
    config, now = clock.config, times.begins.samples
    samples = {now, now + config.step_samples}
    for moment in times.later:
        change = moment.samples
        samples |= {change - 1, change, change + config.step_samples}
    faults = []
    for at in sorted(samples):
        with trainer.at_samples(at):
            found = clock.window(training=True), clock.window(training=False)
        stated = statement.window(config, at), config.seq_length
        if found != stated:
            faults.append(
                f"after {at} samples the clock says a window of {found[0]} tokens in training and "
                f"of {found[1]} in evaluation, but by the schedule ({config.schedule.describe()}) "
                f"they are {stated[0]} and {stated[1]}"
            )
        with trainer.at_samples(at):
            of_local = clock.local_window(training=True), clock.local_window(training=False)
        wanted = statement.local_window(config, at)
        if of_local != (wanted, None):
            assert config.local_schedule is not None
            faults.append(
                f"after {at} samples the clock says that local layers see {of_local[0]} tokens at "
                f"most, but by their ladder ({config.local_schedule.describe()}) it is {wanted}"
            )
    return faults


def sequence_faults(
    trainer: Trainer, batches: list[HostBatch | None], *, documents: bool
) -> list[str]:
    """Return where ranks that train on the same sequences read different ones.

    All ranks have to call this. Only where documents are masked: elsewhere the sequences decide
    nothing.

    Args:
        trainer: whoever trains.
        batches: what each of this rank's model chunks reads first; None where it reads nothing.
        documents: whether documents are masked.
    """
    if not documents:
        return []
    seen = _signatures(batches)
    faults = []
    if len(seen) > 1:  # and on: the others wait in the reductions below
        faults.append("the model chunks of this rank read different sequences first")
    groups: dict[str, Any] = {"pipeline stages": trainer.groups.pp}
    groups["context-parallel ranks"] = trainer.groups.cp
    groups["tensor-parallel ranks"] = trainer.groups.tp  # the first alone reads, or all do
    for name, group in groups.items():
        if group is None or group.size() == 1:
            continue
        if _differ(seen, group):
            faults.append(f"the {name} of one model read different sequences first")
    return faults


def context_parallel_fault(trainer: Trainer, batch: HostBatch) -> str:
    """Return what `sequence_faults` says of the ranks that share a sequence; empty: nothing.

    The ranks of the context-parallel group have to call this, and no others.
    """
    group = trainer.groups.cp
    if group is None or group.size() == 1 or not _differ(_signatures([batch]), group):
        return ""
    return "the context-parallel ranks of one model read different sequences first"


_NOTHING = 1 << 62


def _differ(seen: set[int], group: Any) -> bool:
    """Return whether ranks of a group have seen different sequences; all of it has to call this."""
    smallest = torch.tensor(min(seen, default=_NOTHING), device="cuda")
    largest = torch.tensor(max(seen, default=-1), device="cuda")
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN, group=group)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return bool(smallest < largest)


def _signatures(batches: list[HostBatch | None]) -> set[int]:
    return {_signature(batch["tokens"]) for batch in batches if batch is not None}


def _signature(tokens: torch.Tensor) -> int:
    """Return a number that depends on each token and its place."""
    places = torch.arange(1, tokens.numel() + 1).view(tokens.shape)
    return int(((tokens.long() + 1) * (places * 2654435761 % (1 << 31))).sum()) % _NOTHING
