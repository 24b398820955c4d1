"""Settings of published runs, each fact once; arXiv:2503.15450 unless named otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_skyladder.ladder.schedules import FINAL_WINDOW, Stage


@dataclass(frozen=True)
class ModelShape:
    """A Llama-style decoder: RMSNorm, SwiGLU, no bias, untied embeddings (Table 12)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int = 32_000
    norm_epsilon: float = 1e-5


@dataclass(frozen=True)
class PaperRun:
    """One pretraining run of the paper: 100,000 steps of 2**20 tokens."""

    model: ModelShape
    seq_length: int
    rotary_base: int
    alpha: Fraction  # tokens per step
    start_window: int = 32
    train_steps: int = 100_000
    batch_tokens: int = 2**20

    @property
    def global_batch_size(self) -> int:
        """Rows in a batch."""
        return self.batch_tokens // self.seq_length


@dataclass(frozen=True)
class PaperTraining:
    """What all runs of the paper share (Table 12); the seed is that of its published code."""

    lr: float = 4e-4
    min_lr: float = 4e-5  # at the end of a cosine
    warmup_steps: int = 2000
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    seed: int = 3407


TRAINING = PaperTraining()

MODELS = {
    "120m": ModelShape(12, 768, 2048, 12, 1),
    "360m": ModelShape(18, 1024, 4096, 16, 16),
    "1b": ModelShape(22, 2048, 5632, 32, 4),  # TinyLlama
    "3b": ModelShape(28, 3072, 8192, 24, 8),  # Llama 3.2
}

PAPER_RUNS = {
    "120m-8k": PaperRun(MODELS["120m"], 8192, 10_000, Fraction(1, 8)),
    "360m-8k": PaperRun(MODELS["360m"], 8192, 10_000, Fraction(1, 8)),
    "1b-8k": PaperRun(MODELS["1b"], 8192, 10_000, Fraction(1, 8)),
    "1b-32k": PaperRun(MODELS["1b"], 32_768, 1_000_000, Fraction(1, 2)),
    "3b-8k": PaperRun(MODELS["3b"], 8192, 100_000, Fraction(1, 8)),
}


def _paper_schedule(run: PaperRun) -> dict[str, Any]:
    return {
        "schedule": "linear",
        "start_window": run.start_window,
        "final_window": run.seq_length,
        "alpha": run.alpha,
    }


def _doubling(first: int, last: int) -> tuple[Stage, ...]:
    windows = [first]
    while windows[-1] < last:
        windows.append(windows[-1] * 2)
    return tuple(Stage(window, Fraction(1, len(windows))) for window in windows)


# Flag values by name, without the prefix; --skyladder-preset reads them.
SCHEDULE_PRESETS: dict[str, dict[str, Any]] = {
    **{name: _paper_schedule(run) for name, run in PAPER_RUNS.items()},
    # the paper's advice: start at 8, grow over 60-64 % of the run, whatever the context
    "recommended": {
        "schedule": "linear",
        "start_window": 8,
        "expand_fraction": Fraction(64, 100),
    },
    # arXiv:2012.15832: 128 tokens for the first half, then the full length
    "shortformer": {
        "schedule": "staged",
        "stages": (Stage(128, Fraction(1, 2)), Stage(FINAL_WINDOW, Fraction(1, 2))),
    },
    # arXiv:2310.00576: doubling from 128 to 4096
    "growlength": {
        "schedule": "staged",
        "final_window": 4096,
        "stages": _doubling(128, 4096),
    },
    # the continual-pretraining baseline of Table 7: 4K for 97 % of the tokens, then all
    "continual": {
        "schedule": "staged",
        "stages": (Stage(4096, Fraction(97, 100)), Stage(FINAL_WINDOW, Fraction(3, 100))),
    },
}
