"""The window right now: a pure function of Megatron's consumed samples, looked up, never counted.

One `Clock` per process, installed before the model is built; the trainer's counters come as
functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import Rotary, StageValues
from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule


class Clock:
    """Tells the window of the global batch that is being trained.

    Args:
        config: the checked configuration.
        consumed_samples: returns the training samples consumed before the current global batch;
            Megatron's ``args.consumed_train_samples`` changes only between batches, so every
            micro-batch, pipeline stage and recompute of a step sees the same number.
        iteration: returns the step under way, from 1, as it will be logged.
    """

    def __init__(
        self,
        config: SkyLadderConfig,
        consumed_samples: Callable[[], int],
        iteration: Callable[[], int] = lambda: 1,
    ) -> None:
        self.config = config
        # of training, under context parallelism; another one only where somebody reorders the batch
        self.layout_kind = Kind.ZIGZAG
        self.iteration = iteration
        self._consumed_samples = consumed_samples
        self._samples = -1
        self._window = config.seq_length
        self._local_window: int | None = None
        self._override: int | None = None
        self._rotary_at = -1, True
        self._rotary = Rotary()

    def window(self, *, training: bool) -> int:
        """Return the window in tokens; evaluation sees the full sequence."""
        if self._override is not None:
            return self._override
        if not training:
            return self.config.seq_length
        samples = self._consumed_samples()
        if samples != self._samples:
            self._samples = samples
            self._window = self.config.window_at_samples(samples)
            self._local_window = None
            if self.config.local_schedule is not None:
                self._local_window = self.config.local_window_at_samples(samples)
        return self._window

    def local_window(self, *, training: bool) -> int | None:
        """Return what a query of a local layer sees at most by the ladder of these layers.

        None: no ladder holds them back, so that their model's own window is what counts: there is
        none (`local_ladder`), or this is evaluation.
        """
        if self._override is not None or not training:
            return None
        self.window(training=True)
        return self._local_window

    def rotary(self, *, training: bool) -> Rotary:
        """Return what the stage sets of rotary embeddings.

        Evaluation has that of the latest batch that was trained, also where the next one begins
        another stage: the weights have not seen that yet.
        """
        key = self._consumed_samples(), training
        if key != self._rotary_at:
            self._rotary_at = key
            self._rotary = self._values(key[0], training=training).rotary
        return self._rotary

    def _values(self, samples: int, *, training: bool) -> StageValues:
        if training:
            return self.config.values_at_samples(samples)
        if 0 <= self._samples < samples:  # the latest batch was trained here, whatever its size
            return self.config.values_at_samples(self._samples)
        return self.config.values_of_latest(samples)

    def layout_rule(self, seq_length: int, cp_size: int, *, training: bool) -> LayoutRule:
        """Return how sequences are shared out among context-parallel ranks right now.

        In evaluation always as Megatron does: windows there may be others than in training.
        """
        return LayoutRule(
            self.layout_kind if training else Kind.ZIGZAG,
            seq_length,
            cp_size,
            min(self.window(training=training), seq_length),
            self.config.mask == "sliding",
        )

    @property
    def last_window(self) -> int:
        """The window of the latest training step that looked it up; for logging."""
        return self._window

    @property
    def last_local_window(self) -> int | None:
        """What `local_window` was in that step."""
        return self._local_window

    @property
    def last_values(self) -> StageValues:
        """What went with that window; for logging."""
        return self.config.values_at_samples(max(0, self._samples))

    @contextlib.contextmanager
    def override(self, window: int) -> Iterator[None]:
        """Use this window for a while, in training and evaluation alike."""
        before, self._override = self._override, window
        try:
            yield
        finally:
            self._override = before


_clock: Clock | None = None


def install(
    config: SkyLadderConfig,
    consumed_samples: Callable[[], int],
    iteration: Callable[[], int] = lambda: 1,
) -> Clock:
    """Make a clock (see `Clock`) the process's; trainers go through `runtime.trainer.install`."""
    global _clock
    _clock = Clock(config, consumed_samples, iteration)
    return _clock


def uninstall() -> None:
    """Forget the process's clock."""
    global _clock
    _clock = None


def installed() -> Clock | None:
    """Return the process's clock, or None where SkyLadder is off."""
    return _clock


def documents_masked() -> bool:
    """Return whether training masks documents: every pipeline stage then needs the sequences."""
    return _clock is not None and _clock.config.intra_document


def current() -> Clock:
    """Return the process's clock.

    Raises:
        RuntimeError: none was installed.
    """
    if _clock is None:
        raise RuntimeError(
            "SkyLadder attention was built, but no schedule is installed. Start training through "
            "megatron_skyladder.pretrain_gpt, or call runtime.trainer.install before the model is "
            "built."
        )
    return _clock
