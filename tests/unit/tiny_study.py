"""A study of seconds, whose text is in packages that are on the disk already."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

STUDY = """
[study]
records = {folder}/records
page = {folder}/experiments.md

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
    --micro-batch-size 2 --global-batch-size 4 --train-iters 12
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 2
    --eval-interval 6 --eval-iters 4 --skyladder-eval-lengths 16
    --save-interval 4 --log-interval 1 --num-workers 0

[arms]
constant = --skyladder-schedule constant
broken = --skyladder-start-window 128
ladder = --skyladder-start-window 8 --skyladder-expand-fraction 0.5

[queue]
runs = constant:1 broken:1 ladder:1

[copying]
distances = 16 32
span = 8
samples = 4
"""


def write_study(folder: Path) -> Path:
    """Write the study's file and, below ``folder/study``, the package; return the file."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(40)]
    package = folder / "study/corpus/packages/pypi-words-1.0"
    package.mkdir(parents=True)
    with zipfile.ZipFile(package / "words-1.0-py3-none-any.whl", "w") as wheel:
        for number in range(60):
            wheel.writestr(f"words/{number}.txt", " ".join(chance.choices(words, k=120)) + "\n")
        wheel.writestr("words/again.txt", wheel.read("words/7.txt") if False else "")
    path = folder / "study.ini"
    path.write_text(STUDY.format(folder=folder))
    return path
