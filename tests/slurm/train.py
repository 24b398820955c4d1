"""What the jobs of test_training.py run: Megatron's trainer, recorded, waiting where a test says.

SKYLADDER_TEST_HOLD=ATTEMPT:STEP    in this attempt, stop in front of this step until the file
                                    RUN/release.ATTEMPT is there
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_skyladder import clock, pretrain_gpt
from megatron_skyladder.slurm.rank import ATTEMPT_VARIABLE, RUN_VARIABLE

RUN = Path(os.environ[RUN_VARIABLE])
ATTEMPT = int(Path(os.environ[ATTEMPT_VARIABLE]).name)
RANK = int(os.environ["RANK"])


def main() -> None:
    """Train."""
    attempt, step = map(int, os.environ.get("SKYLADDER_TEST_HOLD", "0:0").split(":"))
    held_at = step if attempt == ATTEMPT else None
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
            (RUN / f"held.{RANK}").touch()
            while not get_signal_handler()._signal_received:
                time.sleep(0.05)
        return forward_step(data_iterator, model, *args)

    def recorded_loss_func(loss_mask: Any, losses: Any) -> Any:
        if losses.requires_grad:
            place = step_and_samples()
            seen.append(place)
            entry = {
                "attempt": ATTEMPT,
                "step": place[0],
                "micro_batch": seen.count(place) - 1,
                "loss": (losses.detach().double() * loss_mask).sum().item(),
                "window": clock.current().window(training=True),
            }
            record.write(json.dumps(entry) + "\n")
        return loss_func(loss_mask, losses)

    pretrain_gpt.forward_step = held_forward_step
    pretrain_gpt.loss_func = recorded_loss_func
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
