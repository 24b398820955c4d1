"""A trainer that is a plain object: what tests hand to `runtime.trainer.install`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_skyladder.runtime.trainer import Groups


@dataclass
class PlainTrainer:
    """The `runtime.trainer.Trainer` of a single process, or of whatever ``groups`` say.

    What is logged is kept in ``logged``, by iteration.
    """

    seq_length: int = 64
    micro_batch_size: int = 1
    num_layers: int = 1
    vocab_size: int = 128
    end_of_document: int = 0
    consumed_samples: int = 0
    total_samples: int = 1
    iteration: int = 1
    every_rank_reads: bool = False
    groups: Groups = field(default_factory=lambda: Groups(None, None, None, None, None))
    logged: dict[int, dict[str, float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def at_samples(self, samples: int) -> Iterator[None]:
        """Set ``consumed_samples`` for a while."""
        before, self.consumed_samples = self.consumed_samples, samples
        try:
            yield
        finally:
            self.consumed_samples = before

    def cut_for_context_parallel(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch: one rank holds whole sequences."""
        return batch

    def log_scalars(self, values: dict[str, float], iteration: int) -> None:
        """Keep them."""
        self.logged.setdefault(iteration, {}).update(values)
