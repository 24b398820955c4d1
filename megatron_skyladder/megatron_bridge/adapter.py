"""Megatron Bridge's trainer, as the runtime sees it: its GlobalState behind one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.runtime.trainer import Groups


class MegatronBridge:
    """The `runtime.trainer.Trainer` of Megatron Bridge; see there for what each answer means.

    `apply` makes it; what Bridge makes later (its state, the model's process groups) is handed over
    by the first callback.
    """

    every_rank_reads = True  # Bridge builds datasets on all of them

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self._state: Any = None
        self._groups: Groups | None = None

    def begin(self, state: Any, model: list[Any]) -> None:
        """Take over what exists once the model has been built."""
        from megatron.bridge.training.utils.pg_utils import get_pg_collection

        self._state, self._cfg = state, state.cfg
        groups = get_pg_collection(model)
        self._groups = Groups(
            tp=groups.tp, pp=groups.pp, cp=groups.cp, dp=groups.dp, dp_cp=groups.dp_cp
        )

    @property
    def state(self) -> Any:
        """Bridge's GlobalState.

        Raises:
            UsageError: Bridge has not called back: it was not given the callbacks.
        """
        if self._state is None:
            raise UsageError(
                "SkyLadder's callbacks were not called. Give them to Bridge with the forward step: "
                "pretrain(cfg, ladder.forward_step, callbacks=ladder.callbacks)."
            )
        return self._state

    @property
    def seq_length(self) -> int:
        return self._cfg.model.seq_length

    @property
    def micro_batch_size(self) -> int:
        return self._cfg.train.micro_batch_size

    @property
    def num_layers(self) -> int:
        return self._cfg.model.num_layers

    @property
    def vocab_size(self) -> int:
        return self._cfg.model.vocab_size

    @property
    def end_of_document(self) -> int:
        tokenizer = self.state.cfg.dataset.tokenizer
        try:
            eod = tokenizer.eod
        except Exception:  # what a tokenizer without one raises is its own affair
            eod = None
        if eod is None:
            raise UsageError(
                "skyladder.intra_document=true needs the end-of-document token, but the tokenizer "
                f"({self._cfg.tokenizer.tokenizer_type}) has none. Use a tokenizer that has one, "
                "or leave the setting out."
            )
        return int(eod)

    @property
    def consumed_samples(self) -> int:
        return self.state.train_state.consumed_train_samples

    @contextlib.contextmanager
    def at_samples(self, samples: int) -> Iterator[None]:
        train_state = self.state.train_state
        before, train_state.consumed_train_samples = train_state.consumed_train_samples, samples
        try:
            yield
        finally:
            train_state.consumed_train_samples = before

    @property
    def total_samples(self) -> int:
        train = self._cfg.train
        return train.train_samples or (train.train_iters or 0) * train.global_batch_size

    @property
    def iteration(self) -> int:
        return self.state.train_state.step + 1

    @property
    def groups(self) -> Groups:
        assert self._groups is not None, "the model has not been built"
        return self._groups

    def cut_for_context_parallel(self, batch: dict[str, Any]) -> dict[str, Any]:
        from megatron.core.utils import get_batch_on_this_cp_rank

        whole = {"cu_seqlens": None, **batch}
        return get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=self.groups.cp)

    def log_scalars(self, values: dict[str, float], iteration: int) -> None:
        state = self.state
        writer, wandb = state.tensorboard_logger, state.wandb_logger
        for name, value in values.items() if writer else ():
            writer.add_scalar(name, value, iteration)
        if wandb:
            wandb.log(values, iteration)
        if state.comet_logger:
            state.comet_logger.log_metrics(values, step=iteration)
        if state.mlflow_logger:  # for which Bridge writes its own names without slashes
            named = {name.replace("/", "_"): value for name, value in values.items()}
            state.mlflow_logger.log_metrics(named, step=iteration)
