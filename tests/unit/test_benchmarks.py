"""The benchmarks run to their end at a small size; what they measure is not judged here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_skyladder.testing import requires_megatron

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *flags):
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *flags],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


@requires_megatron
def test_overhead():
    small = ["--seq-length", "128", "--steps", "4", "--rows", "20", "--repeats", "1"]
    out = run("overhead.py", *small)
    for part in ("1. Full window of 128", "2. Against", "3. Data path", "4. Start-up: the probe"):
        assert part in out
    assert out.count(" x") >= 5  # ratios, side by side


@requires_megatron
def test_overhead_on_a_gpu_at_toy_size():
    """The same code as on a GPU; each run and each kernel beside stock."""
    out = run("overhead.py", "--device", "toy", "--seq-length", "128", "--rows", "20")
    assert "1. Megatron's trainer on CPU (toy)" in out
    assert re.search(r"stock +[0-9.]+ ms/step +peak +[0-9]+ MiB\n", out)
    assert re.search(r"window 8 +[0-9.]+ ms/step +[0-9.]+ x +peak +[0-9]+ MiB\n", out)
    # nothing here makes stock's own call, and documents have no FLOPs model
    assert re.search(r"sdpa +full +128 +1 +[0-9.]+ +1.00 x +- +1.00 x\n", out)
    assert re.search(r"sdpa +documents, window 8 +128 +1 +[0-9.]+ +[0-9.]+ x +- +-\n", out)
    assert re.search(r"4. Start-up: the probe took [0-9.]+ s, hooks [0-9.]+ s\n", out)
    assert "FAILED" not in out


@pytest.mark.parametrize("mask", ["local", "sliding"])
def test_key_exchange(mask):
    flags = ["--seq-length", "4096", "--document-length", "300", "--skyladder-mask", mask]
    out = run("context_parallel.py", *flags, "--windows", "32,1000,4096")
    assert "all-gather" in out and len(out.splitlines()) == 7


@requires_megatron
def test_ranks():
    out = run("context_parallel_ranks.py", "--ranks=2", "--seq-length=256", "--windows=100")
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [
        ["100", "zigzag"],
        ["100", "balanced"],
    ]


def test_key_exchange_as_json():
    """32K on 4 ranks, over a ramp: the figures that the documentation names."""
    found = json.loads(run("context_parallel.py", "--windows", "ramp", "--rows", "1", "--json"))
    assert len(found["rows"]) == 40
    balance = {way: each["busiest_over_mean"] for way, each in found["means"].items()}
    assert balance["zigzag"] == pytest.approx(1.373, abs=1e-3)
    assert balance["balanced"] == pytest.approx(1.007, abs=1e-3)
    assert found["means"]["balanced"]["worst_busiest_over_mean"] <= 1.05
    gather = found["rows"][0]["all_gather_bytes"]
    shares = [found["means"][way]["bytes"] / gather for way in ("zigzag", "balanced")]
    assert shares == pytest.approx([0.39, 0.48], abs=0.01)
    assert found["rows"][0].keys() >= {"seq_length", "cp_size", "window", "ring_bytes"}
