"""Fingerprints and windows of the first release, byte for byte.

Checkpoints carry the fingerprint, and a resume compares it with that of its own flags: a checkpoint
that was written before has to be resumed after. The texts and the digests come from the code of
November 2026, before schedules became classes (commit 79148c2); they are not to be made again from
the code under test.
"""

from __future__ import annotations

import argparse
import hashlib

import pytest

from megatron_skyladder.ladder.flags import add_arguments, config_from_args

# flags | what Megatron says, where it is not 1,000 steps of 128 samples of 2,048 tokens;
# fingerprint; sha256 of the windows of all steps, and of five more
FIRST_RELEASE = [
    (
        "--schedule linear",
        "linear 32 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "452914ea8ff9",
    ),
    (
        "--start-window 8",
        "linear 8 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "f8873a276d4c",
    ),
    (
        "--schedule constant",
        "constant 2048; step of 128 samples; local mask; documents not masked",
        "5806133a06a2",
    ),
    (
        "--schedule constant --final-window 512 --alpha 1",
        "constant 512; step of 128 samples; local mask; documents not masked",
        "4fb5dea46b71",
    ),
    (
        "--alpha 2.5",
        "linear 32 -> 2048, alpha 5/2; step of 128 samples; local mask; documents not masked",
        "9218b3db24d1",
    ),
    (
        "--alpha 17/8 --round-to 64",
        "linear 32 -> 2048, alpha 17/8, rounded to 64; step of 128 samples; local mask; "
        "documents not masked",
        "3e5dd7613a31",
    ),
    (
        "--alpha 1/8 --allow-unfinished",
        "linear 32 -> 2048, alpha 1/8; step of 128 samples; local mask; documents not masked",
        "d57624b8e0ae",
    ),
    (
        "--alpha 0.3 --allow-unfinished",
        "linear 32 -> 2048, alpha 3/10; step of 128 samples; local mask; documents not masked",
        "73db54b37c48",
    ),
    (
        "--alpha 1e-3 --allow-unfinished",
        "linear 32 -> 2048, alpha 1/1000; step of 128 samples; local mask; documents not masked",
        "d3cb8f064339",
    ),
    (
        "--alpha 4 --round-to 1",
        "linear 32 -> 2048, alpha 4; step of 128 samples; local mask; documents not masked",
        "0f6a158de40c",
    ),
    (
        "--expand-fraction 0.640001",
        "linear 32 -> 2048, fraction 0.640001 of 1000 steps; step of 128 samples; local "
        "mask; documents not masked",
        "1b67814f5c21",
    ),
    (
        "--expand-fraction 1/3",
        "linear 32 -> 2048, fraction 1/3 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "362132b56436",
    ),
    (
        "--expand-fraction 1",
        "linear 32 -> 2048, fraction 1.0 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "2d77281ceb8b",
    ),
    (
        "--expand-fraction 0.6 --round-to auto",
        "linear 32 -> 2048, fraction 0.6 of 1000 steps, rounded to 128; step of 128 samples; "
        "local mask; documents not masked",
        "a360d48ef87f",
    ),
    (
        "--schedule stepwise",
        "stepwise 32 -> 2048, fraction 0.64 of 1000 steps, rounded to 1024; step of 128 "
        "samples; local mask; documents not masked",
        "8ecabd80ee07",
    ),
    (
        "--schedule stepwise --round-to 256 --alpha 8",
        "stepwise 32 -> 2048, alpha 8, rounded to 256; step of 128 samples; local mask; "
        "documents not masked",
        "200c01802e99",
    ),
    (
        "--schedule sinusoidal --final-window 1024",
        "sinusoidal 32 -> 1024, fraction 0.64 of 1000 steps; step of 128 samples; local "
        "mask; documents not masked",
        "d39993791629",
    ),
    (
        "--schedule exponential --mask sliding",
        "exponential 32 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; sliding "
        "mask; documents not masked",
        "22efc2c0085a",
    ),
    (
        "--schedule reversed --intra-document",
        "reversed 32 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; local mask; "
        "documents masked",
        "e72bf33ed801",
    ),
    (
        "--schedule cyclic",
        "cyclic 32 -> 2048, fraction 0.64 of 1000 steps, 2 cycles; step of 128 samples; "
        "local mask; documents not masked",
        "6f4a052a98a9",
    ),
    (
        "--schedule cyclic --cycles 3 --alpha 32 --round-to 16",
        "cyclic 32 -> 2048, alpha 32, 3 cycles, rounded to 16; step of 128 samples; local "
        "mask; documents not masked",
        "81fabf25269e",
    ),
    (
        "--schedule cyclic-jump --cycles 1",
        "cyclic-jump 32 -> 2048, fraction 0.64 of 1000 steps, 1 cycles; step of 128 samples; "
        "local mask; documents not masked",
        "452914ea8ff9",
    ),
    (
        "--schedule staged --stages 128:0.5 final:0.5",
        "staged 128:0.5 2048:0.5 of 1000 steps; step of 128 samples; local mask; documents "
        "not masked",
        "749b54d69cb1",
    ),
    (
        "--schedule staged --stages 128:1/3 64:1/6 final:1/2 --begin-samples 12800",
        "staged 128:1/3 64:1/6 2048:0.5 of 900 steps; step of 128 samples; from sample "
        "12800; local mask; documents not masked",
        "317f432ccd3b",
    ),
    (
        "--preset recommended",
        "linear 8 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "f8873a276d4c",
    ),
    (
        "--preset shortformer",
        "staged 128:0.5 2048:0.5 of 1000 steps; step of 128 samples; local mask; documents "
        "not masked",
        "749b54d69cb1",
    ),
    (
        "--preset growlength --final-window 4096 | seq_length=4096",
        "staged 128:1/6 256:1/6 512:1/6 1024:1/6 2048:1/6 4096:1/6 of 1000 steps; step of "
        "128 samples; local mask; documents not masked",
        "fc19ad2b2f54",
    ),
    (
        "--preset late-switch-baseline | seq_length=32768",
        "staged 4096:0.97 32768:0.03 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "f84991a13fb2",
    ),
    (
        "--preset 1b-8k | seq_length=8192 train_iters=100000",
        "linear 32 -> 8192, alpha 1/8; step of 128 samples; local mask; documents not masked",
        "3d98e7a9be09",
    ),
    (
        "--preset 1b-32k --intra-document | seq_length=32768 train_iters=100000 "
        "global_batch_size=32",
        "linear 32 -> 32768, alpha 1/2; step of 32 samples; local mask; documents masked",
        "e36f4f7bea3e",
    ),
    (
        "--preset 120m-8k --start-window 8 | seq_length=8192 train_iters=100000",
        "linear 8 -> 8192, alpha 1/8; step of 128 samples; local mask; documents not masked",
        "e4423e09a053",
    ),
    (
        "--alpha 4 --begin-samples 1280 --mask sliding --intra-document",
        "linear 32 -> 2048, alpha 4; step of 128 samples; from sample 1280; sliding mask; "
        "documents masked",
        "2eeddbdc995b",
    ),
    (
        "--expand-fraction 0.5 | train_iters=None train_samples=100001",
        "linear 32 -> 2048, fraction 0.5 of 781 steps; step of 128 samples; local mask; "
        "documents not masked",
        "dbcb027fb7a7",
    ),
    (
        "--alpha 0.5 | train_iters=None",
        "linear 32 -> 2048, alpha 1/2; step of 128 samples; local mask; documents not masked",
        "02c3068d0bfe",
    ),
    (
        "--expand-fraction 0.5 | train_iters=None",
        "linear 32 -> 2048, fraction 0.5 of 1 steps; step of 128 samples; local mask; "
        "documents not masked",
        "a9129994d31b",
    ),
    (
        "--preset recommended --schedule cyclic",
        "cyclic 8 -> 2048, fraction 0.64 of 1000 steps, 2 cycles; step of 128 samples; local "
        "mask; documents not masked",
        "7c9d17254664",
    ),
    (
        "--no-probe --attention-backend sdpa",
        "linear 32 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked",
        "452914ea8ff9",
    ),
]


@pytest.mark.parametrize(("flags", "fingerprint", "windows"), FIRST_RELEASE)
def test_a_checkpoint_of_the_first_release_is_resumed(
    flags: str, fingerprint: str, windows: str
) -> None:
    words, _, changes = flags.replace("--", "--skyladder-").partition("|")
    megatron = {"seq_length": 2048, "global_batch_size": 128, "train_samples": None}
    megatron |= {"train_iters": 1000}
    for change in changes.split():
        name, value = change.split("=")
        megatron[name] = None if value == "None" else int(value)
    args = add_arguments(argparse.ArgumentParser()).parse_args(words.split())
    vars(args).update(megatron)
    config = config_from_args(args)
    assert config and config.fingerprint == fingerprint
    steps = min((config.schedule.total_steps or 3000) + 5, 120_000)
    text = " ".join(map(str, config.schedule.windows(0, steps).tolist()))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == windows
