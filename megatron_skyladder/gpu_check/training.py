"""Phases that train: Megatron's own trainer, stock and with windows, and what is on beside them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.gpu_check.bench import Bench
from megatron_skyladder.gpu_check.kernels import Result
from megatron_skyladder.ladder.presets import PAPER_RUNS, ModelShape

_STEP = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_LOSS = re.compile(r"lm loss: ([0-9.E+naif-]+)")
_PEAK = re.compile(r"max allocated: ([0-9.]+)")  # MiB, as Megatron reports it after two steps
_PASSED = re.compile(r"mask probe passed in ([0-9.]+) s")
_LEFT_OUT = 3  # first steps, which compile and allocate
_SLOWER_THAN_STOCK = 1.03
_TOY_MODEL = ModelShape(2, 32, 64, 4, 2, vocab_size=128)
LIMIT_SECONDS = 540  # of a phase in one call of check-gpu, and of one training
_TOOK_TOO_LONG = 124  # exit code, as timeout has it
_ENDING_SECONDS = 10
# Without torchrun, whose workers are in sessions of their own: killing it leaves them on the GPU.
_ALONE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},  # of one process: any free port
}


class TimeIsOverError(Exception):
    """A phase has trained for as long as it may; the next call goes on with what is left."""


def flags(bench: Bench) -> list[str]:
    """Return Megatron's flags of the model that is trained: the paper's 1B at 8K, or a toy."""
    run = PAPER_RUNS["1b-8k"]
    model = _TOY_MODEL if bench.toy else run.model
    length = 64 if bench.toy else run.seq_length
    steps = 5 if bench.toy else 15
    words = f"""
        --num-layers {model.num_layers} --hidden-size {model.hidden_size}
        --ffn-hidden-size {model.ffn_hidden_size}
        --num-attention-heads {model.num_attention_heads}
        --group-query-attention --num-query-groups {model.num_query_groups}
        --normalization RMSNorm --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --position-embedding-type rope
        --attention-dropout 0 --hidden-dropout 0
        --seq-length {length} --max-position-embeddings {length}
        --micro-batch-size 1 --global-batch-size 1 --train-iters {steps} --lr 1e-4
        --lr-decay-style constant --mock-data --tokenizer-type NullTokenizer
        --vocab-size {model.vocab_size - 1} --log-interval 1 --eval-iters 0 --eval-interval 1000
        --num-workers 1 --seed 1
    """.split()
    if not bench.toy:
        words += ["--bf16"]
        if importlib.util.find_spec("transformer_engine") is None:
            words += ["--transformer-impl", "local", "--no-persist-layer-norm"]
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
            words.append("--no-gradient-accumulation-fusion")
    return words


def megatron(bench: Bench, folder: Path, seconds: float | None = None) -> Result:
    """The 1B model at 8K for 15 steps: stock, SkyLadder at several windows, with documents.

    Args:
        bench: where.
        folder: for logs; what was trained there is not trained again.
        seconds: for all together; None: `LIMIT_SECONDS`.

    Raises:
        TimeIsOverError: they were not enough.
    """
    length = 64 if bench.toy else PAPER_RUNS["1b-8k"].seq_length
    windows = [8, length] if bench.toy else [32, 128, 512, 2048, length]
    runs = {"stock": ""}
    runs |= {f"window {window}": _constant(window) for window in windows}
    runs["documents"] = f"{_constant(length)} --skyladder-intra-document"
    result = _train_all(bench, folder, runs, seconds)
    stock = result.figures.get("stock")
    for name, figures in result.figures.items():
        if not stock or name == "stock":
            continue
        figures["times stock"] = figures["ms"] / stock["ms"]
        if bench.sizes.judged and figures["times stock"] > _SLOWER_THAN_STOCK:
            result.failures.append(f"{name}: {figures['times stock']:.2f} times stock's step time")
    full = result.figures.get(f"window {length}")
    if stock and full and abs(full["loss"] - stock["loss"]) > 2e-2:
        result.failures.append(
            f"the full window ends at loss {full['loss']}, stock at {stock['loss']}"
        )
    return result


def smokes(bench: Bench, folder: Path) -> Result:
    """What is on beside windows in real runs: recompute, experts, FP8 linear layers."""
    window = _constant(8 if bench.toy else 512)
    runs = {
        "recomputed attention": f"{window} --recompute-granularity selective",
        "experts": f"{window} --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type "
        "alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
        f"--moe-ffn-hidden-size {64 if bench.toy else 1024}",
        "deterministic": f"{window} --deterministic-mode",
    }
    fp8 = bench.capability >= (8, 9) and importlib.util.find_spec("transformer_engine")
    if fp8:
        runs["FP8 linear layers"] = f"{window} --fp8-format hybrid"
    result = _train_all(bench, folder, runs)
    if not fp8:
        result.figures["FP8 linear layers"] = "left out: needs Transformer Engine and 8.9 or later"
    return result


def _constant(window: int) -> str:
    return f"--skyladder-schedule constant --skyladder-final-window {window}"


def _train_all(
    bench: Bench, folder: Path, runs: dict[str, str], seconds: float | None = None
) -> Result:
    result = Result()
    deadline, trained = time.monotonic() + (seconds or LIMIT_SECONDS), 0
    for name, extra in runs.items():
        log = folder / f"{name.replace(' ', '-')}.log"
        ended = log.with_suffix(".exit")
        if not ended.exists():
            left = min(deadline - time.monotonic(), LIMIT_SECONDS)
            words = [*flags(bench), *extra.split()]
            code = _train(bench, words, log, left) if left > 0 else _TOOK_TOO_LONG
            if code == _TOOK_TOO_LONG and trained:  # the time that was left, not its own
                raise TimeIsOverError(
                    f"{LIMIT_SECONDS // 60} minutes are over, and {name} is not trained; what was "
                    "trained is kept: give the command again"
                )
            trained += 1
            ended.write_text(f"{code}\n", encoding="utf-8")
        code = int(ended.read_text(encoding="utf-8"))
        text = log.read_text(encoding="utf-8", errors="replace")
        steps = [float(ms) for ms in _STEP.findall(text)][_LEFT_OUT:]
        if code or not steps:
            end = " / ".join(text.strip().splitlines()[-3:])
            result.failures.append(f"{name}: training ended with {code}; {log} ends: {end[:400]}")
            continue
        losses = _LOSS.findall(text)
        figures: dict[str, Any] = {"ms": statistics.median(steps), "loss": float(losses[-1])}
        peaks, probes = _PEAK.findall(text), _PASSED.findall(text)
        figures |= {"peak MiB": float(peaks[-1])} if peaks else {}
        figures |= {"probe s": float(probes[-1])} if probes else {}
        result.figures[name] = figures
        if not figures["loss"] < float("inf"):
            result.failures.append(f"{name}: the loss is {figures['loss']}")
        if extra and not probes:
            result.failures.append(f"{name}: no word of the mask probe in {log}")
    return result


def _train(bench: Bench, words: list[str], log: Path, seconds: float) -> int:
    """Train in a process of its own and return its exit code; 124 where it took too long."""
    environment = {**os.environ, **_ALONE, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if "--deterministic-mode" in words:
        environment |= {
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NCCL_ALGO": "Ring",
        }
    if bench.toy:
        environment |= {cpu_engine.DEVICE_VARIABLE: "cpu", "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_skyladder.pretrain_gpt", *words]
    return call(command, environment, log, seconds)


def call(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int:
    """Run a command into a log and return its exit code; 124 where it took too long.

    Nothing that it started is left when this returns, or raises.
    """
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return _TOOK_TOO_LONG
        finally:  # on Ctrl-C too, which does not reach another session
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, and wait until they have left the GPU to the next run."""
    deadline = time.monotonic() + _ENDING_SECONDS
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.05)
