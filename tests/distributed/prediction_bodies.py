"""The oracle of prediction heads: stock Megatron, each fragment run as a sequence of its own."""

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
NUM_HEADS = 2


def compare(results: str) -> None:
    """Write by how much gradients differ, and how much Megatron's own shift would change them.

    The gradients are those of the main losses, summed, and of the heads' losses, of which Megatron
    takes the mean over the tokens that count: a fragment alone counts for as many as it has.
    """
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    generator = torch.Generator().manual_seed(3)
    shape = (len(DOCUMENT_ENDS), SEQ_LENGTH)
    tokens, labels = (torch.randint(VOCAB_SIZE, shape, generator=generator) for _ in range(2))
    parts = []
    for row, ends in enumerate(DOCUMENT_ENDS):
        grid = range(0, SEQ_LENGTH + WINDOW, WINDOW)
        cuts = sorted({min(at, SEQ_LENGTH) for at in (*ends, *grid)})
        parts += [(slice(row, row + 1), slice(*cut)) for cut in pairwise(cuts)]
    stock = _model()  # before anything of Megatron is changed
    weights = {
        name: value.clone() for name, value in stock.state_dict().items() if value is not None
    }
    counts = [_counting(tokens[part]) for part in parts]
    losses = torch.empty(shape)
    alone: dict[str, torch.Tensor] = {}
    for depth in range(1, NUM_HEADS + 1):  # one head after the other: each has a mean of its own
        total = sum(count[depth - 1] for count in counts)
        for part, count in zip(parts, counts, strict=True):
            share = count[depth - 1] / total
            losses[part], found = _run(stock, tokens[part], labels[part], depth, share)
            _add(alone, found)
    whole = _gradients_of_depths(stock, tokens, labels, _hidden(SEQ_LENGTH))
    ours_losses, ours = _under_windows(weights, tokens, labels)
    written = {
        "losses": float((ours_losses - losses).abs().max()),
        "gradients": _largest(ours, alone),
        "effect": _largest(whole, alone),
        "of_heads": sum(name.startswith("mtp.") for name in alone),
    }
    Path(results).write_text(json.dumps(written))


def _counting(tokens: torch.Tensor) -> list[int]:
    """Return how many tokens count for the head of each depth: those with a token to be shown."""
    return [max(0, tokens.shape[1] - depth) for depth in range(1, NUM_HEADS + 1)]


def _add(total: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        total[name] = total.get(name, 0) + gradient


def _largest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest error of a parameter's gradient, relative to its norm."""
    assert found.keys() == wanted.keys()
    errors = [(found[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted]
    return float(max(errors))


def _model() -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    config = small_config(
        num_layers=2,
        mtp_num_layers=NUM_HEADS,
        mtp_loss_scaling_factor=1.0,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    heads = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
    return GPTModel(
        config,
        layer,
        VOCAB_SIZE,
        SEQ_LENGTH,
        position_embedding_type="rope",
        mtp_block_spec=heads,
    )


def _hidden(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length).triu(1).bool()


def _run(
    model: Any, tokens: torch.Tensor, labels: torch.Tensor, depth: int, share: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a fragment's losses, and the gradients of one head with the main losses' part."""
    losses, gradients = _backward(model, tokens, labels, _hidden(tokens.shape[1]), depth, share)
    return losses, gradients


def _gradients_of_depths(
    model: Any, tokens: torch.Tensor, labels: torch.Tensor, mask: Any
) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for depth in range(1, NUM_HEADS + 1):
        _add(total, _backward(model, tokens, labels, mask, depth, 1.0)[1])
    return total


def _backward(
    model: Any, tokens: torch.Tensor, labels: torch.Tensor, mask: Any, depth: int, share: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run forward and backward with the loss of one head alone, scaled, and the main losses' sum.

    Args:
        depth: of the head, from 1; the others' losses are left out.
        share: factor on the head's loss.
    """
    from megatron.core.transformer import multi_token_prediction

    model.zero_grad()
    scaler, calls = multi_token_prediction.MTPLossAutoScaler, []

    def apply(output: torch.Tensor, head_loss: torch.Tensor) -> torch.Tensor:
        calls.append(head_loss)
        return original(output, head_loss * (share if len(calls) == depth else 0.0))

    original = scaler.apply
    scaler.set_loss_scale(torch.tensor(1.0))
    multi_token_prediction.MTPLossAutoScaler = type("One", (), {"apply": staticmethod(apply)})
    try:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        mask_of_losses = torch.ones(tokens.shape)
        losses = model(tokens, positions, mask, labels=labels, loss_mask=mask_of_losses)
    finally:
        multi_token_prediction.MTPLossAutoScaler = scaler
    assert len(calls) == NUM_HEADS
    losses.sum().backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }
    return losses.detach(), gradients


def _under_windows(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from megatron_skyladder.attention import prediction_heads
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
    )
    trainer.install(config, PlainTrainer(seq_length=SEQ_LENGTH))
    assert clock.current().window(training=True) == WINDOW
    compat.args = argparse.Namespace  # type: ignore[assignment]  # models ask for flags: none given
    for hook in hooks.HOOKS:
        if hook.of_prediction_heads or hook.name == "GPTModel.__init__":
            hooks._wrap(hook)
    assert prediction_heads.can_follow()
    model = _model()
    model.load_state_dict(weights, strict=False)
    rows = [
        fragments.fragment_cu_seqlens(np.array(ends), seq_length=SEQ_LENGTH, window_len=WINDOW)
        for ends in DOCUMENT_ENDS
    ]
    mask = torch.from_numpy(fragments.rows_cu_seqlens(rows))
    losses, _ = _backward(model, tokens, labels, mask, 1, 1.0)
    return losses, _gradients_of_depths(model, tokens, labels, mask)
