"""How attention behaves, layer by layer, on demand (--skyladder-attention-stats-interval N).

At every N-th iteration, on the first micro-batch of each data-parallel rank, under the mask that
the iteration trains with. The measures are those that the paper watches (arXiv:2503.15450, section
4.6, Figures 7 and 8); s(i, j) is query i times key j times the softmax scale, p(i, j) what the
softmax over the visible keys makes of it:

* maximum attention logit: the largest s(i, j) of all heads, queries and visible keys. The paper
  follows Kimi K2 and writes it without the scale; K2 has it, and it is what the softmax gets.
* attention entropy: the mean over heads and queries of -sum_j p(i, j) ln p(i, j), in nats. A query
  that sees few keys cannot have much: compare runs at equal windows.
* attention sink, after Gu et al. (arXiv:2410.10781) with their threshold of 0.3 and texts of 64
  tokens: the share of heads whose first token gets more than 0.3 of the attention, on average over
  the queries 1..64. The texts are the first 64 tokens of every fragment that has as many, so the
  measure means the same under any window from 64 on; below, there is none. Under context
  parallelism a fragment counts where one rank holds its first 64 tokens in one piece, so which do
  depends on the layout: compare runs with the same ranks and --skyladder-context-parallel-layout.

Logits are computed in float32 for a block of queries at a time, never L x L. Where the interval is
not set, an attention layer has no statistics to ask; between two measurements it asks once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import torch

from megatron_skyladder.attention.segments import Segments

SINK_THRESHOLD = 0.3
SINK_TOKENS = 64
BLOCK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in float32
NAMES = ("max_attention_logit", "attention_entropy", "attention_sink")

Record = Callable[[torch.Tensor, torch.Tensor, Segments], None]


@dataclass
class Sums:
    """What is added up, so that calls, layers and ranks can be: tensors stay on the device."""

    largest: torch.Tensor  # logit
    entropy: torch.Tensor
    sinks: torch.Tensor
    num_queries: int = 0  # that the entropies are of, times heads
    num_heads: int = 0  # that might be sinks, times fragments

    @classmethod
    def nothing(cls, device: torch.device) -> Sums:
        """Return the sums of no attention at all."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(zero - torch.inf, zero, zero)

    def add(self, other: Sums) -> None:
        """Count the other's too."""
        self.largest = torch.maximum(self.largest, other.largest)
        self.entropy = self.entropy + other.entropy
        self.sinks = self.sinks + other.sinks
        self.num_queries += other.num_queries
        self.num_heads += other.num_heads


_layers: WeakSet[LayerStatistics] = WeakSet()


class LayerStatistics:
    """What one attention layer has measured, at the latest measured iteration.

    Args:
        layer_number: Megatron's, from 1, over all pipeline stages.
        interval: iterations from one measurement to the next.
        scale: of the logits.
        iteration: returns the training step under way, as it will be logged.
    """

    def __init__(
        self, layer_number: int, interval: int, scale: float, iteration: Callable[[], int]
    ) -> None:
        self.layer_number = layer_number
        self.sums: Sums | None = None
        self._interval = interval
        self._scale = scale
        self._iteration = iteration
        self._measured_at = -1
        _layers.add(self)

    def recorder(self, device: torch.device) -> Record | None:
        """Return what measures this forward pass of training, or None.

        The first one of a measured iteration is: not the later micro-batches, and not the first
        one when it is recomputed.
        """
        iteration = self._iteration()
        if iteration % self._interval or iteration == self._measured_at:
            return None
        self._measured_at = iteration
        self.sums = Sums.nothing(device)
        return self._record

    @torch.no_grad()
    def _record(self, query: torch.Tensor, key: torch.Tensor, segments: Segments) -> None:
        assert self.sums is not None
        self.sums.add(measure(query, key, segments, self._scale))


def recording(backend: Callable[..., torch.Tensor], record: Record) -> Callable[..., torch.Tensor]:
    """Return the backend (see `backends`), measured on the side."""

    def measured(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        record(query, key, segments)
        return backend(query, key, value, segments)

    return measured


def measure(query: torch.Tensor, key: torch.Tensor, segments: Segments, scale: float) -> Sums:
    """Return the sums of one attention call.

    Args:
        query: [Tq, H, D]; key: [Tk, G, D], H a multiple of G.
        segments: offsets into Tq and Tk.
        scale: of the logits.
    """
    sums = Sums.nothing(query.device)
    for starts_q, starts_k, len_q, len_k in _same_lengths(segments):
        logits_per_query = query.shape[1] * len_k
        block = max(1, min(len_q, BLOCK_ELEMENTS // logits_per_query))
        batch = max(1, BLOCK_ELEMENTS // (logits_per_query * block))
        for first in range(0, len(starts_q), batch):
            chosen = slice(first, first + batch)
            q = _gather(query, starts_q[chosen], len_q).unflatten(2, (key.shape[1], -1))
            k = _gather(key, starts_k[chosen], len_k)
            sums.add(_measure_batch(q, k, block, segments.sliding_window, scale))
    return sums


def _same_lengths(segments: Segments) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
    """Yield the segments in groups of equal lengths: their starts, queries and keys of each."""
    lengths = np.stack([segments.lengths_q, segments.lengths_k], axis=1)
    for len_q, len_k in np.unique(lengths[lengths[:, 0] > 0], axis=0).tolist():
        chosen = np.flatnonzero((lengths == (len_q, len_k)).all(axis=1))
        yield segments.cu_seqlens_q[chosen], segments.cu_seqlens_k[chosen], len_q, len_k


def _gather(tokens: torch.Tensor, starts: np.ndarray, length: int) -> torch.Tensor:
    """[T, heads, D] -> [segments, length, heads, D]; a view where there is one segment."""
    if len(starts) == 1:
        return tokens[starts[0] : starts[0] + length][None]
    index = torch.from_numpy(starts.astype(np.int64)).to(tokens.device)[:, None]
    return tokens[index + torch.arange(length, device=tokens.device)]


def _measure_batch(
    query: torch.Tensor, key: torch.Tensor, block: int, sliding_window: int | None, scale: float
) -> Sums:
    """Measure segments of equal lengths, a block of queries at a time.

    Args:
        query: [N, M, G, R, D], R query heads for each key head; key: [N, K, G, D]; K >= M, the last
            query sees the last key.
    """
    num, len_q, groups, repeats, _ = query.shape
    offset = key.shape[1] - len_q
    q, k = query.permute(0, 2, 3, 1, 4), key.float().permute(0, 2, 3, 1)[:, :, None]
    sums = Sums.nothing(query.device)
    on_first = torch.zeros(num, groups, repeats, device=query.device)
    for start in range(0, len_q, block):
        stop = min(start + block, len_q)
        first = 0 if sliding_window is None else max(0, offset + start - sliding_window + 1)
        positions = torch.arange(offset + start, offset + stop, device=query.device)[:, None]
        keys = torch.arange(first, offset + stop, device=query.device)
        visible = keys <= positions
        if sliding_window is not None:
            visible &= keys > positions - sliding_window
        logits = (q[:, :, :, start:stop].float() @ k[..., first : offset + stop]) * scale
        logits = logits.masked_fill(~visible, -torch.inf)
        sums.largest = torch.maximum(sums.largest, logits.amax().double())
        weights = torch.softmax(logits, dim=-1)
        # ln p = s - ln sum exp s; where nothing is visible p is 0 and counts for nothing
        expected = (weights * logits.masked_fill(~visible, 0.0)).sum(dim=-1)
        sums.entropy = sums.entropy + (logits.logsumexp(dim=-1) - expected).double().sum()
        if start < SINK_TOKENS:  # column 0 is the first key wherever sinks are counted, see below
            on_first += weights[..., : SINK_TOKENS - start, 0].sum(dim=-1)
    sums.num_queries = num * len_q * groups * repeats
    if offset == 0 and len_q >= SINK_TOKENS <= (sliding_window or SINK_TOKENS):
        sums.sinks = (on_first / SINK_TOKENS > SINK_THRESHOLD).double().sum()
        sums.num_heads = num * groups * repeats
    return sums


def by_layer(num_layers: int) -> dict[str, dict[int, float]]:
    """Return the three measures of every layer, over all ranks, which all have to call this.

    Args:
        num_layers: of the model, those without attention included.

    Returns:
        By `NAMES`: a value for each layer with attention, by its number from 1; NaN where there is
        none.
    """
    table = torch.zeros(num_layers, 5, dtype=torch.float64, device="cuda")
    table[:, 0] = -torch.inf
    for layer in _layers:
        sums, layer.sums = layer.sums, None
        if sums is not None:
            row = table[layer.layer_number - 1]
            row[0], row[1], row[2] = sums.largest, sums.entropy, sums.sinks
            row[3], row[4] = sums.num_queries, sums.num_heads
    largest, counts = table[:, 0].contiguous(), table[:, 1:].contiguous()
    # heads are shared out over tensor-parallel ranks, queries over context- and data-parallel ones,
    # layers over pipeline stages: no query is on two ranks
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(counts)
    values = largest, counts[:, 0] / counts[:, 2], counts[:, 1] / counts[:, 3]
    measured = (counts[:, 2].nonzero().flatten() + 1).tolist()  # a hybrid model has other layers
    return {
        name: {number: float(value[number - 1]) for number in measured}
        for name, value in zip(NAMES, values, strict=True)
    }


def summary(layers: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return the largest logit, and the means over layers of the others, for the console."""
    if not layers[NAMES[0]]:
        return {}
    means = {name: float(np.mean([*layers[name].values()])) for name in NAMES[1:]}
    found = {NAMES[0]: max(layers[NAMES[0]].values()), **means}
    return {f"skyladder/{name}": value for name, value in found.items() if np.isfinite(value)}


def scalars(layers: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return every layer's measures by the name under which they are logged."""
    return {
        f"skyladder/{name}/layer_{number}": value
        for name, values in layers.items()
        for number, value in values.items()
        if np.isfinite(value)
    }
