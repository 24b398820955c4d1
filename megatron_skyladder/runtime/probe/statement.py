"""Who may see whom, stated a second time: plain arithmetic on positions, settings and samples.

The probe compares what attention really does with what is said here. So nothing here is shared with
what it checks (`ladder.schedules`, `ladder.clock`, `ladder.fragments`, `ladder.key_exchange`): the
formulas are written down once more, from the paper (arXiv:2503.15450, Table 20 and A.5). Only
numpy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_skyladder.ladder.config import SkyLadderConfig

_HAIR = 1e-9  # a real window this close below an integer is that integer, as in `ladder.schedules`
_SEARCHED_STEPS = 1 << 40  # no run is longer


def window(config: SkyLadderConfig, consumed_samples: int) -> int:
    """Return the training window of the global batch that begins after ``consumed_samples``.

    A schedule that is not in `STATED` has no second statement: its own word is taken.
    """
    return min(_stated(config.schedule, config, consumed_samples), config.seq_length)


def local_window(config: SkyLadderConfig, consumed_samples: int) -> int | None:
    """Return what a query of a local layer sees at most in that batch by a ladder of its own.

    None: there is no such ladder (`ladder.local_ladder`), the model's own window holds.
    """
    if config.local_schedule is None:
        return None
    own = _stated(config.local_schedule, config, consumed_samples)
    return min(own, window(config, consumed_samples))


def _stated(schedule: Any, config: SkyLadderConfig, consumed_samples: int) -> int:
    step = max(0, consumed_samples - config.begin_samples) // config.step_samples
    stated = STATED.get(schedule.schedule)
    return int(schedule.window_at(step) if stated is None else stated(schedule, step))


def _ramp(
    grown: Callable[[Any, Fraction], Fraction | float], legs: Callable[[Any], int] = lambda s: 1
) -> Callable[[Any, int], int]:
    """Return the window of a schedule that grows by ``alpha`` or over a share of the run.

    Args:
        grown: the real-valued window when the share t (0 <= t < 1) of the ramp lies behind.
        legs: how often the way between the windows is gone.
    """

    def tokens(schedule: Any, step: int) -> int:
        start, final = schedule.start_window, schedule.final_window
        if schedule.expand_fraction is not None:
            ramp_steps = Fraction(str(schedule.expand_fraction)) * schedule.total_steps
        else:
            ramp_steps = (final - start) * legs(schedule) / Fraction(str(schedule.alpha))
        if step >= ramp_steps:
            return int(final)
        return _rounded(schedule, grown(schedule, step / ramp_steps), start)

    return tokens


def _rounded(schedule: Any, real: Fraction | float, lowest: int) -> int:
    if schedule.round_to == "pow2":
        powers = [2**n for n in range(32) if 2**n <= real]
        return int(min(schedule.final_window, max(lowest, *powers)))
    multiple = schedule.round_to or 1
    return int(min(schedule.final_window, max(lowest, math.floor(real / multiple) * multiple)))


def _between(schedule: Any, share: Fraction) -> Fraction:
    """Return the window when this share of the way from the start to the final one is gone."""
    start: Fraction = (
        schedule.start_window + (schedule.final_window - schedule.start_window) * share
    )
    return start


def _staged(schedule: Any, step: int) -> int:
    ends = itertools.accumulate(stage.share * schedule.total_steps for stage in schedule.stages)
    for stage, end in zip(schedule.stages, ends, strict=True):
        if step < end:
            if stage.first_window is None:
                return int(stage.window)
            t = 1 - (end - step) / (stage.share * schedule.total_steps)
            grown = stage.first_window + math.floor((stage.window - stage.first_window) * t)
            return _rounded(schedule, grown, min(stage.first_window, stage.window))
    return int(schedule.final_window)


def _points(schedule: Any, step: int) -> int:
    share = Fraction(step, schedule.total_steps)
    for one, other in itertools.pairwise(schedule.points):
        if one.share <= share < other.share:
            way = (share - one.share) / (other.share - one.share)
            lowest = min(point.window for point in schedule.points)
            return _rounded(schedule, one.window + (other.window - one.window) * way, lowest)
    return int(schedule.final_window)


STATED: dict[str, Callable[[Any, int], int]] = {
    "constant": lambda s, step: s.final_window,
    "linear": _ramp(_between),
    "stepwise": _ramp(_between),
    "sinusoidal": _ramp(
        lambda s, t: (
            s.start_window
            + (s.final_window - s.start_window) * math.sin(math.pi * float(t) / 2)
            + _HAIR
        )
    ),
    "exponential": _ramp(
        lambda s, t: s.start_window * (s.final_window / s.start_window) ** float(t) + _HAIR
    ),
    "reversed": _ramp(
        lambda s, t: s.final_window - math.floor((s.final_window - s.start_window) * t)
    ),
    "cyclic": _ramp(
        lambda s, t: _between(s, 1 - abs(1 - 2 * s.num_cycles * t % 2)),
        legs=lambda s: 2 * s.num_cycles,
    ),
    "cyclic-jump": _ramp(lambda s, t: _between(s, s.num_cycles * t % 1), lambda s: s.num_cycles),
    "staged": _staged,
    "points": _points,
}


def own_window(model: Any, layer_number: int) -> int | None:
    """Return how many keys a query of this layer sees at most by its model; None: any number.

    Args:
        model: Megatron's TransformerConfig.
        layer_number: from 1.
    """
    left, _ = getattr(model, "window_size", None) or (-1, 0)
    pattern = getattr(model, "window_attn_skip_freq", None)
    is_global = False
    if isinstance(pattern, int):
        is_global = layer_number % pattern == 0
    elif pattern:
        is_global = not pattern[layer_number - 1]
    return None if left < 0 or is_global else left + 1


def next_change(config: SkyLadderConfig, consumed_samples: int) -> int | None:
    """Return the fewest samples from which on another window holds than now; None: never.

    Of global layers or of local ones. The windows of cyclic schedules come back: then it is the
    first change that is found by steps that double, which may be a later one.
    """
    step = max(0, consumed_samples - config.begin_samples) // config.step_samples

    def samples_at(other: int) -> int:
        return config.begin_samples + other * config.step_samples

    def windows(samples: int) -> tuple[int, int | None]:
        return window(config, samples), local_window(config, samples)

    now, low, stride = windows(consumed_samples), step, 1
    while windows(samples_at(step + stride)) == now:
        low, stride = step + stride, stride * 2
        if stride > _SEARCHED_STEPS:
            return None
    high = step + stride
    while high - low > 1:
        middle = (low + high) // 2
        if windows(samples_at(middle)) == now:
            low = middle
        else:
            high = middle
    return samples_at(high)


def document_starts(tokens: np.ndarray, end_of_document: int) -> np.ndarray:
    """Return where each token's document begins.

    Args:
        tokens: int [num_sequences, seq_length].
        end_of_document: the token after which another document begins.

    Returns:
        int64 [num_sequences, seq_length], positions in the sequence.
    """
    begins = np.zeros(tokens.shape, dtype=bool)
    begins[:, 1:] = tokens[:, :-1] == end_of_document
    return _latest(begins)


def starts_of(ends: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the same where the dataset names the ends: any order, repeats and padding allowed.

    Args:
        ends: int [num_sequences, any number].
        seq_length: tokens.
    """
    begins = np.zeros((len(ends), seq_length), dtype=bool)
    for row, offsets in zip(begins, ends, strict=True):
        row[offsets[(offsets > 0) & (offsets < seq_length)]] = True
    return _latest(begins)


def _latest(begins: np.ndarray) -> np.ndarray:
    positions = np.arange(begins.shape[1], dtype=np.int64)
    return np.maximum.accumulate(np.where(begins, positions, 0), axis=1)


def first_visible(
    num_sequences: int,
    seq_length: int,
    *,
    window_len: int,
    sliding: bool,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Return the first key that each query sees; it sees all from there up to itself.

    Args:
        num_sequences: of the micro-batch.
        seq_length: tokens in each.
        window_len: tokens.
        sliding: whether the window moves along with the query instead of lying on a grid.
        starts: see `document_starts`; None: documents are not masked.

    Returns:
        int64 [num_sequences * seq_length], of one sequence after the other; so is what it holds:
        position p of sequence b is ``b * seq_length + p``.
    """
    positions = np.arange(seq_length, dtype=np.int64)
    if sliding:
        first = np.maximum(0, positions - window_len + 1)
    else:
        first = positions - positions % window_len
    rows = np.broadcast_to(first, (num_sequences, seq_length))
    if starts is not None:
        rows = np.maximum(rows, starts)
    return (rows + np.arange(num_sequences)[:, None] * seq_length).ravel()
