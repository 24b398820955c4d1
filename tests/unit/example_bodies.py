"""What the processes of test_examples.py and test_weights.py run, inside Megatron."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def parse_all(command_lines: dict[str, list[str]], world_size: int, results: str) -> None:
    """Put command lines through Megatron's parser and checks, and ours; write what came out."""
    found = {}
    for name, words in command_lines.items():
        options, config = _parse(words, world_size)
        found[name] = {
            "data_parallel_size": options.data_parallel_size,
            "padded_vocab_size": options.padded_vocab_size,
            "params_dtype": str(options.params_dtype),
            "weight_decay": options.weight_decay,
            "schedule": config.fingerprint,
            "init": config.init,
        }
    Path(results).write_text(json.dumps(found))


def build_on_meta(command_lines: dict[str, list[str]], results: str) -> None:
    """Build each full-size model with Megatron's own code, without memory for its weights."""
    import torch

    found = {}
    for name, words in command_lines.items():
        options = _prepare_model([*words, "--use-cpu-initialization"])
        with torch.device("meta"):
            model = _model(options)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    Path(results).write_text(json.dumps(found))


def train(words: list[str]) -> None:
    """Train as the launcher does."""
    from megatron_skyladder import pretrain_gpt

    sys.argv = ["pretrain_gpt", *words]
    pretrain_gpt.main()


def _parse(words: list[str], world_size: int) -> tuple[Any, Any]:
    from megatron.core import num_microbatches_calculator
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import destroy_global_vars

    from megatron_skyladder.cpu.megatron import set_argument_defaults
    from megatron_skyladder.ladder.flags import add_arguments, config_from_args

    def add_all(parser: Any) -> Any:
        set_argument_defaults(parser)
        return add_arguments(parser)

    destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = ["pretrain_gpt", *words]
    options = parse_and_validate_args(extra_args_provider=add_all, args_defaults={})
    return options, config_from_args(options)


def _prepare_model(words: list[str]) -> Any:
    """Parse, and set up what a model is built with."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    options, _ = _parse(words, int(os.environ["WORLD_SIZE"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(options.tensor_model_parallel_size)
        model_parallel_cuda_manual_seed(options.seed)
    return options


def _model(options: Any) -> Any:
    from megatron_skyladder.megatron_lm import launch

    return launch.gpt_model(pre_process=True, post_process=True)
