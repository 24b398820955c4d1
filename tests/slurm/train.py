"""What the jobs of test_training.py run: Megatron's trainer, recorded, waiting where a test says.

SKYLADDER_TEST_HOLD="STEP STEP ..."    the first attempt stops in front of the first of these steps
until it is asked to leave, the second attempt in front of the second, and so on; each rank says so
with a file ATTEMPT/held.RANK
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_skyladder import pretrain_gpt
from megatron_skyladder.ladder import clock
from megatron_skyladder.slurm.rank import ATTEMPT_VARIABLE, RUN_VARIABLE

RUN = Path(os.environ[RUN_VARIABLE])
ATTEMPT = Path(os.environ[ATTEMPT_VARIABLE])
NUMBER = int(ATTEMPT.name)
RANK = int(os.environ["RANK"])


def main() -> None:
    """Train."""
    holds = [int(step) for step in os.environ.get("SKYLADDER_TEST_HOLD", "").split()]
    held_at = holds[NUMBER - 1] if len(holds) >= NUMBER else None
    record = (RUN / f"losses.{RANK}.jsonl").open("a", buffering=1)
    forward_step, loss_func = pretrain_gpt.forward_step, pretrain_gpt.loss_func
    seen: list[tuple[int, int]] = []

    def step_and_samples() -> tuple[int, int]:
        from megatron.training import get_args

        samples = get_args().consumed_train_samples
        return samples // get_args().global_batch_size, samples

    def held_forward_step(data_iterator: Any, model: Any, *args: Any) -> Any:
        from megatron.training import get_signal_handler

        if model.training and step_and_samples()[0] == held_at:
            (ATTEMPT / f"held.{RANK}").touch()
            while not get_signal_handler()._signal_received:
                time.sleep(0.05)
        return forward_step(data_iterator, model, *args)

    def recorded_loss_func(loss_mask: Any, losses: Any, **kwargs: Any) -> Any:
        if losses.requires_grad:
            place = step_and_samples()
            seen.append(place)
            entry = {
                "attempt": NUMBER,
                "step": place[0],
                "micro_batch": seen.count(place) - 1,
                "loss": (losses.detach().double() * loss_mask).sum().item(),
                "window": clock.current().window(training=True),
            }
            record.write(json.dumps(entry) + "\n")
        return loss_func(loss_mask, losses, **kwargs)

    pretrain_gpt.forward_step = held_forward_step
    pretrain_gpt.loss_func = recorded_loss_func
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
