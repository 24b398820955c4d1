"""What SkyLadder costs and saves on this machine, side by side in one run (``make bench``).

    python benchmarks/overhead.py [--seq-length 2048] [--steps 12] [--device cpu|cuda|toy]

1. Step time at the full window against stock Megatron with the same kernel (SDPA in the place of
   its local attention), and peak memory.
2. Step time and attention time against the window, beside what the FLOPs model says.
3. Sequences per second through the data loader: Megatron's dataset, with our document mask made
   of each sequence in the trainer's process, and Megatron's own inter-document masking.
4. Start-up: hooks and probe.

Ratios count, not seconds: run it on a quiet machine. What is compared with stock runs in pairs, now
one first and now the other; medians are taken, and the range of the pairs tells the noise.

Where there is a GPU, parts 1 and 2 are `skyladder check-gpu`'s: the paper's 1B model at 8K, stock
and with windows, and every installed kernel against the window. ``--device toy`` runs the same code
on the CPU at toy size.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, HEADS, GROUPS = 4, 256, 4, 2
VOCAB_SIZE = 2048
NUM_WORKERS = 2  # of the data loader: Megatron's default
INSTALL_HOOKS = """
from megatron_skyladder.cpu import engine as cpu_engine
cpu_engine.install()
import time, types, megatron.training.training, megatron.training.checkpointing
started = time.perf_counter()
from megatron_skyladder.megatron_lm import hooks
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
config = SkyLadderConfig(WindowSchedule("constant"), seq_length=8192, step_samples=1)
hooks.install(config, types.SimpleNamespace(attention_dropout=0.0))
print(time.perf_counter() - started)
"""
_STEP = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_PROBE = re.compile(r"mask probe passed in ([0-9.]+) s")


def training_flags(seq_length: int, steps: int, extra: list[str]) -> list[str]:
    """Return Megatron's flags for a small Llama-style model on mock data."""
    return (
        f"""
        --num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS}
        --group-query-attention --num-query-groups {GROUPS} --normalization RMSNorm --swiglu
        --disable-bias-linear --untie-embeddings-and-output-weights
        --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
        --seq-length {seq_length} --max-position-embeddings {seq_length}
        --micro-batch-size 1 --global-batch-size 1 --train-iters {steps} --lr 1e-4
        --lr-decay-style constant --mock-data --tokenizer-type NullTokenizer
        --vocab-size {VOCAB_SIZE - 1} --log-interval 1 --eval-iters 0
        --eval-interval 1000 --num-workers 1
    """.split()
        + extra
    )


def train(flags: list[str], same_kernel: bool, report: str) -> None:
    """Run one training in this process (a rank of the pool) and note its peak memory.

    Args:
        flags: the command line.
        same_kernel: give stock Megatron's local attention SDPA's causal kernel.
        report: the file that gets the peak resident memory in MiB.
    """
    from megatron_skyladder import pretrain_gpt

    if same_kernel:
        _give_stock_attention_the_same_kernel()
    sys.argv = ["pretrain_gpt", *flags]
    pretrain_gpt.main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(report).write_text(f"{peak:.0f}\n")


def _give_stock_attention_the_same_kernel() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from torch.nn.functional import scaled_dot_product_attention

    def forward(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    DotProductAttention.forward = forward


def measure_run(pool: Any, folder: Path, flags: list[str], same_kernel: bool) -> dict[str, float]:
    """Return the median step time in ms (first steps left out), peak MiB and probe seconds."""
    report = folder / "peak"
    pool.run(
        "overhead:train",
        num_processes=1,
        folder=folder,
        arguments={"flags": flags, "same_kernel": same_kernel, "report": str(report)},
        environment={"OMP_NUM_THREADS": str(os.cpu_count())},
        timeout_seconds=1200,
    )
    log = (folder / "log.0.txt").read_text(errors="replace")
    steps = [float(ms) for ms in _STEP.findall(log)][3:]
    probe = _PROBE.search(log)
    return {
        "ms": statistics.median(steps),
        "peak": float(report.read_text()),
        "probe": float(probe[1]) if probe else 0.0,
    }


def bench_steps(seq_length: int, steps: int, repeats: int) -> None:
    """Print parts 1, 2 and 4."""
    from megatron_skyladder.ladder.fragments import window_pairs
    from megatron_skyladder.testing import ProcessPool

    windows = [seq_length // share for share in (64, 16, 4, 2)]
    with ProcessPool() as pool, tempfile.TemporaryDirectory() as scratch:

        def run(name: str, extra: list[str], same_kernel: bool = False) -> dict[str, float]:
            flags = training_flags(seq_length, steps, extra)
            return measure_run(pool, Path(scratch) / name, flags, same_kernel)

        full = ["--skyladder-schedule", "constant"]
        runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for i in range(repeats):
            for is_stock in (True, False) if i % 2 else (False, True):
                extra = [] if is_stock else full
                runs[is_stock].append(run(f"{is_stock}{i}", extra, same_kernel=is_stock))
        stock, ours = (
            {key: statistics.median(run[key] for run in runs[is_stock]) for key in runs[True][0]}
            for is_stock in (True, False)
        )
        ratios = sorted(b["ms"] / a["ms"] for a, b in zip(runs[True], runs[False], strict=True))
        print(f"\n1. Full window of {seq_length} tokens, the same kernel (goal: at most 1.02x)")
        print(f"   stock Megatron   {stock['ms']:8.1f} ms/step   peak {stock['peak']:6.0f} MiB")
        print(f"   SkyLadder        {ours['ms']:8.1f} ms/step   peak {ours['peak']:6.0f} MiB")
        print(
            f"   ratio            {statistics.median(ratios):8.3f} x         "
            f"peak {ours['peak'] / stock['peak']:6.3f} x   "
            f"(pairs of runs: {ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
        print("\n2. Against the window         step   ratio   attention   ratio   FLOPs model")
        attentions = {window: attention_ms(window, seq_length) for window in [*windows, seq_length]}
        for window, attention in attentions.items():
            step = ours["ms"]
            if window < seq_length:
                step = run(f"w{window}", [*full, "--skyladder-final-window", str(window)])["ms"]
            model = window_pairs(window, seq_length) / window_pairs(seq_length, seq_length)
            print(
                f"   window {window:6d}      {step:9.1f} ms  {step / ours['ms']:5.2f}  "
                f"{attention:7.1f} ms  {attention / attentions[seq_length]:5.2f}   {model:6.2f}"
            )
        print(f"\n4. Start-up: the probe took {ours['probe']:.1f} s, hooks {hooks_seconds():.3f} s")


def bench_gpu(*, toy: bool) -> list[str]:
    """Print parts 1, 2 and 4 on a GPU, or at toy size on the CPU; return what went wrong."""
    from megatron_skyladder.gpu_check import costs, training
    from megatron_skyladder.gpu_check.bench import Bench

    bench = Bench(toy=toy)
    with tempfile.TemporaryDirectory() as scratch:
        trained = training.megatron(bench, Path(scratch), seconds=float("inf"))
    print(f"\n1. Megatron's trainer on {bench.name}, a run of each (goal: at most 1.02x)")
    for name, figures in trained.figures.items():
        ratio = f"   {figures['times stock']:6.3f} x" if "times stock" in figures else ""
        peak = f"   peak {figures['peak MiB']:8.0f} MiB" if "peak MiB" in figures else ""
        print(f"   {name:16s} {figures['ms']:8.1f} ms/step{ratio or ' ' * 11}{peak}")
    timed = costs.timings(bench)
    print(
        "\n2. One layer's attention, forward and backward, L2 flushed\n"
        "   backend   mask                        length   sequences        ms   "
        "of full   of stock   FLOPs model"
    )
    for row in timed.figures["rows"]:
        of_stock = f"{row['ms'] / row['stock_ms']:6.2f} x" if "stock_ms" in row else f"{'-':>8s}"
        pairs = row.get("percent_of_pairs")
        model = f"{'-':>11s}" if pairs is None else f"{pairs / 100:9.2f} x"
        print(
            f"   {row['backend']:9s} {row['mask']:26s} {row['seq_length']:7d} "
            f"{row['micro_batch']:11d} {row['ms']:9.2f}   {row['percent_of_full'] / 100:5.2f} x   "
            f"{of_stock}   {model}"
        )
    probes = [it["probe s"] for it in trained.figures.values() if "probe s" in it]
    longest = f"the probe took {max(probes):.1f} s, " if probes else ""
    print(f"\n4. Start-up: {longest}hooks {hooks_seconds():.3f} s")
    return trained.failures + timed.failures


def attention_ms(window: int, seq_length: int) -> float:
    """Return the median time of one layer's attention on one core, forward and backward."""
    import torch

    from megatron_skyladder.attention import sdpa

    torch.set_num_threads(1)
    head_dim = HIDDEN // HEADS
    query = torch.randn(seq_length, 1, HEADS, head_dim, requires_grad=True)
    key, value = (torch.randn(seq_length, 1, GROUPS, head_dim, requires_grad=True) for _ in "kv")
    times = []
    for _ in range(7):
        started = time.process_time()
        sdpa.attend_grid(query, key, value, window, head_dim**-0.5).sum().backward()
        times.append(time.process_time() - started)
    return 1e3 * statistics.median(times[1:])


def hooks_seconds() -> float:
    """Return how long a fresh process takes to import and install the hooks, Megatron imported."""
    environment = {**os.environ, "SKYLADDER_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", INSTALL_HOOKS], env=environment, stdout=subprocess.PIPE, check=True
    )
    return float(result.stdout.split()[-1])


def bench_data(seq_length: int, num_rows: int, repeats: int) -> None:
    """Print part 3."""
    from megatron_skyladder.data.indexed import IndexedWriter
    from megatron_skyladder.ladder import fragments

    generator = np.random.default_rng(0)
    eod = VOCAB_SIZE - 1
    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(scratch) / "documents"
        with IndexedWriter(prefix, np.dtype("<u2")) as writer:
            tokens = 0
            while tokens < num_rows * seq_length * 1.1:
                length = max(2, int(generator.lognormal(5.5, 1.2)))
                document = generator.integers(0, eod, length)
                document[-1] = eod
                writer.add_document(document)
                tokens += length
        plain = _dataset(prefix, seq_length, num_rows, eod, inter_document_masking=False)
        packed = _dataset(prefix, seq_length, num_rows, eod, inter_document_masking=True)

        def mask(batch: dict[str, Any]) -> None:
            ends = fragments.document_ends(batch["tokens"].numpy()[0], eod)
            fragments.fragment_cu_seqlens(
                ends, seq_length=seq_length, window_len=max(1, seq_length // 8)
            )

        def nothing(batch: dict[str, Any]) -> None: ...

        readers = {
            "Megatron's GPTDataset": (plain, nothing),
            "with our document mask": (plain, mask),
            "Megatron's inter-document masking": (packed, nothing),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, (dataset, use) in readers.items():
                rates[name].append(_rows_per_second(dataset, num_rows, use))
    print(f"\n3. Data path: sequences per second from {NUM_WORKERS} workers (goal: at least 0.95x)")
    base = statistics.median(rates["Megatron's GPTDataset"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"   {name:36s} {rate:9.0f}   {rate / base:6.3f} x")


def _rows_per_second(dataset: Any, num_rows: int, use: Callable[[dict[str, Any]], None]) -> float:
    """Read sequences as Megatron's trainer does, and do something with each."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
    from torch.utils.data import DataLoader

    sampler = MegatronPretrainingSampler(num_rows, 0, 1, 0, 1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=NUM_WORKERS)
    rows = iter(loader)
    use(next(rows))  # the workers have started
    started = time.perf_counter()
    for batch in rows:
        use(batch)
    return (num_rows - 1) / (time.perf_counter() - started)


def _dataset(
    prefix: Path, seq_length: int, num_rows: int, eod: int, inter_document_masking: bool
) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=eod
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=inter_document_masking,
    )
    documents = IndexedDataset(str(prefix))
    indices = np.arange(documents.document_indices.shape[0] - 1, dtype=np.int32)
    return GPTDataset(documents, str(prefix), indices, num_rows, Split.train, config)


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12, help="per run; the first 3 do not count")
    parser.add_argument("--rows", type=int, default=500, help="read from the datasets")
    parser.add_argument("--repeats", type=int, default=7, help="of what is compared with stock")
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "toy"), help="default: cuda where there is one"
    )
    args = parser.parse_args()
    if args.steps < 4:
        parser.error(f"--steps={args.steps}: the first 3 do not count, so give at least 4.")
    device = args.device or ("cuda" if _sees_a_gpu() else "cpu")
    if device == "cpu":
        os.environ |= {"SKYLADDER_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    elif device == "toy":
        from megatron_skyladder.cpu import engine as cpu_engine

        cpu_engine.install()
    bench_data(args.seq_length, args.rows, args.repeats)
    if device == "cpu":
        bench_steps(args.seq_length, args.steps, args.repeats)
        return
    failures = bench_gpu(toy=device == "toy")
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(1 if failures else 0)


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
