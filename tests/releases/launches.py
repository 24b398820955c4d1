"""Launch training on the CPU engine with a Megatron of choice, and read what it logged.

A Megatron is a folder that comes first on the path: a checkout, or a wheel unpacked by
``pip install --no-deps --target FOLDER``. Both hide the one that is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_skyladder.data.indexed import IndexedWriter
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.report import runlog

ENTRY_POINT = "megatron_skyladder.pretrain_gpt"
REPOSITORY = Path(__file__).parents[2]
EOD = 127  # ends each document of the data below
SMALL_MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 2 --global-batch-size 8 --train-iters 6 --lr 1e-3
    --lr-decay-style constant --tokenizer-type NullTokenizer --init-method-std 0.1 --split 8,1,1
    --num-workers 0 --log-interval 1 --eval-interval 5 --eval-iters 1 --seed 1
"""
LADDER = ["--skyladder-start-window", "8"]
DOCUMENTS_MASKED = [*LADDER, "--skyladder-intra-document"]


def folder_named_by(variable: str) -> Path | None:
    """Return the folder a variable names, or None where it names none."""
    value = os.environ.get(variable)
    return Path(value).resolve() if value else None


def require(variable: str, name: str, how: str) -> Path:
    """Return a Megatron's folder, or skip the test and say why."""
    parent = folder_named_by(variable)
    if parent is None:
        pytest.skip(f"{variable} names no folder; {how}")
    if releases.megatron_in(parent / name) is None:
        pytest.skip(f"there is no Megatron in {parent / name}; {how}")
    return parent / name


def copy_checkout(source: Path, target: Path) -> Path:
    """Copy a Megatron-LM checkout and build its dataset helpers for this Python.

    Megatron builds them by itself, for the python3 and the python3-config that are first on the
    path; those are not always this one's.
    """
    pybind11 = pytest.importorskip("pybind11", reason="Megatron builds its helpers with pybind11")
    ignored = shutil.ignore_patterns(".git", "__pycache__", "functional_tests", "docs", "examples")
    shutil.copytree(source, target, ignore=ignored, symlinks=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    datasets = target / "megatron" / "core" / "datasets"
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    subprocess.run(
        ["make", "-C", str(datasets), f"LIBEXT={suffix}", f"CPPFLAGS={includes}"],
        check=True,
        capture_output=True,
    )
    return target


@dataclass
class Data:
    """Documents of 2 to 40 tokens, and where Megatron may keep its index of them."""

    folder: Path

    def __post_init__(self) -> None:
        self.prefix = self.folder / "documents"
        generator = np.random.default_rng(0)
        with IndexedWriter(self.prefix, np.dtype(np.uint16)) as writer:
            for length in generator.integers(2, 40, 400):
                first, step = generator.integers(0, 60, 2)
                tokens = (first + step * np.arange(length)) % EOD
                writer.add_document(np.append(tokens, EOD).astype(np.uint16))

    def flags(self, megatron: Path | None) -> list[str]:
        """Return the flags that name the data, and make ``EOD`` what the tokenizer says it is."""
        line = (releases.megatron_in(megatron) if megatron else releases.installed()).line
        # the NullTokenizer's end of document: the vocabulary's last, up to 0.17 the one after it
        vocab_size = EOD + (tuple(map(int, line.split("."))) >= (0, 18))
        cache = self.folder / f"cache-{line}"
        return (
            f"--data-path {self.prefix} --data-cache-path {cache} --vocab-size {vocab_size}".split()
        )


def launch(
    data: Data,
    *flags: str,
    megatron: Path | None = None,
    script: Path | None = None,
    num_processes: int = 1,
    environment: dict[str, str] | None = None,
    fails: bool = False,
    stop_time: bool = False,
) -> tuple[runlog.RunLog, str]:
    """Train and return the log, parsed and whole.

    Args:
        data: what to train on.
        flags: added to those of the small model.
        megatron: the folder that comes first on the path; None: the Megatron that is installed.
        script: a checkout's own script instead of our entry point.
        num_processes: ranks.
        environment: added variables.
        fails: whether the run is to end with an error, rather than well.
        stop_time: let time stand still, for `every_figure`.
    """
    entry = ["-m", ENTRY_POINT]
    if script is not None:
        entry = ["-m", "megatron_skyladder.cpu", str(script)]
    if stop_time:
        stopped_clock = Path(__file__).with_name("stopped_clock.py")
        entry = ["-m", "megatron_skyladder.cpu", str(stopped_clock), str(script or ENTRY_POINT)]
    path = [str(folder) for folder in (megatron, REPOSITORY) if folder]
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=data.folder))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--log-dir", str(logs), "--redirects", "3"),  # or the ranks' lines run together
            *("--nproc-per-node", str(num_processes), *entry),
            *(*SMALL_MODEL.split(), *data.flags(megatron), *flags),
        ],
        cwd=data.folder,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(path),
            "SKYLADDER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,  # a minute, on a machine with nothing else to do
    )
    files = [path for rank in range(num_processes) for path in logs.rglob(f"{rank}/std*.log")]
    text = "".join(path.read_text(errors="replace") for path in files) + result.stdout
    assert (result.returncode != 0) == fails, "\n".join(text.splitlines()[-60:])
    return runlog.parse(text), text


def figures(log: runlog.RunLog) -> list[tuple[float | None, ...]]:
    """Return loss, gradient norm and window of every iteration, and the validation losses."""
    trained = [(entry.loss, entry.values["grad norm"], entry.window) for entry in log.iterations]
    assert len(trained) >= 5, "the log has too few iterations"
    return trained + [(validation.loss,) for validation in log.validations]


def every_figure(log: runlog.RunLog) -> list[dict[str, float]]:
    """Return all numbers of all lines; of a run for which time stood still."""
    assert len(log.iterations) >= 5, "the log has too few iterations"
    return [entry.values for entry in (*log.iterations, *log.validations)]
