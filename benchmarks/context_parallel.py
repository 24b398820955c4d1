"""Traffic and balance of context parallelism against the window, counted exactly.

    python benchmarks/context_parallel.py [--seq-length 32768] [--context-parallel-size 4]

Counts, and runs nothing: keys and values that one rank receives per layer and step, forward and
backward, beside a plain all-gather (with reduce-scatter of the gradients) and the ring of
Megatron's Transformer Engine attention, which both send everything at every window.

    mean, busiest   MB that a rank receives per layer and step, over the ranks
    of gather       the mean relative to the all-gather
    waits           share of the attention work that sees a key of another rank; the rest is
                    computed while keys travel
    balance         attention work of the busiest rank over the mean
"""

from __future__ import annotations

import argparse

import numpy as np

from megatron_skyladder.ladder.exchange_costs import (
    ALL_GATHER_PASSES,
    OUR_PASSES,
    RING_PASSES,
    RankCosts,
    gathered_tokens,
    key_value_bytes,
    rank_costs,
)
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens, rows_cu_seqlens
from megatron_skyladder.ladder.sequence_layout import zigzag

SEED = 1


def random_documents(generator: np.random.Generator, seq_length: int, mean: int) -> np.ndarray:
    """Return ends of documents of exponential length in a row, int32, ascending."""
    lengths = generator.exponential(mean, 4 * seq_length // mean + 16).astype(np.int64) + 1
    ends = np.cumsum(lengths)
    return ends[ends < seq_length].astype(np.int32)


def costs_of(window_len: int, options: argparse.Namespace) -> RankCosts:
    """Return the costs of one step: all rows that a rank takes part in."""
    generator = np.random.default_rng(SEED)
    length, sliding = options.seq_length, options.skyladder_mask == "sliding"
    rows = []
    for _ in range(options.rows):
        ends = np.empty(0, np.int32)
        if options.document_length:
            ends = random_documents(generator, length, options.document_length)
        cut = length if sliding else window_len
        rows.append(fragment_cu_seqlens(ends, seq_length=length, window_len=cut))
    return rank_costs(
        rows_cu_seqlens(rows),
        [zigzag(length, options.context_parallel_size)] * options.rows,
        sliding_window=window_len if sliding else None,
    )


def windows_to_show(options: argparse.Namespace) -> list[int]:
    """Return the given windows, or powers of two and what lies between them."""
    if options.windows:
        return [int(word) for word in options.windows.split(",")]
    powers = [1 << k for k in range(5, options.seq_length.bit_length())]
    between = [window // 2 * 3 - 1 for window in powers]
    windows = {w for w in [*powers, *between] if w <= options.seq_length}
    return sorted(windows | {options.seq_length})


def print_table(options: argparse.Namespace) -> None:
    """Print one line per window."""

    def megabytes(num_tokens: float, passes: int) -> float:
        size = key_value_bytes(
            num_tokens,
            num_groups=options.num_query_groups,
            head_dim=options.kv_channels,
            num_bytes=2,
        )
        return passes * size / 1e6

    everything = options.rows * gathered_tokens(options.context_parallel_size, options.seq_length)
    gather, ring = megabytes(everything, ALL_GATHER_PASSES), megabytes(everything, RING_PASSES)
    print(f"all-gather {gather:,.1f} MB, ring {ring:,.1f} MB, at every window")
    print("  window      mean  busiest  of gather   waits  balance")
    for window in windows_to_show(options):
        costs = costs_of(window, options)
        mean = megabytes(costs.received.mean(), OUR_PASSES)
        print(
            f"{window:8,}  {mean:8,.2f}  {megabytes(costs.received.max(), OUR_PASSES):7,.2f}  "
            f"{mean / gather:9.2%}  {costs.waiting_pairs.sum() / costs.pairs.sum():6.1%}  "
            f"{costs.imbalance:7.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=32768)
    parser.add_argument("--context-parallel-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="rows per step and CP group")
    parser.add_argument("--num-query-groups", type=int, default=4, help="on a TP rank")
    parser.add_argument("--kv-channels", type=int, default=64)
    parser.add_argument(
        "--document-length", type=int, help="mask documents of this mean length (random)"
    )
    parser.add_argument("--skyladder-mask", choices=("local", "sliding"), default="local")
    parser.add_argument("--windows", help="such as 32,4096,6000")
    print_table(parser.parse_args())


if __name__ == "__main__":
    main()
