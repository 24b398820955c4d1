"""What the runtime asks of whoever trains: Megatron-LM, Megatron Bridge, or a test.

The rest of `runtime` and all of `attention` know this interface and no trainer. `install` switches
SkyLadder on in this process; the trainer, the clock and every cache that belongs to them have this
one owner, and `uninstall` resets them all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from megatron_skyladder.attention import core_attention, recurrent
from megatron_skyladder.ladder import clock, sequence_layout
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig


@dataclass(frozen=True)
class Groups:
    """This rank's process groups, each a ``torch.distributed.ProcessGroup``.

    Args:
        tp: tensor parallel.
        pp: pipeline parallel.
        cp: context parallel.
        dp: data parallel.
        dp_cp: data and context parallel together: all ranks that hold different tokens.
    """

    tp: Any
    pp: Any
    cp: Any
    dp: Any
    dp_cp: Any


class Trainer(Protocol):
    """What a trainer knows. Everything is asked when it is needed; values may change over a run."""

    @property
    def seq_length(self) -> int:
        """Tokens in a sequence, over all context-parallel ranks."""

    @property
    def micro_batch_size(self) -> int:
        """Sequences in a micro-batch of training."""

    @property
    def num_layers(self) -> int:
        """Layers of the model, over all pipeline stages."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table, padding included."""

    @property
    def end_of_document(self) -> int:
        """The token id that ends a document.

        Raises:
            UsageError: the tokenizer has none.
        """

    @property
    def consumed_samples(self) -> int:
        """Training sequences consumed before the global batch under way."""

    def at_samples(self, samples: int) -> AbstractContextManager[None]:
        """Within, let ``consumed_samples`` be this, for all who ask the trainer itself too."""

    @property
    def total_samples(self) -> int:
        """Training sequences of the whole run."""

    @property
    def iteration(self) -> int:
        """The training step under way, counted from 1, as it will be logged."""

    @property
    def groups(self) -> Groups:
        """The process groups of this rank."""

    @property
    def every_rank_reads(self) -> bool:
        """Whether all tensor-parallel ranks read the sequences, and not the first alone."""

    def cut_for_context_parallel(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return this context-parallel rank's part of ``[b, s]`` tensors; None stays None."""

    def log_scalars(self, values: dict[str, float], iteration: int) -> None:
        """Write to whatever the trainer has open (TensorBoard, W&B, ...), not to the console."""


_trainer: Trainer | None = None


def install(config: SkyLadderConfig, trainer: Trainer) -> Clock:
    """Switch SkyLadder on in this process, before the model is built.

    Args:
        config: the checked configuration.
        trainer: whoever trains.

    Returns:
        The process's clock.
    """
    global _trainer
    uninstall()
    _trainer = trainer
    return clock.install(
        config,
        consumed_samples=lambda: trainer.consumed_samples,
        iteration=lambda: trainer.iteration,
    )


def begin_step() -> None:
    """Get ready for a training step; every rank has to call it before the step's first micro-batch.

    The window is looked up for what is logged: on a pipeline stage without attention no layer does.
    Masks of the step before are dropped with their device tensors and the layouts of their
    sequences: each travels with a micro-batch, and no micro-batch outlives its step, recomputed and
    interleaved ones included.
    """
    clock.current().window(training=True)
    _forget_masks()


def uninstall() -> None:
    """Forget the trainer, the clock, and what was cached under them."""
    global _trainer
    _trainer = None
    clock.uninstall()
    _forget_masks()
    host_group.cache_clear()


def _forget_masks() -> None:
    core_attention.forget_masks()
    recurrent.forget_masks()
    sequence_layout.of_sequence.cache_clear()


@lru_cache(maxsize=1)
def host_group(ranks: tuple[int, ...]) -> Any:
    """Return a gloo group of these ranks; made once, by all of them at the same time."""
    return torch.distributed.new_group(list(ranks), backend="gloo", use_local_synchronization=True)


def current() -> Trainer:
    """Return the trainer of this process.

    Raises:
        RuntimeError: none was installed.
    """
    if _trainer is None:
        raise RuntimeError(
            "SkyLadder is not installed in this process. Start training through "
            "megatron_skyladder.pretrain_gpt, or call runtime.trainer.install before the model is "
            "built."
        )
    return _trainer
