"""Mixtures of experts at full strength: capacities, auxiliary losses, jitter, overlapped messages.

Routing, capacities and auxiliary losses are Megatron's. What SkyLadder could change is which tokens
a rank holds: a rank drops among its own tokens, whatever the layout. So the reference is one
process of stock Megatron with a dense mask, which drops within the groups of tokens that the ranks
hold. Micro-batches are of one sequence: a capacity is that of a micro-batch.
"""

from __future__ import annotations

import numpy as np
import pytest
from runs import SEQ_LENGTH, Run, Trainer
from test_parity import MASKS, SAMPLES, assert_parity, gradient_errors, loss_errors

from megatron_skyladder.ladder.sequence_layout import by_window, zigzag
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

MASK = MASKS["ragged"]
AUXILIARY = (
    "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1e-2 2e-2 "
    "--moe-z-loss-coeff 1e-3"
)
BY_PROBABILITY = f"{AUXILIARY} --moe-expert-capacity-factor 0.75"
PADDED = f"{BY_PROBABILITY} --moe-pad-expert-input-to-capacity"
BY_POSITION = f"{BY_PROBABILITY} --moe-token-drop-policy position"
BALANCED, ZIGZAG = (
    f"--context-parallel-size 2 --skyladder-context-parallel-layout {name}"
    for name in ("balanced", "zigzag")
)
Held = list[list[list[int]]]  # of each step, of each rank: positions


def held_by(layout: str) -> Held:
    """Return what each rank holds at each step."""
    positions = np.arange(SEQ_LENGTH)
    if layout == "halves":  # sequence parallelism
        return [[each.tolist() for each in np.split(positions, 2)]] * len(MASK.windows)
    layouts = [
        zigzag(SEQ_LENGTH, 2) if layout == "zigzag" else by_window(SEQ_LENGTH, 2, window)
        for window in MASK.windows
    ]
    return [[each.positions(rank).tolist() for rank in (0, 1)] for each in layouts]


def train(trainer: Trainer, flags: str, num_processes: int = 1, **options: object) -> Run:
    return trainer.train(
        f"{SAMPLES} --micro-batch-size 1 {flags}",
        num_processes=num_processes,
        architecture="moe",
        gradients=True,
        **options,
    )


@pytest.mark.parametrize(
    ("num_processes", "layout", "experts", "held"),
    [
        (
            4,
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
            "--expert-tensor-parallel-size 1",
            BY_PROBABILITY,
            "halves",
        ),
        (4, f"--expert-model-parallel-size 2 {BALANCED}", BY_PROBABILITY, "balanced"),
        (2, f"--expert-model-parallel-size 2 {ZIGZAG}", PADDED, "zigzag"),
        (2, BALANCED, BY_POSITION, "balanced"),
    ],
)
def test_capacities_drop_what_stock_megatron_drops(
    trainer: Trainer, num_processes: int, layout: str, experts: str, held: str
) -> None:
    stock = train(trainer, experts, dense=MASK.dense, dropped_among=held_by(held))
    run = train(trainer, f"{experts} {layout} {MASK.flags}", num_processes)
    assert tuple(run.windows.values()) == MASK.windows
    assert_parity(run, stock)


def test_layouts_drop_other_tokens_only_where_tokens_are_dropped(trainer: Trainer) -> None:
    """A capacity for all tokens is the same under any layout, padded too; a small one is not."""
    enough = f"{AUXILIARY} --moe-expert-capacity-factor 2 --moe-pad-expert-input-to-capacity"
    stock = train(trainer, AUXILIARY, dense=MASK.dense)
    assert_parity(train(trainer, f"{enough} {MASK.flags} {BALANCED}", 2), stock)
    few = train(trainer, f"{BY_PROBABILITY} {MASK.flags} {BALANCED}", 2)
    assert max(loss_errors(few, stock)) > 1e-3
    assert max(gradient_errors(few, stock).values()) > 1e-2


def test_jitter_draws_what_stock_megatron_draws(trainer: Trainer) -> None:
    """SkyLadder, its probe included, leaves the random state alone."""
    jitter = "--moe-input-jitter-eps 0.1"
    stock = train(trainer, jitter, dense=MASK.dense)
    assert_parity(train(trainer, f"{jitter} {MASK.flags}"), stock)


def test_overlapped_messages_of_experts_change_nothing(trainer: Trainer) -> None:
    """In bf16, which Megatron wants for it; documents masked."""
    flags = f"--bf16 --expert-model-parallel-size 2 {MASKS['ragged+documents'].flags}"
    plain = train(trainer, flags, 2)
    overlapped = train(trainer, f"{flags} --overlap-moe-expert-parallel-comm", 2)
    assert_parity(overlapped, plain)
