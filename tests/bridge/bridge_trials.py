"""Bodies of runs that are to be refused, or that look at what a run writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import bridge_changes
from bridge_bodies import bridge_config, recorder, write_line


def apply_each(folder: str, data: str, changes: list[str]) -> None:
    """Apply SkyLadder to configurations with one change each, and note what it says."""
    from megatron_skyladder import megatron_bridge as skyladder
    from megatron_skyladder.errors import UsageError

    messages: dict[str, str | None] = {}
    for name in changes:
        cfg = bridge_config(folder, data)
        getattr(bridge_changes, name)(cfg)
        try:
            skyladder.apply(cfg, start_window=8, intra_document=True)
            messages[name] = None
        except UsageError as error:
            messages[name] = str(error)
    Path(folder, "facts.json").write_text(json.dumps(messages))


def train_wrongly(
    folder: str, data: str, wrong: str, ladder: dict[str, Any], **options: Any
) -> None:
    """Train after one of the mistakes that people make.

    Args:
        folder: of the run.
        data: prefix.
        wrong: ``step``: Bridge's own forward step; ``callbacks``: none of ours; ``later``: an
            override after `apply`; ``twice``: `apply` called twice; ``on one rank``: rank 1 does
            without the probe; ``data``: documents end elsewhere in what rank 1 reads.
        ladder: settings of `apply`.
        options: of `bridge_config`.
    """
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.pretrain import pretrain

    from megatron_skyladder import megatron_bridge as skyladder

    if wrong == "on one rank" and os.environ["RANK"] == "1":
        ladder = {**ladder, "no_probe": True}
    cfg = bridge_config(folder, data, **options)
    applied = skyladder.apply(cfg, **ladder)
    step, callbacks = applied.forward_step, [*applied.callbacks]
    if wrong == "step":
        step = gpt_step.forward_step
    if wrong == "callbacks":
        callbacks = []
    if wrong == "data" and os.environ["RANK"] == "1":
        _read_others()
    if wrong == "later":
        cfg.train.train_iters *= 2
    if wrong == "twice":
        skyladder.apply(cfg, **ladder)
    _note_optimizer_steps(folder)
    pretrain(cfg, step, callbacks=[*callbacks, recorder(folder)])


def _read_others() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    read = GPTDataset.__getitem__

    def other(self: Any, index: int) -> dict[str, Any]:
        item = read(self, index)
        return {**item, "tokens": item["tokens"].roll(5)}

    GPTDataset.__getitem__ = other


def _note_optimizer_steps(folder: str) -> None:
    from megatron.core.optimizer import DistributedOptimizer, FP32Optimizer

    for kind in (DistributedOptimizer, FP32Optimizer):
        step = kind.step_with_ready_grads  # `step` itself is not called of one in a chain

        def noted(self: Any, *args: Any, _step: Any = step, **kwargs: Any) -> Any:
            write_line(folder, "optimizer.jsonl", {"stepped": True})
            return _step(self, *args, **kwargs)

        kind.step_with_ready_grads = noted


def command(folder: str, data: str, words: list[str], **_: Any) -> None:
    """Run ``python -m megatron_skyladder.megatron_bridge`` with these words."""
    import runpy
    import sys

    os.chdir(folder)
    sys.argv = ["bridge", *words]
    runpy.run_module("megatron_skyladder.megatron_bridge", run_name="__main__")


def describe_recipe(folder: str, data: str, recipe: str, settings: dict[str, Any]) -> None:
    """Note what a recipe of the examples sets, and what the ladder makes of it."""
    import own_recipe

    from megatron_skyladder import megatron_bridge as skyladder

    cfg = getattr(own_recipe, recipe)()
    applied = skyladder.apply(cfg, **settings)
    facts = {
        "seq_length": cfg.model.seq_length,
        "global_batch_size": cfg.train.global_batch_size,
        "train_iters": cfg.train.train_iters,
        "fingerprint": applied.config.fingerprint,
    }
    Path(folder, "facts.json").write_text(json.dumps(facts))


def train_with_wandb(folder: str, data: str, ladder: dict[str, Any], **options: Any) -> None:
    """Train with Weights & Biases switched on, offline, and note its run's summary."""
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain

    from megatron_skyladder import megatron_bridge as skyladder

    class Summary(Callback):
        def on_train_end(self, context: Any) -> None:
            summary = dict(context.state.wandb_logger.run.summary)
            numbers = {k: v for k, v in summary.items() if isinstance(v, (int, float))}
            Path(folder, "facts.json").write_text(json.dumps(numbers))

    cfg = bridge_config(folder, data, **options)
    cfg.logger.wandb_project, cfg.logger.wandb_exp_name = "skyladder", "test"
    cfg.logger.wandb_save_dir = folder
    applied = skyladder.apply(cfg, **ladder)
    pretrain(cfg, applied.forward_step, callbacks=[*applied.callbacks, Summary()])


def train_with_mlflow(folder: str, data: str, ladder: dict[str, Any], **options: Any) -> None:
    """Train with MLflow switched on, in a folder, and note every metric that it kept."""
    from megatron.bridge.training.pretrain import pretrain

    from megatron_skyladder import megatron_bridge as skyladder

    cfg = bridge_config(folder, data, **options)
    cfg.logger.mlflow_experiment, cfg.logger.mlflow_run_name = "skyladder", "test"
    cfg.logger.mlflow_tracking_uri = f"file://{folder}/mlflow"
    applied = skyladder.apply(cfg, **ladder)
    pretrain(cfg, applied.forward_step, callbacks=applied.callbacks)
    import mlflow

    client = mlflow.MlflowClient(cfg.logger.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name("skyladder")
    (run,) = client.search_runs([experiment.experiment_id])
    kept = {
        name: {
            point.step: point.value for point in client.get_metric_history(run.info.run_id, name)
        }
        for name in run.data.metrics
    }
    Path(folder, "facts.json").write_text(json.dumps(kept))
