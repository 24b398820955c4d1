"""The flags that ``plan`` and ``compare`` read: the part of Megatron's that decides work and time.

Works where Megatron is not installed. A launch script's whole command line can be pasted: what
does not matter here is left aside and named.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_skyladder.ladder.config import add_arguments
from megatron_skyladder.ladder.costs import DecoderShape, padded_vocab_size
from megatron_skyladder.ladder.presets import PAPER_RUNS, PaperRun
from megatron_skyladder.planning.time_model import add_time_flags

# Models that are counted differently; a wrong figure would be worse than none.
NOT_COUNTED = (
    "--num-experts",
    "--multi-latent-attention",
    "--mtp-num-layers",
    "--hybrid-layer-pattern",
    "--hybrid-override-pattern",
    "--heterogeneous-layers-config-path",
    "--attention-output-gate",
    "--experimental-attention-variant",
    "--yaml-cfg",
)
_INTEGERS = {
    "--num-layers": "decoder layers",
    "--hidden-size": "width of the model",
    "--ffn-hidden-size": "width of the MLP (default: 4 times the hidden size, 8/3 with --swiglu)",
    "--num-attention-heads": "query heads",
    "--num-query-groups": "key and value heads, with --group-query-attention",
    "--kv-channels": "width of a head (default: hidden size / heads)",
    "--seq-length": "tokens in a row",
    "--max-position-embeddings": "rows of a learned position embedding",
    "--vocab-size": "tokens in the vocabulary, before padding",
    "--padded-vocab-size": "rows of the embedding, if you set them yourself",
    "--make-vocab-size-divisible-by": "pad the vocabulary to a multiple of this times TP",
    "--tensor-model-parallel-size": "TP",
    "--pipeline-model-parallel-size": "PP",
    "--context-parallel-size": "CP",
    "--micro-batch-size": "rows of a micro-batch",
    "--global-batch-size": "rows of a batch, over all GPUs",
    "--train-samples": "rows to train on",
    "--train-iters": "batches to train on",
}
_SWITCHES = {
    "--group-query-attention": "use --num-query-groups",
    "--swiglu": "gated MLP",
    "--quick-geglu": "gated MLP",
    "--untie-embeddings-and-output-weights": "an output layer of its own",
    "--disable-bias-linear": "no biases",
    "--add-qkv-bias": "a bias for queries, keys and values only",
    "--qk-layernorm": "normalise queries and keys",
    "--use-rotary-position-embeddings": "RoPE (old name)",
}
_DEFAULTS = {  # Megatron's
    "num_query_groups": 1,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps paragraphs that were laid out by hand, and wraps those of a single line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset``, Megatron's flags, ours, and those about time and money."""
    parser.allow_abbrev = False  # as in Megatron
    parser.add_argument(
        "--preset",
        choices=tuple(PAPER_RUNS),
        help="model, batch, length and schedule of a run of the paper; flags override its parts",
    )
    megatron = parser.add_argument_group(
        "Megatron's flags", "Those that decide work and time. All others are accepted and left out."
    )
    for flag, help_text in _INTEGERS.items():
        megatron.add_argument(flag, type=int, metavar="N", help=help_text)
    for flag, help_text in _SWITCHES.items():
        megatron.add_argument(flag, action="store_const", const=True, help=help_text)
    megatron.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"))
    megatron.add_argument("--position-embedding-type", metavar="NAME")
    megatron.add_argument(
        "--data-path",
        nargs="*",
        metavar="PREFIX",
        help="measure the documents in these .bin/.idx files",
    )
    add_time_flags(parser)
    add_arguments(parser)
    _leave_out_the_rest(parser)


def _leave_out_the_rest(parser: argparse.ArgumentParser) -> None:
    """Make the parser put flags it does not know into ``args.ignored``, values included."""
    parse_known = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        known, ignored = _split(parser, list(args))
        result, rest = parse_known(known, namespace)
        result.ignored = ignored
        return result, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _split(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words the parser knows, and the names of the flags it does not."""
    known: list[str] = []
    ignored: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            if name in NOT_COUNTED:
                parser.error(
                    f"{name}: plan counts dense GPT models only, with all layers alike. "
                    "Leave the flag out to plan for the dense part."
                )
            ours = name.startswith("--skyladder-")  # a misspelt one must not go unnoticed
            skipping = name not in parser._option_string_actions and not ours
            if skipping:
                ignored.append(name)
        if not skipping:
            known.append(word)
    return known, ignored


def complete(args: argparse.Namespace, preset: str | None = None) -> argparse.Namespace:
    """Return the flags with the preset's and Megatron's defaults filled in, and checked.

    Args:
        args: the parsed flags.
        preset: a run of the paper, in place of ``args.preset``.

    Raises:
        ValueError: a flag is missing or does not fit another one.
    """
    filled = argparse.Namespace(**vars(args))
    preset = preset or args.preset
    if preset:
        for name, value in _preset_flags(preset, PAPER_RUNS[preset], args).items():
            if getattr(filled, name, None) is None:
                setattr(filled, name, value)
    for name, value in _DEFAULTS.items():
        if getattr(filled, name) is None:
            setattr(filled, name, value)
    if filled.use_rotary_position_embeddings:
        filled.position_embedding_type = "rope"
    _fill_batch(filled)
    _check(filled)
    return filled


def _preset_flags(name: str, run: PaperRun, args: argparse.Namespace) -> dict[str, Any]:
    model = run.model
    flags = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "disable_bias_linear": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "seq_length": run.seq_length,
        "max_position_embeddings": run.seq_length,
        "global_batch_size": run.global_batch_size,
        "skyladder_preset": name,
    }
    if args.train_samples is None:
        flags["train_iters"] = run.train_steps
    return flags


def _fill_batch(flags: argparse.Namespace) -> None:
    """Set the global batch as Megatron does where only the micro-batch is given."""
    if flags.global_batch_size is None and flags.micro_batch_size and flags.gpus:
        flags.global_batch_size = flags.micro_batch_size * (flags.gpus // _gpus_per_replica(flags))


def _gpus_per_replica(flags: argparse.Namespace) -> int:
    return (
        flags.tensor_model_parallel_size
        * flags.pipeline_model_parallel_size
        * flags.context_parallel_size
    )


def _check(flags: argparse.Namespace) -> None:
    needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "global_batch_size")
    missing = [name for name in needed if getattr(flags, name) is None]
    if flags.vocab_size is None and flags.padded_vocab_size is None:
        missing.append("vocab_size")
    if flags.train_samples is None and flags.train_iters is None:
        missing.append("train_iters")
    if missing:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(
            f"not given: {names}. A plan needs the model, the batch and the length of the run. "
            f"Give Megatron's own flags, or --preset {'|'.join(PAPER_RUNS)}."
        )
    for flag in _INTEGERS:
        value = getattr(flags, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"{flag}={value}: give at least 1.")
    if flags.train_samples is not None and flags.train_iters is not None:
        raise ValueError("--train-samples and --train-iters are both given. Give only one of them.")
    if total_steps(flags) < 1:
        raise ValueError(
            f"--train-samples={flags.train_samples} is less than one batch of "
            f"{flags.global_batch_size}. Give more samples, or a smaller --global-batch-size."
        )
    _check_layout(flags)


def _check_layout(flags: argparse.Namespace) -> None:
    if flags.gpus is None:
        return
    replica = _gpus_per_replica(flags)
    if flags.gpus < 1 or flags.gpus % replica:
        raise ValueError(
            f"--gpus={flags.gpus} is no multiple of TP x PP x CP = {replica}. Give whole replicas."
        )
    rows = (flags.micro_batch_size or 1) * (flags.gpus // replica)
    if flags.global_batch_size % rows:
        raise ValueError(
            f"--global-batch-size={flags.global_batch_size} is no multiple of micro-batch size x "
            f"data-parallel size = {rows}. Change one of them, or --gpus."
        )


def total_steps(flags: argparse.Namespace) -> int:
    """Return the global batches of the run, as Megatron rounds them."""
    if flags.train_samples is None:
        return int(flags.train_iters)
    return int(flags.train_samples // flags.global_batch_size)


def decoder_shape(flags: argparse.Namespace) -> DecoderShape:
    """Return the model that Megatron builds from these flags.

    Raises:
        ValueError: they do not make a model.
    """
    hidden, heads = flags.hidden_size, flags.num_attention_heads
    gated = bool(flags.swiglu or flags.quick_geglu)
    if flags.kv_channels is None and hidden % heads:
        raise ValueError(
            f"--hidden-size={hidden} is no multiple of --num-attention-heads={heads}. "
            "Change one of them, or give --kv-channels."
        )
    groups = flags.num_query_groups if flags.group_query_attention else heads
    if heads % groups:
        raise ValueError(
            f"--num-attention-heads={heads} is no multiple of --num-query-groups={groups}. "
            "Change one of them."
        )
    default_ffn = int(4 * hidden * 2 / 3 / 64) * 64 if flags.swiglu else 4 * hidden
    vocab_size = flags.padded_vocab_size or padded_vocab_size(
        flags.vocab_size,
        divisible_by=flags.make_vocab_size_divisible_by,
        tensor_parallel=flags.tensor_model_parallel_size,
    )
    learned = flags.position_embedding_type == "learned_absolute"
    if learned and flags.max_position_embeddings is None:
        raise ValueError(
            "--max-position-embeddings is missing: it sizes the learned position embedding. Give "
            "it, or --position-embedding-type rope."
        )
    return DecoderShape(
        num_layers=flags.num_layers,
        hidden_size=hidden,
        ffn_hidden_size=flags.ffn_hidden_size or default_ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=flags.kv_channels or hidden // heads,
        vocab_size=vocab_size,
        gated_mlp=gated,
        linear_bias=not flags.disable_bias_linear,
        qkv_bias=bool(flags.add_qkv_bias),
        norm_bias=flags.normalization == "LayerNorm",
        qk_norm=bool(flags.qk_layernorm),
        tied_embeddings=not flags.untie_embeddings_and_output_weights,
        learned_positions=flags.max_position_embeddings if learned else 0,
    )
