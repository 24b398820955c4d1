"""Attention's CPU time on each of several real ranks, zigzag and balanced.

    python benchmarks/context_parallel_ranks.py [--ranks 4] [--seq-length 4096] [--windows 1535,...]

Starts the ranks as gloo processes, runs SkyLadder's own core attention forward and backward under
each layout, and prints the processor time that each rank needed (`time.process_time`, which does
not count waiting). What counts is the busiest over the mean, beside the same counted in pairs of
queries and keys: a GPU would be as busy. The fastest of a few repeats.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

HEADS, HEAD_DIM, REPEATS = 4, 32, 5
KINDS = ("zigzag", "window")


def measure(options: argparse.Namespace) -> None:
    """As one rank: run all windows under both layouts; rank 0 prints."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_skyladder.attention.core_attention import SkyLadderAttention
    from megatron_skyladder.ladder import clock
    from megatron_skyladder.ladder.config import SkyLadderConfig
    from megatron_skyladder.ladder.exchange_costs import rank_costs
    from megatron_skyladder.ladder.fragments import fragment_cu_seqlens
    from megatron_skyladder.ladder.schedules import WindowSchedule
    from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    group, length = torch.distributed.group.WORLD, options.seq_length
    size = group.size()
    shape = length // size, 1, HEADS, HEAD_DIM
    if group.rank() == 0:
        print("  window  layout   CPU ms of each rank, and the busiest over the mean    in pairs")
    for window in map(int, options.windows.split(",")):
        config = SkyLadderConfig(
            schedule=WindowSchedule(schedule="constant", final_window=window),
            seq_length=length,
            step_samples=1,
            attention_backend="sdpa",
        )
        active = clock.install(config, lambda: 0)
        transformer = TransformerConfig(
            num_layers=1,
            hidden_size=HEADS * HEAD_DIM,
            num_attention_heads=HEADS,
            attention_dropout=0.0,
            context_parallel_size=size,
        )
        arguments = transformer, 1, AttnMaskType.causal, "self"
        attention = SkyLadderAttention(*arguments, pg_collection=SimpleNamespace(cp=group))
        for name in KINDS:
            active.layout_kind = Kind(name)
            qkv = [torch.randn(shape, requires_grad=True) for _ in range(3)]
            best = float("inf")
            for _ in range(REPEATS):
                torch.distributed.barrier()
                started = time.process_time()
                attention(*qkv, None).sum().backward()
                best = min(best, time.process_time() - started)
            times: list[float] = [0.0] * size
            torch.distributed.all_gather_object(times, 1e3 * best)
            layouts = LayoutRule(Kind(name), length, size, window, False).layouts(1)
            cut = fragment_cu_seqlens(
                torch.empty(0, dtype=torch.int32).numpy(), seq_length=length, window_len=window
            )
            if group.rank() == 0:
                of_ranks = "  ".join(f"{each:7.1f}" for each in times)
                busiest = max(times) * size / sum(times)
                counted = rank_costs(cut, layouts).imbalance
                shown = "balanced" if name == "window" else name
                print(f"{window:8,}  {shown:8} {of_ranks}    {busiest:6.2f} {counted:18.2f}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--windows", default="383,1535,3071,4096")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # in a started process
    options = parser.parse_args()
    if options.rank_of is not None:
        measure(options)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options.ranks}", __file__, "--rank-of=run"]
    command += [f"--seq-length={options.seq_length}", f"--windows={options.windows}"]
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
