"""Calls into Megatron that differ between releases; nothing else has to know that they do.

A difference is asked of the installed Megatron by signature where that tells, and of the table in
`releases` where it does not.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu

from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_lm.releases import MegatronMismatchError

RENAMED_FIELDS = {  # of GPTDatasetConfig: the argument that each takes
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}


def args() -> Any:
    """Return Megatron's global arguments."""
    from megatron.training import get_args

    return get_args()


def eod_token() -> int:
    """Return the tokenizer's end-of-document id.

    Raises:
        UsageError: the tokenizer has none.
    """
    from megatron.training import get_tokenizer

    try:
        eod = get_tokenizer().eod
    except (AttributeError, NotImplementedError):
        eod = None
    if eod is None:
        raise UsageError(
            f"--skyladder-intra-document needs the end-of-document token, but the tokenizer "
            f"({args().tokenizer_type}) has none. Use a tokenizer that has one, or leave the flag "
            "out."
        )
    return int(eod)


def pad_token() -> int | None:
    """Return the tokenizer's padding id, as Megatron's datasets ask for it."""
    from megatron.training import get_tokenizer

    try:
        return get_tokenizer().pad
    except Exception:  # what a tokenizer without one raises is its own affair
        return None


def training_data(options: Any) -> list[str]:
    """Return the path of each .bin/.idx pair that training reads, without the suffix."""
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(options)
    training = blend or (blend_per_split or [None])[0]
    return list(training[0]) if training else []


def padded_vocab_size() -> int:
    """Return the size of the embedding table."""
    return args().padded_vocab_size


def needs_sequences(vp_stage: int | None) -> bool:
    """Return whether this (virtual) stage embeds tokens or computes the loss."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return is_first_or_last_pipeline_stage(vp_stage) or has_prediction_heads(vp_stage)


def has_prediction_heads(vp_stage: int | None) -> bool:
    """Return whether this (virtual) stage holds heads of multi-token prediction."""
    options = args()
    if not getattr(options, "mtp_num_layers", None):
        return False
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

    layout = options.pipeline_model_parallel_layout
    if layout is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        layout = PipelineParallelLayerLayout(layout, options.pipeline_model_parallel_size)
    return bool(
        mtp_on_this_rank(
            layout=layout,
            mtp_num_layers=options.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def tp_batch(
    data_iterator: Any, vp_stage: int | None = None, *, training: bool
) -> dict[str, torch.Tensor | None]:
    """Read a batch on tensor-parallel rank 0 and share it with the group, as Megatron does.

    Args:
        data_iterator: None on the other ranks.
        vp_stage: the virtual pipeline stage, where there are several.
        training: False in evaluation.
    """
    from megatron.core import utils

    share = getattr(utils, "get_batch_on_this_tp_rank", None)
    if share is None:  # up to 0.17 it lies with the trainer and reads the batch itself
        from megatron.training.utils import get_batch_on_this_tp_rank as read_and_share

        return read_and_share(data_iterator)
    options = args()
    batch: dict[str, Any] = {}
    if data_iterator is not None:
        host = next(data_iterator)
        batch = {
            key: host[key].cuda(non_blocking=True) if host.get(key) is not None else None
            for key in ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
        }
    known = {
        "broadcast_src_rank": mpu.get_tensor_model_parallel_src_rank(),
        "broadcast_group": mpu.get_tensor_model_parallel_group(),
        "is_sft": False,
        "has_cu_seqlens": False,
        "is_hybrid_cp": False,
        "create_attention_mask_in_dataloader": options.create_attention_mask_in_dataloader,
        "cp_size": options.context_parallel_size,
        "tp_rank": mpu.get_tensor_model_parallel_rank(),
        "micro_batch_size": _micro_batch_size(batch, training=training),
        "seq_length": options.seq_length,
        "mtp_on_this_rank": has_prediction_heads(vp_stage),
        "pipeline_model_parallel_size": options.pipeline_model_parallel_size,
        "is_pipeline_first_stage": mpu.is_pipeline_first_stage(),
        "is_pipeline_last_stage": mpu.is_pipeline_last_stage(),
    }
    return share(batch, **_accepted(share, known))


def _micro_batch_size(batch: dict[str, Any], *, training: bool) -> int:
    """Return the sequences of a micro-batch, for which ranks that do not read make room.

    In evaluation the rank that reads says it where sizes differ: validation may have another one
    than training (--eval-micro-batch-size, or 1 under --full-validation, but not the test after
    it), and the mask probe asks about evaluation with a micro-batch of training.

    Args:
        batch: on tensor-parallel rank 0; empty on the others.
        training: False in evaluation.
    """
    options = args()
    size: int = options.micro_batch_size
    varies = (getattr(options, "eval_micro_batch_size", None) or size) != size
    varies = varies or getattr(options, "full_validation", False)
    if training or not varies or mpu.get_tensor_model_parallel_world_size() == 1:
        return size
    num_rows = torch.tensor(len(batch["tokens"]) if batch else 0, device="cuda")
    source = mpu.get_tensor_model_parallel_src_rank()
    torch.distributed.broadcast(num_rows, source, group=mpu.get_tensor_model_parallel_group())
    return int(num_rows)


def cp_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut a batch to this context-parallel rank's zigzag part, as Megatron does."""
    from megatron.core import utils

    cut = utils.get_batch_on_this_cp_rank
    known = {"is_hybrid_cp": False, "cp_group": mpu.get_context_parallel_group()}
    return cut({"cu_seqlens": None, **batch}, **_accepted(cut, known))


def gpt_dataset_config(options: Any) -> Any:
    """Build Megatron's GPTDatasetConfig from the arguments, with the fields this release has."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(options)
    values = {"blend": blend, "blend_per_split": blend_per_split, "tokenizer": get_tokenizer()}
    values["sequence_parallel_size"] = (
        options.tensor_model_parallel_size * options.sequence_parallel
    )
    if options.per_dataset_sequences_path is not None:
        with open(options.per_dataset_sequences_path, encoding="utf-8") as file:
            values["sequences_per_dataset"] = json.load(file)
    fields = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    for field in fields - values.keys():
        source = RENAMED_FIELDS.get(field, field)
        if hasattr(options, source):
            values[field] = getattr(options, source)
    return GPTDatasetConfig(**{name: values[name] for name in values if name in fields})


def _accepted(function: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the known arguments that the function of this release takes.

    Raises:
        MegatronMismatchError: it needs one that is not known.
    """
    parameters = inspect.signature(function).parameters
    missing = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty and name not in known
    ]
    if missing:
        raise MegatronMismatchError(
            f"Megatron's {function.__module__}.{function.__name__} needs {', '.join(missing)}, "
            "which SkyLadder does not know. Use a tested release (see the README)."
        )
    return {name: value for name, value in known.items() if name in parameters}
