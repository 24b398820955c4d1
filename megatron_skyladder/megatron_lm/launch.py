"""Megatron-LM's ``pretrain``, called as each release wants it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.flags import END_LADDER
from megatron_skyladder.megatron_lm import compat, hybrid, releases
from megatron_skyladder.megatron_lm.releases import Trainer
from megatron_skyladder.megatron_lm.spec import gpt_layer_spec

_OUR_FLAGS = "--skyladder-"


def launch(
    datasets_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    *,
    extra_args_provider: Callable[[Any], Any],
    args_defaults: dict[str, Any],
    on_arguments: Callable[[Any], None],
    started: float,
) -> None:
    """Run Megatron's ``pretrain``.

    Args:
        datasets_provider: Megatron's ``train_valid_test_datasets_provider``.
        forward_step: Megatron's ``forward_step``.
        extra_args_provider: adds our flags to Megatron's parser.
        args_defaults: Megatron's defaults for flags that were not given.
        on_arguments: called with the validated arguments, before any model is built.
        started: when this process began to start, in seconds since the epoch.
    """
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps

    trainer = releases.release_of(releases.installed()).trainer
    store = None
    # with flags of ours a restart is refused, on some releases within pretrain: not to be repeated
    if not any(word.startswith(_OUR_FLAGS) and word != END_LADDER for word in sys.argv):
        pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    set_startup_timestamps(program_start=started, main_entry=started)
    ours = {"extra_args_provider": extra_args_provider, "args_defaults": args_defaults}
    others = {"store": store, "get_embedding_ranks": embedding_ranks}
    if trainer is Trainer.PARSES_ARGUMENTS:
        _after_initialization(lambda: on_arguments(compat.args()))
        model_type = ModelType.encoder_or_decoder
        pretrain(datasets_provider, gpt_model, model_type, forward_step, **others, **ours)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    options = parse_and_validate_args(**ours)
    on_arguments(options)
    is_hybrid = hybrid.is_asked_for(options)
    model_config, provider = None, [hybrid.model if is_hybrid else gpt_model]
    if trainer is Trainer.TAKES_MODEL_CONFIG:
        from megatron.training import argument_utils

        configure = (
            argument_utils.hybrid_config_from_args
            if is_hybrid
            else argument_utils.gpt_config_from_args
        )
        model_config, provider = configure(options), []
    pretrain(
        pretrain_cfg_container_from_args(options, model_config),
        datasets_provider,
        *provider,
        ModelType.encoder_or_decoder,
        forward_step,
        **others,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that hold word embeddings, as Megatron's script has it."""
    options = compat.args()
    ranks = {pp_ranks[0]}
    if not options.untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    if options.mtp_num_layers:
        from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
        from megatron.training.arguments import core_transformer_config_from_args

        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(options)))
    return sorted(ranks)


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
    from megatron.training.yaml_arguments import core_transformer_config_from_yaml

    options = compat.args()
    hybrid.check(options)
    if options.record_memory_history:  # it is begun by Megatron's script, up to 0.18
        raise UsageError(
            "--record-memory-history has no effect in SkyLadder's entry point on this release of "
            "Megatron. Run Megatron's own pretrain_gpt.py of a checkout, patched for SkyLadder "
            "(skyladder patch apply DIR), or Megatron 0.19."
        )
    if config is None and options.yaml_cfg is not None:
        config = core_transformer_config_from_yaml(options, "language_model")
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


def print_help(
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> None:
    """Print all flags: Megatron's, and those that ``add_arguments`` adds.

    Megatron itself parses more than once, the first time without added flags.
    """
    from megatron.training import arguments

    parser = argparse.ArgumentParser(
        prog="megatron_skyladder.pretrain_gpt", description="Megatron-LM's flags and SkyLadder's."
    )
    with_printable_help(add_arguments(arguments.add_megatron_arguments(parser))).print_help()


def with_printable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Double the percent signs that argparse would take for formatting.

    Some of Megatron's help texts have them (0.18.2 to 0.19.2), and --help ends in a ValueError.
    """
    for action in parser._actions:
        if action.help and action.help is not argparse.SUPPRESS:
            action.help = re.sub(
                r"%%|%\(\w+\)\w|%",
                lambda found: "%%" if found[0] == "%" else found[0],
                action.help,
            )
    return parser


def _after_initialization(action: Callable[[], None]) -> None:
    """Do something once Megatron's ``pretrain`` has parsed the arguments, before the model."""
    from megatron.training import training

    initialize = training.initialize_megatron

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        result = initialize(*args, **kwargs)
        action()
        return result

    training.initialize_megatron = initialize_megatron
