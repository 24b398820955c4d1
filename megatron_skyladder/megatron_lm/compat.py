"""Calls into Megatron that differ between releases; nothing else has to know that they do.

A difference is asked of the installed Megatron by signature where that tells, and of the table in
`releases` where it does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu

from megatron_skyladder.layer_specs import gpt_layer_spec
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.megatron_lm.releases import MegatronMismatchError, Trainer


def args() -> Any:
    """Return Megatron's global arguments."""
    from megatron.training import get_args

    return get_args()


def eod_token() -> int:
    """Return the tokenizer's end-of-document id.

    Raises:
        ValueError: the tokenizer has none.
    """
    from megatron.training import get_tokenizer

    try:
        eod = get_tokenizer().eod
    except (AttributeError, NotImplementedError):
        eod = None
    if eod is None:
        raise ValueError(
            f"--skyladder-intra-document needs the end-of-document token, but the tokenizer "
            f"({args().tokenizer_type}) has none. Use a tokenizer that has one, or leave the flag "
            "out."
        )
    return int(eod)


def padded_vocab_size() -> int:
    """Return the size of the embedding table."""
    return args().padded_vocab_size


def is_first_or_last_pipeline_stage(vp_stage: int | None) -> bool:
    """Return whether this (virtual) stage embeds tokens or computes the loss."""
    from megatron.training.utils import is_first_or_last_pipeline_stage as is_first_or_last

    return is_first_or_last(vp_stage)


def tp_batch(data_iterator: Any) -> dict[str, torch.Tensor | None]:
    """Read a batch on tensor-parallel rank 0 and share it with the group, as Megatron does.

    Args:
        data_iterator: None on the other ranks.
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
        "create_attention_mask_in_dataloader": False,
        "cp_size": options.context_parallel_size,
        "tp_rank": mpu.get_tensor_model_parallel_rank(),
        "micro_batch_size": options.micro_batch_size,
        "seq_length": options.seq_length,
        "mtp_on_this_rank": False,
        "pipeline_model_parallel_size": options.pipeline_model_parallel_size,
        "is_pipeline_first_stage": mpu.is_pipeline_first_stage(),
        "is_pipeline_last_stage": mpu.is_pipeline_last_stage(),
    }
    return share(batch, **_accepted(share, known))


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
    renamed = {
        "random_seed": "seed",
        "sequence_length": "seq_length",
        "path_to_cache": "data_cache_path",
        "fast_cache_load": "dataloader_fast_cache_load",
        "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    }
    values = {"blend": blend, "blend_per_split": blend_per_split, "tokenizer": get_tokenizer()}
    values["create_attention_mask"] = False  # the attention does not take a dense mask
    for field in dataclasses.fields(GPTDatasetConfig):
        source = renamed.get(field.name, field.name)
        if field.name not in values and hasattr(options, source):
            values[field.name] = getattr(options, source)
    return GPTDatasetConfig(**values)


def launch(
    datasets_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    *,
    extra_args_provider: Callable[[Any], Any],
    args_defaults: dict[str, Any],
    on_arguments: Callable[[Any], None],
) -> None:
    """Run Megatron's ``pretrain``.

    Args:
        datasets_provider: Megatron's ``train_valid_test_datasets_provider``.
        forward_step: Megatron's ``forward_step``.
        extra_args_provider: adds our flags to Megatron's parser.
        args_defaults: Megatron's defaults for flags that were not given.
        on_arguments: called with the validated arguments, before any model is built.
    """
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain

    trainer = releases.release_of(releases.installed()).trainer
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    ours = {"extra_args_provider": extra_args_provider, "args_defaults": args_defaults}
    if trainer is Trainer.PARSES_ARGUMENTS:
        _after_initialization(lambda: on_arguments(args()))
        model_type = ModelType.encoder_or_decoder
        pretrain(datasets_provider, gpt_model, model_type, forward_step, store=store, **ours)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    options = parse_and_validate_args(**ours)
    on_arguments(options)
    model_config, provider = None, [gpt_model]
    if trainer is Trainer.TAKES_MODEL_CONFIG:
        from megatron.training.argument_utils import gpt_config_from_args

        model_config, provider = gpt_config_from_args(options), []
    pretrain(
        pretrain_cfg_container_from_args(options, model_config),
        datasets_provider,
        *provider,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
    )


def gpt_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build one model chunk; Megatron's ``model_provider``, where it takes one (up to 0.18)."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    options = args()
    config = config or core_transformer_config_from_args(options)
    return GPTModel(
        config=config,
        transformer_layer_spec=gpt_layer_spec(options, config, vp_stage),
        vocab_size=options.padded_vocab_size,
        max_sequence_length=options.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=options.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not options.untie_embeddings_and_output_weights,
        position_embedding_type=options.position_embedding_type,
        rotary_percent=options.rotary_percent,
        rotary_base=options.rotary_base,
        rope_scaling=options.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _after_initialization(action: Callable[[], None]) -> None:
    """Do something once Megatron's ``pretrain`` has parsed the arguments, before the model."""
    from megatron.training import training

    initialize = training.initialize_megatron

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        result = initialize(*args, **kwargs)
        action()
        return result

    training.initialize_megatron = initialize_megatron


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
