"""Pretrain a GPT, or a HybridModel, with a growing attention window, on Megatron's own trainer.

    torchrun ... -m megatron_skyladder.pretrain_gpt <Megatron's flags> --skyladder-*

Without a GPU: ``SKYLADDER_DEVICE=cpu``. Without any ``--skyladder-*`` flag this is stock Megatron.
``--hybrid-layer-pattern`` builds Megatron's HybridModel in the place of its GPTModel.
"""

from __future__ import annotations

import logging
import sys
import time
from functools import partial
from typing import Any

from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.runtime.console import log_to_console
from megatron_skyladder.runtime.ending import explained

_STARTED = time.time()  # for Megatron's report on what the start-up took
logger = logging.getLogger("megatron_skyladder.pretrain_gpt")  # __name__ is __main__ here
SPIKY_LOSS_FACTOR = 10  # a loss this many times the largest so far is spiky, as in Megatron


def forward_step(
    data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run one micro-batch through one pipeline stage; Megatron's ``forward_step_func``.

    Args:
        data_iterator: yields batches on the ranks that read data.
        model: this stage's model chunk.
        return_schedule_plan: whether to return the model's plan of the step instead of its output,
            which Megatron asks for under ``--overlap-moe-expert-parallel-comm``.
    """
    from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
    from megatron.training import get_timers

    from megatron_skyladder.megatron_lm.batches import get_batch

    timers, straggler = get_timers(), StragglerDetector()  # the process's only one
    timers("batch-generator", log_level=2).start()
    with straggler(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch, mask = get_batch(data_iterator, vp_stage=vp_stage, training=model.training)
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    with straggler:
        output = run(
            batch["tokens"],
            batch["position_ids"],
            mask,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(loss_func, batch["loss_mask"], model=model)


def loss_func(loss_mask: Any, losses: Any, model: Any = None) -> tuple[Any, Any, dict[str, Any]]:
    """Sum the losses of a micro-batch and check them, as stock ``pretrain_gpt.py`` does.

    Args:
        loss_mask: float [b, s], 1 where a token counts.
        losses: float [b, s], per token.
        model: this stage's model chunk, which Megatron's own passes too; not looked at.

    Returns:
        The summed loss, the number of tokens that count, and what Megatron logs.
    """
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    options = get_args()
    rerun = get_rerun_state_machine()
    if options.check_for_nan_in_loss_and_grad:
        for test, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            rerun.validate_result(
                result=loss,
                rejection_func=test,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if options.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(
                rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Build the training, validation and test sets; Megatron's datasets provider.

    Megatron's classes and order; only which ranks read them depends on us: with documents masked
    every pipeline stage needs the sequences.
    """
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    from megatron_skyladder.ladder import clock
    from megatron_skyladder.megatron_lm import compat

    options = get_args()

    def is_built_on_rank() -> bool:
        if mpu.get_tensor_model_parallel_rank() != 0:
            return False
        return clock.documents_masked() or compat.needs_sequences(vp_stage)

    dataset_class = MockGPTDataset if options.mock_data else GPTDataset
    config = compat.gpt_dataset_config(options)
    return BlendedMegatronDatasetBuilder(
        dataset_class, num_samples, is_built_on_rank, config
    ).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks for it


def main() -> None:
    """Train."""
    log_to_console()
    with explained():
        releases.check_for_our_start(releases.installed())
        if {"-h", "--help"} & set(sys.argv[1:]):
            cpu_engine.install_where_no_gpu()
            _print_help()
            return
        cpu_engine.install_or_check_device()
        _launch()


def _print_help() -> None:
    from megatron_skyladder.megatron_lm import launch, patch_calls

    launch.print_help(patch_calls.add_arguments)


def _launch() -> None:
    from megatron_skyladder.megatron_lm import flag_rules, hooks, launch, patch_calls, resume

    def on_arguments(options: Any) -> None:
        flag_rules.check_arrival(options, sys.argv[1:])
        flag_rules.check_entry_point(options)
        config = resume.config_of_run(options)
        if config is not None:
            patch_calls.check_other_masks(config)
            hooks.install(config, options)
        else:
            _warn_of_unequal_parts(options)

    hooks.install_guards()
    launch.launch(
        datasets_provider,
        forward_step,
        extra_args_provider=patch_calls.add_arguments,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        on_arguments=on_arguments,
        started=_STARTED,
    )


def _warn_of_unequal_parts(options: Any) -> None:
    """Say where stock Megatron's gradients are not those of one process."""
    if (
        options.context_parallel_size > 1
        and options.eod_mask_loss
        and not options.calculate_per_token_loss
    ):
        logger.warning(
            "--eod-mask-loss with --context-parallel-size=%d: Megatron divides the loss of each "
            "rank's part of a sequence by the part's own count of tokens, so gradients are not "
            "those of one process. Add --calculate-per-token-loss, or any --skyladder-* flag (such "
            "as --skyladder-schedule constant), under which whole sequences are counted.",
            options.context_parallel_size,
            extra=SAME_ON_ALL_RANKS,
        )


if __name__ == "__main__":
    main()
