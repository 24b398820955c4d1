"""Going on from a checkpoint: not without the ladder, not under other windows, not from a ruin."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from histories import LADDER, WINDOWS
from runs import Run, Trainer

from megatron_skyladder.schedules import Stage
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

AS_USERS_START_IT = {"SKYLADDER_TRACEBACK": ""}  # without it refusals come as tracebacks
HALF = "--exit-interval 4"  # of eight steps


class Started:
    """A run of four steps, and what happens when it goes on with other flags."""

    def __init__(self, trainer: Trainer, flags: str, num_processes: int = 1) -> None:
        self.trainer = trainer
        self.num_processes = num_processes
        self.folder = trainer.new_folder("checkpoints")
        self.checkpoints = f"--save {self.folder} --save-interval 100"
        self.train(f"{flags} {HALF}")

    def train(self, flags: str, **options: object) -> Run:
        return self.trainer.train(
            f"--micro-batch-size 2 {self.checkpoints} --train-samples 64 {flags}",
            load=False,
            num_processes=self.num_processes,
            environment=AS_USERS_START_IT,
            **options,
        )

    def resume(self, flags: str, **options: object) -> Run:
        return self.train(f"--load {self.folder} {flags}", **options)

    def refused(self, flags: str) -> str:
        run = self.resume(flags, exit_codes=(2,))
        assert not run.of("step")
        assert "Traceback" not in run.log()
        return run.log()


@pytest.fixture(scope="module")
def started(trainer: Trainer) -> Started:
    return Started(trainer, LADDER)


# --- without the ladder ---------------------------------------------------------------------------


def test_a_resume_without_flags_is_refused_and_says_both_ways_on(started: Started) -> None:
    said = started.refused("")
    assert "trained with SkyLadder, but this run has none of its flags: from 32 samples on" in said
    assert "full window of 64 tokens, where the checkpoint had 44" in said
    assert "checkpoint: linear 8 -> 64, alpha 9; step of 8 samples; local mask" in said
    assert f"To go on with the ladder: {LADDER}." in said
    assert "To end it here and go on at the full window: --skyladder-end-ladder." in said


def test_the_ladder_ends_where_a_flag_says_so(trainer: Trainer) -> None:
    started = Started(trainer, LADDER)
    ended = started.resume("--skyladder-end-ladder --exit-interval 6")
    assert "the ladder ends here, as --skyladder-end-ladder says: from 32 samples" in ended.log()
    assert {entry["window"] for entry in ended.of("step")} == {None}  # it is not even switched on
    later = started.resume("")  # its checkpoints are stock Megatron's
    assert set(ended.losses) | set(later.losses) == set(range(32, 64))
    assert "SkyLadder" not in later.log()


def test_the_end_stands_alone(started: Started) -> None:
    said = started.refused("--skyladder-end-ladder --skyladder-intra-document")
    assert "--skyladder-end-ladder goes on without SkyLadder" in said
    assert "cannot stand beside --skyladder-intra-document" in said


# --- under other windows --------------------------------------------------------------------------


AS_A_SHARE = "--skyladder-start-window 8 --skyladder-expand-fraction 7/9"  # alpha 9 of 8 steps
CHANGES = {  # flags at first, what changes, and the rate of the ladder then
    "longer": (AS_A_SHARE, "--train-samples 128 --override-opt_param-scheduler", "9"),
    "smaller batches": (LADDER, "--global-batch-size 4", "9/2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_line_that_keeps_the_windows(trainer: Trainer, change: str) -> None:
    """A share of a longer run is a slower ladder, a rate of smaller steps a faster one."""
    flags, changed, rate = CHANGES[change]
    started = Started(trainer, flags)
    said = started.refused(f"{flags} {changed}")
    assert "trained under another schedule.\n  checkpoint: linear 8 -> 64" in said
    assert f"To keep the checkpoint's windows: --skyladder-alpha {rate}" in said
    assert "To go on under this run's (at 32 samples the window goes from 44 to" in said
    going_on = started.resume(f"{changed} --skyladder-start-window 8 --skyladder-alpha {rate}")
    windows = {at: window for at, window in WINDOWS.items() if at >= 32}
    assert {at: going_on.windows[at] for at in windows} == windows
    assert "another schedule, but from here on the windows are the same" in going_on.log()


def test_a_run_that_would_end_too_early_gets_the_line_at_once(started: Started) -> None:
    """Before the checkpoint is loaded: at this rate there are too few of the larger steps."""
    said = started.refused(f"{LADDER} --global-batch-size 16")
    assert "it would end at a window of 35" in said
    assert f"windows of the checkpoint in {started.folder}: --skyladder-alpha 18." in said


# --- what cannot be read --------------------------------------------------------------------------


def damaged(started: Started, rank: int) -> None:
    """Cut off a rank's file of a checkpoint in the torch format."""
    (file,) = started.folder.glob(f"iter_*/mp_rank_0{rank}*/model_optim_rng.pt")
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("flags", [LADDER, ""], ids=["ladder", "stock"])
def test_a_checkpoint_that_cannot_be_read_is_no_end_of_a_run(trainer: Trainer, flags: str) -> None:
    """Megatron leaves with exit code 0, on the rank alone that cannot read its file."""
    layout = "--tensor-model-parallel-size 2 --ckpt-format torch"
    started = Started(trainer, f"{flags} {layout}", num_processes=2)
    damaged(started, 1)
    failed = started.resume(f"{flags} {layout}", exit_codes=(1, -9))
    assert failed.exit_codes == [-9, 1]
    assert "could not load the checkpoint" in failed.log(1)  # Megatron's
    assert "rank 1: Megatron could not read the checkpoint (it says why above)" in failed.log(1)
    assert not failed.of("step")


@pytest.mark.parametrize("flags", ["--exit-on-missing-checkpoint", "--use-checkpoint-args"])
def test_nor_is_one_that_is_missing_or_read_for_its_arguments(trainer: Trainer, flags: str) -> None:
    folder = trainer.new_folder("checkpoints")
    if flags == "--use-checkpoint-args":
        file = folder / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"nothing")
        (folder / "latest_checkpointed_iteration.txt").write_text("4")
    failed = trainer.train(
        f"--micro-batch-size 2 --train-samples 64 --load {folder} {flags}",
        load=False,
        environment=AS_USERS_START_IT,
        exit_codes=(1,),
    )
    assert "rank 0: Megatron could not read the checkpoint" in failed.log()


# --- of earlier versions --------------------------------------------------------------------------

EARLIER = {  # flags, and what was left of them in Megatron's arguments
    "rate": (LADDER, {"skyladder_alpha": Fraction(9)}),
    "stages": (
        "--skyladder-schedule staged --skyladder-stages 16:0.75 final:0.25",
        {"skyladder_stages": [Stage(16, Fraction(3, 4)), Stage(-1, Fraction(1, 4))]},
    ),
}


def write_as_earlier(folder: Path, left: dict[str, object]) -> None:
    """Put parsed values into a checkpoint's arguments, as versions up to November 2026 did."""
    (file,) = folder.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    vars(state["args"]).update(left)
    torch.save(state, file)


@pytest.mark.parametrize("kind", EARLIER)
def test_a_checkpoint_of_an_earlier_version_is_resumed(trainer: Trainer, kind: str) -> None:
    flags, left = EARLIER[kind]
    started = Started(trainer, f"{flags} --ckpt-format torch")
    write_as_earlier(started.folder, left)
    said = started.refused("--ckpt-format torch")  # and its flags are known again
    typed = flags.replace("0.75", "3/4").replace("0.25", "1/4")
    assert f"To go on with the ladder: {typed}." in said
    going_on = started.resume(f"{flags} --ckpt-format torch")
    assert min(going_on.windows) == 32
