"""Which later windows the probe asks about: hand-made lists, and the attention's own calls."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch

from megatron_skyladder.attention.segments import Rows, grid_segments
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.local_ladder import local_ladder
from megatron_skyladder.ladder.local_layers import LocalLayers
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.runtime.probe.ahead import Sharing, samples_to_ask

ALONE, ZIGZAG, WINDOW = Sharing(1, Kind.ZIGZAG), Sharing(2, Kind.ZIGZAG), Sharing(2, Kind.WINDOW)
LENGTH = 16


def config(schedule, own=None, mask="local", **more):
    layers = None if own is None else LocalLayers(own, 1, 2)
    return SkyLadderConfig(schedule, LENGTH, step_samples=4, mask=mask, local_layers=layers, **more)


# windows of 4, 6, 8, 10, 12, 14 and then 16 tokens, from sample 0, 4, 8, ... on
CLIMBS = WindowSchedule("linear", start_window=4, final_window=LENGTH, alpha=2)
# windows of 16, 13, 10 and 7 tokens, and of 16 again from sample 16 on
FALLS = WindowSchedule("reversed", start_window=4, final_window=LENGTH, alpha=3)
CASES = {
    # those that divide the sequence (8), those that do not (14), all of it (16)
    "a ladder": (config(CLIMBS), 0, 99, ALONE, {8: 8, 20: 14, 24: 16}),
    "sliding": (config(CLIMBS, mask="sliding"), 0, 99, ALONE, {20: 14, 24: 16}),
    "resumed": (config(CLIMBS), 12, 99, ALONE, {20: 14, 24: 16}),
    "at its end": (config(CLIMBS), 24, 99, ALONE, {}),
    "a run that ends before": (config(CLIMBS), 0, 18, ALONE, {8: 8, 16: 12}),
    "it begins later": (config(CLIMBS, begin_samples=10), 3, 99, ALONE, {18: 8, 30: 14, 34: 16}),
    # 12 of their tokens: 14 and 16 are cut by their own window, 12 is not
    "local layers": (config(CLIMBS, own=12), 0, 99, ALONE, {8: 8, 16: 12, 20: 14, 24: 16}),
    # a rank holds 8 tokens, in two chunks of 4: keys travel but for windows of 4
    "two ranks": (config(CLIMBS), 0, 99, ZIGZAG, {4: 6, 8: 8, 20: 14, 24: 16}),
    # a rank holds 8 tokens side by side: windows of 8 need no others
    "two ranks by the window": (config(CLIMBS), 0, 99, WINDOW, {4: 6, 8: 8, 20: 14, 24: 16}),
    # 13 is the longest that does not divide, 7 the shortest of all; 16 is asked about as it begins
    "reversed": (config(FALLS), 0, 99, ALONE, {4: 13, 12: 7}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_of_each_kind_is_asked_about(name):
    asked_config, now, total, sharing, expected = CASES[name]
    asked = samples_to_ask(asked_config, now, total, sharing)
    assert {at: asked_config.window_at_samples(at) for at in asked} == expected


def test_a_ladder_of_local_layers_is_a_kind_while_it_grows():
    """Own windows of 2, 4, 6, 8, 10 and then 12 tokens hide part of 4, 6, 8, ... all along."""
    grows = local_ladder(
        {"local_start_window": 2, "local_expand_fraction": Fraction(1, 2)},
        LocalLayers(12, 1, 2),
        total_steps=10,
    )
    two = config(CLIMBS, own=12, local_schedule=grows)
    own = [two.local_window_at_samples(4 * step) for step in range(7)]
    assert own == [2, 4, 6, 8, 10, 12, 12]
    # held back below the ladder's window: 8 and 12; grown to the model's: 14 and 16
    assert samples_to_ask(two, 0, 99, ALONE) == [8, 16, 20, 24]


def calls(window, mask, own):
    """Return how global and local layers call their kernels, by their segments."""
    found = set()
    for own_window in {None, own if own is not None and own < window else None}:
        rows = Rows(
            seq_length=LENGTH,
            num_rows=1,
            window_len=window,
            sliding=mask == "sliding",
            device=torch.device("cpu"),
            own_window=own_window,
        )
        segments = grid_segments(rows)
        where = {LENGTH: "full", None: "packed"}.get(segments.grid, "windows")
        ragged = segments.grid is not None and LENGTH % segments.grid != 0
        found.add((where, segments.sliding_window is not None, ragged))
    return found


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(1, LENGTH),
    alpha=st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(3), Fraction(7)]),
    mask=st.sampled_from(["local", "sliding"]),
    own=st.sampled_from([None, 1, 5, 12, LENGTH]),
    now=st.integers(0, 80),
)
def test_every_call_to_come_is_asked_about(start, alpha, mask, own, now):
    schedule = WindowSchedule("linear", start_window=start, final_window=LENGTH, alpha=alpha)
    climbs = config(schedule, own, mask)
    total = 80

    def of(samples):
        windows = {climbs.window_at_samples(at) for at in samples}
        return set().union(*(calls(window, mask, own) for window in windows))

    assert of(range(now, total + 1)) <= of([now, *samples_to_ask(climbs, now, total + 1, ALONE)])
