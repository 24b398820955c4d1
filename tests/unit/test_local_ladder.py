"""A second ladder for local layers: by hand, never beyond the first one, counted step by step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig, TrainingRun, make_config
from megatron_skyladder.ladder.continuation import Checkpoint, flags_that_keep, goes_on
from megatron_skyladder.ladder.costs import grid_pairs, layer_runs, masked_pairs, mean_pairs
from megatron_skyladder.ladder.flags import FINGERPRINT, add_arguments, config_from_args
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens
from megatron_skyladder.ladder.local_layers import LocalLayers
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.settings import SettingError
from megatron_skyladder.planning.visible_context import MAX_WINDOWS, pack
from megatron_skyladder.runtime.probe import statement
from megatron_skyladder.testing.trainer import PlainTrainer

LENGTH = 64
LOCAL = LocalLayers(16, 5, 6)


def config(steps: int = 8, **settings: Any) -> SkyLadderConfig:
    """Return a run whose steps have ten samples, of six layers with five local ones."""
    ladder = {"start_window": 2, "alpha": 4, "allow_unfinished": True}
    own = {"local_start_window": 4, "local_expand_fraction": "0.5"}
    run = TrainingRun(LENGTH, 10, 10 * steps, local_layers=LOCAL)
    return make_config(run, {**ladder, **own, **settings})


def seen(settings: SkyLadderConfig, steps: int = 8) -> list[int | None]:
    return [settings.local_window_at_samples(10 * step) for step in range(steps)]


# --- windows --------------------------------------------------------------------------------------


def test_the_table_of_the_documentation() -> None:
    """Ladder 2, 6, 10, ...; own 4 to 16 over 4 steps, three tokens a step; the smaller of both."""
    settings = config()
    assert [settings.window_at_samples(10 * step) for step in range(6)] == [2, 6, 10, 14, 18, 22]
    assert seen(settings) == [2, 6, 10, 13, 16, 16, 16, 16]
    assert settings.local_window_at_samples(39) == 13 and settings.local_window_at_samples(40) == 16
    assert settings.local_window_at_samples(10**12) == 16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "alpha": None, "start_window": None}, [4, 7, 10, 13, 16, 16]),
        ({"start_window": 8}, [4, 7, 10, 13, 16, 16]),
        ({"start_window": 8, "local_expand_fraction": None}, [4, 6, 8, 11, 13, 15]),  # 5.12 steps
        ({"start_window": 8, "local_expand_fraction": "1"}, [4, 5, 7, 8, 10, 11]),
        ({"start_window": 8, "local_start_window": 16}, [8, 12, 16, 16, 16, 16]),
        ({"start_window": 8, "local_start_window": 1}, [1, 4, 8, 12, 16, 16]),
        ({"start_window": 8, "round_to": 4}, [4, 4, 8, 12, 16, 16]),
        ({"start_window": 8, "round_to": "pow2"}, [4, 4, 8, 8, 16, 16]),
        ({"start_window": 8, "begin_samples": 20}, [4, 4, 4, 8, 12, 16]),  # of six steps
        ({"start_window": 8, "local_start_window": None, "local_expand_fraction": None},
         [8, 12, 16, 16, 16, 16]),
    ],
)  # fmt: skip
def test_windows_by_step(settings: dict[str, Any], expected: list[int]) -> None:
    assert seen(config(**settings), 6) == expected


def test_what_a_schedule_rounds_by_itself_is_not_taken_over() -> None:
    """Stepwise rounds to 1,024 tokens where nothing is said: a local layer has fewer."""
    assert seen(config(schedule="stepwise", start_window=8), 3) == [4, 7, 8]


def test_a_multiple_above_the_window_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    assert seen(config(start_window=8, round_to=15), 6) == [4, 4, 4, 4, 15, 15]
    assert seen(config(start_window=8, round_to=16, local_start_window=16), 3) == [8, 8, 16]
    assert not caplog.records
    assert seen(config(start_window=8, round_to=16), 6) == [4, 4, 4, 4, 16, 16]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "round_to=16 is not below the local layers' window of 16 tokens: it stays at 4 until it "
        "grows to all of them at once."
    ]


@given(
    st.sampled_from(["linear", "cyclic", "cyclic-jump", "exponential", "reversed", "constant"]),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 64),
    st.fractions(0, 1, max_denominator=50).filter(bool),
    st.integers(1, 60),
    st.integers(0, 700),
)
def test_a_local_layer_never_sees_beyond_either(
    schedule: str, start: int, own: int, own_start: int, share: Any, steps: int, samples: int
) -> None:
    """And it sees all that both show: the linear schedule's window and the ladder's."""
    own_start = min(own, own_start)
    settings = {"schedule": schedule, "start_window": start, "local_start_window": own_start}
    run = TrainingRun(LENGTH, 10, 10 * steps, local_layers=LocalLayers(own, 1, 2))
    made = make_config(run, {**settings, "local_expand_fraction": share})
    ladder = made.window_at_samples(samples)
    step = samples // 10
    alone = WindowSchedule("linear", own_start, own, expand_fraction=share, total_steps=steps)
    found = made.local_window_at_samples(samples)
    assert found == min(ladder, alone.window_at(step))
    if step >= share * steps:
        assert found == min(ladder, own)
    grown = own_start + (own - own_start) * step / (share * steps)  # the slow way
    assert alone.window_at(step) == min(own, int(grown // 1))
    assert statement.local_window(made, samples) == found


def test_the_clock_in_training_and_evaluation() -> None:
    samples = [0]
    clock = Clock(config(), lambda: samples[0])
    found = []
    for samples[0] in (0, 30, 10, 30):  # a resumed or rerun step has what it had
        found.append(clock.local_window(training=True))
        assert clock.last_local_window == found[-1]
        assert clock.local_window(training=False) is None
    assert found == [2, 13, 6, 13]
    with clock.override(16):
        assert clock.local_window(training=True) is None
    assert clock.last_local_window == 13
    plain = config(local_start_window=None, local_expand_fraction=None)
    assert Clock(plain, lambda: 0).local_window(training=True) is None


# --- what is refused, and what is noted -----------------------------------------------------------


RUN = {
    "seq_length": LENGTH,
    "global_batch_size": 10,
    "train_iters": 8,
    "train_samples": None,
    "context_parallel_size": 1,
    "num_layers": 6,
    "window_size": (15, 0),
    "window_attn_skip_freq": 6,
}
START = "--skyladder-local-start-window"
SHARE = "--skyladder-local-expand-fraction"
LADDER = "--skyladder-start-window 8 --skyladder-alpha 7"
BOTH = f"{LADDER} {START} 4 {SHARE} 0.5"
FROM_20 = f"{BOTH.replace('alpha 7', 'alpha 14')} --skyladder-begin-samples 20"


def options(flags: str, **megatron: Any) -> argparse.Namespace:
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    vars(args).update(RUN | megatron)
    return args


@pytest.mark.parametrize(
    ("flags", "megatron", "said"),
    [
        (f"{START} 4", {"window_size": None}, f"{START}=4 is about layers with a sliding window"),
        (f"{START} 4", {"window_size": None}, r"Give --window-size \(such as 127,0\)"),
        (f"{START} 4", {"window_attn_skip_freq": 1}, "this model has none, as far as its flags"),
        (f"{START} 4", {"num_layers": None}, "and to a plan the number of layers"),
        (f"{SHARE} 0.5", {}, f"where it starts is not said. Give {START} too"),
        (f"{START} 17", {}, f"{START}=17 is above the 16 tokens that a local layer sees at most"),
        (f"{START} 17", {}, r"--window-size=15,0\). Give 16 or less"),
        (f"{START} 0", {}, f"{START}=0 is not a window. Give at least 1 token"),
        (f"{START} 4 {SHARE} 0", {}, f"{SHARE}=0.0 is not a share of the run"),
        (f"{START} 4 {SHARE} 9/8", {}, f"{SHARE}=1.125 is not a share of the run"),
    ],
)
def test_what_does_not_fit_is_refused(flags: str, megatron: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config_from_args(options(f"--skyladder-schedule linear {flags}", **megatron))


def test_python_callers_read_field_names() -> None:
    with pytest.raises(SettingError, match=r"^local_start_window: 'a' is not a whole number"):
        config(local_start_window="a")
    with pytest.raises(SettingError, match=r"^local_expand_fraction: 'b' is not a number"):
        config(local_expand_fraction="b")


def test_the_fingerprint_has_it_where_it_is_given() -> None:
    made, plain = config_from_args(options(BOTH)), config_from_args(options(LADDER))
    assert made is not None and plain is not None
    own = "; local layers linear 4 -> 16, fraction 0.5 of 8 steps"
    assert own in made.fingerprint
    assert made.fingerprint.replace(own, "") == plain.fingerprint
    staged = "--skyladder-schedule staged --skyladder-stages 8:0.5 final:0.5"
    made = config_from_args(options(f"{staged} {START} 4 {SHARE} 0.5"))
    assert made is not None
    assert [made.local_window_at_samples(10 * n) for n in range(6)] == [4, 7, 8, 8, 16, 16]


# --- going on from a checkpoint -------------------------------------------------------------------


def checkpoint(flags: str, consumed: int, **megatron: Any) -> Checkpoint:
    args = options(flags, consumed_train_samples=consumed, **megatron)
    made = config_from_args(args)
    assert made is not None
    setattr(args, FINGERPRINT, made.fingerprint)
    return Checkpoint.of(args)


@pytest.mark.parametrize(
    ("other", "consumed", "megatron", "same"),
    [
        (BOTH, 10, {}, True),
        (f"{LADDER} {START} 8 {SHARE} 0.5", 10, {}, False),
        (f"{LADDER} {START} 5 {SHARE} 0.5", 10, {}, True),  # 7, 10, 13 either way, after the first
        (f"{LADDER} {START} 5 {SHARE} 0.5", 0, {}, False),
        (f"{LADDER} {START} 4 {SHARE} 0.75", 10, {}, False),
        (LADDER, 10, {}, False),  # the second ladder is left out
        (LADDER, 40, {}, True),  # it has ended
        (f"{LADDER} {START} 16", 40, {}, True),
        (BOTH, 10, {"train_iters": 16}, False),  # the same share of a longer run
        (f"{LADDER} {START} 4 {SHARE} 0.25", 10, {"train_iters": 16}, True),
        (BOTH.replace("alpha 7", "alpha 7/2"), 10, {"global_batch_size": 5, "train_iters": 16},
         True),
    ],
)  # fmt: skip
def test_whether_the_windows_stay(
    other: str, consumed: int, megatron: dict[str, Any], same: bool
) -> None:
    was, args = checkpoint(BOTH, consumed).config(), options(other, **megatron)
    will = config_from_args(args)
    assert was is not None and will is not None
    assert goes_on(was, will, args, consumed) == same
    assert goes_on(will, was, args, consumed) == same


@pytest.mark.parametrize(
    ("flags", "other", "megatron", "expected"),
    [
        (BOTH, BOTH, {"train_iters": 16}, {"alpha": "7", "local_expand_fraction": "1/4"}),
        (BOTH, LADDER, {},
         {"start_window": 8, "alpha": "7", "local_start_window": 4,
          "local_expand_fraction": "1/2"}),
        (LADDER, BOTH, {}, {"start_window": 8, "alpha": "7"}),
        (BOTH.replace("0.5", "1"), BOTH.replace("0.5", "1"), {"train_iters": 4}, None),
        # three of the six steps behind sample 20 are three of fourteen
        (FROM_20, FROM_20, {"train_iters": 16}, {"alpha": "14", "local_expand_fraction": "3/14"}),
    ],
)  # fmt: skip
def test_the_flags_that_keep_the_windows(
    flags: str, other: str, megatron: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    """A share of a run that is twice as long is half of it; more than all of it is none."""
    args = options(other, **megatron)
    found = flags_that_keep(checkpoint(flags, 10), args)
    kept = None if found is None else {k: v for k, v in found.items() if v is not None}
    assert kept == expected
    if found is None:
        return
    vars(args).update({f"skyladder_{name}": value for name, value in found.items()})
    made, was = config_from_args(args), checkpoint(flags, 10).config()
    assert made is not None and was is not None
    for at in range(10, 80, 10):
        assert made.local_window_at_samples(at) == was.local_window_at_samples(at)


# --- what is counted ------------------------------------------------------------------------------


def pairs_of(settings: SkyLadderConfig, samples: int, ends: np.ndarray | None = None) -> float:
    """Return the mean over the six layers of what their dense masks have, at a moment."""
    window, own = settings.window_at_samples(samples), settings.local_window_at_samples(samples)
    masks = [
        dense_mask(
            LENGTH,
            window_len=window,
            sliding=settings.mask == "sliding",
            document_ends=ends,
            own_window=each,
        )
        for each in (own, None)
    ]
    return (5 * int(masks[0].sum()) + int(masks[1].sum())) / 6


@pytest.mark.parametrize("mask", ["local", "sliding"])
@pytest.mark.parametrize("begin", [0, 20, 25])
def test_the_work_of_a_run_is_that_of_its_steps(mask: str, begin: int) -> None:
    settings = config(12, mask=mask, begin_samples=begin)
    runs = layer_runs(settings, 12)
    steps = [windows for first, end, *windows in runs for _ in range(first, end)]
    moments = [10 * step for step in range(12)]
    assert [tuple(each) for each in steps] == [
        (settings.window_at_samples(at), settings.local_window_at_samples(at)) for at in moments
    ]
    expected = [pairs_of(settings, at) for at in moments]
    assert [grid_pairs(settings)(*windows) for windows in steps] == pytest.approx(expected)
    assert mean_pairs(runs, grid_pairs(settings)) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("mask", ["local", "sliding"])
def test_documents_are_counted_with_both_ladders(mask: str) -> None:
    settings, ends = config(mask=mask), np.array([3, 20, 21, 64])
    rows = pack(np.array([3, 17, 1, 43]), LENGTH, 1)
    runs = layer_runs(settings, 8)
    measured = rows.pairs_by_window(
        [window for _, _, window, _ in runs],
        sliding=mask == "sliding",
        local_layers=settings.local_layers,
        local_windows=[own for *_, own in runs],
    )
    for step, (_, _, window, own) in enumerate(runs[:6]):
        cut = LENGTH if mask == "sliding" else window
        offsets = fragment_cu_seqlens(ends, seq_length=LENGTH, window_len=cut)
        expected = pairs_of(settings, 10 * step, ends)
        assert masked_pairs(settings, offsets, window, own) == pytest.approx(expected)
        assert measured(window, own) == pytest.approx(expected)
    whole = measured(LENGTH)  # at no step of the run
    own_masks = [
        dense_mask(LENGTH, window_len=LENGTH, document_ends=ends, own_window=each).sum()
        for each in (16, None)
    ]
    assert whole == pytest.approx((5 * own_masks[0] + own_masks[1]) / 6)


@pytest.fixture
def running() -> Iterator[PlainTrainer]:
    """A trainer to install; where documents are masked, every rank finds their ends, token 9."""
    pytest.importorskip("megatron.core")
    from megatron_skyladder.runtime import trainer

    yield PlainTrainer(seq_length=LENGTH, end_of_document=9, every_rank_reads=True)
    trainer.uninstall()


@pytest.mark.parametrize("mask", ["local", "sliding"])
def test_the_log_counts_both_ladders(running: PlainTrainer, mask: str) -> None:
    """The step under way, and all that lie ahead."""
    from megatron_skyladder.runtime import metrics, trainer

    settings = config(12, mask=mask)
    active = trainer.install(settings, running)
    outlook = metrics.Outlook(settings, total_samples=120)
    work = [pairs_of(settings, 10 * step) for step in range(12)]
    for step in range(12):
        running.consumed_samples = 10 * step
        active.window(training=True)
        counted = metrics.meter().step()
        assert counted.pairs == counted.grid_pairs == pytest.approx(work[step])
        ahead = outlook.left(10 * step)[1] * LENGTH * (LENGTH + 1) / 2
        assert ahead == pytest.approx(sum(work[step:]))


@pytest.mark.parametrize("state", ["", "documents"])
def test_the_log_counts_documents_with_both_ladders(running: PlainTrainer, state: str) -> None:
    """Behind the fragments a mask may carry documents, for other layers' states: not counted."""
    torch = pytest.importorskip("torch")
    from megatron_skyladder.runtime import document_mask, metrics, trainer

    settings = config(12, intra_document=True, recurrent_state=state)
    trainer.install(settings, running)
    tokens = torch.ones(2, LENGTH, dtype=torch.int64)
    tokens[0, [2, 19, 20]] = 9
    running.consumed_samples = 30  # a window of 14 tokens, and 10 of local layers
    document_mask.training_mask({"tokens": tokens})
    counted, plain = metrics.meter().step(), pairs_of(settings, 30)
    cut = pairs_of(settings, 30, np.array([3, 20, 21, LENGTH]))
    assert counted.pairs == pytest.approx(cut + plain)
    assert counted.grid_pairs == pytest.approx(2 * plain)
    # five windows in a sequence, and three documents that end within them
    assert (counted.rows, counted.fragments, counted.rows_with_end) == (2, 5 + 3 + 5, 1)


def test_between_many_windows_it_is_interpolated() -> None:
    """Along the run, so that both windows are those of steps that lie close together."""
    generator = np.random.default_rng(0)
    length, steps = 2048, 3 * MAX_WINDOWS
    rows = pack(generator.integers(2, 900, 400), length, 40)
    local = LocalLayers(300, 5, 6)
    run = TrainingRun(length, 1, steps, local_layers=local)
    own = {"local_start_window": 4, "local_expand_fraction": "0.9"}
    settings = make_config(run, {"start_window": 8, "expand_fraction": "0.7", **own})
    runs = layer_runs(settings, steps)
    windows, of_local = np.array([run[2:] for run in runs]).T
    assert len(runs) > 2 * MAX_WINDOWS
    measured = rows.pairs_by_window(windows, local_layers=local, local_windows=of_local)
    found = measured(windows, of_local)
    counted = [
        local.mean(rows.pairs(window), rows.pairs(window, own_window=at_most))
        for window, at_most in zip(windows.tolist(), of_local.tolist(), strict=True)
    ]
    assert found == pytest.approx(counted, rel=0.06)  # the first windows are divided unevenly
    assert found.mean() == pytest.approx(np.mean(counted), rel=1e-3)


# --- commands -------------------------------------------------------------------------------------

LAUNCH = (
    "--num-layers 6 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 4 "
    "--train-iters 100 --vocab-size 512 --position-embedding-type rope --skyladder-start-window 8 "
    "--skyladder-alpha 1"
)
MODEL = "--window-size 15,0 --window-attn-skip-freq 6"
SECOND = f"{START} 4 {SHARE} 0.5"


def answer(capsys: pytest.CaptureFixture[str], command: str) -> Any:
    assert main(command.split()) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_plan_shows_and_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    """From 4 to 16 tokens over 50 of 100 steps: 12 * 7 // 50 is 1 after 7 steps."""
    flags = f"{LAUNCH} {MODEL} --at 0,7,21,50,99"
    one, two = (answer(capsys, f"plan --json {flags} {more}") for more in ("", SECOND))
    assert "local_windows" not in one and one["windows"] == two["windows"]
    assert two["local_windows"] == {"0": 4, "7": 5, "21": 9, "50": 16, "99": 16}
    assert "grows from 4 tokens to these 16 over 50 steps" in " ".join(two["notes"])
    assert two["flops"]["constant"] == one["flops"]["constant"]
    assert two["flops"]["saved_percent"] > one["flops"]["saved_percent"]
    work = 0
    for step in range(100):
        window, own = min(64, 8 + step), min(16, 8 + step, 4 + 12 * step // 50)
        masks = [dense_mask(64, window_len=window, own_window=each) for each in (own, None)]
        work += (5 * masks[0].sum() + masks[1].sum()) / 6
    assert two["attention_fraction"] == pytest.approx(work / 100 / (64 * 65 / 2))
    assert main(["plan", "-v", *f"{flags} {SECOND}".split()]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["21", "5,376", "29", "9"] in [words[:4] for words in lines]


def test_the_exchange_of_local_layers_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Zigzag on two ranks: a local layer that sees 9 tokens fetches 8 keys for each cut."""
    flags = "--context-parallel-size 2 --skyladder-context-parallel-layout zigzag --at 56"
    slow = f"{START} 4 {SHARE} 1"  # 4 + 12 * 56 // 100 = 10 at step 56, the first full window
    stages = answer(capsys, f"plan --json {LAUNCH} {MODEL} {slow} {flags}")["context_parallel"]
    own = stages["stages"]["56"]["share_of_all_gather"]
    assert own == pytest.approx((5 * (9 + 9) / 64 + 48 / 64) / 6)


def test_compare_has_a_row_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Even beside the constant window, which climbs nothing: its local layers still do."""
    command = f"compare --json {LAUNCH} {MODEL} {SECOND} --schedule constant linear"
    rows = answer(capsys, command)["schedules"]
    saved = {row["name"]: row["flops"]["saved_percent"] for row in rows}
    assert list(saved) == ["no ladder", "constant", "linear"] and len(rows) == 3
    assert saved["no ladder"] == 0 < saved["constant"] < saved["linear"]


def test_doctor_knows_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", *f"{LAUNCH} {MODEL} {SECOND}".split()])
    found = json.loads(capsys.readouterr().out)
    assert "local layers linear 4 -> 16, fraction 0.5 of 100" in found["run"]["schedule"]
