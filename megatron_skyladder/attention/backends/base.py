"""What every backend answers, and the views that it is called on.

Shapes: T tokens of all sequences of a micro-batch, one after the other; S tokens of one sequence, b
sequences, h query heads, g key/value heads (h a multiple of g), d head size of queries and keys, c
of values (d but for multi-latent attention), W window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_skyladder.attention.segments import Segments


class Backend(torch.nn.Module):
    """One kernel library behind three calls; a subclass defines `forward`, and `missing`.

    Args:
        scale: factor on the logits.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.softmax_scale = scale
        self._sink: Callable[[], torch.Tensor] | None = None

    @classmethod
    def build(cls, *, config: Any, scale: float, **stock_arguments: Any) -> Backend:
        """Build the backend of one layer.

        Args:
            config: Megatron's TransformerConfig.
            scale: factor on the logits.
            stock_arguments: what Megatron gives to any core attention of this layer.
        """
        return cls(scale)

    @classmethod
    def check_installed(cls) -> None:
        """Raise whatever tells that the library is not there, or too old."""

    @classmethod
    def check_sink(cls) -> None:
        """Raise whatever tells that this release of the library has no sink."""

    def use_sink(self, sink: Callable[[], torch.Tensor]) -> None:
        """Attend with a sink from now on (Megatron's ``--softmax-type``).

        Args:
            sink: returns the logits of this rank's heads, [h].
        """
        self._sink = sink

    def sink_of(self, num_heads: int) -> torch.Tensor | None:
        """Return the sinks for a call in which the heads of several sequences may stand.

        In float32 at least, so that what the sequences say about one parameter is not rounded
        before it is added up.

        Args:
            num_heads: of the call's queries: those of one sequence after those of the other.

        Returns:
            [num_heads], or None where there is no sink.
        """
        if self._sink is None:
            return None
        sink = self._sink()
        sink = sink.to(torch.promote_types(sink.dtype, torch.float32))
        return sink.repeat(num_heads // len(sink))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """Attend within segments of any lengths, causal, aligned at the bottom right.

        Args:
            query: [Tq, h, d]; key: [Tk, g, d]; value: [Tk, g, c].
            segments: offsets into Tq and Tk that attention may not cross.

        Returns:
            [Tq, h, c].
        """
        raise NotImplementedError

    def attend_windows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """Attend within equal windows of each sequence.

        Sequences join the heads, not the windows: [S, b, h, d] -> [S, b * h, d] needs no copy of a
        contiguous tensor, the offsets are those of one sequence, and query head i * h + j still
        meets key head i * g + j * g // h.

        Args:
            query: [S, b, h, d]; key: [S, b, g, d]; value: [S, b, g, c].
            segments: with ``grid`` set.

        Returns:
            [S, b, h * c].
        """
        num_tokens, num_sequences = query.shape[:2]
        joined = (tensor.flatten(1, 2) for tensor in (query, key, value))
        out = self(*joined, segments.of_one_sequence(num_tokens))
        return out.reshape(num_tokens, num_sequences, -1)

    def attend_full(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """Attend to whole sequences, causal; shapes as for `attend_windows`."""
        return self.attend_windows(query, key, value, segments)


class WidenedValues(Backend):
    """Another backend, whose kernel wants wider values: zeros behind them, cut off the output.

    Args:
        inner: the backend.
        width: channels of a head of values that it wants.
    """

    def __init__(self, inner: Backend, width: int) -> None:
        super().__init__(inner.softmax_scale)
        self._inner, self._width = inner, width

    def use_sink(self, sink: Callable[[], torch.Tensor]) -> None:
        """See `Backend`."""
        self._inner.use_sink(sink)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        out: torch.Tensor = self._inner(query, key, self._widened(value), segments)
        return out[..., : value.shape[-1]]

    def attend_windows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        out = self._inner.attend_windows(query, key, self._widened(value), segments)
        return self._cut(out, value)

    def attend_full(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        out = self._inner.attend_full(query, key, self._widened(value), segments)
        return self._cut(out, value)

    def _widened(self, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(value, (0, self._width - value.shape[-1]))

    def _cut(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return out.unflatten(-1, (-1, self._width))[..., : value.shape[-1]].flatten(-2)


def window_size(segments: Segments) -> tuple[int, int]:
    """Return FlashAttention's (left, right), both inclusive: W visible tokens are (W - 1, 0)."""
    left = -1 if segments.sliding_window is None else segments.sliding_window - 1
    return left, 0


def to_thd(tensor: torch.Tensor) -> torch.Tensor:
    """[S, b, heads, d] -> [b * S, heads, d], sequence after sequence; a view where b is 1."""
    return tensor.transpose(0, 1).flatten(0, 1)


def from_thd(tensor: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[b * S, heads, d] -> [S, b, heads * d]; a view where b is 1."""
    return tensor.flatten(1).unflatten(0, (num_sequences, -1)).transpose(0, 1)


def require_arguments(function: Any, *names: str) -> None:
    """Raise ImportError where a function of this release does not take an argument."""
    function = getattr(function, "_init_fn", function)  # what torch.library.custom_op wraps
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise ImportError(f"{function.__name__} does not take {', '.join(missing)}")
