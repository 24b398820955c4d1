"""Megatron-LM's trainer, as the runtime sees it: global arguments and ``mpu`` behind one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from megatron.core import mpu

from megatron_skyladder.ladder.batch_sizes import batch_sizes
from megatron_skyladder.megatron_lm import compat
from megatron_skyladder.runtime.trainer import Groups


class MegatronLM:
    """The `runtime.trainer.Trainer` of Megatron-LM; see there for what each answer means."""

    @property
    def seq_length(self) -> int:
        return compat.args().seq_length

    @property
    def micro_batch_size(self) -> int:
        return compat.args().micro_batch_size

    @property
    def num_layers(self) -> int:
        return compat.args().num_layers

    @property
    def vocab_size(self) -> int:
        return compat.padded_vocab_size()

    @property
    def end_of_document(self) -> int:
        return compat.eod_token()

    @property
    def consumed_samples(self) -> int:
        return compat.args().consumed_train_samples

    @contextlib.contextmanager
    def at_samples(self, samples: int) -> Iterator[None]:
        options = compat.args()
        before, options.consumed_train_samples = options.consumed_train_samples, samples
        try:
            yield
        finally:
            options.consumed_train_samples = before

    @property
    def total_samples(self) -> int:
        options = compat.args()
        return options.train_samples or batch_sizes(options).samples_in(options.train_iters)

    @property
    def iteration(self) -> int:
        return compat.args().curr_iteration + 1

    @cached_property
    def groups(self) -> Groups:
        return Groups(
            tp=mpu.get_tensor_model_parallel_group(),
            pp=mpu.get_pipeline_model_parallel_group(),
            cp=mpu.get_context_parallel_group(),
            dp=mpu.get_data_parallel_group(),
            dp_cp=mpu.get_data_parallel_group(with_context_parallel=True),
        )

    @property
    def every_rank_reads(self) -> bool:
        return False

    def cut_for_context_parallel(self, batch: dict[str, Any]) -> dict[str, Any]:
        return compat.cp_batch(batch)

    def log_scalars(self, values: dict[str, float], iteration: int) -> None:
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, value in values.items() if writer else ():
            writer.add_scalar(name, value, iteration)
        if wandb:
            wandb.log(values, iteration)
