"""Logs of Megatron as they are found: several attempts, prefixes, colours, interval means."""

import math
import os
import re
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_skyladder.report import log_files, runlog
from megatron_skyladder.report.runlog import parse, read_run

ARGUMENTS = """using world size: 2, data-parallel size: 2
------------------------ arguments ------------------------
  lr .............................................. 0.001
  seq_length ...................................... 128
  split ........................................... None
  cp_comm_type .................................... ['p2p']
-------------------- end of arguments ---------------------
SkyLadder: linear 8 -> 128, fraction 0.64 of 8 steps; step of 4 samples; local mask; documents \
not masked
"""


def line(
    iteration: int, loss: float, ms: float = 100.0, window: float = 8.0, extra: str = ""
) -> str:
    return (
        f" [2026-11-23 06:34:{iteration:02d}.068902] iteration {iteration:8d}/{40:8d} |"
        f" consumed samples: {4 * iteration:12d} | elapsed time per iteration (ms): {ms:.1f} |"
        f" learning rate: 1.000000E-03 | global batch size:     4 |{extra}"
        f" skyladder/window: {window:.6E} | skyladder/attention_fraction: 6.976745E-02 |"
        f" lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.304 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


VALIDATION = (
    " validation loss at iteration 2 | lm loss value: 4.185435E+00 | lm loss PPL: 6.572210E+01 | "
    "skyladder/loss_at_16 value: 4.5E+00 | skyladder/loss_at_16 PPL: 9.0E+01 | "
    "skyladder/loss_at_128 value: 4.1E+00 | skyladder/loss_at_128 PPL: 6.0E+01 | "
    "skyladder/loss_positions_0_15 value: 4.6E+00 | skyladder/loss_positions_0_15 PPL: 9.9E+01 | "
    "skyladder/loss_positions_16_127 value: 4.0E+00 | x PPL: 5.4E+01 | "
)


def test_one_line() -> None:
    (record,) = parse(line(1, 4.5, extra=" throughput per GPU (TFLOP/s/GPU): 12.3 |")).iterations
    assert (record.iteration, record.consumed_samples, record.elapsed_ms) == (1, 4, 100.0)
    assert (record.loss, record.window, record.attention_fraction) == (4.5, 8, 0.06976745)
    assert record.values["learning rate"] == 1e-3
    assert record.values["grad norm"] == 1.304
    assert record.values["throughput per GPU (TFLOP/s/GPU)"] == 12.3
    assert record.time is not None
    assert record.time.second == 1


def test_settings_and_schedule() -> None:
    run = parse(ARGUMENTS + line(1, 4.5))
    assert run.settings["cp_comm_type"] == "['p2p']"
    assert (run.number("lr"), run.number("split"), run.number("absent")) == (1e-3, None, None)
    assert (run.seq_length, run.num_gpus, run.num_attempts) == (128, 2, 1)
    assert run.schedule is not None
    assert run.schedule.startswith("linear 8 -> 128, fraction 0.64")


def test_the_line_after_the_first_contains_it_again() -> None:
    # Iterations take 300, 100, 100, ... ms with losses 5, 4, 3, 2 at a log interval of 1:
    # Megatron prints means of 1, then of 2 iterations, and only then starts over.
    text = "\n".join([line(1, 5.0, 300.0), line(2, 4.5, 200.0), line(3, 3.0), line(4, 2.0)])
    run = parse(ARGUMENTS + text)
    assert [record.loss for record in run.iterations] == [5.0, 4.0, 3.0, 2.0]
    assert run.elapsed_seconds() == pytest.approx([0.3, 0.4, 0.5, 0.6])


def test_the_rate_of_the_line_after_the_first_keeps_its_work() -> None:
    # 4 TFLOP per iteration: 40 a second for a mean of 100 ms, 80 for the 50 ms of iteration 2 alone
    rate = " skyladder/tflops_per_gpu: 4.0E+01 |"
    text = "\n".join([line(1, 5.0, 150.0, extra=rate), line(2, 4.5, 100.0, extra=rate)])
    record = parse(ARGUMENTS + text).iterations[1]
    assert record.elapsed_ms == pytest.approx(50.0)
    assert record.tflops_per_gpu == pytest.approx(80.0)


def test_up_to_015_no_line_contains_another_one_again() -> None:
    old = ARGUMENTS + "  retro_add_retriever ............................. False\n"
    text = "\n".join([line(1, 5.0, 300.0), line(2, 4.5, 200.0), line(3, 3.0)])
    assert [record.loss for record in parse(old + text).iterations] == [5.0, 4.5, 3.0]
    old += "  log_interval .................................... 10\n"
    run = parse(old + "\n".join([line(10, 5.0, 190.0), line(20, 3.0)]))  # none after the first
    assert [record.num_iterations for record in run.iterations] == [10, 10]
    assert run.elapsed_seconds() == pytest.approx([1.9, 2.9])


def test_interval_means_cover_the_iterations_since_the_line_before() -> None:
    # log interval 10: the second line is the mean of iterations 1..10, of which 1 took 1,000 ms
    text = "\n".join([line(1, 9.0, 1000.0), line(10, 4.5, 190.0), line(20, 3.0)])
    run = parse(ARGUMENTS + text)
    assert [record.num_iterations for record in run.iterations] == [1, 9, 10]
    assert [record.loss for record in run.iterations] == [9.0, 4.0, 3.0]
    assert run.elapsed_seconds() == pytest.approx([1.0, 1.9, 2.9])


def test_what_begins_in_the_middle_is_taken_as_it_is() -> None:
    run = parse("\n".join([line(20, 4.0), line(30, 3.0)]))
    assert [record.loss for record in run.iterations] == [4.0, 3.0]
    assert [record.num_iterations for record in run.iterations] == [10, 10]
    # 26 is on no log boundary: an attempt's first iteration, whose arguments are not in the log
    run = parse("\n".join([line(26, 4.0), line(30, 3.0)]))
    assert [record.num_iterations for record in run.iterations] == [1, 4]
    assert parse(line(20, 4.0)).iterations[0].num_iterations == 1


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("iterations", "covered"),
    [((1, 2, 3), (1, 1, 1)), ((10, 20, 30), (10, 10, 10)), ((30, 40), (10, 10)), ((4,), (4,))],
)
def test_bridge_prints_no_line_after_the_first_iteration(
    ours: bool, iterations: tuple[int, ...], covered: tuple[int, ...]
) -> None:
    """Its stamps have whole seconds, and no head of arguments is printed."""
    text = [line(i, 5.0 - i / 10, 100.0 + i).replace(".068902]", "]") for i in iterations]
    if ours:
        text.append(f"SkyLadder: iteration {iterations[-1]}/40 | skyladder/window: 16")
    run = parse("\n".join(text))
    assert [record.num_iterations for record in run.iterations] == list(covered)
    assert [record.loss for record in run.iterations] == [5.0 - i / 10 for i in iterations]
    assert [record.elapsed_ms for record in run.iterations] == [100.0 + i for i in iterations]


def test_a_requeued_run_leaves_out_what_was_lost() -> None:
    lost = [line(1, 5.0), line(2, 4.0), VALIDATION, line(3, 3.9), line(4, 3.8)]
    resumed = [line(3, 3.5), line(4, 3.4)]
    text = ARGUMENTS + "\n".join(lost) + "\n" + ARGUMENTS + "\n".join(resumed)
    run = parse(text)
    assert [record.iteration for record in run.iterations] == [1, 2, 3, 4]
    assert [record.loss for record in run.iterations][2:] == pytest.approx([3.5, 3.3])
    assert run.num_attempts == 2
    assert [record.iteration for record in run.validations] == [2]


def test_tokens_of_sequences_that_got_longer() -> None:
    """4 sequences of 128 tokens in each iteration, and of 512 from the third on."""
    longer = ARGUMENTS.replace(
        "seq_length ...................................... 128", "seq_length ... 512"
    )
    text = [ARGUMENTS, line(1, 5.0), line(2, 4.0), longer, line(3, 4.0), line(10, 4.0)]
    run = parse("\n".join(text))
    assert run.tokens() == [512, 1024, 1024 + 2048, 1024 + 8 * 2048]
    assert parse("\n".join(text[1:3])).tokens() == [4, 8]  # samples: no length is known
    assert parse("\n".join(text[1:])).tokens()[1] == 8 * 512  # the only length that is known


def test_an_attempt_that_ends_early_does_not_keep_the_later_lines_of_the_one_before() -> None:
    text = ARGUMENTS + "\n".join([line(i, 5.0) for i in (1, 2, 3, 4)]) + "\n" + ARGUMENTS
    run = parse(text + line(3, 3.5))
    assert [record.iteration for record in run.iterations] == [1, 2, 3]


RATE = " skyladder/tflops_per_gpu: {:.6E} |"


def test_iterations_between_the_last_line_and_a_restart_count() -> None:
    """Iterations of 4 TFLOP take 100 ms, an attempt's first one 1,000; log interval 10.

    Stopped at 25 and 58 and going on from there, like a run that was never stopped but for the
    two slow iterations.
    """

    def of(iteration: int, ms: float) -> str:
        return line(iteration, 4.0, ms, extra=RATE.format(4e3 / ms))

    whole = [of(1, 1000.0), of(10, 190.0), *(of(i, 100.0) for i in (20, 30, 40, 50))]
    stopped = [
        *[ARGUMENTS, *whole[:3]],  # 21 to 25: as the line of 20
        *[ARGUMENTS, of(26, 1000.0), of(30, 280.0), *whole[4:]],
        *[ARGUMENTS, of(59, 1000.0)],  # 51 to 58: as the line of 50
    ]
    run = parse("\n".join(stopped))
    assert [(each.iteration, each.num_iterations) for each in run.iterations] == [
        *[(1, 1), (10, 9), (20, 10), (26, 6), (30, 4), (40, 10), (50, 10), (59, 9)]
    ]
    seconds = run.elapsed_seconds()
    assert seconds == pytest.approx([1.0, 1.9, 2.9, 4.4, 4.8, 5.8, 6.8, 8.6])
    work = [
        (each.tflops_per_gpu or 0) * (end - start)
        for each, start, end in zip(run.iterations, [0.0, *seconds], seconds, strict=False)
    ]
    assert sum(work) == pytest.approx(59 * 4, rel=1e-3)


def test_kept_iterations_of_a_lost_line_took_the_time_of_that_line() -> None:
    # a checkpoint at 25, the job killed after 40, and twice more at once
    lost = [line(1, 5.0, 900.0), *(line(i, 4.0, 100.0 + 10 * i) for i in (20, 30, 40))]
    again = [ARGUMENTS, line(26, 4.0, 900.0)]
    run = parse("\n".join([ARGUMENTS, *lost, *again, *again, *again]))
    assert [record.iteration for record in run.iterations] == [1, 20, 26]
    assert run.iterations[2].num_iterations == 6
    assert run.iterations[2].elapsed_ms == pytest.approx((5 * 400.0 + 900.0) / 6)


def test_kept_iterations_do_not_take_the_time_of_a_slow_first_one() -> None:
    # stopped after 6, before a line other than the first: as the line after
    text = [ARGUMENTS, line(1, 5.0, 900.0), ARGUMENTS, line(7, 4.0, 900.0), line(10, 4.0, 300.0)]
    run = parse("\n".join(text))
    assert [record.num_iterations for record in run.iterations] == [1, 6, 3]
    assert run.elapsed_seconds() == pytest.approx([0.9, 0.9 + 0.5 + 0.9, 2.6])
    short = parse("\n".join(text[:4]))  # nothing says more
    assert short.elapsed_seconds() == pytest.approx([0.9, 0.9 + 6 * 0.9])


def skipped(text: str, count: int) -> str:
    """Return a line whose gradients overflowed in so many of its iterations."""
    return text.replace("skipped iterations:   0", f"skipped iterations: {count:3d}")


def test_skipped_iterations_are_not_taken_out_of_the_mean_loss() -> None:
    # a skipped iteration is in no mean: the loss stays what Megatron printed
    run = parse(ARGUMENTS + skipped(line(1, 5.0), 1) + "\n" + line(2, 4.5))
    assert run.iterations[1].loss == 4.5


def test_where_all_iterations_were_skipped_there_is_no_loss() -> None:
    """Megatron prints 0 for the mean of no losses; fp16 runs begin so, and skip now and then."""
    text = [skipped(line(1, 0.0), 1), skipped(line(10, 0.0), 10), skipped(line(20, 4.0), 3)]
    run = parse("\n".join([ARGUMENTS, *text, line(30, 3.0), skipped(line(40, 0.0), 10)]))
    assert [record.loss for record in run.iterations] == [None, None, 4.0, 3.0, None]
    assert run.iterations[1].num_iterations == 9
    assert parse(line(1, 0.0)).iterations[0].loss == 0.0  # this one is a loss


@pytest.mark.parametrize(
    "decorate",
    [
        lambda text: "[default3]:" + text,
        lambda text: " 7:" + text,
        lambda text: "\x1b[32m" + text + "\x1b[0m",
        lambda text: "2026-11-23T06:34:48Z node7 " + text,
        lambda text: text.strip() + "\r",
    ],
)
def test_prefixes_and_colours(decorate: Callable[[str], str]) -> None:
    text = ARGUMENTS + line(1, 4.5) + "\n" + VALIDATION
    run = parse("\n".join(decorate(row) for row in text.splitlines()))
    assert run.iterations[0].loss == 4.5
    assert run.iterations[0].consumed_samples == 4
    assert run.validations[0].loss == 4.185435


def test_settings_behind_torchrun_and_srun_prefixes() -> None:
    for prefix in ("[default0]:", "0: ", "rank0:"):
        run = parse("\n".join(prefix + row for row in ARGUMENTS.splitlines()))
        assert run.settings["seq_length"] == "128", prefix


def test_validation_by_length_and_positions() -> None:
    (record,) = parse(VALIDATION).validations
    assert (record.iteration, record.dataset) == (2, "validation")
    assert record.loss == 4.185435
    assert record.by_length == {16: 4.5, 128: 4.1}
    assert record.by_positions == {(0, 15): 4.6, (16, 127): 4.0}


def test_validation_sets_are_told_apart_and_the_later_line_counts() -> None:
    rows = [
        " validation loss at iteration 8 on validation set | lm loss value: 3.0E+00 | ",
        " validation loss at iteration 8 on test set | lm loss value: 2.0E+00 | ",
        " validation-wiki loss at iteration 8 | lm loss value: 1.0E+00 | ",
        " validation loss at iteration 8 | lm loss value: 3.5E+00 | ",
    ]
    run = parse("\n".join(rows))
    assert {record.dataset: record.loss for record in run.validations} == {
        "validation": 3.5,
        "test": 2.0,
        "validation-wiki": 1.0,
    }


def without_loss(text: str) -> str:
    """Return a line as Megatron prints it where the mean loss is NaN, or of no iteration."""
    return re.sub(r" lm loss: \S+ \|", "", text)


def test_a_line_without_a_loss_in_a_run_that_has_them_is_of_nan() -> None:
    """Megatron prints means that are 0 or more, and NaN is not."""
    text = [line(1, 5.0), line(2, 4.5), without_loss(line(3, 0.0)), VALIDATION]
    text += [" timers: forward-backward: 3.1 |", without_loss(line(4, 0.0))]
    run = parse("\n".join([ARGUMENTS, *text]))
    assert [math.isnan(record.loss or 0.0) for record in run.iterations] == [False] * 2 + [True] * 2
    assert run.iterations[2].window == 8 and run.validations[0].loss == 4.185435


def test_lines_that_have_no_loss_for_another_reason() -> None:
    first = [skipped(without_loss(line(i, 0.0)), 1) for i in (1, 2)]  # of an fp16 run
    cut_off = line(4, 3.0).partition(" lm loss")[0]  # the job was killed in mid-line
    run = parse("\n".join([ARGUMENTS, *first, line(3, 4.0), cut_off]))
    assert [record.loss for record in run.iterations] == [None, None, 4.0, None]
    other = "\n".join(line(i, 4.0).replace("lm loss", "mse loss") for i in (1, 2))
    assert [record.loss for record in parse(other).iterations] == [None, None]
    bridge = [line(10, 4.0), "SkyLadder: iteration 20/40 | skyladder/window: 16", line(20, 3.0)]
    assert [record.loss for record in parse("\n".join(bridge)).iterations] == [4.0, 3.0]


def test_a_loss_that_is_no_number_is_kept_as_such() -> None:
    record = parse(line(1, math.nan)).iterations[0]
    assert record.loss is not None
    assert math.isnan(record.loss)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_line_whose_figures_are_not_finite(value: str) -> None:
    """Whatever of it: a record that can be used, or none where its place is not known."""
    whole = line(1, 4.5, extra=" throughput per GPU (TFLOP/s/GPU): 12.3 |")
    for number in re.findall(r": +([\d.E+-]+) \|", whole):
        (record,) = parse(whole.replace(f" {number} |", f" {value} |", 1)).iterations or [None]  # type: ignore[list-item]
        if number == "4":  # consumed samples
            assert record is None
        else:
            assert record is not None
            assert record.window in (8, None) and math.isfinite(record.elapsed_ms)


def test_a_folder_is_read_in_the_order_of_its_training_lines(tmp_path: Path) -> None:
    (tmp_path / "logs" / "attempt_0").mkdir(parents=True)
    (tmp_path / "b.log").write_text(ARGUMENTS + line(1, 5.0) + "\n" + line(2, 4.0))
    (tmp_path / "logs" / "attempt_0" / "a.out").write_text(ARGUMENTS + line(3, 3.0))
    (tmp_path / "setup.log").write_text("nothing to see")
    (tmp_path / "other" / "logs").mkdir(parents=True)
    (tmp_path / "other" / "x.log").write_text(line(9, 1.0))  # another run, not this one
    run = read_run(tmp_path)
    assert [record.iteration for record in run.iterations] == [1, 2, 3]
    assert run.path == tmp_path
    assert run.num_attempts == 2


def test_a_file_without_training_lines_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.log"
    file.write_text("no training here")
    with pytest.raises(ValueError, match=r"no training line of Megatron .* in .*empty\.log"):
        read_run(file)
    with pytest.raises(ValueError, match=r"in the \.log, .* files of .* and .*logs"):
        read_run(tmp_path)


# --- logs larger than one would like --------------------------------------------------------------


@pytest.mark.parametrize("characters", [1, 100, 1 << 20])
def test_a_file_is_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    monkeypatch.setattr(log_files, "BLOCK_CHARACTERS", characters, raising=False)
    progress = "loading:  10%\rloading: 100%\r\n" + "wandb: \N{ROCKET} View run\x0cat\u2028here\n"
    first = [ARGUMENTS, progress, line(1, 5.0), line(2, 4.5), VALIDATION, line(3, 3.0)]
    second = [ARGUMENTS.replace(" 128", " 256"), line(3, 3.5) + "\r" + line(4, 3.2)]
    data = "\n".join([*first, *second]).encode().replace(b"View", b"\xff\xc3View")
    (tmp_path / "a.log").write_bytes(data)  # ends without a newline
    (tmp_path / "b.log").write_text(line(5, 3.0))
    run = read_run(tmp_path)
    (whole := parse("\n".join([*first, *second, line(5, 3.0)]))).path = tmp_path
    assert run == whole
    assert [record.iteration for record in run.iterations] == [1, 2, 3, 4, 5]
    assert (run.num_attempts, run.seq_length, len(run.validations)) == (2, 256, 1)


@pytest.mark.parametrize("layout", ["skyladder slurm", "srun --output %j_%t.out"])
def test_memory_is_that_of_the_records(tmp_path: Path, layout: str) -> None:
    """A single emoji makes a text of four bytes per character, and each line is a string too."""
    write_ranks(tmp_path, layout)
    noise = "[rank17]: W1130 12:00:00 torch/foo.py:123] some library warns of something\n" * 14_000
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:  # those that are looked into
            path.write_text("\N{ROCKET}\n" + noise + path.read_text())
    tracemalloc.start()
    try:
        run = read_run(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(run.iterations) == 4
    assert peak < 16e6  # as one text, 34 MB


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As of ``skyladder report <(zcat run.log.gz)``."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = ARGUMENTS + line(1, 5.0) + "\n" + line(2, 4.5)
    threading.Thread(target=pipe.write_text, args=(text,), daemon=True).start()
    assert len(read_run(pipe).iterations) == 2


def test_records_share_the_names_of_their_numbers() -> None:
    first, second = parse(ARGUMENTS + line(1, 5.0) + "\n" + line(2, 4.5)).iterations
    assert all(a is b for a, b in zip(first.values, second.values, strict=True))


def test_many_validations_are_not_compared_with_one_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    class Counted(runlog.Validation):
        def __getattribute__(self, name: str) -> Any:
            nonlocal asked
            asked += name == "iteration"
            return super().__getattribute__(name)

    monkeypatch.setattr(runlog, "Validation", Counted)
    rows = []
    for iteration in range(1, 201):
        rows.append(line(iteration % 60, 4.0).replace(f"{iteration % 60:8d}/", f"{iteration:8d}/"))
        rows += [VALIDATION.replace("iteration 2", f"iteration {iteration}")] * 2
    run = parse("\n".join(rows))
    assert asked < 10 * 200
    assert [each.iteration for each in run.validations] == list(range(1, 201))


# --- ranks with files of their own ----------------------------------------------------------------

LAST_RANK = "\n".join([line(1, 5.0), line(2, 4.5), line(3, 3.0)])
RESUMED = "\n".join([line(3, 3.5), line(4, 3.2)])
# one log for each rank: rank 0 prints the arguments, the last one the training lines
LAYOUTS = {
    "skyladder slurm": ("attempts/001/rank.{:04}.log", "attempts/002/rank.{:04}.log"),
    "torchrun --redirects 3": ("logs/x/attempt_0/{}/stdout.log", "logs/x/attempt_1/{}/stdout.log"),
    "srun --output %j_%t.out": ("17_{}.out", "18_{}.out"),
}


def write_ranks(folder: Path, layout: str, ranks: int = 12) -> None:
    for name, lines in zip(LAYOUTS[layout], (LAST_RANK, RESUMED), strict=True):
        for rank in range(ranks):
            path = folder / name.format(rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text({0: ARGUMENTS, ranks - 1: lines}.get(rank, "building the model\n"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_with_a_log_for_each_rank(tmp_path: Path, layout: str) -> None:
    write_ranks(tmp_path, layout)
    run = read_run(tmp_path)
    assert [record.loss for record in run.iterations] == pytest.approx([5.0, 4.0, 3.5, 2.9])
    assert (run.seq_length, run.num_gpus, run.num_attempts) == (128, 2, 2)
    assert run.schedule is not None and run.schedule.startswith("linear 8 -> 128")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_of_many_is_read_with_the_others(tmp_path: Path, layout: str) -> None:
    write_ranks(tmp_path, layout)
    run = read_run(tmp_path / LAYOUTS[layout][1].format(11))
    assert [record.iteration for record in run.iterations] == [3, 4]
    assert (run.seq_length, run.num_gpus, run.num_attempts) == (128, 2, 1)


def test_parts_of_a_slurm_folder(tmp_path: Path) -> None:
    write_ranks(tmp_path, "skyladder slurm")
    dead = tmp_path / "attempts" / "003"  # it ended before its first training line
    dead.mkdir()
    (dead / "rank.0000.log").write_text(ARGUMENTS)
    (tmp_path / "slurm-7.out").write_text("2026-01-02 job 7: not finished: requeued\n")
    (tmp_path / "status.txt").write_text("training, attempt 3, from iteration 4\n")
    for path, iterations, attempts in (
        (tmp_path, [1, 2, 3, 4], 3),
        (tmp_path / "attempts", [1, 2, 3, 4], 3),
        (tmp_path / "attempts/002", [3, 4], 1),
        (tmp_path / "attempts/001/rank.0000.log", [1, 2, 3], 1),
    ):
        run = read_run(path)
        assert [record.iteration for record in run.iterations] == iterations
        assert (run.seq_length, run.num_attempts) == (128, attempts)


@pytest.mark.parametrize("lines", ["last", "first", "none"])
def test_of_thousands_of_ranks_only_the_first_and_the_last_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str
) -> None:
    """Megatron's last rank prints training lines, Bridge's first; a start may have none at all."""
    write_ranks(tmp_path, "skyladder slurm")
    attempt = tmp_path / "attempts/001"
    if lines == "first":
        (attempt / "rank.0000.log").write_text(LAST_RANK)  # without arguments, as Bridge's
    if lines != "last":
        (attempt / "rank.0011.log").write_text("")
    opened: set[str] = set()

    def noting(do: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Path, *args: Any, **kwargs: Any) -> Any:
            opened.add(path.name)
            return do(path, *args, **kwargs)

        return noted

    monkeypatch.setattr(Path, "open", noting(Path.open))
    monkeypatch.setattr(Path, "read_text", noting(Path.read_text))
    run = read_run(tmp_path)
    assert [record.iteration for record in run.iterations] == [
        *([] if lines == "none" else [1, 2]),
        *(3, 4),
    ]
    assert opened == {"rank.0000.log", "rank.0011.log"}


def test_what_torchrun_keeps_apart(tmp_path: Path) -> None:
    """The schedule goes through logging, to stderr."""
    write_ranks(tmp_path, "torchrun --redirects 3")
    for attempt in (0, 1):
        first = tmp_path / f"logs/x/attempt_{attempt}/0"
        *head, schedule = ARGUMENTS.splitlines()
        (first / "stdout.log").write_text("\n".join(head))
        (first / "stderr.log").write_text(schedule)
    assert str(read_run(tmp_path).schedule).startswith("linear 8 -> 128")


def test_logs_of_several_jobs_stay_starts_of_their_own(tmp_path: Path) -> None:
    """Their names differ in a number as those of ranks do, but each has everything, or none."""
    (tmp_path / "job-1.out").write_text(ARGUMENTS + LAST_RANK)
    (tmp_path / "job-2.out").write_text(ARGUMENTS + RESUMED)
    assert read_run(tmp_path).num_attempts == 2
    for number, lines in ((1, LAST_RANK), (2, RESUMED)):
        (tmp_path / f"job-{number}.out").write_text(lines)
    assert [record.iteration for record in read_run(tmp_path).iterations] == [1, 2, 3, 4]


# --- clocks that are set back ---------------------------------------------------------------------

# the second start begins later, but its first lines have earlier times: summer time has ended, or
# its container's clock shows UTC
BEFORE = "\n".join([line(1, 5.0), line(2, 4.5), line(3, 3.0)]).replace("06:34", "02:34")
AFTER = "\n".join([line(3, 3.5), line(4, 3.2)]).replace("06:34", "02:04")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("slurm-9.out", "slurm-10.out"),
        ("9_{}.out", "10_{}.out"),
        ("logs/x/attempt_9/{}/stdout.log", "logs/x/attempt_10/{}/stdout.log"),
    ],
)
@pytest.mark.parametrize("has_head", [True, False])
def test_starts_are_in_the_order_of_their_numbers(
    tmp_path: Path, first: str, second: str, has_head: bool
) -> None:
    for name, lines in ((first, BEFORE), (second, AFTER)):
        ranks = 2 if "{}" in name else 1
        for rank in range(ranks):
            path = tmp_path / name.format(rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            head = ARGUMENTS if rank == 0 and (has_head or name == second) else "no head\n"
            path.write_text(head + (lines if rank == ranks - 1 else ""))
    run = read_run(tmp_path)
    assert [record.iteration for record in run.iterations] == [1, 2, 3, 4]
    assert [record.loss for record in run.iterations] == pytest.approx([5.0, 4.0, 3.5, 2.9])


def test_numbers_that_are_no_order(tmp_path: Path) -> None:
    """Logs named for nodes: a time that is earlier by days is no matter of clocks."""
    (tmp_path / "node7.log").write_text(ARGUMENTS + LAST_RANK)
    (tmp_path / "node3.log").write_text(ARGUMENTS + RESUMED.replace("11-23", "11-25"))
    assert [record.iteration for record in read_run(tmp_path).iterations] == [1, 2, 3, 4]


def test_files_of_several_names_are_put_together_by_time(tmp_path: Path) -> None:
    third = "\n".join([line(4, 3.1), line(5, 3.0), line(6, 2.9)])
    for name, lines in (
        ("slurm-9.out", LAST_RANK),
        ("again.log", RESUMED),
        ("slurm-10.out", third),
    ):
        (tmp_path / name).write_text(ARGUMENTS + lines)
    run = read_run(tmp_path)
    assert [record.iteration for record in run.iterations] == [1, 2, 3, 4, 5, 6]
    assert run.num_attempts == 3
