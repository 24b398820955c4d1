"""Console logs of imagined runs: what Megatron would print for the paper's 1B model at 8K."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.ladder.schedules import WindowSchedule

SEQ_LENGTH, BATCH, STEPS, GPUS = 8192, 128, 100_000, 8
LENGTHS = (512, 4096, 8192)

ARGUMENTS = """using world size: {gpus}, data-parallel size: {gpus}
------------------------ arguments ------------------------
  num_layers ...................................... 22
  hidden_size ..................................... 2048
  ffn_hidden_size ................................. 5632
  num_attention_heads ............................. 32
  num_query_groups ................................ 4
  seq_length ...................................... {seq_length}
  micro_batch_size ................................ 4
  global_batch_size ............................... {batch}
  train_iters ..................................... {steps}
  lr .............................................. 0.0004
  min_lr .......................................... 4e-05
  bf16 ............................................ True
  save ............................................ /checkpoints/{name}
  skyladder_schedule .............................. {schedule}
-------------------- end of arguments ---------------------
SkyLadder: {description}; step of {batch} samples; local mask; documents not masked
"""


def write_log(
    path: Path, schedule: WindowSchedule, *, advantage: float = 0.0, interval: int = 500
) -> None:
    """Write the log of a run.

    Args:
        schedule: of its windows.
        advantage: how much lower its losses end, in nats.
        interval: the log interval; validation runs at every tenth.
    """
    noise = np.random.default_rng(3)
    full = window_pairs(SEQ_LENGTH, SEQ_LENGTH)
    name = path.parent.name
    lines = [
        ARGUMENTS.format(
            gpus=GPUS,
            seq_length=SEQ_LENGTH,
            batch=BATCH,
            steps=STEPS,
            name=name,
            schedule=schedule.schedule,
            description=schedule.describe(),
        )
    ]
    for step in (1, *range(interval, STEPS + 1, interval)):
        window = schedule.window_at(step - 1)
        fraction = window_pairs(window, SEQ_LENGTH) / full
        done = step / STEPS
        loss = _loss(step, window) - advantage * done + noise.normal(0, 0.01)
        seconds = 5.2 + 2.1 * fraction
        work = (5.2 + 1.6 * fraction) * 130 / seconds
        norm = 0.2 + 1.5 / math.sqrt(step) + abs(noise.normal(0, 0.02 + 0.05 * fraction))
        health = ""
        if step % (10 * interval) == 0:
            sink = f" skyladder/attention_sink: {0.25 * done:.6E} |" if window >= 64 else ""
            health = (
                f" skyladder/max_attention_logit: {5 + 20 * done:.6E} |"
                f" skyladder/attention_entropy: {0.4 * math.log(window):.6E} |{sink}"
            )
        lines.append(
            f" [2026-11-23 06:34:47.068902] iteration {step:8d}/{STEPS:8d} |"
            f" consumed samples: {step * BATCH:12d} |"
            f" elapsed time per iteration (ms): {1000 * seconds + noise.normal(0, 20):.1f} |"
            f" learning rate: 4.000000E-04 | global batch size: {BATCH:5d} | lm loss: {loss:.6E} |"
            f" skyladder/window: {window:.6E} | skyladder/attention_fraction: {fraction:.6E} |"
            f" skyladder/tflops_per_gpu: {work:.6E} |{health}"
            f" loss scale: 1.0 | grad norm: {norm:.3f} |"
            " number of skipped iterations:   0 | number of nan iterations:   0 |"
        )
        if step % (10 * interval) == 0:
            lines.append(_validation(step, advantage * done))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _loss(step: int, context: int) -> float:
    return 1.9 + 8.0 / (1 + step / 40) ** 0.42 + 0.9 * context**-0.35


def _validation(step: int, advantage: float) -> str:
    plain = _loss(step, SEQ_LENGTH) - advantage
    parts = [f" validation loss at iteration {step} | lm loss value: {plain:.6E} | lm loss PPL: 1 "]
    for length in LENGTHS:
        loss = _loss(step, length) - advantage * (1.2 if length < SEQ_LENGTH else 1)
        parts.append(f" skyladder/loss_at_{length} value: {loss:.6E} | x PPL: 1 ")
    for start, stop in zip((0, *LENGTHS), LENGTHS, strict=False):
        loss = _loss(step, stop) - advantage
        parts.append(f" skyladder/loss_positions_{start}_{stop - 1} value: {loss:.6E} | x PPL: 1 ")
    return "|".join(parts)
