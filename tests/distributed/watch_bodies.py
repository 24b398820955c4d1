"""What the ranks of the runs in test_watch do besides `recorded_training`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import recorded_training
import torch


def train(
    folder: str, evaluation_window: int | None = None, count_dense: bool = False, **arguments: Any
) -> None:
    """Train as `recorded_training.train` does.

    Args:
        folder: gets ``watch.<rank>.jsonl`` too.
        evaluation_window: hand stock Megatron a dense mask of blocked windows in validation.
        count_dense: count the visible pairs of every training row in its dense mask.
        arguments: those of `recorded_training.train`.
    """
    file = (Path(folder) / f"watch.{os.environ['RANK']}.jsonl").open("a", buffering=1)
    if evaluation_window is not None:
        _evaluate_densely(evaluation_window)
    if count_dense:
        _count_densely(file)
    _note_state_after_evaluation(file)
    recorded_training.train(folder, **arguments)


def _evaluate_densely(window: int) -> None:
    from megatron_skyladder.megatron_lm import batches
    from megatron_skyladder.testing import megatron_dense_mask

    get_batch = batches.get_batch

    def get_batch_with_mask(data_iterator: Any, *, training: bool, **kwargs: Any) -> Any:
        batch, mask = get_batch(data_iterator, training=training, **kwargs)
        if not training:
            tokens = batch["tokens"].numpy()
            mask = megatron_dense_mask(tokens, window_len=window, eod=None, sliding=False)
        return batch, mask

    batches.get_batch = get_batch_with_mask


def _count_densely(file: Any) -> None:
    from megatron.training import training

    from megatron_skyladder.ladder import clock
    from megatron_skyladder.megatron_lm import batches, compat
    from megatron_skyladder.testing import megatron_dense_mask

    get_batch = batches.get_batch
    count_flops = training.num_floating_point_operations  # before anything is hooked

    def counting_get_batch(data_iterator: Any, *, training: bool, **kwargs: Any) -> Any:
        batch, mask = get_batch(data_iterator, training=training, **kwargs)
        if recorded_training.probing():
            return batch, mask
        if training and batch["tokens"] is not None:
            config = clock.current().config
            hidden = megatron_dense_mask(
                batch["tokens"].numpy(),
                window_len=clock.current().window(training=True),
                eod=compat.eod_token() if config.intra_document else None,
                sliding=config.mask == "sliding",
            )
            options, rows, pairs = compat.args(), len(batch["tokens"]), int((~hidden).sum())
            entry = {
                "samples": options.consumed_train_samples,
                "rows": rows,
                "pairs": pairs,
                # sum of l^2 over fragments, of which l (l + 1) / 2 pairs are visible
                "flops": count_flops(
                    options, rows, seqlen_squared_sum_in_batch=2 * pairs - rows * options.seq_length
                ),
                "fragments": None if mask is None else len(mask) - 1,
            }
            file.write(json.dumps(entry) + "\n")
        return batch, mask

    batches.get_batch = counting_get_batch


def _note_state_after_evaluation(file: Any) -> None:
    """Write down what an evaluation must leave as it was, and how many rows went forward."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.training import training

    from megatron_skyladder.megatron_lm import compat

    original = training.evaluate_and_print_results

    def evaluate_and_print_results(prefix: str, step: Any, data: Any, model: Any, *args: Any, **kw):
        rows = 0

        def count(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal rows
            labels = named.get("labels")
            rows += 0 if labels is None else len(labels)

        hooks = [chunk.register_forward_pre_hook(count, with_kwargs=True) for chunk in model]
        result = original(prefix, step, data, model, *args, **kw)
        for hook in hooks:
            hook.remove()
        options = compat.args()
        states = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
        digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states))
        entry = {
            "consumed_valid_samples": options.consumed_valid_samples,
            "consumed_train_samples": options.consumed_train_samples,
            "random_states": digest.hexdigest(),
            "training": [chunk.training for chunk in model],
            "rows_forward": rows,
        }
        file.write(json.dumps(entry) + "\n")
        return result

    training.evaluate_and_print_results = evaluate_and_print_results
