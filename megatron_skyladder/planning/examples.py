"""Megatron's command lines for the paper's runs, each flag with where it comes from.

Facts stand in `presets`, layouts in `layouts`; here they become flags. An example has everything
but the data: add ``--data-path`` and ``--tokenizer-model``, and where to save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_skyladder.ladder.presets import PAPER_RUNS, TRAINING, ModelShape, PaperRun
from megatron_skyladder.planning.layouts import GPUS_PER_NODE, Layout, estimated_gib, layout_of

DEFAULT_GPU = "a100-40g"
PAPER = "arXiv:2503.15450"

# The paper's published code: every 500 steps 100 micro-batches of 4 sequences on each of 8 GPUs.
EVAL_INTERVAL = 500
EVAL_TOKENS = 100 * 4 * 8 * 8192
EVAL_LENGTHS = (512, 4096, 8192)
SAVE_INTERVAL = 500
RETAIN_INTERVAL = 10_000
# Embedding rows are padded to a multiple of this times the tensor-parallel size: with 32 there is
# nothing to pad up to 8-way tensor parallelism, so the model has the paper's parameters.
VOCAB_MULTIPLE = 32


@dataclass(frozen=True)
class Variant:
    """How attention is masked in a run."""

    summary: str
    flags: tuple[str, ...]  # {run} is the run's name
    of_paper: bool = True

    @property
    def has_papers_ladder(self) -> bool:
        """Whether the window grows as the paper's runs have it."""
        return "--skyladder-preset {run}" in self.flags


_DOCUMENTS = "--skyladder-intra-document"
VARIANTS = {
    "constant": Variant(
        "full causal attention; Random in the paper",
        ("--skyladder-schedule constant",),
    ),
    "intra-document": Variant(
        "attention ends where documents do; IntraDoc in the paper",
        ("--skyladder-schedule constant", _DOCUMENTS),
    ),
    "skyladder": Variant(
        "a window that grows; SkyLadder in the paper",
        ("--skyladder-preset {run}",),
    ),
    "skyladder-intra-document": Variant(
        "growing window, documents masked; IntraDoc + SkyLadder",
        ("--skyladder-preset {run}", _DOCUMENTS),
    ),
    "recommended": Variant(
        "a window that starts at 8 and grows over 64 % of the run",
        ("--skyladder-preset recommended",),
        of_paper=False,
    ),
    "recommended-intra-document": Variant(
        "the same, and attention ends where documents do",
        ("--skyladder-preset recommended", _DOCUMENTS),
        of_paper=False,
    ),
}


@dataclass(frozen=True)
class Flag:
    """One flag as it is typed, and why."""

    text: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A run of the paper as a command line.

    Args:
        run_name: a key of ``PAPER_RUNS``.
        variant: a key of ``VARIANTS``.
        gpu: a key of ``GPU_MEMORY_GIB``.
        shrunk: whether it is the same run at the size of a test, see `shrunk_run`.
        sections: flags under a heading.
    """

    run_name: str
    variant: str
    gpu: str
    shrunk: bool
    sections: dict[str, tuple[Flag, ...]]

    @property
    def words(self) -> list[str]:
        """The command line."""
        flags = (flag for section in self.sections.values() for flag in section)
        return [word for flag in flags for word in flag.text.split()]

    @property
    def layout(self) -> Layout:
        """How it is spread over GPUs."""
        layout = layout_of(self.run_name, self.gpu)
        return replace(layout, micro_batch_size=1) if self.shrunk else layout


def example(
    run_name: str, variant: str, *, gpu: str = DEFAULT_GPU, shrink: bool = False
) -> Example:
    """Return one of the examples.

    Args:
        run_name: a key of ``PAPER_RUNS``.
        variant: a key of ``VARIANTS``.
        gpu: a key of ``GPU_MEMORY_GIB``: decides the layout, nothing else.
        shrink: the same at the size of a test, on data that Megatron makes up.

    Raises:
        ValueError: a name is unknown.
    """
    if run_name not in PAPER_RUNS:
        raise ValueError(f"{run_name} is no run of the paper. Choose: {', '.join(PAPER_RUNS)}.")
    if variant not in VARIANTS:
        raise ValueError(f"{variant} is no variant. Choose: {', '.join(VARIANTS)}.")
    found = Example(run_name, variant, gpu, shrink, {})
    layout = found.layout
    run, scale = PAPER_RUNS[run_name], 1
    if shrink:
        scale = run.seq_length // SHRUNK_LENGTHS[run.seq_length]
        run = shrunk_run(run)
    sections = {
        "model": _model_flags(run),
        "training": _training_flags(run),
        "window": _window_flags(run_name, variant, run if shrink else None),
        "layout: ours": _layout_flags(layout),
        "evaluation, checkpoints, log": _watching_flags(run, scale),
        "data": _shrunk_data_flags() if shrink else _data_flags(),
    }
    return replace(found, sections={k: tuple(v) for k, v in sections.items()})


def _model_flags(run: PaperRun) -> Iterable[Flag]:
    model = run.model
    table = "Table 12"
    yield Flag(f"--num-layers {model.num_layers}", table)
    yield Flag(f"--hidden-size {model.hidden_size}", table)
    yield Flag(f"--ffn-hidden-size {model.ffn_hidden_size}", table)
    yield Flag(f"--num-attention-heads {model.num_attention_heads}", table)
    yield Flag("--group-query-attention", table)
    yield Flag(f"--num-query-groups {model.num_query_groups}", table)
    yield Flag(f"--seq-length {run.seq_length}", table)
    yield Flag(f"--max-position-embeddings {run.seq_length}", "Megatron wants it beside RoPE too")
    yield Flag("--position-embedding-type rope", table)
    yield Flag(f"--rotary-base {run.rotary_base}", table)
    yield Flag("--normalization RMSNorm", table)
    yield Flag(f"--norm-epsilon {model.norm_epsilon:g}", table)
    yield Flag("--swiglu", table)
    yield Flag("--disable-bias-linear", table)
    yield Flag("--untie-embeddings-and-output-weights", table)
    yield Flag("--attention-dropout 0", "the paper's code; Megatron's default is 0.1")
    yield Flag("--hidden-dropout 0", "the same")
    yield Flag(
        f"--make-vocab-size-divisible-by {VOCAB_MULTIPLE}",
        "ours: 32,000 is not padded at TP 1 to 8",
    )
    yield Flag(
        "--skyladder-init reference",
        "the paper's code; std as in `skyladder plan --help`",
    )


def _training_flags(run: PaperRun) -> Iterable[Flag]:
    training = TRAINING
    table = "Table 12"
    yield Flag(f"--train-iters {run.train_steps}", f"{table}: steps of 2**20 tokens")
    yield Flag(
        f"--global-batch-size {run.global_batch_size}",
        f"{run.batch_tokens:,} tokens in sequences of {run.seq_length:,}",
    )
    yield Flag("--optimizer adam", f"{table}: AdamW, which is what Megatron's adam is")
    yield Flag(f"--adam-beta1 {training.adam_beta1}", table)
    yield Flag(f"--adam-beta2 {training.adam_beta2}", table)
    yield Flag(f"--weight-decay {training.weight_decay}", f"{table}; Megatron spares the norms")
    yield Flag(f"--lr {training.lr:g}", table)
    yield Flag(f"--min-lr {training.min_lr:g}", table)
    yield Flag("--lr-decay-style cosine", table)
    warmup = min(training.warmup_steps, run.train_steps // 4)
    yield Flag(f"--lr-warmup-iters {warmup}", table)
    yield Flag(f"--clip-grad {training.clip_grad}", table)
    yield Flag("--bf16", "the paper's code: bf16 with fp32 master weights")
    yield Flag(f"--seed {training.seed}", "the paper's code")


def _window_flags(run_name: str, name: str, shrunk: PaperRun | None) -> Iterable[Flag]:
    variant = VARIANTS[name]
    for text in variant.flags:
        yield Flag(text.format(run=run_name), variant.summary)
    if shrunk is not None and variant.has_papers_ladder:
        fraction = float(ramp_share(PAPER_RUNS[run_name]))
        why = "in place of the preset's, which are for the full size"
        yield Flag(f"--skyladder-start-window {shrunk.start_window}", why)
        yield Flag(f"--skyladder-final-window {shrunk.seq_length}", why)
        yield Flag(f"--skyladder-expand-fraction {fraction:g}", "the run's own share of its steps")


def _layout_flags(layout: Layout) -> Iterable[Flag]:
    yield Flag(f"--micro-batch-size {layout.micro_batch_size}", "what fits, see above")
    yield Flag(f"--tensor-model-parallel-size {layout.tensor}", "1 where the model fits")
    if layout.tensor > 1:
        yield Flag("--sequence-parallel", "cuts the activations between the matrices too")
    yield Flag(f"--context-parallel-size {layout.context}", "sequences cut over so many GPUs")
    yield Flag("--use-distributed-optimizer", "optimizer state cut over all replicas")
    yield Flag("--overlap-grad-reduce", "gradients travel during the backward pass")
    yield Flag("--overlap-param-gather", "weights travel during the forward pass")


def _watching_flags(run: PaperRun, scale: int) -> Iterable[Flag]:
    steps = run.train_steps
    code = f"the paper's code: {EVAL_TOKENS / 1e6:.0f} M tokens every {EVAL_INTERVAL} steps"
    yield Flag(f"--eval-interval {min(EVAL_INTERVAL, steps // 2)}", code)
    iterations = EVAL_TOKENS // run.batch_tokens if scale == 1 else 1
    yield Flag(f"--eval-iters {iterations}", code)
    lengths = [length // scale for length in EVAL_LENGTHS]
    shorter = ",".join(str(length) for length in lengths if length < run.seq_length)
    yield Flag(f"--skyladder-eval-lengths {shorter}", "where the paper reports validation loss")
    yield Flag(f"--save-interval {min(SAVE_INTERVAL, steps // 2)}", "ours: what a crash may cost")
    if scale == 1:
        yield Flag(f"--save-retain-interval {RETAIN_INTERVAL}", "ours: older ones are deleted")
    yield Flag("--ckpt-format torch_dist", "resumes under another layout")
    yield Flag(f"--log-interval {10 if scale == 1 else 1}", "the paper's code")
    yield Flag("--log-throughput", "TFLOP/s per GPU, for `skyladder plan --calibrate` too")


def _data_flags() -> Iterable[Flag]:
    yield Flag("--tokenizer-type Llama2Tokenizer", "Table 12: Llama 2, 32,000 tokens")
    yield Flag("--split 998,2,0", "ours: 0.2 % of the documents for validation")


# --- the same runs at the size of a test ---------------------------------------------------------

SHRUNK_LENGTHS = {8192: 128, 32_768: 256}
SHRUNK_STEPS = 8
SHRUNK_ROWS = 4
SHRUNK_VOCAB = 128


def shrunk_run(run: PaperRun) -> PaperRun:
    """Return a run of the same kind that two CPU cores train in seconds.

    Kept are the shape's ratios (heads per key/value group, FFN to hidden), the share of the steps
    over which the window grows, and everything that is no size.
    """
    return replace(
        run,
        model=_shrunk_model(run.model),
        seq_length=SHRUNK_LENGTHS[run.seq_length],
        start_window=2,
        train_steps=SHRUNK_STEPS,
        batch_tokens=SHRUNK_ROWS * SHRUNK_LENGTHS[run.seq_length],
    )


def _shrunk_model(model: ModelShape) -> ModelShape:
    per_group = model.num_attention_heads // model.num_query_groups
    heads = max(4, 2 * per_group) if model.num_query_groups > 1 else 4
    groups = 1 if model.num_query_groups == 1 else heads // per_group
    hidden = 8 * heads
    ffn = 8 * round(hidden * model.ffn_hidden_size / model.hidden_size / 8)
    return replace(
        model,
        num_layers=2,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=SHRUNK_VOCAB,
    )


def _shrunk_data_flags() -> Iterable[Flag]:
    yield Flag("--mock-data", "Megatron makes it up")
    yield Flag("--tokenizer-type NullTokenizer", "texts are numbers")
    yield Flag(f"--vocab-size {SHRUNK_VOCAB - 1}", "and an end of document")
    yield Flag("--num-workers 0", "no processes for data that costs nothing")


def ramp_share(run: PaperRun) -> Fraction:
    """Return the share of the steps over which the window of a run grows."""
    return (run.seq_length - run.start_window) / (run.alpha * run.train_steps)


# --- for people and programs ---------------------------------------------------------------------


def to_json(found: Example) -> dict[str, Any]:
    """Return the command line with its reasons as one object."""
    layout, run = found.layout, PAPER_RUNS[found.run_name]
    gib = None if found.shrunk else estimated_gib(run, layout, GPUS_PER_NODE)
    return {
        "run": found.run_name,
        "variant": found.variant,
        "of_paper": VARIANTS[found.variant].of_paper,
        "gpu": found.gpu,
        "gpus_per_replica": layout.gpus_per_replica,
        "estimated_gib": gib,
        "words": found.words,
        "reasons": {f.text: f.reason for section in found.sections.values() for f in section},
    }


def to_text(found: Example) -> list[str]:
    """Return the lines of an annotated command line: one flag a line, its reason as a comment."""
    run = PAPER_RUNS[found.run_name]
    variant = VARIANTS[found.variant]
    lines = [f"# {found.run_name}, {found.variant}: {variant.summary}"]
    if not variant.of_paper:
        lines.append("# NOT a run of the paper, but its advice: start at 8, grow over 60 to 64 %.")
    lines.append(f"# Tables are those of {PAPER}, its code is github.com/sail-sg/SkyLadder.")
    if found.shrunk:
        lines.append("# Shrunk to the size of a test; the reasons are those of the full size.")
    else:
        gib = estimated_gib(run, found.layout, GPUS_PER_NODE)
        lines.append(
            f"# {run.train_steps:,} steps of 2**20 tokens; about {gib:.0f} GiB on each of "
            f"{GPUS_PER_NODE} {found.gpu} by arithmetic, not measured."
        )
    width = max(len(flag.text) for section in found.sections.values() for flag in section)
    for heading, flags in found.sections.items():
        lines += ["", f"# {heading}"]
        lines += [f"{flag.text:<{width}}  # {flag.reason}" for flag in flags]
    return lines
