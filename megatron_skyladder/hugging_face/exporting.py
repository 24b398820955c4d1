"""Megatron checkpoint -> Hugging Face folder, one layer in memory at a time."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_skyladder.data import tokenizer_flags
from megatron_skyladder.files import whole, write_text
from megatron_skyladder.hugging_face import checking, model_card, vocabulary, weights
from megatron_skyladder.hugging_face.architecture import (
    PRECISIONS,
    Architecture,
    from_megatron,
    hugging_face_config,
)
from megatron_skyladder.hugging_face.checkpoints import Checkpoint, open_checkpoint
from megatron_skyladder.hugging_face.folder import INDEX
from megatron_skyladder.hugging_face.output import Staging, is_finished
from megatron_skyladder.hugging_face.tokenizer import (
    Tokenizer,
    TokenizerMismatchError,
    convert,
)

logger = logging.getLogger(__name__)

TOKENIZER_FLAGS = (
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
    "null_tokenizer_eod_id",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
    "tokenizer_hf_no_include_special_tokens",
)


@dataclass(frozen=True)
class Exported:
    """What was made.

    Args:
        folder: transformers loads it.
        checkpoint: where it comes from.
        model: what it is.
        dtype: of the weights.
        notes: what a user has to know.
        is_new: False where an earlier run had made it.
        comparison: with Megatron's logits, where it was asked for.
    """

    folder: Path
    checkpoint: Checkpoint
    model: Architecture
    dtype: str
    notes: list[str]
    is_new: bool
    comparison: checking.Comparison | None = None


def export(
    checkpoint: Path | str,
    folder: Path | str,
    *,
    iteration: int | None = None,
    tokenizer: Namespace | None = None,
    without_tokenizer: bool = False,
    vocab_size: int | None = None,
    dtype: str | None = None,
    rope_scaling_factor: float | None = None,
    trust: bool = False,
    check: bool = False,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Export one iteration of a run.

    Args:
        checkpoint: a run's folder of checkpoints, or one iteration's.
        folder: what to make; it appears when it is whole.
        iteration: which one; the latest where it is None.
        tokenizer: flags of `tokenizer_flags.add_arguments` that win over the checkpoint's.
        without_tokenizer: leave the tokenizer out.
        vocab_size: rows of the embedding to keep, where there are more than tokens.
        dtype: of the weights, one of `PRECISIONS`; the checkpoint's where it is None.
        rope_scaling_factor: of rotary scaling, where the checkpoint leaves it open.
        trust: unpickle types that are not on the list of `pickles`.
        check: compare logits with Megatron's own model; the folder appears only if they agree.
        on_part: called with the number of finished parts and of all.

    Raises:
        ValueError: it cannot be exported, or the tokenizer is not that of training; nothing is
            left at ``folder``.
    """
    source = open_checkpoint(Path(checkpoint), iteration=iteration, trust=trust)
    target = Path(folder)
    if check:
        checking.refuse(source, dtype)
    flags = tokenizer_arguments(source.args, tokenizer)
    model = from_megatron(source.args, 0, rope_scaling_factor)  # refusals before anything else
    rows, notes = _vocabulary(source, flags, vocab_size, without_tokenizer)
    model = replace(model, vocab_size=rows)
    precision = dtype or _dtype_of(source)
    words: Tokenizer | None = None
    if without_tokenizer:
        config = hugging_face_config(model, precision)
    else:
        model, words = _with_tokenizer(model, precision, flags)
        config = hugging_face_config(model, precision, bos=words.bos, eos=words.eos, pad=words.pad)
    _check_model(source, model)
    settings = {
        "iteration": source.iteration,
        "checkpoint": source.identity,
        "config": config,
        "tokenizer": _hashes(words.files if words else {}),
    }
    notes += model_card.warnings_about(model_card.ladder_of(source))
    is_new = not is_finished(target, settings)
    if is_new:
        card = model_card.model_card(source, model, precision)
        with Staging(target, settings) as staging:
            _write_small_files(staging, config, words, card)
            _write_weights(staging, source, model, precision, on_part)
            comparison = _checked(source, staging) if check else None
    else:
        comparison = _checked(source, target) if check else None
    return Exported(target, source, model, precision, notes, is_new, comparison)


def _checked(source: Checkpoint, folder: Path) -> checking.Comparison:
    comparison = checking.compare(source, folder)
    if not comparison.agrees:
        raise ValueError(f"{comparison}. It lies in {folder}.")
    return comparison


def _hashes(files: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}


def tokenizer_arguments(args: Namespace, given: Namespace | None) -> Namespace:
    """Return the tokenizer's flags: the checkpoint's, and what is given over them."""
    parser = argparse.ArgumentParser()
    tokenizer_flags.add_arguments(parser)
    flags = parser.parse_args([])
    recorded = {name: getattr(args, name, None) for name in TOKENIZER_FLAGS}
    recorded["tokenizer_special_tokens"] = getattr(args, "special_tokens", None)
    if given is not None and given.tokenizer_type not in (None, recorded["tokenizer_type"]):
        recorded = {}  # another tokenizer: nothing of the old one's holds
    chosen = {
        name: value
        for name, value in vars(given or Namespace()).items()
        if hasattr(flags, name) and value != getattr(flags, name)
    }
    known = {name: value for name, value in recorded.items() if value is not None}
    vars(flags).update({**known, **chosen})
    return flags


def _with_tokenizer(
    model: Architecture, dtype: str, flags: Namespace
) -> tuple[Architecture, Tokenizer]:
    """Convert the tokenizer, for another form of the model where that is needed.

    transformers 5 gives every model of type qwen2 Qwen's tokenizer class, whatever the folder says,
    which splits texts in Qwen's way. The same model as a Llama with biases keeps its tokenizer.
    """
    try:
        return model, convert(flags, hugging_face_config(model, dtype), model.max_positions)
    except TokenizerMismatchError:
        if model.family != "Qwen2":
            raise
    model = replace(model, output_bias=True)
    words = convert(flags, hugging_face_config(model, dtype), model.max_positions)
    logger.info("written as Llama with biases: transformers reads Qwen2 with Qwen's tokenizer only")
    return model, words


def _vocabulary(
    source: Checkpoint, flags: Namespace, given: int | None, without_tokenizer: bool
) -> tuple[int, list[str]]:
    """Return the rows of the embedding to keep, and notes on the tokenizer they are counted by."""
    if without_tokenizer and (given or flags.vocab_size):
        return int(given or flags.vocab_size), []
    num_tokens = _num_tokens(flags)
    rows = given or num_tokens
    notes = vocabulary.compare_with_training(source.args, flags, num_tokens=num_tokens, rows=rows)
    return rows, notes


def _num_tokens(flags: Namespace) -> int:
    if flags.tokenizer_type is None:
        raise ValueError(
            "the checkpoint does not name its tokenizer. Give --tokenizer-type and "
            "--tokenizer-model, or --without-tokenizer and --vocab-size."
        )
    if flags.tokenizer_type not in tokenizer_flags.BUILDERS:
        raise ValueError(
            f"the run's {flags.tokenizer_type} cannot be converted. Give it as one of "
            f"{', '.join(tokenizer_flags.BUILDERS)} (--tokenizer-type, --tokenizer-model), or "
            "--without-tokenizer and --vocab-size."
        )
    return tokenizer_flags.build_tokenizer(flags).vocab_size


def _dtype_of(source: Checkpoint) -> str:
    """Return the precision of the weights; that of training, also where main weights are fp32."""
    found = str(source.reader.dtype(weights.EMBEDDING)).removeprefix("torch.")
    if found not in PRECISIONS:
        raise ValueError(
            f"the weights are {found}; {', '.join(PRECISIONS)} can be exported. Give --dtype, or "
            "save the checkpoint without fp8 parameters."
        )
    return found


def _check_model(source: Checkpoint, model: Architecture) -> None:
    """Compare what is stored with what the arguments say, before anything is written."""
    expected = {weights.EMBEDDING, weights.FINAL_NORM} | (set() if model.tied else {weights.OUTPUT})
    found = source.reader.outside_layers()
    allowed = expected | {weights.OUTPUT}  # tied: the last pipeline stage's copy
    if not expected <= found <= allowed:
        raise ValueError(
            f"{source.folder} holds {', '.join(sorted(found))}; {model.family} has "
            f"{', '.join(sorted(expected))}. Other models cannot be exported."
        )
    if source.reader.num_layers() != model.num_layers:
        raise ValueError(
            f"{source.folder} holds {source.reader.num_layers()} layers, but its arguments say "
            f"{model.num_layers}. The checkpoint is incomplete or its arguments are another's."
        )


def _write_small_files(
    folder: Path, config: dict[str, Any], words: Tokenizer | None, card: str
) -> None:
    files = {"config.json": _json(config), "README.md": card, **(words.files if words else {})}
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    present = {name: value for name, value in ids.items() if value is not None}
    files["generation_config.json"] = _json({**present, "do_sample": False})
    for name, text in files.items():
        write_text(folder / name, text)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_weights(
    folder: Path,
    source: Checkpoint,
    model: Architecture,
    dtype: str,
    on_part: Callable[[int, int], None],
) -> None:
    """Write a shard for each part of the model, passing over those of an earlier run."""
    shapes = list(weights.hugging_face_shapes(model))
    parts = _parts(source, model)
    places: dict[str, str] = {}
    total_bytes = 0
    for number, (expected, make) in enumerate(zip(shapes, parts, strict=True)):
        name = f"model-{number + 1:05d}-of-{len(shapes):05d}.safetensors"
        if not _is_written(folder / name, expected, dtype):
            _write_shard(folder / name, make(), expected, dtype)
        places |= dict.fromkeys(expected, name)
        itemsize = getattr(torch, dtype).itemsize
        total_bytes += sum(torch.Size(shape).numel() for shape in expected.values()) * itemsize
        on_part(number + 1, len(shapes))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    write_text(folder / INDEX, _json(index))


def _parts(source: Checkpoint, model: Architecture) -> Iterator[Callable[[], weights.Tensors]]:
    """Yield functions that read and convert the parts of `weights.hugging_face_shapes`."""
    reader = source.reader

    def table(name: str) -> weights.Tensors:
        rows = weights.cut_vocabulary(reader.read(name), model, name)
        return {weights.OUTSIDE[name]: rows}

    def layer(index: int) -> weights.Tensors:
        converted = weights.layer_to_hugging_face(reader.read_layer(index), model)
        start = weights.hugging_face_layer(index)
        return {start + name: tensor for name, tensor in converted.items()}

    def last() -> weights.Tensors:
        norm = {weights.OUTSIDE[weights.FINAL_NORM]: reader.read(weights.FINAL_NORM)}
        return norm if model.tied else {**norm, **table(weights.OUTPUT)}

    yield lambda: table(weights.EMBEDDING)
    for index in range(model.num_layers):
        yield lambda index=index: layer(index)  # type: ignore[misc]
    yield last


def _write_shard(
    path: Path, tensors: weights.Tensors, expected: weights.Shapes, dtype: str
) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    wanted = getattr(torch, dtype)
    for name in tensors:
        tensors[name] = tensors[name].to(wanted).contiguous()
    with whole(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _is_written(path: Path, expected: weights.Shapes, dtype: str) -> bool:
    """Return whether an earlier run finished this shard; names appear when files are whole."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as shard:
        found = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    if found != expected:
        raise ValueError(f"{path} is not what this export makes. Delete {path.parent}.")
    return True
