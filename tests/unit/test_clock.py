"""The clock: a function of consumed samples, looked up and never counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule


def config(**changes: object) -> SkyLadderConfig:
    schedule = WindowSchedule(start_window=8, final_window=64, alpha=4)
    values = {"schedule": schedule, "seq_length": 64, "step_samples": 10, **changes}
    return SkyLadderConfig(**values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    clock.uninstall()
    yield
    clock.uninstall()


@pytest.mark.parametrize(
    ("samples", "window"),
    [(0, 8), (9, 8), (10, 12), (19, 12), (20, 16), (139, 60), (140, 64), (10**9, 64)],
)
def test_the_window_follows_consumed_samples(samples: int, window: int) -> None:
    """A step is 10 samples, and 4 tokens: both sides of each edge, and far beyond the end."""
    assert Clock(config(), lambda: samples).window(training=True) == window


def test_time_may_go_back() -> None:
    """A resumed or rerun step has the window it had: nothing is counted."""
    samples = [0]
    running = Clock(config(), lambda: samples[0])
    windows = []
    for samples[0] in (0, 50, 10, 50, 0):
        windows.append(running.window(training=True))
    assert windows == [8, 28, 12, 28, 8]


def test_a_schedule_that_begins_later() -> None:
    later = config(begin_samples=1000)
    windows = [later.window_at_samples(samples) for samples in (0, 999, 1000, 1010)]
    assert windows == [8, 8, 8, 12]


def test_evaluation_sees_whole_sequences_and_does_not_move_the_clock() -> None:
    running = Clock(config(), lambda: 30)
    assert running.window(training=True) == 20
    assert running.window(training=False) == 64
    assert running.last_window == 20


def test_an_override_ends_with_its_block_even_where_it_fails() -> None:
    running = Clock(config(), lambda: 0)
    with pytest.raises(KeyError), running.override(5):
        assert running.window(training=True) == running.window(training=False) == 5
        with running.override(6):
            assert running.window(training=True) == 6
        assert running.window(training=True) == 5
        raise KeyError
    assert running.window(training=True) == 8


def test_one_clock_for_the_process() -> None:
    with pytest.raises(RuntimeError, match=r"no schedule is installed\. Start training through"):
        clock.current()
    assert clock.installed() is None and not clock.documents_masked()
    installed = clock.install(config(intra_document=True), lambda: 0, iteration=lambda: 7)
    assert clock.current() is clock.installed() is installed
    assert clock.documents_masked() and installed.iteration() == 7
