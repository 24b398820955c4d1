"""How runs end that cannot start or go on: who says what, and with which exit code."""

from __future__ import annotations

from runs import Trainer

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

AS_USERS_START_IT = {"SKYLADDER_TRACEBACK": ""}
TWO_RANKS = "--train-samples 16 --micro-batch-size 4"


def test_what_all_ranks_refuse_is_said_once(trainer: Trainer) -> None:
    refused = trainer.train(
        f"{TWO_RANKS} --skyladder-alpha 0",
        num_processes=2,
        exit_codes=(2, -9),
        environment=AS_USERS_START_IT,
    )
    assert refused.exit_codes == [2, -9]  # a launcher ends the others
    assert refused.log(0).count("error: --skyladder-alpha=0.0 never reaches") == 1
    assert "Traceback" not in refused.log(0)
    assert "--skyladder-alpha=0.0" not in refused.log(1)


def test_an_error_of_one_rank_in_mid_training_is_found_in_its_log(trainer: Trainer) -> None:
    failed = trainer.train(
        f"{TWO_RANKS} --skyladder-start-window 8",
        num_processes=2,
        exit_codes=(1, -9),
        environment=AS_USERS_START_IT,
        broken="fail_between_steps",
    )
    assert failed.exit_codes == [-9, 1]
    assert "rank 1 failed with ValueError: step=-1: steps count from 0." in failed.log(1)
    assert "in window_at" in failed.log(1)  # the traceback
