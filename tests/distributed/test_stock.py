"""Without our flags the entry point is stock Megatron; what only its script acts on is refused.

``tests/releases`` has the tables of names by release, and runs beside Megatron's own script where a
checkout is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import EOD, SEQ_LENGTH, Trainer

from megatron_skyladder.data.indexed import IndexedWriter
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LADDER = "--skyladder-start-window 8"
REFUSED = (
    "--sft",
    "--fim-data",
    "--dataloader-inter-document-masking",
    "--logits-load-dir nowhere",
)


@pytest.mark.parametrize("flags", [*REFUSED, f"--logits-load-dir nowhere {LADDER}"])
def test_what_only_megatrons_script_acts_on_is_refused(trainer: Trainer, flags: str) -> None:
    run = trainer.train(
        f"--train-samples 8 --micro-batch-size 8 {flags}",
        load=False,
        exit_codes=(2,),
        environment={"SKYLADDER_TRACEBACK": ""},
    )
    flag = flags.split()[0]
    assert f"{flag} has no effect in megatron_skyladder.pretrain_gpt: only Megatron's" in run.log()
    assert "Run that script of a checkout" in run.log()


@pytest.mark.parametrize("layout", ["", "--pipeline-model-parallel-size 2"], ids=["one", "pp2"])
def test_without_our_flags_it_is_the_run_that_another_script_starts(
    trainer: Trainer, layout: str
) -> None:
    """Bit by bit: a script that knows nothing of SkyLadder, and Megatron as it is installed."""
    flags = f"--train-samples 32 --micro-batch-size 2 --eval-iters 1 --split 50,50,0 {layout}"
    options: dict[str, Any] = {"gradients": True, "num_processes": 2 if layout else 1}
    ours = trainer.train(flags, **options)
    own = trainer.train(flags, script=str(Path(__file__).with_name("plain_script.py")), **options)
    for name in ("loss", "grad_norm"):
        assert own.steps(name) == ours.steps(name) and len(own.steps(name)) == 4
    assert own.gradients.keys() == ours.gradients.keys()
    assert all(bool((own.gradients[name] == ours.gradients[name]).all()) for name in own.gradients)


def test_megatrons_own_document_mask(trainer: Trainer) -> None:
    flags = "--train-samples 16 --micro-batch-size 4"
    run = trainer.train(f"{flags} --reset-attention-mask")
    dense = {"windows": [SEQ_LENGTH] * 2, "eod": EOD, "sliding": False}
    assert run.losses == trainer.train(flags, dense=dense).losses
    assert run.losses != trainer.train(flags).losses


def test_the_counts_of_documents_may_come_from_a_file(trainer: Trainer, tmp_path: Path) -> None:
    prefix, counts = tmp_path / "documents", tmp_path / "counts.json"
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:  # what it takes the data for then
        for start in range(60):
            writer.add_document(np.append(np.arange(start, start + 40), EOD).astype(np.uint16))
    counts.write_text(json.dumps({str(prefix): [60, 61]}))  # documents, and their borders
    flags = f"--train-samples 8 --micro-batch-size 8 {LADDER}"
    data = f"--data-path {prefix} --split 100,0,0"
    run = trainer.train(f"{flags} --per-dataset-sequences-path {counts}", data=data)
    assert run.losses == trainer.train(flags, data=data).losses
    missing = f"--per-dataset-sequences-path {tmp_path / 'none.json'}"
    run = trainer.train(f"{flags} {missing}", data=data, exit_codes=(1,))
    assert "FileNotFoundError" in run.log()


@pytest.mark.parametrize("ours", ["", f"{LADDER} --skyladder-intra-document"])
def test_experts_that_exchange_tokens_beside_their_work(trainer: Trainer, ours: str) -> None:
    """``--overlap-moe-expert-parallel-comm`` asks ``forward_step`` for a plan of the step."""
    flags = f"--train-samples 16 --micro-batch-size 2 --expert-model-parallel-size 2 --bf16 {ours}"
    plain, overlapped = (
        trainer.train(f"{flags} {more}", architecture="moe", num_processes=2)
        for more in ("", "--overlap-moe-expert-parallel-comm")
    )
    assert overlapped.losses == pytest.approx(plain.losses, rel=1e-3)
    assert overlapped.tokens == plain.tokens
