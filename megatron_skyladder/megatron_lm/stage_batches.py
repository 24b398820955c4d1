"""Whether Megatron will take the batches of the stages: it looks at each when it gets there.

Asked when training begins, of the batches that lie ahead: those of stages that are over may well
have been made for fewer GPUs.
"""

from __future__ import annotations

from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.flags import flag_of
from megatron_skyladder.runtime import pipeline


def check(options: Any, model: list[Any]) -> None:
    """Refuse a run that Megatron would end at the beginning of a stage.

    Args:
        options: Megatron's validated arguments, once a checkpoint is loaded.
        model: this rank's model chunks, as Megatron wraps them.

    Raises:
        UsageError: a batch ahead is no whole number of micro-batches for each data-parallel rank,
            or not one that an interleaved pipeline takes.
    """
    batches = clock.current().config.batches
    if batches is None:
        return
    unit = options.micro_batch_size * options.data_parallel_size
    for start, size in batches.ahead(options.consumed_train_samples):
        number = size // unit
        if size % unit or pipeline.num_microbatches(model, number) != number:
            _refuse(start, size, unit, model)


def _refuse(start: int, size: int, unit: int, model: list[Any]) -> None:
    why = f"is no multiple of micro-batch size x data-parallel size = {unit}"
    if size % unit == 0:
        why = (
            f"is {size // unit} micro-batches for each data-parallel rank, and the interleaved "
            "pipeline does not take so many"
        )
    lower, upper = size // unit, pipeline.num_microbatches(model, -(-size // unit))
    while lower and pipeline.num_microbatches(model, lower) != lower:
        lower -= 1
    fitting = " or ".join(f"batch={number * unit}" for number in (lower, upper) if number)
    raise UsageError(
        f"{flag_of('stages')}: the batch of {size} samples from sample {start} on {why}. Megatron "
        f"would stop there. Give {fitting}, or change --micro-batch-size or the number of GPUs."
    )
