"""What one micro-batch's queries may see, and which of them this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.sequence_layout import Layout
from megatron_skyladder.runtime import sequence_order
from megatron_skyladder.runtime.probe import statement
from megatron_skyladder.runtime.probe.sequences import HostBatch
from megatron_skyladder.runtime.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Sight:
    """Who may see whom in a micro-batch, by `statement`.

    Positions count over all its sequences, one after the other: N in all, s of each sequence on
    this context-parallel rank. Tensors are int64, on the device.

    Args:
        first: [N], the first key that each query sees; it sees all from there up to itself.
        own: [s, b], the positions that this rank holds, as attention gets them.
        run_starts: [N], where the stretch of neighbouring positions begins that lie on one rank.
        seq_length: tokens in a sequence.
    """

    first: torch.Tensor
    own: torch.Tensor
    run_starts: torch.Tensor
    seq_length: int

    @property
    def num_positions(self) -> int:
        """N."""
        return self.first.numel()

    @property
    def own_in_sequence(self) -> torch.Tensor:
        """[b, s]: the same positions, counted within each sequence."""
        return self.own.T % self.seq_length

    def of_layer(self, own_window: int | None) -> Sight:
        """Return what a layer sees whose queries see so many keys at most; None: any number."""
        if own_window is None:
            return self
        if own_window not in self._of_local:
            everywhere = torch.arange(self.num_positions, device=self.first.device)
            first = torch.maximum(self.first, everywhere - own_window + 1)
            self._of_local[own_window] = replace(self, first=first)
        return self._of_local[own_window]

    @cached_property
    def _of_local(self) -> dict[int, Sight]:
        return {}

    @cached_property
    def is_last_seer(self) -> torch.Tensor:
        """bool [N]: the next query sees fewer of the keys, so this one is the last to see some."""
        following = torch.roll(self.first, -1)
        following[-1] = -1
        return following != self.first

    @cached_property
    def place_of(self) -> torch.Tensor:
        """[N]: at which place of ``own.flatten()`` a position is, or -1."""
        places = torch.full_like(self.first, -1)
        places[self.own.flatten()] = torch.arange(self.own.numel(), device=places.device)
        return places


def held_positions(trainer: Trainer, layouts: Sequence[Layout] = ()) -> torch.Tensor:
    """Return the positions of each sequence that each context-parallel rank holds, [n, cp, s].

    They are those at which the trainer cuts a batch that was put into the layouts' order; all ranks
    of the group have to call this.

    Args:
        trainer: whoever trains.
        layouts: of each sequence; empty: one sequence in the order of the dataset.

    Raises:
        ValueError: the ranks do not hold each position once.
    """
    whole = torch.arange(trainer.seq_length).expand(max(1, len(layouts)), -1)
    ordered = sequence_order.reordered({"positions": whole}, layouts)["positions"].to("cuda")
    own = trainer.cut_for_context_parallel({"positions": ordered})["positions"].contiguous()
    group = trainer.groups.cp
    size = 1 if group is None else group.size()
    if size == 1:
        return own[:, None]
    parts = [torch.empty_like(own) for _ in range(size)]
    torch.distributed.all_gather(parts, own, group=group)
    held = torch.stack(parts, dim=1)
    if not torch.equal(held.flatten(1).sort(dim=1).values, whole.to(held.device)):
        raise ValueError(
            f"the {size} context-parallel ranks do not hold each of the {trainer.seq_length} "
            "positions of a sequence once: the batch is cut otherwise than Megatron cuts it."
        )
    return held


def run_starts(held: torch.Tensor) -> np.ndarray:
    """Return where each position's run begins (see `Sight`), int64 [seq_length], on the host.

    Args:
        held: [cp, s], of one sequence; see `held_positions`.
    """
    positions = held.cpu().numpy()
    owner = np.empty(positions.size, dtype=np.int64)
    for rank, part in enumerate(positions):
        owner[part] = rank
    begins = np.append(True, owner[1:] != owner[:-1])
    return np.maximum.accumulate(np.where(begins, np.arange(owner.size), 0))


def sight(
    trainer: Trainer,
    config: SkyLadderConfig,
    held: torch.Tensor,
    window_len: int,
    batch: HostBatch | None,
    *,
    documents: bool,
) -> Sight:
    """Work out what the queries of a micro-batch may see; all ranks have to call this.

    Args:
        trainer: whoever trains.
        config: the checked configuration.
        held: [n, cp, s], of each sequence or of one like all; see `held_positions`.
        window_len: tokens.
        batch: the sequences; needed on tensor-parallel rank 0, where documents are masked.
        documents: whether documents are masked.
    """
    length, count = trainer.seq_length, trainer.micro_batch_size
    starts = _shared_starts(trainer, batch) if documents else None
    first = statement.first_visible(
        count, length, window_len=window_len, sliding=config.mask == "sliding", starts=starts
    )
    shift = torch.arange(count, device=held.device) * length
    rank = 0 if trainer.groups.cp is None else trainer.groups.cp.rank()
    begins = torch.from_numpy(np.stack([run_starts(each) for each in held])).to(held.device)
    return Sight(
        first=torch.from_numpy(first).to(held.device),
        own=held[:, rank].T + shift,
        run_starts=(shift[:, None] + begins).flatten(),
        seq_length=length,
    )


def _shared_starts(trainer: Trainer, batch: HostBatch | None) -> np.ndarray:
    """Give the documents' starts to all ranks of the tensor-parallel group, [b, seq_length]."""
    shape = trainer.micro_batch_size, trainer.seq_length
    group = trainer.groups.tp
    starts = torch.empty(shape, dtype=torch.int64, device="cuda")
    if group is None or group.rank() == 0:
        assert batch is not None
        starts = torch.from_numpy(_starts(batch, trainer)).to("cuda")
        if tuple(starts.shape) != shape:
            raise ValueError(
                f"the first micro-batch has the shape {tuple(starts.shape)}, but the trainer says "
                f"{shape} (sequences, tokens)."
            )
    if group is not None and group.size() > 1:
        source = torch.distributed.get_process_group_ranks(group)[0]
        torch.distributed.broadcast(starts, source, group=group)
    return starts.cpu().numpy()


def _starts(batch: HostBatch, trainer: Trainer) -> np.ndarray:
    given: Any = batch.get("cu_seqlens")
    if given is not None:
        return statement.starts_of(given.numpy(), trainer.seq_length)
    return statement.document_starts(batch["tokens"].numpy(), trainer.end_of_document)
