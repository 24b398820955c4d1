"""The oracle of recurrent layers: stock Megatron, each fragment run as a sequence of its own."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_models import small_config

SEQ_LENGTH, WINDOW, VOCAB_SIZE = 64, 13, 128
DOCUMENT_ENDS = ([5, 23, 24, 50], [17, 40])  # of two sequences
SIZES = {  # of the small model's recurrent layers
    **{"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_num_heads": 8},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 4},
}


def compare(pattern: str, results: str) -> None:
    """Write the largest difference of a token's loss, and how much the cut itself matters."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    generator = torch.Generator().manual_seed(3)
    shape = (len(DOCUMENT_ENDS), SEQ_LENGTH)
    tokens, labels = (torch.randint(VOCAB_SIZE, shape, generator=generator) for _ in range(2))
    stock = _model(pattern)  # before anything of Megatron is changed
    with torch.no_grad():
        whole = _losses(stock, tokens, labels)
        alone = torch.empty_like(whole)
        for row, ends in enumerate(DOCUMENT_ENDS):
            grid = range(0, SEQ_LENGTH + WINDOW, WINDOW)
            cuts = sorted({min(at, SEQ_LENGTH) for at in (*ends, *grid)})
            for start, end in pairwise(cuts):
                part = (slice(row, row + 1), slice(start, end))
                alone[part] = _losses(stock, tokens[part], labels[part])
    ours = _losses_under_windows(pattern, stock, tokens, labels)
    found = {
        "difference": float((ours - alone).abs().max()),
        "effect": float((whole - alone).abs().max()),
    }
    Path(results).write_text(json.dumps(found))


def _model(pattern: str) -> Any:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    config = small_config(
        num_layers=len(pattern),
        **SIZES,
    )
    return HybridModel(
        config,
        hybrid_stack_spec,
        VOCAB_SIZE,
        SEQ_LENGTH,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
    )


def _losses(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a loss for each token of sequences that stock attention sees whole, causally."""
    length = tokens.shape[1]
    hidden = torch.ones(1, 1, length, length).triu(1).bool()
    positions = torch.arange(length).expand_as(tokens)
    return model(tokens, positions, hidden, labels=labels)


def _losses_under_windows(
    pattern: str, stock: Any, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    from megatron_skyladder.ladder import clock, fragments
    from megatron_skyladder.ladder.config import SkyLadderConfig
    from megatron_skyladder.ladder.schedules.constant import Constant
    from megatron_skyladder.megatron_lm import compat, hooks
    from megatron_skyladder.runtime import trainer
    from megatron_skyladder.testing.trainer import PlainTrainer

    config = SkyLadderConfig(
        schedule=Constant(final_window=WINDOW),
        seq_length=SEQ_LENGTH,
        step_samples=8,
        intra_document=True,
        recurrent_state="fragments",
    )
    trainer.install(config, PlainTrainer(seq_length=SEQ_LENGTH))
    assert clock.current().window(training=True) == WINDOW
    compat.args = argparse.Namespace  # type: ignore[assignment]  # models ask for flags: none given
    states = (hook for symbol in "MG" if symbol in pattern for hook in hooks.STATES[symbol])
    of_model = (hook for hook in hooks.HOOKS if hook.of_hybrid_model)
    for hook in (*of_model, *states):
        hooks._wrap(hook)
    model = _model(pattern)
    model.load_state_dict(stock.state_dict(), strict=False)
    rows = [
        fragments.fragment_cu_seqlens(np.array(ends), seq_length=SEQ_LENGTH, window_len=WINDOW)
        for ends in DOCUMENT_ENDS
    ]
    mask = torch.from_numpy(fragments.rows_cu_seqlens(rows))
    positions = torch.arange(SEQ_LENGTH).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, mask, labels=labels)
