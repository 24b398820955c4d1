"""Sharded parameters: Megatron-FSDP trains as the distributed optimizer does, documents masked.

From the same seed rather than one checkpoint: its checkpoints are of a format of its own. Torch's
FSDP2 wants parameters on a CUDA device and is not tried.
"""

from __future__ import annotations

import pytest
from runs import Trainer

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LADDER = (
    "--train-samples 32 --micro-batch-size 2 --use-distributed-optimizer "
    "--no-gradient-accumulation-fusion --skyladder-start-window 8 --skyladder-alpha 11 "
    "--skyladder-allow-unfinished --skyladder-intra-document"
)
# gloo cannot divide while it reduces
SHARDED = (
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
    "--ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion"
)


@pytest.mark.parametrize("architecture", ["llama", "sinks"])
def test_megatron_fsdp_trains_as_the_distributed_optimizer_does(
    trainer: Trainer, architecture: str
) -> None:
    """The probe included, which runs forward and backward passes of its own at start.

    A learnable sink is a parameter of attention itself, which is sharded like any other.
    """
    free = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    plain, sharded = (
        trainer.train(
            f"{LADDER} {more}",
            num_processes=2,
            load=False,
            environment=free,
            architecture=architecture,
        )
        for more in ("", SHARDED)
    )
    assert sharded.windows == plain.windows == {0: 8, 8: 19, 16: 30, 24: 41}
    assert "mask probe passed" in sharded.log() and "mask probe passed" in plain.log()
    assert sharded.tokens == plain.tokens
    assert list(sharded.losses) == list(range(32))
    assert sharded.losses == pytest.approx(plain.losses, rel=1e-6)
