"""Hugging Face folder -> a checkpoint that Megatron's ``--load --finetune`` takes at any layout."""

from __future__ import annotations

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import write_text
from megatron_skyladder.hugging_face import torch_dist, vocabulary, weights
from megatron_skyladder.hugging_face.architecture import (
    Architecture,
    extended,
    from_hugging_face,
    megatron_settings,
)
from megatron_skyladder.hugging_face.checkpoints import TRACKER
from megatron_skyladder.hugging_face.folder import HuggingFaceWeights
from megatron_skyladder.hugging_face.output import InUseError, Staging, is_finished, sync_folder
from megatron_skyladder.hugging_face.torch_dist import LazyTensor

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 3.0
RECORD = "skyladder_import.json"
RELEASE = "release"  # Megatron's name for weights without an iteration
WAIT_SECONDS = 2.0  # between looks at another process's import
TABLE_ROWS = 4096  # of the embedding, in memory at a time
# Modules that save an `_extra_state` object per layer, with the local spec or Transformer Engine's.
# Megatron refuses a checkpoint that lacks one it expects, and does not mind one too many.
EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "input_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
EXTRA_STATE_OUTSIDE = ("decoder.final_layernorm", "output_layer")


@dataclass(frozen=True)
class Imported:
    """What was made.

    Args:
        folder: for ``--load``.
        model: what it is.
        flags: Megatron's, to load and to go on training it; with a ladder where a longer context
            was asked for.
        notes: what a user has to know.
        is_new: False where another command, earlier or just now, had made it.
    """

    folder: Path
    model: Architecture
    flags: list[str]
    notes: list[str]
    is_new: bool


def import_model(
    source: Path | str,
    folder: Path | str,
    *,
    tensor_parallel: int = 1,
    divisible_by: int = 128,
    dtype: str | None = None,
    seq_length: int | None = None,
    rotary_base: int | None = None,
) -> Imported:
    """Write a checkpoint from a Hugging Face folder.

    Each node of a run may call this at once: one makes the folder, the others wait for it. A folder
    that the same source and settings made is left as it is. ``seq_length`` and ``rotary_base`` are
    none of those: they are in the flags alone.

    Args:
        source: a folder with config.json and safetensors files.
        folder: what to make, for ``--load``; it appears when it is whole.
        tensor_parallel: at which the vocabulary is padded. Others load too, but rows that are then
            added to the padding start at random, and take probability from the tokens.
        divisible_by: Megatron's ``--make-vocab-size-divisible-by``.
        dtype: of the weights; the folder's where it is None.
        seq_length: a longer context to train for.
        rotary_base: for it; see `architecture.extended`.

    Raises:
        ValueError: it cannot be imported, the tokenizer has more tokens than it has rows, or
            something else is at ``folder``, which is left as it was.
    """
    tensors = HuggingFaceWeights(Path(source))
    model = from_hugging_face(tensors.config)
    tensors.compare(model)
    target = Path(folder)
    longer = None if seq_length is None else extended(model, seq_length, rotary_base)
    if longer is None and rotary_base is not None:
        raise ValueError("--rotary-base is for a longer context: give --seq-length as well.")
    num_tokens, uncertain = vocabulary.count_tokens(Path(source), model.vocab_size)
    vocabulary.refuse_tokens_without_rows(Path(source), num_tokens, model.vocab_size)
    divisor = _divisor(model, num_tokens, tensor_parallel, divisible_by)
    multiple = divisor * tensor_parallel
    padded = _round_up(model.vocab_size, multiple)
    precision = dtype or tensors.dtype()
    settings = {
        "source": tensors.identity,
        "dtype": precision,
        "tensor_model_parallel_size": tensor_parallel,
        "make_vocab_size_divisible_by": divisor,
    }
    arguments = _arguments(model, padded, multiple, precision, Path(source))
    is_new = _make(target, settings, lambda place: _write(place, tensors, model, arguments))
    flags = _flags(longer or model, target, Path(source), precision, divisor)
    notes = [*_notes(model, longer, tensor_parallel, padded), *uncertain]
    if longer is not None:  # the preset wants the length that the model was trained with
        flags.append("--skyladder-preset extend-context")
        flags.append(f"--skyladder-start-window {model.max_positions}")
    return Imported(target, model, flags, notes, is_new)


class _Layers:
    """Converts layers when they are asked for, and keeps the last one.

    Tensors are written by layer, all of one layer's after each other.
    """

    def __init__(
        self, tensors: HuggingFaceWeights, model: Architecture, dtype: torch.dtype
    ) -> None:
        self._tensors, self._model, self._dtype = tensors, model, dtype
        self._index, self._layer = -1, weights.Tensors()

    def part(self, name: str, index: int) -> torch.Tensor:
        """Return a stacked weight's part for one layer, ``[1, ...]``."""
        if index != self._index:
            self._layer = {}  # before the next one is made
            self._layer = weights.layer_to_megatron(self._tensors.layer(index), self._model)
            self._index = index
        return self._layer[name].to(self._dtype).unsqueeze(0)


def _make(target: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> bool:
    """Return True when the folder is written, False where another command did that."""
    waiting = False
    while not is_finished(target, settings, record=RECORD):
        try:
            with Staging(target, settings, record=RECORD, resumes=False) as folder:
                write(folder)
            return True
        except InUseError as error:
            if not waiting:
                logger.info("waiting for another process: %s", error)
            waiting = True
            time.sleep(WAIT_SECONDS)
    _refuse_trained(target)
    return False


def _refuse_trained(folder: Path) -> None:
    """Refuse a folder that a run has saved in: --load --finetune would begin at what it saved."""
    latest = (folder / TRACKER).read_text().strip()
    if latest != RELEASE:
        raise UsageError(
            f"since the import a run has saved iteration {latest} in {folder}, from whose weights "
            "the import's flags would begin anew. To go on with that run, give --load without "
            "--finetune, --no-load-optim and --no-load-rng; to begin another, import to another "
            "name."
        )


def _write(target: Path, tensors: HuggingFaceWeights, model: Architecture, args: Namespace) -> None:
    folder = target / RELEASE
    folder.mkdir()
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
    lazy = _lazy_tensors(tensors, model, args.padded_vocab_size, args.params_dtype)
    torch_dist.write(folder, lazy, _extra_states(model.num_layers), common)
    sync_folder(folder)
    write_text(target / TRACKER, RELEASE)


def _lazy_tensors(
    tensors: HuggingFaceWeights, model: Architecture, padded: int, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    layers = _Layers(tensors, model, dtype)
    result = {weights.EMBEDDING: _table(tensors, weights.EMBEDDING, model, padded, dtype)}
    for name, shape in weights.megatron_layer_shapes(model).items():
        result[torch_dist.LAYERS + name] = LazyTensor(
            (model.num_layers, *shape), dtype, 1, _layer_maker(layers, name)
        )
    norm = weights.OUTSIDE[weights.FINAL_NORM]
    result[weights.FINAL_NORM] = LazyTensor(
        (model.hidden_size,),
        dtype,
        model.hidden_size,
        lambda first, last: tensors.read(norm)[first:last].to(dtype),
    )
    if not model.tied:
        result[weights.OUTPUT] = _table(tensors, weights.OUTPUT, model, padded, dtype)
    return result


def _layer_maker(layers: _Layers, name: str) -> Callable[[int, int], torch.Tensor]:
    return lambda first, last: layers.part(name, first)


def _table(
    tensors: HuggingFaceWeights,
    name: str,
    model: Architecture,
    padded: int,
    dtype: torch.dtype,
) -> LazyTensor:
    """Describe an embedding; rows for no token are the mean of the others.

    Training pushes their logits down from there. Zeros or noise would begin with logits unlike
    those of every token.
    """
    stored = weights.OUTSIDE[name]

    def make(first: int, last: int) -> torch.Tensor:
        rows = tensors.rows(stored, first, min(last, model.vocab_size)).to(dtype)
        missing = last - max(first, model.vocab_size)
        if missing <= 0:
            return rows
        mean = _mean_row(tensors, stored, model.vocab_size).to(dtype)
        return torch.cat([rows, mean.expand(missing, -1)])

    return LazyTensor((padded, model.hidden_size), dtype, TABLE_ROWS, make)


def _mean_row(tensors: HuggingFaceWeights, name: str, num_rows: int) -> torch.Tensor:
    """Return the mean row, ``[1, h]``, in double precision."""
    total = torch.zeros(1, dtype=torch.float64)
    for first in range(0, num_rows, TABLE_ROWS):
        rows = tensors.rows(name, first, min(first + TABLE_ROWS, num_rows))
        total = total + rows.sum(dim=0, keepdim=True, dtype=torch.float64)
    return total / num_rows


def _extra_states(num_layers: int) -> dict[str, list[None]]:
    states: dict[str, list[None]] = {}
    for module in EXTRA_STATE_MODULES:
        for index in range(num_layers):
            name = f"{torch_dist.LAYERS}{module}._extra_state/shard_{index}_{num_layers}"
            states[name] = [None]
    for module in EXTRA_STATE_OUTSIDE:
        states[f"{module}._extra_state/shard_0_1"] = [None]
    return states


def _arguments(
    model: Architecture, padded: int, multiple: int, dtype: str, source: Path
) -> Namespace:
    """Return what Megatron's --use-checkpoint-args and its checks look for, and our export's."""
    settings = {k: v for _, values in megatron_settings(model) for k, v in values.items()}
    return Namespace(
        **settings,
        seq_length=model.max_positions,
        max_position_embeddings=model.max_positions,
        add_position_embedding=True,
        padded_vocab_size=padded,
        make_vocab_size_divisible_by=multiple,  # at the tensor-parallel size of 1 below
        params_dtype=getattr(torch, dtype),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(source.resolve()),
        ckpt_format="torch_dist",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        passes_rotary_interpolation=True,
    )


def _flags(model: Architecture, target: Path, source: Path, dtype: str, divisor: int) -> list[str]:
    """Return Megatron's flags, one string for each with its values."""
    flags = [flag for flag, _ in megatron_settings(model) if flag]
    flags += [
        f"--seq-length {model.max_positions}",
        f"--max-position-embeddings {model.max_positions}",
        "--tokenizer-type HuggingFaceTokenizer",
        f"--tokenizer-model {source}",
        f"--make-vocab-size-divisible-by {divisor}",
        "--ckpt-format torch_dist",
        f"--load {target}",
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
    ]
    return flags + {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(dtype, [])


def _divisor(model: Architecture, num_tokens: int, tensor_parallel: int, divisible_by: int) -> int:
    """Return the --make-vocab-size-divisible-by with which Megatron has a row for each of ours.

    Megatron pads the tokenizer's size; some models (Qwen) have many more rows than tokens.
    """
    if _round_up(num_tokens, divisible_by * tensor_parallel) >= model.vocab_size:
        return divisible_by
    return _round_up(math.ceil(model.vocab_size / tensor_parallel), divisible_by)


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _notes(
    model: Architecture, longer: Architecture | None, tensor_parallel: int, padded: int
) -> list[str]:
    notes = [
        f"the vocabulary is padded from {model.vocab_size:,} to {padded:,} rows, as "
        f"--tensor-model-parallel-size {tensor_parallel} has it. At another size N keep them: "
        f"--make-vocab-size-divisible-by {padded}/N."
    ]
    if model.rope.kind == "linear":
        notes.append(
            "--rotary-seq-len-interpolation-factor has an effect from Megatron-LM 0.19 on only."
        )
    if model.rope.yarn is not None:
        notes.append("--position-embedding-type yarn is for Megatron-LM from 0.19 on.")
    if longer is not None:
        notes.append(
            f"rotary base {model.rope.base:,} for {model.max_positions:,} positions becomes "
            f"{longer.rope.base:,} for {longer.max_positions:,}. --rotary-base chooses another."
        )
    return notes
