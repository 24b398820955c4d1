"""Bridge's forward step with the documents' ends in the place of the attention mask.

As ``megatron.bridge.training.gpt_step.forward_step``, of its public parts. Bridge lets only the
first and last pipeline stage read; where documents are masked the middle ones read as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from megatron.bridge.training import gpt_step
from megatron.bridge.training.losses import create_masked_next_token_loss_function
from megatron.bridge.training.utils.flop_utils import (
    accumulate_flops_metadata,
    get_model_chunk_vp_stage,
)
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.utils import get_model_config

from megatron_skyladder.ladder import clock
from megatron_skyladder.megatron_bridge.adapter import MegatronBridge
from megatron_skyladder.runtime.document_mask import HostTap, training_mask
from megatron_skyladder.runtime.evaluation import Taps
from megatron_skyladder.runtime.probe.moments import context_parallel_fault
from megatron_skyladder.runtime.sequence_mean import over_sequences

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState


def refuse_other_sequences(fault: str) -> NoReturn:
    """Raise where ranks read different sequences.

    Args:
        fault: of `sequence_faults`.
    """
    raise RuntimeError(
        f"documents are masked by the sequences that each rank reads, but {fault}. "
        "Look at the dataset: it has to be the same on all ranks of a model."
    )


class ForwardStep:
    """What ``pretrain`` is given in the place of ``gpt_step.forward_step``.

    Args:
        bridge: whoever trains.
    """

    def __init__(self, bridge: MegatronBridge) -> None:
        self._bridge = bridge
        self.is_running = False  # while a model is called from here: the callbacks look
        self.first_batches: dict[int, dict[str, Any]] | None = {}  # by chunk; None: no more
        self.taps: Taps | None = None  # while an evaluation is recorded

    def __call__(
        self,
        state: GlobalState,
        data_iterator: Any,
        model: Any,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, Any]:
        """Run one micro-batch through one model chunk.

        Args:
            state: Bridge's, which it fills in by the parameter's name.
            data_iterator: yields batches of host tensors.
            model: the chunk, as Bridge wraps it.
            return_schedule_plan: whether the model's plan of the step is wanted in the place of
                its output (``overlap_moe_expert_parallel_comm``).

        Returns:
            The output and the loss function.
        """
        self._bridge.state  # noqa: B018  # raises where the callbacks were left out
        state.timers("batch-generator", log_level=2).start()
        with state.straggler_timer(bdata=True):
            tokens, labels, loss_mask, mask, positions = self._batch(state, data_iterator, model)
        state.timers("batch-generator").stop()
        accumulate_flops_metadata(
            state,
            tokens,
            vp_stage=get_model_chunk_vp_stage(model),
            config_seq_len=self._bridge.seq_length,
        )
        self.is_running = True
        with state.straggler_timer:
            if return_schedule_plan:
                output = model.build_schedule_plan(
                    tokens, positions, mask, labels=labels, loss_mask=loss_mask
                )
            else:
                output = model(
                    input_ids=tokens, position_ids=positions, attention_mask=mask, labels=labels
                )
        self.is_running = False
        return output, self._loss(state, model, loss_mask)

    def _batch(self, state: GlobalState, data_iterator: Any, model: Any) -> tuple[Any, ...]:
        """Return tokens, labels, loss mask, attention mask and positions of this rank's part."""
        chunk = get_model_chunk_vp_stage(model)
        tap = HostTap(data_iterator)
        tokens, labels, loss_mask, mask, positions, packed = gpt_step.get_batch(
            tap, state.cfg, False, pg_collection=get_pg_collection(model), vp_stage=chunk
        )
        if packed is not None or mask is not None:
            raise ValueError(
                "the dataset hands over packed sequences or attention masks, and SkyLadder makes "
                "the mask itself. Train on GPTDatasetConfig, as the pretrain recipes do."
            )
        if model.training:
            if clock.documents_masked():
                if tap.latest is None:  # a middle stage, which Bridge does not let read
                    next(tap)
                mask = training_mask(tap.latest)
            if tap.latest is not None:
                self._note_first(chunk or 0, tap.latest)
        elif self.taps is not None and tap.latest is not None:
            self.taps.keep_batch(chunk or 0, tap.latest)
        return tokens, labels, loss_mask, mask, positions

    def _note_first(self, chunk: int, batch: dict[str, Any]) -> None:
        """Keep what a chunk reads first, and see that it can be shared out.

        Before the model is called: there each context-parallel rank sends and expects the keys that
        the documents of its own sequence ask for, and others would wait for ever.
        """
        if self.first_batches is None or chunk in self.first_batches:
            return
        self.first_batches[chunk] = batch
        if clock.documents_masked():
            fault = context_parallel_fault(self._bridge, batch)
            if fault:
                refuse_other_sequences(fault)

    def _loss(self, state: GlobalState, model: Any, loss_mask: Any) -> Any:
        checks = state.cfg.rerun_state_machine
        loss = create_masked_next_token_loss_function(
            loss_mask,
            check_for_nan_in_loss=checks.check_for_nan_in_loss,
            check_for_spiky_loss=checks.check_for_spiky_loss,
        )
        if model.training:
            per_token = get_model_config(model).calculate_per_token_loss
            return loss if per_token else over_sequences(loss)
        return loss if self.taps is None else self.taps.keeping_losses(loss)
