"""What SkyLadder does at the events of a run of Bridge."""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.megatron_bridge import (
    checkpoints,
    data_check,
    evaluate,
    refusals,
    settings,
)
from megatron_skyladder.megatron_bridge.adapter import MegatronBridge
from megatron_skyladder.megatron_bridge.console import show_warnings
from megatron_skyladder.megatron_bridge.spelling import translated
from megatron_skyladder.megatron_bridge.step import ForwardStep, refuse_other_sequences
from megatron_skyladder.megatron_bridge.training_log import TrainingLog
from megatron_skyladder.runtime import (
    attention_present,
    kept_keys,
    resuming,
    same_settings,
    trainer,
)
from megatron_skyladder.runtime.probe import first_of_all, probe_mask
from megatron_skyladder.runtime.probe.moments import sequence_faults
from megatron_skyladder.runtime.probe.sequences import made_up

logger = logging.getLogger(__name__)


class LadderCallback(Callback):
    """All of it, in the order of a run.

    Args:
        config: what came of the settings.
        flags: the settings, as flags would have set them.
        bridge: whoever trains.
        step: the forward step.
    """

    def __init__(
        self,
        config: SkyLadderConfig,
        flags: Namespace,
        bridge: MegatronBridge,
        step: ForwardStep,
    ) -> None:
        self._config = config
        self._flags = flags
        self._bridge = bridge
        self._step = step
        self._guards: list[Any] = []
        self._log: TrainingLog | None = None

    @translated()
    def on_data_init_start(self, context: CallbackContext) -> None:
        """Check what could not be checked before: the finished configuration, the checkpoint."""
        show_warnings()
        state = context.state
        self._bridge.begin(state, context.model)
        same_settings.check(clock.current().config)
        options = settings.options_of(state.cfg, self._flags)
        refusals.check(state.cfg, finished=True)
        self._check_unchanged(options)
        self._check_checkpoint(state, options)
        if self._config.intra_document:
            data_check.check(self._config, state.cfg, self._bridge.end_of_document)

    def _check_unchanged(self, options: Namespace) -> None:
        finished = settings.config_of(options)
        if finished != self._config:
            raise UsageError(
                "the configuration was changed after SkyLadder was applied to it.\n"
                f"  applied:  {self._config.fingerprint}\n  finished: {finished.fingerprint}\n"
                "Call apply last, after all overrides."
            )

    def _check_checkpoint(self, state: Any, options: Namespace) -> None:
        allowed = bool(getattr(options, "skyladder_allow_schedule_change", None))
        checkpoint = checkpoints.loaded(state, may_be_unknown=allowed)
        if checkpoint is None:
            return
        resuming.check(checkpoint, options)

    def on_train_start(self, context: CallbackContext) -> None:
        """Try the mask on the real model; then watch the first step."""
        attention_present.check(context.model)
        self._log = TrainingLog(context.state.cfg)
        kept_keys.announce(context.model, clock.current())
        if self._config.probe:
            # Bridge shows its callbacks no data, so the sequences are made up, documents included
            iterators = [iter([made_up(self._bridge)]) for _ in context.model]
            step = functools.partial(self._step, context.state)
            several = len(iterators) > 1
            probe_mask(context.model, clock.current(), step, iterators if several else iterators[0])
        self._step.first_batches = {}
        self._guards = [
            chunk.register_forward_pre_hook(self._check_step) for chunk in context.model
        ]

    def _check_step(self, chunk: Any, _: Any) -> None:
        """Refuse a model that is called by another forward step, before it has learnt anything."""
        if chunk.training and not self._step.is_running:
            raise UsageError(
                "the model is called by another forward step than SkyLadder's, which masks no "
                "documents and measures no losses by length. Give pretrain the one that apply "
                "returned: "
                "pretrain(cfg, ladder.forward_step, callbacks=ladder.callbacks)."
            )

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Begin with the step's window and without the masks of the step before."""
        trainer.begin_step()

    @translated()
    def on_train_step_end(self, context: CallbackContext) -> None:
        """Count the step, and log it where that is due."""
        if self._guards:
            self._end_first_step()
        assert self._log is not None
        self._log.end_step(context.state)

    def _end_first_step(self) -> None:
        """See that the ranks of one model have read the same sequences; all ranks call this."""
        for guard in self._guards:
            guard.remove()
        batches, self._step.first_batches = self._step.first_batches or {}, None
        self._guards = []
        faults = sequence_faults(
            self._bridge, list(batches.values()), documents=self._config.intra_document
        )
        fault = first_of_all(faults[0] if faults else None)  # or one rank would raise, others wait
        if fault is not None:
            refuse_other_sequences(fault)

    def on_eval_start(self, context: CallbackContext) -> None:
        """Record what losses by length are to be measured on."""
        evaluate.begin(self._step, context.state, context.model)

    def on_eval_end(self, context: CallbackContext) -> None:
        """Measure them."""
        losses = context.total_loss_dict
        assert losses is not None
        evaluate.end(self._step, context.state, context.model, losses)

    on_test_start, on_test_end = on_eval_start, on_eval_end
