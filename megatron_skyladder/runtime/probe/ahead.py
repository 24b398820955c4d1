"""Which windows that are still ahead are asked about: one for each kind of call of the attention.

How a layer calls its kernel depends on more than the length of the window: whether that is the
whole sequence, whether the last window of a sequence is shorter, whether a local layer's own window
hides part of it, whether keys travel between context-parallel ranks. A ladder comes to most of
these hours into a run. A kernel that refuses one of them would end the run there, and one that
masks it wrongly would spoil it. So the longest window of each kind is asked about, which has most
of a kernel's tiles, and the shortest of all, which has most segments.

When they hold is looked up in the schedule itself; what has to be seen then, `statement` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.sequence_layout import Kind as LayoutKind


class Sharing(NamedTuple):
    """How context-parallel ranks share a sequence in training.

    Args:
        size: ranks.
        layout: what decides which tokens a rank holds.
    """

    size: int
    layout: LayoutKind


class Windows(NamedTuple):
    """The windows of a step.

    Args:
        ladder: tokens of the ladder's window.
        own: tokens that a query of a local layer sees at most; None: there are no local layers.
    """

    ladder: int
    own: int | None


class CallKind(NamedTuple):
    """What decides how layers call their kernels at a step: the same on all ranks.

    Documents are left out: with them every call is one of packed segments.

    Args:
        whole: the window is the whole sequence.
        ragged: the last window of a sequence is shorter.
        exchanges: keys travel between context-parallel ranks.
        reach: of the window against what a rank holds: 0 up to half of it, which is a chunk of
            Megatron's zigzag, 1 up to all of it, 2 beyond; 0 without context parallelism.
        hides: a local layer's own window hides part of the ladder's.
        grown: that own window is the model's, and no longer one of a ladder of its own.
    """

    whole: bool
    ragged: bool
    exchanges: bool
    reach: int
    hides: bool
    grown: bool


def kind_of(windows: Windows, config: SkyLadderConfig, sharing: Sharing) -> CallKind:
    """Return the kind of call that these windows lead to."""
    length, window, sliding = config.seq_length, windows.ladder, config.mask == "sliding"
    on_rank, exchanges, reach = length // sharing.size, False, 0
    if sharing.size > 1:
        # neighbouring tokens that one rank holds; a window that ends elsewhere is cut
        stretch = on_rank // 2 if sharing.layout is LayoutKind.ZIGZAG else on_rank
        exchanges = window > 1 if sliding else stretch % window != 0
        reach = (2 * window > on_rank) + (window > on_rank)
    model = config.local_layers
    hides = windows.own is not None and windows.own < window
    return CallKind(
        whole=window == length,
        ragged=not sliding and length % window != 0,
        exchanges=exchanges,
        reach=reach,
        hides=hides,
        grown=hides and model is not None and windows.own == model.window,
    )


def samples_to_ask(
    config: SkyLadderConfig, now: int, total_samples: int, sharing: Sharing
) -> list[int]:
    """Return after how many samples the windows begin that are asked about, ascending.

    Args:
        config: the checked configuration.
        now: samples consumed by training; what holds here is not among them.
        total_samples: of the run.
        sharing: of sequences by context-parallel ranks.
    """
    longest: dict[CallKind, tuple[int, int]] = {}  # window, samples
    shortest, asked = config.window_at_samples(now), set()
    for samples, windows in _ahead(config, now, total_samples):
        kind, window = kind_of(windows, config, sharing), windows.ladder
        if kind not in longest or window > longest[kind][0]:
            longest[kind] = window, samples
        if window < shortest:
            shortest, asked = window, {samples}
    return sorted(asked | {samples for _, samples in longest.values()})


def _ahead(config: SkyLadderConfig, now: int, total_samples: int) -> Iterator[tuple[int, Windows]]:
    """Yield after how many samples other windows begin than now, and these."""

    def windows_at(samples: int) -> Windows:
        return Windows(config.window_at_samples(samples), config.local_window_at_samples(samples))

    current = windows_at(now)
    steps = max(0, -(-(total_samples - config.begin_samples) // config.step_samples))
    schedules = [config.schedule, *filter(None, [config.local_schedule])]
    for step in sorted({first for each in schedules for first, _, _ in each.segments(steps)}):
        samples = config.begin_samples + step * config.step_samples
        windows = windows_at(samples)
        if samples > now and windows != current:
            yield samples, windows
