"""Windows against tables worked out by hand, laws that hold for every schedule, and messages."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_skyladder.ladder.alignment import aligned_multiple, explain_multiple
from megatron_skyladder.ladder.numbers import exact
from megatron_skyladder.ladder.schedules import (
    SCHEDULES,
    Cyclic,
    CyclicJump,
    Linear,
    Point,
    Points,
    Stage,
    Staged,
    WindowSchedule,
)
from megatron_skyladder.ladder.settings import SettingError

FAR = 10**9


def table(text: str) -> list[tuple[int, int]]:
    """Read "step:window step:window far:window"."""
    points = [point.split(":") for point in text.split()]
    return [(FAR if step == "far" else int(step), int(window)) for step, window in points]


# (schedule, [(step, window), ...]): the first step, both sides of each edge, far beyond the end.
TABLES: dict[str, tuple[WindowSchedule, list[tuple[int, int]]]] = {
    "constant": (
        WindowSchedule("constant", start_window=8192, final_window=8192),
        table("0:8192 1:8192 far:8192"),
    ),
    # the paper's 1B at 8K: one token every 8 steps; the ramp is (8192 - 32) * 8 = 65,280 steps
    "linear, 1b-8k": (
        WindowSchedule("linear", 32, 8192, alpha=Fraction(1, 8)),
        table(
            "0:32 7:32 8:33 15:33 16:34 64000:8032 65271:8190 65272:8191 65279:8191 "
            "65280:8192 far:8192"
        ),
    ),
    # the paper's 1B at 32K: one token every 2 steps; the ramp is 65,472 steps
    "linear, 1b-32k": (
        WindowSchedule("linear", 32, 32_768, alpha="1/2"),
        table("0:32 1:32 2:33 65470:32767 65471:32767 65472:32768 far:32768"),
    ),
    # 3 tokens every 10 steps; in binary floats 0.3 * 10 is 3 only by luck, 0.1 * 3 is not 0.3
    "linear, a decimal rate": (
        WindowSchedule("linear", 1, 10, alpha=0.3),
        table("0:1 3:1 4:2 6:2 7:3 9:3 10:4 20:7 29:9 30:10 far:10"),
    ),
    "linear, several tokens a step, and the last one cut": (
        WindowSchedule("linear", 10, 20, alpha=4),  # the ramp ends between steps 2 and 3
        table("0:10 1:14 2:18 3:20 4:20 far:20"),
    ),
    "linear, a share of the run": (  # the ramp is 1,000 steps and 2,016 tokens
        WindowSchedule("linear", 32, 2048, expand_fraction=0.5, total_steps=2000),
        table("0:32 1:34 2:36 496:1031 999:2045 1000:2048 far:2048"),
    ),
    "linear, rounded": (  # the final window is not rounded
        WindowSchedule("linear", 32, 100, alpha=1, round_to=16),
        table("0:32 15:32 16:48 31:48 32:64 63:80 64:96 67:96 68:100 far:100"),
    ),
    "linear, rounded, a start that is no multiple": (
        WindowSchedule("linear", 40, 100, alpha=1, round_to=16),
        table("0:40 7:40 8:48 23:48 24:64 59:96 60:100 far:100"),
    ),
    "linear, powers of two": (
        WindowSchedule("linear", 24, 100, alpha=1, round_to="pow2"),
        table("0:24 7:24 8:32 39:32 40:64 75:64 76:100 far:100"),
    ),
    "linear, nothing to grow": (
        WindowSchedule("linear", 64, 64, alpha=1),
        table("0:64 1:64 far:64"),
    ),
    "stepwise": (  # steps of 1,024 tokens (Table 20), and 32 until the first
        WindowSchedule("stepwise", 32, 8192, alpha=1),
        table(
            "0:32 991:32 992:1024 2015:1024 2016:2048 7135:6144 7136:7168 8159:7168 8160:8192 "
            "far:8192"
        ),
    ),
    "stepwise, steps of another size": (
        WindowSchedule("stepwise", 32, 1024, alpha=1, round_to=256),
        table("0:32 223:32 224:256 479:256 480:512 991:768 992:1024 far:1024"),
    ),
    # a step is one degree; sin 30 = 1/2 comes out of libm as 0.49999999999999994
    "sinusoidal": (
        WindowSchedule("sinusoidal", 32, 1032, expand_fraction=1, total_steps=90),
        table("0:32 1:49 29:516 30:532 31:547 45:739 60:898 89:1031 90:1032 far:1032"),
    ),
    # 32 * 256**(step/16): twice as long every second step
    "exponential": (
        WindowSchedule("exponential", 32, 8192, expand_fraction=0.16, total_steps=100),
        table("0:32 1:45 2:64 4:128 8:512 12:2048 14:4096 15:5792 16:8192 far:8192"),
    ),
    "staged": (
        WindowSchedule(
            "staged",
            final_window=2048,
            total_steps=100,
            stages=(Stage(128, exact("1/2")), Stage(512, exact("1/4")), Stage(2048, exact("1/4"))),
        ),
        table("0:128 49:128 50:512 74:512 75:2048 99:2048 far:2048"),
    ),
    "staged, a share that ends between two steps": (  # 33 1/3 of 100
        WindowSchedule(
            "staged",
            final_window=512,
            total_steps=100,
            stages=(Stage(128, exact("1/3")), Stage(512, exact("2/3"))),
        ),
        table("0:128 33:128 34:512 far:512"),
    ),
    "staged, down and up again": (
        WindowSchedule(
            "staged",
            final_window=512,
            total_steps=10,
            stages=(Stage(512, exact(0.2)), Stage(64, exact(0.3)), Stage(512, exact(0.5))),
        ),
        table("0:512 1:512 2:64 4:64 5:512 far:512"),
    ),
    "cyclic": (  # the M shape: up, down, up, down, 10 steps each
        WindowSchedule("cyclic", 10, 20, alpha=1, num_cycles=2),
        table("0:10 1:11 9:19 10:20 11:19 19:11 20:10 21:11 30:20 31:19 39:11 40:20 far:20"),
    ),
    "cyclic, a share of the run": (
        WindowSchedule("cyclic", 10, 20, expand_fraction=0.5, total_steps=80, num_cycles=2),
        table("0:10 10:20 20:10 30:20 39:11 40:20 far:20"),
    ),
    "cyclic-jump": (  # the saw tooth: up 10 steps, back at once, three times
        WindowSchedule("cyclic-jump", 10, 20, alpha=1, num_cycles=3),
        table("0:10 9:19 10:10 19:19 20:10 29:19 30:20 far:20"),
    ),
    "reversed": (
        WindowSchedule("reversed", 10, 20, alpha="1/2"),
        table("0:20 1:20 2:19 3:19 18:11 19:11 20:20 far:20"),
    ),
    # 480 tokens in 10 steps, 3,584 in 40, 4,096 in 14; rounded down between the points
    "points": (
        WindowSchedule("points", points="0:32 0.1:512 0.5:4096 0.64:final", total_steps=100),
        table("0:32 1:80 9:464 10:512 11:601 50:4096 51:4388 63:7899 64:8192 far:8192"),
    ),
    "points, down and up again": (
        WindowSchedule("points", final_window=10, points="0:10 0.3:3 1:10", total_steps=10),
        table("0:10 1:7 2:5 3:3 4:4 9:9 10:10 far:10"),
    ),
    "points, a jump": (
        WindowSchedule("points", final_window=64, points="0:8 .5:16 .5:32 1:64", total_steps=4),
        table("0:8 1:12 2:32 3:48 4:64 far:64"),
    ),
    "points, one that lies between two steps": (  # 9 tokens in 3 1/3 steps
        WindowSchedule("points", final_window=10, points="0:1 1/3:final", total_steps=10),
        table("0:1 1:3 2:6 3:9 4:10 far:10"),
    ),
    "points, rounded, but for the final window": (
        WindowSchedule(
            "points", final_window=10, points="0:4 .5:10 1:10", total_steps=4, round_to=4
        ),
        table("0:4 1:4 2:10 3:10 4:10 far:10"),
    ),
    "points, rounded": (  # never below the lowest point
        WindowSchedule("points", final_window=70, points="0:5 1:70", total_steps=65, round_to=16),
        table("0:5 10:5 11:16 26:16 27:32 64:64 65:70 far:70"),
    ),
}


@pytest.mark.parametrize(
    ("schedule", "step", "window"),
    [
        pytest.param(schedule, step, window, id=f"{name}-{step}")
        for name, (schedule, table) in TABLES.items()
        for step, window in table
    ],
)
def test_window_equals_the_hand_computed_one(
    schedule: WindowSchedule, step: int, window: int
) -> None:
    assert schedule.window_at(step) == window


def test_every_schedule_has_a_table() -> None:
    assert {schedule.schedule for schedule, _ in TABLES.values()} == set(SCHEDULES)


RAMP_STEPS = [
    ("constant", 0),
    ("linear, 1b-8k", 65_280),
    ("linear, 1b-32k", 65_472),
    ("linear, a decimal rate", 30),
    ("linear, several tokens a step, and the last one cut", Fraction(5, 2)),
    ("exponential", 16),
    ("staged", 75),
    ("staged, a share that ends between two steps", Fraction(100, 3)),
    ("cyclic", 40),
    ("cyclic-jump", 30),
    ("reversed", 20),
    ("points", 64),
    ("points, down and up again", 10),
    ("points, one that lies between two steps", Fraction(10, 3)),
]


@pytest.mark.parametrize(("name", "steps"), RAMP_STEPS)
def test_ramp_steps(name: str, steps: Fraction) -> None:
    assert TABLES[name][0].ramp_steps == steps


# --- laws, over random schedules ----------------------------------------------------------------

RATED = [name for name, kind in SCHEDULES.items() if kind.has_rate()]
GROWING = ["constant", "linear", "stepwise", "sinusoidal", "exponential"]
SHARES = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)


@st.composite
def schedules(draw: st.DrawFn, names: list[str] = list(SCHEDULES)) -> WindowSchedule:  # noqa: B006
    """Any valid schedule with a ramp of at most a few thousand steps."""
    name = draw(st.sampled_from(names))
    final = draw(st.integers(1, 3000) | st.integers(1, 10))
    if name == "constant":
        return WindowSchedule(name, start_window=final, final_window=final)
    if name == "staged":
        weights = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
        windows = draw(
            st.lists(st.integers(1, final), min_size=len(weights), max_size=len(weights))
        )
        stages = tuple(
            Stage(window, Fraction(weight, sum(weights)))
            for window, weight in zip([*windows[:-1], final], weights, strict=True)
        )
        return WindowSchedule(
            name, final_window=final, total_steps=draw(st.integers(1, 400)), stages=stages
        )
    if name == "points":
        shares = sorted(draw(st.lists(SHARES, min_size=1, max_size=6)))
        windows = draw(st.lists(st.integers(1, final), min_size=len(shares), max_size=len(shares)))
        return WindowSchedule(
            name,
            final_window=final,
            total_steps=draw(st.integers(1, 400)),
            round_to=draw(st.none() | st.just("pow2") | st.integers(1, 50)),
            points=tuple(map(Point, [Fraction(0), *shares], [*windows, final])),
        )
    settings: dict[str, Any] = {
        "start_window": draw(st.integers(1, final)),
        "final_window": final,
        "round_to": draw(st.none() | st.just("pow2") | st.integers(1, 1500)),
    }
    if "num_cycles" in SCHEDULES[name].settings():
        settings["num_cycles"] = draw(st.integers(1, 4))
    if draw(st.booleans()):
        settings |= {"alpha": draw(st.fractions(Fraction(1, 2), 64, max_denominator=50))}
    else:
        settings |= {"expand_fraction": draw(SHARES), "total_steps": draw(st.integers(1, 2000))}
    return WindowSchedule(name, **settings)


STEPS = st.integers(0, 3000)


@given(schedules(), STEPS)
def test_windows_lie_between_start_and_final(schedule: WindowSchedule, step: int) -> None:
    lowest = schedule.start_window
    if isinstance(schedule, Staged):
        lowest = min(stage.window for stage in schedule.stages)
    if isinstance(schedule, Points):
        lowest = min(point.window for point in schedule.points)
    assert lowest <= schedule.window_at(step) <= schedule.final_window


@given(schedules(), st.data())
def test_what_moves_a_window_is_in_the_line(schedule: WindowSchedule, data: st.DataObject) -> None:
    """A resume compares the lines: no setting may change a window and be left out of them."""
    other = data.draw(schedules([schedule.schedule]))
    names = [field.name for field in fields(schedule)]
    changed = [name for name in names if getattr(schedule, name) != getattr(other, name)]
    for name in changed:
        try:
            one = replace(schedule, **{name: getattr(other, name)})
        except SettingError:  # the two do not go together
            continue
        same_windows = (schedule.windows(0, 3000) == one.windows(0, 3000)).all()
        assert same_windows or schedule.describe() != one.describe(), name


@given(schedules(GROWING), STEPS, STEPS)
def test_growing_windows_never_shrink(schedule: WindowSchedule, one: int, other: int) -> None:
    first, later = sorted((one, other))
    assert schedule.window_at(first) <= schedule.window_at(later)


@given(schedules(["reversed"]), STEPS, STEPS)
def test_reversed_never_grows_before_it_jumps(
    schedule: WindowSchedule, one: int, other: int
) -> None:
    first, later = sorted((one, other))
    if later < schedule.ramp_steps:
        assert schedule.window_at(first) >= schedule.window_at(later)


@given(schedules(), st.integers(0, 5000))
def test_the_final_window_holds_from_the_end_of_the_ramp(
    schedule: WindowSchedule, beyond: int
) -> None:
    assert schedule.window_at(-(-schedule.ramp_steps // 1) + beyond) == schedule.final_window


@given(schedules(RATED), STEPS)
def test_rounded_windows_are_multiples_or_an_end(schedule: WindowSchedule, step: int) -> None:
    multiple = schedule.round_to or (1024 if schedule.schedule == "stepwise" else 1)
    window = schedule.window_at(step)
    if window in (schedule.start_window, schedule.final_window):
        return
    if isinstance(multiple, str):
        exact_window = replace(schedule, round_to=1).window_at(step)
        assert window in [2**n for n in range(32)] and window <= exact_window < 2 * window
    else:
        assert window % int(multiple) == 0


@given(schedules(RATED), STEPS, st.integers(1, 16), st.integers(1, 5000))
def test_an_aligned_window_is_shorter_by_less_than_the_multiple(
    schedule: WindowSchedule, step: int, cp_size: int, chunk_length: int
) -> None:
    multiple = aligned_multiple(2 * cp_size * chunk_length, cp_size)
    part = chunk_length if cp_size > 1 else 2 * chunk_length
    assert part % multiple == 128 % multiple == 0
    exact_window = replace(schedule, round_to=1).window_at(step)
    assert 0 <= exact_window - replace(schedule, round_to=multiple).window_at(step) < multiple


@pytest.mark.parametrize(
    ("seq_length", "cp_size", "multiple"),
    [
        (8192, 1, 128),
        (32768, 4, 128),
        (131072, 16, 128),
        (512, 4, 64),  # chunks of 64
        (9024, 3, 32),  # chunks of 1,504 = 47 * 32
        (9024, 1, 64),  # 141 * 64
        (12, 2, 1),  # chunks of 3: nothing to align
    ],
)
def test_the_aligned_multiple_divides_tile_and_chunk(
    seq_length: int, cp_size: int, multiple: int
) -> None:
    assert aligned_multiple(seq_length, cp_size) == multiple
    text = explain_multiple(seq_length, cp_size)
    assert f"auto is {multiple}," in text
    assert f"at most {multiple - 1} tokens shorter" in text
    assert ("context-parallel chunks" in text) == (cp_size > 1)


@given(schedules(RATED), STEPS, SHARES, st.integers(1, 2000))
def test_a_rate_and_its_share_of_the_run_give_the_same_windows(
    schedule: WindowSchedule, step: int, share: Fraction, total_steps: int
) -> None:
    span = schedule.final_window - schedule.start_window
    if span == 0:
        return
    common: dict[str, Any] = {
        "start_window": schedule.start_window,
        "final_window": schedule.final_window,
        "round_to": schedule.round_to,
    }
    legs = 1
    if isinstance(schedule, Cyclic | CyclicJump):
        common["num_cycles"] = schedule.num_cycles
        legs = schedule.num_cycles * (2 if isinstance(schedule, Cyclic) else 1)
    by_share = WindowSchedule(
        schedule.schedule, expand_fraction=share, total_steps=total_steps, **common
    )
    alpha = span * legs / (share * total_steps)
    by_rate = WindowSchedule(schedule.schedule, alpha=alpha, **common)
    assert by_share.window_at(step) == by_rate.window_at(step)


@given(schedules(), st.integers(0, 3000))
@example(WindowSchedule("cyclic", 1, 2, alpha="1/10"), 50)  # 2 for one step, amid steps of 1
@example(WindowSchedule("cyclic-jump", 1, 9, alpha=1, round_to=8), 50)
def test_segments_say_what_window_at_says(schedule: WindowSchedule, total_steps: int) -> None:
    segments = schedule.segments(total_steps)
    unrolled = [window for first, end, window in segments for _ in range(first, end)]
    assert unrolled == [schedule.window_at(step) for step in range(total_steps)]
    assert [first for first, _, _ in segments] == [0, *(end for _, end, _ in segments)][
        : len(segments)
    ]
    assert all(a[2] != b[2] for a, b in itertools.pairwise(segments))  # runs are whole


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.data(), st.integers(0, 200) | st.integers(0, 3000), st.integers(0, 300))
def test_many_windows_at_once_are_those_of_each_step(
    name: str, data: st.DataObject, first: int, count: int
) -> None:
    _check_at_once(data.draw(schedules([name])), first, count)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (WindowSchedule(alpha=Fraction(1, 10**15), final_window=2**31 - 1), 10**15),
        (WindowSchedule("points", points="0:1 1:final", total_steps=10**15), 10**15 - 2),
    ],
)
def test_windows_beyond_what_an_int64_holds(schedule: WindowSchedule, first: int) -> None:
    _check_at_once(schedule, first, 5)


def _check_at_once(schedule: WindowSchedule, first: int, count: int) -> None:
    windows = schedule.windows(first, first + count)
    assert windows.dtype == np.int64
    assert windows.tolist() == [schedule.window_at(first + step) for step in range(count)]


@given(
    st.sampled_from(["linear", "stepwise", "reversed", "cyclic", "cyclic-jump"]),
    st.integers(1, 30),
    st.integers(0, 49),
    st.integers(1, 4),
    st.fractions(0, 1, max_denominator=99),
)
def test_windows_at_once_do_not_overflow(
    name: str, span_bits: int, rate_bits: int, cycles: int, place: Fraction
) -> None:
    """Products on both sides of what an int64 holds."""
    settings = {"num_cycles": cycles} if "num_cycles" in SCHEDULES[name].settings() else {}
    rate = Fraction(1, 2**rate_bits)
    schedule = WindowSchedule(name, 1, 2**span_bits, alpha=rate, **settings)  # type: ignore[arg-type]
    _check_at_once(schedule, int(schedule.ramp_steps * place), 5)


@pytest.mark.parametrize("total_steps", [0, -1])
def test_no_steps_have_no_segments(total_steps: int) -> None:
    assert WindowSchedule("linear", 32, 64, alpha=1).segments(total_steps) == []


def test_segments_cost_what_their_windows_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = WindowSchedule("stepwise", 32, 8192, alpha="1/1000000000")
    calls = []
    plain = WindowSchedule.window_at

    def counted(self: WindowSchedule, step: int) -> int:
        calls.append(step)
        return plain(self, step)

    monkeypatch.setattr(WindowSchedule, "window_at", counted)
    segments = schedule.segments(9 * 10**12)
    assert [window for _, _, window in segments] == [32, *range(1024, 8193, 1024)]
    assert segments[-1][:2] == (8160 * 10**9, 9 * 10**12)
    assert len(calls) < 2000


DESCRIPTIONS = [
    (WindowSchedule("constant", 8192, 8192), "constant 8192"),
    (WindowSchedule(alpha=0.125), "linear 32 -> 8192, alpha 1/8"),
    (
        WindowSchedule(expand_fraction=0.64, total_steps=100),
        "linear 32 -> 8192, fraction 0.64 of 100 steps",
    ),
    (
        WindowSchedule(expand_fraction=Fraction(640_001, 10**6), total_steps=100, round_to=128),
        "linear 32 -> 8192, fraction 0.640001 of 100 steps, rounded to 128",
    ),
    (WindowSchedule("stepwise", alpha=1), "stepwise 32 -> 8192, alpha 1, rounded to 1024"),
    (WindowSchedule("cyclic", alpha=1), "cyclic 32 -> 8192, alpha 1, 2 cycles"),
    (
        WindowSchedule(
            "staged",
            final_window=512,
            total_steps=9,
            stages=(Stage(128, exact("1/3")), Stage(512, exact("2/3"))),
        ),
        "staged 128:1/3 512:2/3 of 9 steps",
    ),
    (
        WindowSchedule("points", points="0:32 1/3:512 0.50:final", total_steps=9, round_to=64),
        "points 0:32 1/3:512 0.5:8192 of 9 steps, rounded to 64",
    ),
]


@pytest.mark.parametrize(("schedule", "text"), DESCRIPTIONS)
def test_description(schedule: WindowSchedule, text: str) -> None:
    assert schedule.describe() == text


# --- what is refused ----------------------------------------------------------------------------

HALF = exact("1/2")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "cosine", "alpha": 1}, "schedule=cosine is unknown. Choose one of:"),
    ({"final_window": 0, "alpha": 1}, "final_window=0 is not a window"),
    ({"round_to": 0, "alpha": 1}, "round_to=0 is not a multiple"),
    ({"total_steps": 0, "alpha": 1}, "total_steps=0: a run has at least one step"),
    (
        {"alpha": 1, "stages": (Stage(8192, HALF),)},
        "stages is for schedule=staged, but the schedule is linear",
    ),
    ({"start_window": 0, "alpha": 1}, "start_window=0 is not a window"),
    ({"start_window": -8, "alpha": 1}, "start_window=-8 is not a window"),
    (
        {"start_window": 4096, "final_window": 2048, "alpha": 1},
        "start_window=4096 is above the final window of 2048. Give a smaller start, "
        "or use schedule=reversed",
    ),
    ({"schedule": "cyclic", "num_cycles": 0, "alpha": 1}, "num_cycles=0: give at least 1"),
    (
        {"schedule": "cyclic-jump", "num_cycles": -1, "alpha": 1},
        "num_cycles=-1: give at least 1",
    ),
    (
        {"alpha": 0.125, "expand_fraction": 0.64},
        "alpha=0.125 and expand_fraction=0.64 both set the rate",
    ),
    ({}, "schedule linear has no rate. Give alpha"),
    ({"alpha": 0.0}, "alpha=0.0 never reaches the final window of 8192 tokens. Give a"),
    ({"alpha": "-1/8"}, "alpha=-0.125 never reaches the final window of 8192 tokens"),
    (
        {"expand_fraction": 0, "total_steps": 10},
        "expand_fraction=0.0 is not a share of the run",
    ),
    (
        {"expand_fraction": 1.5, "total_steps": 10},
        "expand_fraction=1.5 is not a share of the run",
    ),
    ({"expand_fraction": 0.5}, "an expand fraction needs the length of the run"),
    ({"schedule": "staged"}, "schedule=staged needs stages WINDOW:SHARE"),
    (
        {"schedule": "staged", "stages": (Stage(8192, exact(1)),)},
        "stages are shares of the run: give total_steps",
    ),
    (
        {"schedule": "staged", "stages": (Stage(0, HALF), Stage(8192, HALF)), "total_steps": 10},
        "stages has a window of 0. Windows lie between 1 and the final window of 8192",
    ),
    (
        {"schedule": "staged", "stages": (Stage(9000, exact(1)),), "total_steps": 10},
        "stages has a window of 9000",
    ),
    (
        {"schedule": "staged", "stages": (Stage(-2, exact(1)),), "total_steps": 10},
        "stages has a window of -2",
    ),
    (
        {
            "schedule": "staged",
            "stages": (Stage(32, exact(0)), Stage(8192, exact(1))),
            "total_steps": 10,
        },
        "stages gives the window 32 a share of 0. Shares are above 0",
    ),
    (
        {"schedule": "staged", "stages": (Stage(8192, HALF),), "total_steps": 10},
        "the shares of stages add up to 0.5. They have to add up to 1",
    ),
    (
        {"schedule": "staged", "stages": (Stage(8192, HALF), Stage(64, HALF)), "total_steps": 10},
        "the last of stages is 64, but the final window is 8192",
    ),
]


POINTS: list[tuple[str, str]] = [
    ("0:8192", "schedule=points needs points SHARE:WINDOW ..., 2 to 1000 of them, for example"),
    ("0.1:32 1:final", "points run from 0.1 to 1. They are shares of the run: the first is at 0"),
    ("0:32 1.5:final", "points run from 0 to 1.5. They are shares of the run"),
    ("0:32 0.5:64 0.4:final", "points go back from 0.5 to 0.4. Give them in order"),
    ("0:9000 1:final", "points has a window of 9000. Windows lie between 1 and the final window"),
    ("0:32 0.5:64", "the last of points is 64, but the final window is 8192. Make them equal"),
    ("0:32 half:64", "points: 'half:64' is neither SHARE:WINDOW, such as 0.5:4096, nor a .csv"),
    ("0:-1 1:final", "points: '0:-1' is neither SHARE:WINDOW"),
]
REFUSED += [
    ({"schedule": "points", "total_steps": 10, "points": points}, message)
    for points, message in POINTS
]
REFUSED += [
    ({"schedule": "points", "points": "0:32 1:final"}, "points are at shares of the run: give tot"),
    ({"schedule": "points"}, "schedule=points needs points SHARE:WINDOW"),
    # numbers, before anything is computed with them
    ({"alpha": "1e-400"}, "alpha: '1e-400' is out of bounds: sizes lie between 1e-15 and 1e15"),
    ({"alpha": "1e99999999"}, "alpha: '1e99999999' is out of bounds"),
    ({"alpha": Fraction(1, 10**400)}, "is out of bounds"),
    ({"alpha": float("nan")}, "alpha: 'nan' is not a number such as 0.125 or 1/8"),
    ({"alpha": "0." + "1" * 1000}, "alpha: '0.11111111111111'... has 1002 characters"),
    ({"alpha": 1, "start_window": 32.5}, "start_window: '32.5' is not a whole number"),
    ({"alpha": 1, "start_window": "9" * 5000}, "is not a whole number"),
    ({"alpha": 1, "final_window": 2**31}, "final_window=2147483648 is not a window"),
    ({"alpha": 1, "total_steps": 10**16}, "total_steps=10000000000000000: a run has at least one"),
    (
        {"schedule": "cyclic", "alpha": 1, "num_cycles": 10**9},
        "num_cycles=1000000000: give at least 1 cycle and at most 10,000",
    ),
    ({"alpha": 1, "round_to": "often"}, "round_to: 'often' is neither a number, nor auto or pow2"),
    # what means nothing here
    ({"alpha": 1, "round_to": "auto"}, "round_to=auto needs the run's layout. Give a number here"),
    ({"schedule": "constant", "alpha": 1}, "alpha has no meaning with schedule=constant"),
    ({"alpha": 1, "num_cycles": 2}, "num_cycles is for schedule=cyclic or cyclic-jump, but the"),
    ({"alpha": 1, "speed": 2}, "speed is no setting of a schedule. There are: start_window, final"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WindowSchedule(**settings)


def test_a_schedule_is_called_what_it_is() -> None:
    with pytest.raises(ValueError, match="schedule=cyclic was given to Linear, which is linear"):
        replace(WindowSchedule(alpha=1), schedule="cyclic")
    assert Linear(alpha=1) == WindowSchedule("linear", alpha="1")


def test_points_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ladder.csv"
    path.write_text("share,window\n0, 32\n\n1/2,4096\n0.64,final\n")
    by_file = WindowSchedule("points", points=str(path), total_steps=100)
    assert by_file == WindowSchedule("points", points="0:32 0.5:4096 0.64:final", total_steps=100)
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")  # as Excel does
    assert WindowSchedule("points", points=str(path), total_steps=100) == by_file
    path.write_text("\ufeff0,32\n0.5,4096\n0.64,final\n", encoding="utf-8")
    assert WindowSchedule("points", points=str(path), total_steps=100) == by_file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"0,32\n0.5\n", "line 2: '0.5' is not SHARE,WINDOW, such as 0.5,4096"),
        (b"0,32\n0.5,64,128\n", "line 2: '0.5,64,128' is not SHARE,WINDOW"),
        (b"share,window\n", "has no points. Give lines of SHARE,WINDOW"),
        (b"\xff\xfe0,32\n", "cannot be read: it is no CSV text"),
        (None, "cannot be read: No such file"),
        (b"0,32\n" * 2000, "schedule=points needs points SHARE:WINDOW ..., 2 to 1000 of them"),
    ],
)
def test_a_file_of_points_that_cannot_be_read(
    tmp_path: Path, text: bytes | None, message: str
) -> None:
    path = tmp_path / "ladder.csv"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        WindowSchedule("points", points=str(path), total_steps=100)


def test_steps_count_from_zero() -> None:
    with pytest.raises(ValueError, match="step=-1: steps count from 0"):
        WindowSchedule(alpha=1).window_at(-1)


@pytest.mark.parametrize(
    ("written", "value"),
    [(0.1, Fraction(1, 10)), ("0.1", Fraction(1, 10)), ("1/8", Fraction(1, 8)), (3, Fraction(3))],
)
def test_exact_keeps_what_was_written(written: Any, value: Fraction) -> None:
    assert exact(written) == value
