"""Counts parameters and FLOPs as Megatron does from its own flags; run by test_costs.py.

Reads a JSON list of command lines from stdin and prints a list of (parameters, FLOPs of a batch).
The model of a hybrid layout is not built, as Mamba's kernels want a GPU: its parameters are null.
Its own process, because Megatron's parser and parallel state are global. Weights lie on torch's
meta device.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

import torch

# None of these changes a shape.
FOR_ANY_MACHINE = [
    *("--use-cpu-initialization", "--no-persist-layer-norm", "--transformer-impl", "local"),
    *("--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion"),
    *("--micro-batch-size", "1", "--lr", "1e-3"),
]


def main() -> None:
    """Print the parameter counts as JSON, on the last line."""
    warnings.filterwarnings("ignore")
    os.environ.update(RANK="0", WORLD_SIZE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    from megatron.core import parallel_state

    from megatron_skyladder.cpu.megatron import attend_with_narrower_values

    attend_with_narrower_values()
    torch.cuda.current_device = lambda: "meta"  # type: ignore[assignment,return-value]
    logging.disable(logging.WARNING)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    counts = [count(flags) for flags in json.load(sys.stdin)]
    print(json.dumps(counts))


def count(flags: list[str]) -> tuple[int | None, float]:
    """Return the parameters of what Megatron builds from these flags, and its FLOPs of a batch."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import num_floating_point_operations
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    sys.argv = ["pretrain_gpt.py", *flags, *FOR_ANY_MACHINE]
    args = parse_args()
    tensor_parallel, args.tensor_model_parallel_size = args.tensor_model_parallel_size, 1
    validate_args(args)
    args.padded_vocab_size = args.padded_vocab_size or calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, tensor_parallel, False
    )
    parameters = None if args.hybrid_layer_pattern else built(args)
    return parameters, float(num_floating_point_operations(args, args.global_batch_size))


def built(args: Any) -> int:
    """Return the parameters of a GPT, built on the meta device."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    spec = get_gpt_layer_local_spec(
        qk_layernorm=args.qk_layernorm,
        normalization=args.normalization,
        multi_latent_attention=args.multi_latent_attention,
    )
    last = spec
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(config, False, normalization=args.normalization)
        last = spec.layer_specs[-1]
    heads = get_gpt_mtp_block_spec(config, last, False) if args.mtp_num_layers else None
    with torch.device("meta"):
        model = GPTModel(
            config,
            spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            mtp_block_spec=heads,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
