"""How many micro-batches a pipeline takes: interleaved schedules do not run any number of them."""

from __future__ import annotations

from typing import Any

from megatron.core.utils import get_attr_wrapped_model

from megatron_skyladder.runtime import trainer


def num_microbatches(model: list[Any], wanted: int) -> int:
    """Return the smallest number of micro-batches, of ``wanted`` or more, that the pipeline takes.

    Args:
        model: this rank's model chunks, as the trainer wraps them.
        wanted: how many there are.
    """
    if len(model) == 1:  # not interleaved
        return wanted
    group = get_attr_wrapped_model(model[0], "config").microbatch_group_size_per_vp_stage
    return interleaved(wanted, group=group, pp_size=trainer.current().groups.pp.size())


def interleaved(wanted: int, *, group: int, pp_size: int) -> int:
    """Return the smallest number, of ``wanted`` or more, that an interleaved schedule takes.

    Megatron runs whole groups on one chunk after the other: there has to be one, and a last group
    that is not whole must still fill the pipeline. Example, groups of 5, 2 stages: 1 -> 5,
    6 -> 7 (5 and 2), 8 -> 8.

    Args:
        wanted: micro-batches, at least 1.
        group: micro-batches in a group (``--microbatch-group-size-per-virtual-pipeline-stage``),
            at least ``pp_size``, which is Megatron's default.
        pp_size: pipeline stages.
    """
    count = max(wanted, group)
    rest = count % group
    return count + pp_size - rest if 0 < rest < pp_size else count
