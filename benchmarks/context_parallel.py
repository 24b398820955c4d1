"""Traffic and balance of context parallelism against the window, counted exactly.

    python benchmarks/context_parallel.py [--seq-length 32768] [--context-parallel-size 4] [--json]

Counts, and runs nothing but the planning: keys and values that one rank receives per layer and
step, forward and backward, and the attention work of the ranks, with sequences shared out

    zigzag      as Megatron does
    balanced    by the window (and each sequence's documents, with --document-length)
    pow2        as Megatron does, at the window rounded down to a power of two: another schedule

beside a plain all-gather (with reduce-scatter of the gradients) and the ring of Megatron's
Transformer Engine attention, which both send everything at every window.

    balance     attention work of the busiest rank over the mean
    of gather   bytes relative to the all-gather, on average over the ranks
    waits       share of the attention work that sees a key of another rank; the rest is computed
                while keys travel
    ms          per layer and step, by a model: the slowest rank computes 4 H D FLOPs per visible
                pair forward and 10 H D backward at --tflops; keys and values in bf16 come at
                --gigabytes-per-second while it does what needs none. No launches, no partly empty
                tiles. A prediction, not a measurement.
    plan ms     on this host: choosing the layout, and the exchange plan of one rank
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

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
from megatron_skyladder.ladder.key_exchange import exchange_plan
from megatron_skyladder.ladder.sequence_layout import (
    Kind,
    Layout,
    LayoutRule,
    by_positions,
    by_window,
    of_sequence,
)

SEED = 1
FORWARD, BACKWARD = 4, 10  # FLOPs per pair, head and dimension
MEASURED = 3  # plannings, of which the fastest counts
RAMP_STEPS = 40


def random_documents(generator: np.random.Generator, seq_length: int, mean: int) -> np.ndarray:
    """Return ends of documents of log-normal length in a row, int32, ascending."""
    sigma = 1.2
    count = 8 * seq_length // mean + 64
    lengths = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).astype(np.int64) + 1
    ends = np.cumsum(lengths)
    return ends[ends < seq_length].astype(np.int32)


def offsets_of(window_len: int, options: argparse.Namespace) -> np.ndarray:
    """Return cu_seqlens of one step: all sequences that a group of ranks shares."""
    generator = np.random.default_rng(SEED)
    rows = []
    for _ in range(options.rows):
        ends = np.empty(0, np.int32)
        if options.document_length:
            ends = random_documents(generator, options.seq_length, options.document_length)
        cut = options.seq_length if options.skyladder_mask == "sliding" else window_len
        rows.append(fragment_cu_seqlens(ends, seq_length=options.seq_length, window_len=cut))
    return rows_cu_seqlens(rows)


def counted(kind: Kind, window_len: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what one way of sharing sequences out costs."""
    sliding = options.skyladder_mask == "sliding"
    cu_seqlens = offsets_of(window_len, options)
    size = options.context_parallel_size
    rule = LayoutRule(kind, options.seq_length, size, window_len, sliding)
    seconds = []
    for _ in range(MEASURED):
        for cached in (by_window, by_positions, of_sequence):
            cached.cache_clear()
        started = time.perf_counter()
        layouts = rule.layouts(options.rows, cu_seqlens)
        window = window_len if sliding else None
        exchange_plan(cu_seqlens, layouts, rank=0, sliding_window=window)
        seconds.append(time.perf_counter() - started)
    costs = rank_costs(cu_seqlens, layouts, sliding_window=window)
    return {
        "busiest_over_mean": costs.imbalance,
        "pairs_of_busiest": int(costs.pairs.max()),
        "pairs_of_mean": float(costs.pairs.mean()),
        "bytes": bytes_of(costs.received.mean(), OUR_PASSES, options),
        "bytes_of_busiest": bytes_of(costs.received.max(), OUR_PASSES, options),
        "waiting_share": float(costs.waiting_pairs.sum() / costs.pairs.sum()),
        "predicted_ms": predicted_ms(costs, layouts, options),
        "planning_ms": 1e3 * min(seconds),
    }


def bytes_of(num_tokens: float, passes: int, options: argparse.Namespace) -> float:
    """Return the bytes of keys and values that travel in so many passes."""
    groups, dim = options.num_query_groups, options.kv_channels
    size = key_value_bytes(float(num_tokens), num_groups=groups, head_dim=dim, num_bytes=2)
    return passes * size


def predicted_ms(
    costs: RankCosts, layouts: tuple[Layout, ...], options: argparse.Namespace
) -> float:
    """Return the model's time of one layer, see the module's text.

    Sequences run one after the other; the costs of all of them are spread over them evenly.
    """
    per_pair = options.num_attention_heads * options.kv_channels / (options.tflops * 1e12)
    slowest = max(costs.received.max(), costs.sent.max())
    travel = bytes_of(slowest, 1, options) / (options.gigabytes_per_second * 1e9)
    own = costs.pairs - costs.waiting_pairs
    total = 0.0
    for flops in (FORWARD, BACKWARD):
        ready, waits = (flops * per_pair * pairs for pairs in (own, costs.waiting_pairs))
        total += float((np.maximum(ready, travel) + waits).max())
    return 1e3 * total


def windows_to_show(options: argparse.Namespace) -> list[int]:
    """Return the given windows, a linear ramp, or powers of two and what lies between them."""
    length = options.seq_length
    if options.windows == "ramp":
        middles = (np.arange(RAMP_STEPS) + 0.5) / RAMP_STEPS
        return [int(32 + (length - 32) * share) // 128 * 128 for share in middles]
    if options.windows:
        return [int(word) for word in options.windows.split(",")]
    powers = [1 << k for k in range(5, length.bit_length())]
    between = [window // 2 * 3 - 1 for window in powers]
    windows = {w for w in [*powers, *between] if w <= length}
    return sorted(windows | {length})


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per window."""
    balanced = Kind.SEQUENCE if options.document_length else Kind.WINDOW
    everything = options.rows * gathered_tokens(options.context_parallel_size, options.seq_length)
    rows = []
    for window in windows_to_show(options):
        rows.append(
            {
                "seq_length": options.seq_length,
                "cp_size": options.context_parallel_size,
                "window": window,
                "document_length": options.document_length,
                "zigzag": counted(Kind.ZIGZAG, window, options),
                "balanced": counted(balanced, window, options),
                "pow2": counted(Kind.ZIGZAG, 1 << (window.bit_length() - 1), options),
                "all_gather_bytes": bytes_of(everything, ALL_GATHER_PASSES, options),
                "ring_bytes": bytes_of(everything, RING_PASSES, options),
            }
        )
    return rows


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean of each figure over the windows, balance by the work that they have."""
    found: dict[str, dict[str, float]] = {}
    for way in ("zigzag", "balanced", "pow2"):
        names = rows[0][way]
        found[way] = {name: float(np.mean([row[way][name] for row in rows])) for name in names}
        found[way]["busiest_over_mean"] = (
            found[way]["pairs_of_busiest"] / found[way]["pairs_of_mean"]
        )
        found[way]["worst_busiest_over_mean"] = max(row[way]["busiest_over_mean"] for row in rows)
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per window, and the means."""
    gather = rows[0]["all_gather_bytes"]
    ring = rows[0]["ring_bytes"]
    print(f"all-gather {gather / 1e6:,.1f} MB, ring {ring / 1e6:,.1f} MB, at every window")
    print(
        "          |---------- zigzag -----------|----------- balanced ----------|- pow2 zigzag -|"
    )
    print(
        "  window   balance of gather waits    ms  balance of gather waits   ms  plan ms  balance"
    )

    def line(head: str, row: dict[str, Any]) -> str:
        text = f"{head:>8} "
        for way in ("zigzag", "balanced"):
            each = row[way]
            text += (
                f"  {each['busiest_over_mean']:7.3f} {each['bytes'] / gather:9.2%} "
                f"{each['waiting_share']:5.0%} {each['predicted_ms']:7.2f}"
            )
        text += f" {row['balanced']['planning_ms']:7.2f} {row['pow2']['busiest_over_mean']:8.3f}"
        return text

    for row in rows:
        print(line(f"{row['window']:,}", row))
    print(line("mean", means(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=32768)
    parser.add_argument("--context-parallel-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="sequences per step and CP group")
    parser.add_argument("--num-attention-heads", type=int, default=32, help="on a TP rank")
    parser.add_argument("--num-query-groups", type=int, default=4, help="on a TP rank")
    parser.add_argument("--kv-channels", type=int, default=64)
    parser.add_argument(
        "--document-length", type=int, help="mask documents of this mean length (random)"
    )
    parser.add_argument("--skyladder-mask", choices=("local", "sliding"), default="local")
    parser.add_argument("--windows", help="such as 32,4096,6000; or ramp: 40 steps of a linear one")
    parser.add_argument("--tflops", type=float, default=450, help="of the attention kernel")
    parser.add_argument("--gigabytes-per-second", type=float, default=350, help="of the link")
    parser.add_argument("--json", action="store_true", help="all figures, one object")
    options = parser.parse_args()
    rows = rows_of(options)
    if options.json:
        print(json.dumps({"rows": rows, "means": means(rows)}, indent=1))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
