"""The clock under everything that bends a run: growing batches, replays, other starts, workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import LADDER, RESHARDABLE, WINDOWS, History, assert_same_history
from runs import SEQ_LENGTH, Run, Trainer

from megatron_skyladder.report.runlog import parse
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron


# Four samples a batch, eight from 16 samples on. A step of the schedule is 8 samples, the final
# batch: the first four batches are half a step each. Windows: 8 + 9 * floor(samples / 8).
GROWING = f"--step-batch-size-schedule 0:4,{16 * SEQ_LENGTH}:8"
GROWING_WINDOWS = {0: 8, 4: 8, 8: 17, 12: 17, 16: 26, 24: 35, 32: 44, 40: 53, 48: 62, 56: 64}


def test_growing_batches(trainer: Trainer) -> None:
    """The clock counts samples, not batches; resumed in the middle of the growth as well."""
    flags = f"{LADDER} {GROWING}"
    whole = History(trainer, flags)
    whole.go_on("--micro-batch-size 2 --save-interval 100", global_batch_size=None)
    assert whole.merged("windows") == GROWING_WINDOWS
    history = History(trainer, flags)
    history.go_on("--micro-batch-size 1 --exit-interval 3", global_batch_size=None)
    history.go_on("--micro-batch-size 2", global_batch_size=None, num_processes=2)
    assert set(history.attempts[1].losses) == set(range(12, 64))
    for name in ("tokens", "labels", "windows", "learning_rate"):
        assert history.merged(name) == whole.merged(name), name
    assert history.merged("losses") == pytest.approx(whole.merged("losses"), rel=1e-6)


def test_replayed_steps(trainer: Trainer, uninterrupted) -> None:
    """Megatron's rerun state machine runs every step a second time, on the same samples."""
    flags = f"{LADDER} --micro-batch-size 2 --skyladder-intra-document"
    history = History(trainer, flags)
    run = history.go_on(replay=True)
    for event, name in (("batch", "tokens"), ("batch", "window"), ("loss", "rows")):
        seen: dict[tuple[int, int], list[object]] = {}
        for entry in run.of(event, training=True):
            seen.setdefault((entry["samples"], entry["micro_batch"]), []).append(entry[name])
        assert len(seen) == 32
        assert all(len(values) == 2 and values[0] == values[1] for values in seen.values())
    assert_same_history(history, uninterrupted(flags))


def test_a_step_that_failed_its_validation(trainer: Trainer, uninterrupted) -> None:
    """Megatron repeats a step whose loss it does not believe, and leaves; the run goes on."""
    flags = f"{LADDER} --micro-batch-size 2"
    history = History(trainer, flags)
    history.go_on("--exit-interval 3")
    failing = "--rerun-mode validate_results --error-injection-rate 1"
    run = history.go_on(f"{failing} --error-injection-type transient_error", exit_codes=(17,))
    assert "Need to rerun step" in run.log() and "Possible transient error" in run.log()
    assert set(run.windows.items()) == {(24, 35), (32, 44)}
    history.go_on()
    assert_same_history(history, uninterrupted(flags))


OTHER = LADDER.replace("alpha 9", "alpha 10")


def test_another_schedule_on_resume(trainer: Trainer) -> None:
    """Refused, naming both; allowed by a flag, and then the log says so."""
    history = History(trainer, "--micro-batch-size 4")
    history.go_on(f"{LADDER} --exit-interval 3")
    refused = history.go_on(OTHER, exit_codes=(1,))
    assert "the checkpoint was trained under another schedule" in refused.log()
    assert "checkpoint: linear 8 -> 64, alpha 9" in refused.log()
    assert "this run:   linear 8 -> 64, alpha 10" in refused.log()
    assert not refused.windows
    allowed = history.go_on(f"{OTHER} --skyladder-allow-schedule-change")
    assert "schedule changed on resume, as allowed" in allowed.log()
    assert allowed.windows == {24: 38, 32: 48, 40: 58, 48: 64, 56: 64}
    history.go_on(OTHER)  # what was saved since carries the new schedule


# 3 + 9 * step // 8: below the first ladder at each of eight steps
SECOND = (
    f"{LADDER} --window-size 11,0 --window-attn-skip-freq 2 --skyladder-local-start-window 3 "
    "--skyladder-local-expand-fraction 1"
)
HELD_BACK = (3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize(
    ("num_processes", "flags"),
    [
        (2, "--context-parallel-size 2"),
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_killed_while_both_ladders_climb(
    trainer: Trainer, uninterrupted, num_processes: int, flags: str
) -> None:
    """Documents masked; bit-identical, and the log has what local layers saw."""
    flags = f"{SECOND} --micro-batch-size 2 --skyladder-intra-document {flags}"
    history = History(trainer, flags, num_processes)
    history.go_on(kill={"samples": 40, "when": "forward", "micro_batch": 1}, exit_codes=(0, -9))
    assert -9 in history.attempts[0].exit_codes
    history.go_on(RESHARDABLE)
    assert min(history.attempts[1].windows) == 24
    whole = uninterrupted(flags, num_processes)
    assert_same_history(history, whole)
    last = num_processes - 1
    entries = parse(whole.attempts[0].log(last)).iterations
    assert [entry.values["skyladder/local_window"] for entry in entries] == [*HELD_BACK]
    assert [entry.values["skyladder/window"] for entry in entries] == [*WINDOWS.values()]


def test_another_second_ladder_on_resume(trainer: Trainer) -> None:
    """Refused as any other schedule, also where it is left out; allowed by the same flag."""
    history = History(trainer, "--micro-batch-size 4")
    history.go_on(f"{SECOND} --exit-interval 3")
    other = SECOND.replace("local-start-window 3", "local-start-window 8")
    for flags, after in (
        (other, "9 tokens"),
        (SECOND.partition(" --skyladder-local")[0], "12 tok"),
    ):
        refused = history.go_on(flags, exit_codes=(1,))
        assert "local layers linear 3 -> 12, fraction 1.0 of 8 steps" in refused.log()
        assert f"at 24 samples the window of local layers goes from 6 to {after}" in refused.log()
        assert not refused.windows
    allowed = history.go_on(f"{other} --skyladder-allow-schedule-change")
    assert "schedule changed on resume, as allowed" in allowed.log()
    entries = parse(allowed.log()).iterations
    assert [entry.values["skyladder/local_window"] for entry in entries] == [9, 10, 10, 11, 11]


def test_a_curve_of_ones_own(trainer: Trainer, tmp_path: Path) -> None:
    """Points from a file are in the fingerprint: edited, they are another schedule."""
    points = tmp_path / "ladder.csv"
    points.write_text("share,window\n0,8\n0.25,16\n0.25,32\n0.75,final\n")
    flags = f"--micro-batch-size 4 --skyladder-schedule points --skyladder-points {points}"
    history = History(trainer, flags)
    history.go_on("--exit-interval 3")
    curve = points.read_text()
    points.write_text(curve.replace("32", "48"))
    refused = history.go_on(exit_codes=(1,))
    assert "checkpoint: points 0:8 0.25:16 0.25:32 0.75:64 of 8 steps;" in refused.log()
    assert "this run:   points 0:8 0.25:16 0.25:48 0.75:64 of 8 steps;" in refused.log()
    points.write_text(curve)
    history.go_on()
    assert list(history.merged("windows").values()) == [8, 12, 32, 40, 48, 56, 64, 64]


def test_continuing_from_a_stock_checkpoint(trainer: Trainer) -> None:
    """Continual pretraining: the schedule starts where the stock run ended."""
    history = History(trainer, "--micro-batch-size 4")
    stock = history.go_on("--exit-interval 3")
    assert not stock.windows
    ladder = "--skyladder-start-window 8 --skyladder-alpha 14 --skyladder-begin-samples 24"
    run = history.go_on(ladder)
    assert "trained without SkyLadder; from here on: linear 8 -> 64, alpha 14" in run.log()
    assert run.windows == {24: 8, 32: 22, 40: 36, 48: 50, 56: 64}
    plain = History(trainer, "--micro-batch-size 4")
    plain.go_on()
    for name in ("tokens", "labels", "learning_rate"):
        assert history.merged(name) == plain.merged(name), name


def test_the_order_of_samples_depends_on_nothing(trainer: Trainer, uninterrupted) -> None:
    """Schedules, workers and how far they read ahead: the same samples at the same place."""
    expected = uninterrupted(f"{LADDER} --micro-batch-size 2").attempts[0]
    assert expected.windows == WINDOWS
    runs: list[Run] = []
    for schedule, workers, prefetch in (
        ("--skyladder-schedule constant", 0, None),
        ("--skyladder-schedule cyclic-jump --skyladder-expand-fraction 1", 1, 2),
        (f"{LADDER} --skyladder-intra-document", 2, 1),
        (f"{LADDER} --skyladder-mask sliding", 3, 7),
    ):
        flags = f"--micro-batch-size 2 {schedule} --num-workers {workers}"
        history = History(trainer, flags)
        runs.append(history.go_on("--save-interval 100", prefetch=prefetch))
    assert len({tuple(run.windows.values()) for run in runs}) > 2
    for run in runs:
        assert run.tokens == expected.tokens and run.labels == expected.labels
    ladders = [run for run in runs if run.windows == WINDOWS]
    assert len(ladders) == 2  # what workers read ahead does not move the window
