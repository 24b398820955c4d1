"""A study of seconds, whose text is in a package that is on the disk already."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

STUDY = """
[study]
records = {folder}/docs/records
page = {folder}/docs/experiments.md

[corpus]
packages =
    pypi words 1.0 *.txt
validation-share = 0.3
vocab-size = 300

[training]
flags =
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
    --normalization RMSNorm --swiglu --disable-bias-linear --bf16
    --untie-embeddings-and-output-weights --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 4
    --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 4 --train-iters 60
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 2
    --eval-interval 20 --eval-iters 4 --skyladder-eval-lengths 16
    --save-interval 8 --log-interval 1 --num-workers 0

[timing]
time = --skyladder-start-window 8 --skyladder-expand-fraction 0.5 --train-iters 20

[arms]
ladder = --skyladder-start-window 8 --skyladder-expand-fraction 0.5
twin = --skyladder-start-window 8 --skyladder-expand-fraction 0.5
broken = --skyladder-start-window 128

[queue]
runs = {runs}

[copying]
distances = 16 32
span = 8
samples = 4
"""
RUNS = "ladder:1 broken:1 twin:1 time:1"


def write_study(folder: Path, runs: str = RUNS) -> Path:
    """Write the study's file and, below ``folder/study``, the package; return the file."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(40)]
    package = folder / "study/corpus/packages/pypi-words-1.0"
    package.mkdir(parents=True)
    with zipfile.ZipFile(package / "words-1.0-py3-none-any.whl", "w") as wheel:
        for number in range(60):
            wheel.writestr(f"words/{number}.txt", " ".join(chance.choices(words, k=120)) + "\n")
    path = folder / "study.ini"
    path.write_text(STUDY.format(folder=folder, runs=runs), encoding="utf-8")
    return path
