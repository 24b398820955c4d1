"""The demo's two runs: the same model, weights, data and kernel; only the window differs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.ladder.costs import DecoderShape
from megatron_skyladder.ladder.schedules import WindowSchedule

NUM_RANKS = 2
BATCH_SAMPLES = 2
START_WINDOW, EXPAND_FRACTION = 8, "0.64"  # the paper's recommendation
RATE = 2e-3  # the best of 5e-4, 1e-3, 2e-3 and 3e-3 for the constant window: docs/results.md
SEQ_LENGTH = 2048
VOCAB_SIZE = 2048
EVAL_LENGTHS = (128, 512, 1024, 2048)

# A Llama-style decoder, small enough for minutes on two cores.
SHAPE = DecoderShape(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=352,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=VOCAB_SIZE,
)
MODEL = f"""
--num-layers {SHAPE.num_layers} --hidden-size {SHAPE.hidden_size}
--ffn-hidden-size {SHAPE.ffn_hidden_size} --num-attention-heads {SHAPE.num_attention_heads}
--group-query-attention --num-query-groups {SHAPE.num_query_groups}
--normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 128
"""

TRAINING = """
--micro-batch-size 1 --lr {rate} --min-lr {min_rate} --lr-decay-style cosine
--weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --seed 3407 --eval-iters 17 --log-interval 1
--num-workers 1 --split 98,2,0 --no-save-optim --no-save-rng
"""

SCHEDULES = {
    "constant": "--skyladder-schedule constant",
    "skyladder": f"--skyladder-start-window {START_WINDOW} "
    f"--skyladder-expand-fraction {EXPAND_FRACTION}",
}

_ITERATION = re.compile(r" iteration +(\d+)/ +(\d+) .*?lm loss: ([0-9.E+-]+)")


def schedule(train_iters: int) -> WindowSchedule:
    """Return the ladder of the SkyLadder run."""
    return WindowSchedule(
        start_window=START_WINDOW,
        final_window=SEQ_LENGTH,
        expand_fraction=EXPAND_FRACTION,
        total_steps=train_iters,
    )


@dataclass(frozen=True)
class Run:
    """One training run of the demo; its learning rate decays to a tenth."""

    name: str
    folder: Path
    train_iters: int
    rate: float = RATE

    @property
    def log(self) -> Path:
        """Where its console output goes."""
        return self.folder / "train.log"

    @property
    def checkpoints(self) -> Path:
        """Megatron's --save: the last step's weights."""
        return self.folder / "checkpoints"

    def flags(self, data_prefix: Path, tokenizer: Path) -> list[str]:
        """Return Megatron's flags and ours."""
        eval_interval = max(1, self.train_iters // 4)
        return [
            *MODEL.split(),
            *TRAINING.format(rate=self.rate, min_rate=self.rate / 10).split(),
            *SCHEDULES[self.name].split(),
            *f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH}".split(),
            *f"--global-batch-size {BATCH_SAMPLES}".split(),
            *f"--train-iters {self.train_iters} --eval-interval {eval_interval}".split(),
            *f"--lr-warmup-iters {self.train_iters // 20}".split(),
            *("--save", str(self.checkpoints), "--save-interval", str(self.train_iters)),
            *("--data-path", str(data_prefix), "--data-cache-path", str(self.folder / "cache")),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
            *("--skyladder-eval-lengths", ",".join(map(str, EVAL_LENGTHS))),
        ]

    def is_finished(self) -> bool:
        """Return whether an earlier call has brought this run to its end."""
        return self._finished.exists() and self.checkpoints.exists()

    @property
    def _finished(self) -> Path:
        return self.folder / "finished"

    def train(
        self, data_prefix: Path, tokenizer: Path, on_step: Callable[[int, int, float], None]
    ) -> None:
        """Train to the end.

        Args:
            data_prefix: of the .bin/.idx files.
            tokenizer: its folder.
            on_step: called with the iteration, how many there are, and the loss.

        Raises:
            RuntimeError: training failed; the message has the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._finished.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # of a run that was cut off
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(NUM_RANKS), "-m", "megatron_skyladder.pretrain_gpt"),
            *self.flags(data_prefix, tokenizer),
        ]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        with (
            self.log.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                match = _ITERATION.search(line)
                if match:
                    on_step(int(match[1]), int(match[2]), float(match[3]))
        if process.returncode:
            tail = "".join(self.log.read_text(encoding="utf-8").splitlines(True)[-25:])
            raise RuntimeError(
                f"the {self.name} run ended with exit code {process.returncode}; the end of "
                f"{self.log}:\n{tail}"
            )
        self._finished.touch()
