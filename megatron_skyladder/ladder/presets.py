"""Settings of published runs, each fact once; arXiv:2503.15450 unless named otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction


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
        """Sequences in a batch."""
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


@dataclass(frozen=True)
class Preset:
    """A published schedule: settings as on a command line, without the prefix.

    Args:
        settings: text by name, such as ``{"schedule": "linear", "alpha": "1/8"}``.
        summary: what it does, one line.
        source: where it was published, or what speaks for it.
        assumes: settings that depend on the model, with what each has to be.
        note: what has to be known of it, a sentence.
    """

    settings: Mapping[str, str]
    summary: str
    source: str
    assumes: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def _of_paper(name: str, run: PaperRun) -> Preset:
    return Preset(
        {
            "schedule": "linear",
            "start_window": str(run.start_window),
            "final_window": str(run.seq_length),
            "alpha": str(run.alpha),
        },
        f"{run.start_window} -> {run.seq_length:,}, one token every {1 / run.alpha} steps: the "
        f"paper's {name.split('-')[0].upper()} model",
        "arXiv:2503.15450",
    )


def _doubling(first: int, last: int) -> str:
    windows = [first]
    while windows[-1] < last:
        windows.append(windows[-1] * 2)
    return " ".join(f"{window}:1/{len(windows)}" for window in windows)


_UNPROVEN = (
    "what window, batch, learning rate and RoPE do together has not been measured with this table; "
    "take it for a starting point"
)
SCHEDULE_PRESETS: dict[str, Preset] = {
    **{name: _of_paper(name, run) for name, run in PAPER_RUNS.items()},
    "recommended": Preset(
        {"schedule": "linear", "start_window": "8", "expand_fraction": "0.64"},
        "8 -> full over 64 % of the run, whatever its length: the paper's advice",
        "arXiv:2503.15450: a start of 8, and 60 to 64 % of the tokens",
    ),
    "extend-context": Preset(
        {
            "schedule": "linear",
            "start_window": "4096",
            "expand_fraction": "0.4",
            "round_to": "auto",
        },
        "for a model that has a context already: from its length (--skyladder-start-window, "
        "default 4,096) -> full over 40 % of the run",
        "no published run; arXiv:2309.16039 (Tables 10, 11): going from 4K to 32K after 20 or 40 "
        "% of training costs long tasks little, after 80 % much",
        assumes={"start_window": "the context length that the model was trained with"},
    ),
    "1b-32k-stepwise": Preset(
        {
            "schedule": "stepwise",
            "start_window": "32",
            "final_window": "32768",
            "alpha": "1/2",
            "round_to": "1024",
        },
        "32 -> 32,768 in steps of 1,024 tokens: the rounding of the paper's own code",
        "arXiv:2503.15450, Tables 7 and 20",
    ),
    "llama-2-long-20": Preset(
        {"schedule": "staged", "stages": "4096:0.2 final:0.8"},
        "4,096 for 20 % of the run, then full",
        "arXiv:2309.16039, Tables 10 and 11: 7B, 4K -> 32K",
    ),
    "llama-2-long-40": Preset(
        {"schedule": "staged", "stages": "4096:0.4 final:0.6"},
        "4,096 for 40 % of the run, then full",
        "arXiv:2309.16039, Tables 10 and 11: 7B, 4K -> 32K",
    ),
    "extend-context-stages": Preset(
        {
            "schedule": "staged",
            "final_window": "131072",
            "stages": "4096:0.5,rope=10000 32768:0.3,rope=1000000 final:0.2,rope=10000000",
        },
        "4,096 -> 32,768 -> 131,072, with the RoPE base moved at each step: 10,000, 1,000,000, "
        "10,000,000",
        "no published run has this table. 1,000,000 at 32K: arXiv:2503.15450; from 10,000 at 4K to "
        "10,000,000 at 256K: the report on Qwen2.5-1M. The shares are ours",
        note=_UNPROVEN,
    ),
    "critical-batch": Preset(
        {
            "schedule": "staged",
            "stages": "final:168B,batch=x1,lr=1 final:335B,batch=x2,lr=sqrt "
            "final:rest,batch=x2,lr=sqrt",
        },
        "the full window; the batch doubles after 168B and 503B tokens, the learning rate grows by "
        "sqrt 2 each time",
        "arXiv:2505.23971: OLMo 1B, batches of 1,024, 2,048 and 4,096",
    ),
    "seesaw": Preset(
        {
            "schedule": "staged",
            "stages": "final:0.6667,batch=x1,lr=1 final:0.1724,batch=x2,lr=0.5^0.5 "
            "final:0.0811,batch=x2,lr=0.25^0.5 final:rest,batch=x2,lr=0.125^0.5",
        },
        "the full window; where a cosine to 0 would have halved the learning rate (after 66.7, "
        "83.9 and 92 % of the run), it is divided by sqrt 2 and the batch doubled. Give "
        "--lr-decay-style constant",
        "arXiv:2510.14717; the points are those of cos(pi t/2), worked out here",
        note="it stands in the place of a decay: give --lr-decay-style constant with your warm-up, "
        "or the learning rate decays twice",
    ),
    "modded-nanogpt": Preset(
        {
            "schedule": "staged",
            "stages": "384:1/3,batch=x1,lr=1 896:1/3,batch=x2,lr=1.52 1408:rest,batch=x1.5,lr=1.73",
            "final_window": "1408",
        },
        "384, 896 and 1,408 tokens, a third of the run each; the batch grows 1 : 2 : 3, the "
        "learning rate by 1.52 and 1.73",
        "github.com/KellerJordan/modded-nanogpt, its TRAINING_STAGES (long windows; short ones, "
        "sliding masks and the cool-down are left out; as in a copy of its file, not checked "
        "against a record)",
        note=_UNPROVEN,
    ),
    "shortformer": Preset(
        {"schedule": "staged", "stages": "128:0.5 final:0.5"},
        "128 for the first half, then full",
        "arXiv:2012.15832",
    ),
    "growlength": Preset(
        {"schedule": "staged", "final_window": "4096", "stages": _doubling(128, 4096)},
        "doubles from 128 to 4,096",
        "arXiv:2310.00576",
    ),
    "late-switch-baseline": Preset(
        {"schedule": "staged", "stages": "4096:0.97 final:0.03"},
        "4,096 for 97 % of the tokens, then full: what the paper compares with as continual "
        "pretraining, and finds worse than its ladder",
        "arXiv:2503.15450, Table 7",
    ),
}

# Names that a launch script may still have, and what to say.
RENAMED_PRESETS = {
    "continual": "it was the paper's comparison run, 4,096 tokens for 97 % of the run, and is "
    "called late-switch-baseline now. To extend the context of a model, take extend-context",
}
