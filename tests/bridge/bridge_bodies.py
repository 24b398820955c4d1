"""What the ranks of these tests run: one tiny Llama, by Bridge and by the entry point."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EOD, VOCAB, SEQ, LAYERS, SAMPLES, ROWS = 127, 128, 128, 4, 8, 2
ITERATIONS = 8


def make_data(prefix: Path, eod: int = EOD) -> Path:
    """Write a dataset of 1,500 documents of 2 to 60 tokens and return its prefix.

    Args:
        prefix: where.
        eod: the token that ends each document.
    """
    from megatron_skyladder.data.indexed import IndexedWriter

    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for length in generator.integers(2, 60, 1500):
            first, step = generator.integers(0, 60, 2)
            tokens = (first + step * np.arange(length)) % 60
            writer.add_document(np.append(tokens, eod).astype(np.uint16))
    return prefix


def bridge_model(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    sp: bool = False,
    recompute: bool = False,
    te: bool = False,
) -> Any:
    """Return the model's provider; with ``te`` it has Bridge's own layers."""
    import torch
    from megatron.bridge.models.gpt_provider import (
        GPTModelProvider,
        default_layer_spec,
        local_layer_spec,
    )
    from megatron.core.transformer.enums import AttnBackend

    model = GPTModelProvider(
        num_layers=LAYERS,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        position_embedding_type="rope",
        rotary_base=10000,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        seq_length=SEQ,
        vocab_size=VOCAB,
        init_method_std=0.1,
        layernorm_epsilon=1e-5,
        transformer_layer_spec=default_layer_spec if te else local_layer_spec,
        transformer_impl="transformer_engine" if te else "local",
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        sequence_parallel=sp,
        make_vocab_size_divisible_by=1,  # or tensor parallelism pads to another softmax
        **dict.fromkeys(NO_FUSIONS, False),
    )
    if te:
        model.attention_backend = AttnBackend.unfused  # TE's own attention in PyTorch
    if vpp:
        model.overlap_p2p_comm, model.batch_p2p_comm = True, False
    if recompute:
        model.recompute_granularity, model.recompute_method = "full", "uniform"
        model.recompute_num_layers = 1
    return model


def bridge_config(
    folder: str,
    data: str,
    *,
    distributed_optimizer: bool = True,
    iterations: int = ITERATIONS,
    samples: int | None = None,
    weights: str | None = None,
    load: str | None = None,
    save_interval: int | None = None,
    exit_interval: int | None = None,
    tensorboard: bool = False,
    log_interval: int = 1,
    eval_iterations: int = 1,
    **layout: Any,
) -> Any:
    """Return Bridge's configuration of the model, in fp32 and without a GPU.

    Args:
        layout: of `bridge_model`.
    """
    import torch
    from megatron.bridge.recipes.common import _pretrain_common

    cfg = _pretrain_common()
    cfg.model = bridge_model(**layout)
    cfg.mixed_precision = None
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "NullTokenizer", None
    cfg.tokenizer.vocab_size = VOCAB
    dataset = cfg.dataset
    dataset.seq_length, dataset.random_seed, dataset.split = SEQ, 1, "8,1,1"
    dataset.num_workers, dataset.persistent_workers = 0, False
    dataset.blend, dataset.path_to_cache = ([data], None), str(Path(data).parent / "cache-bridge")
    train, validation = cfg.train, cfg.validation
    train.global_batch_size, train.micro_batch_size = SAMPLES, ROWS
    train.train_iters, train.exit_interval = iterations, exit_interval
    validation.eval_interval, validation.eval_iters = 4, eval_iterations
    optimizer, scheduler = cfg.optimizer, cfg.scheduler
    optimizer.lr, optimizer.min_lr, optimizer.weight_decay = 1e-3, 0.0, 0.01
    optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps = 0.9, 0.95, 1e-8
    optimizer.clip_grad, optimizer.params_dtype = 1.0, torch.float32
    optimizer.bf16 = optimizer.fp16 = False
    optimizer.use_distributed_optimizer = distributed_optimizer
    cfg.ddp.use_distributed_optimizer = distributed_optimizer
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = False
    cfg.ddp.data_parallel_sharding_strategy = "no_shard"
    scheduler.lr_decay_style, scheduler.lr_warmup_iters = "constant", 0
    scheduler.lr_warmup_init = 0.0
    scheduler.start_weight_decay = scheduler.end_weight_decay = 0.01
    if samples is not None:
        train.train_iters, train.train_samples = None, samples
        scheduler.lr_decay_iters, scheduler.lr_warmup_samples = None, 0
    cfg.dist.distributed_backend, cfg.dist.disable_jit_fuser = "gloo", True
    cfg.rng.seed = 1
    cfg.logger.log_interval, cfg.logger.log_timers_to_tensorboard = log_interval, False
    cfg.logger.tensorboard_dir = f"{folder}/tensorboard" if tensorboard else None
    checkpoint = cfg.checkpoint
    checkpoint.save = f"{folder}/checkpoint" if save_interval else None
    checkpoint.load, checkpoint.save_interval, checkpoint.async_save = load, save_interval, False
    if weights:
        checkpoint.pretrained_checkpoint, checkpoint.finetune = weights, True
    return cfg


NO_FUSIONS = (
    *("bias_activation_fusion", "masked_softmax_fusion", "persist_layer_norm"),
    *("bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"),
    "cross_entropy_loss_fusion",
)


def train_bridge(
    folder: str,
    data: str,
    ladder: dict[str, Any] | None = None,
    change: str | None = None,
    **options: Any,
) -> None:
    """Train with Bridge.

    Args:
        folder: of the run.
        data: prefix.
        ladder: settings of `apply`; None: stock Bridge.
        change: a function of `bridge_changes`, called with the configuration before `apply`.
        options: of `bridge_config`.
    """
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megatron_skyladder import megatron_bridge as skyladder

    cfg = bridge_config(folder, data, **options)
    if change is not None:
        import bridge_changes

        getattr(bridge_changes, change)(cfg)
    if ladder is None:
        pretrain(cfg, forward_step, callbacks=[recorder(folder)])
        return
    applied = skyladder.apply(cfg, **ladder)
    pretrain(cfg, applied.forward_step, callbacks=[*applied.callbacks, recorder(folder)])


def is_last_rank() -> bool:
    """Return whether this rank has the losses."""
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def write_line(folder: str, name: str, values: dict[str, Any]) -> None:
    """Add a line to one of a run's records."""
    with open(Path(folder) / name, "a") as file:
        file.write(json.dumps(values) + "\n")


def last_window() -> int | None:
    """Return the window of the latest step, or None where SkyLadder is off."""
    from megatron_skyladder.ladder import clock

    active = clock.installed()
    return active.last_window if active else None


def recorder(folder: str) -> Any:
    """Return a callback that records each step and each evaluation."""
    from megatron.bridge.training.callbacks import Callback

    class Recorder(Callback):
        def on_train_step_end(self, context: Any) -> None:
            state = context.state
            if context.loss_dict and is_last_rank():
                values = {
                    "iteration": state.train_state.step + 1,
                    "loss": float(context.loss_dict["lm loss"]),
                    "grad_norm": float(context.grad_norm),
                    "window": last_window(),
                    "squares": int(state._flops_seqlen_sq_sum),
                }
                write_line(folder, "history.jsonl", values)

        def on_eval_end(self, context: Any) -> None:
            assert not any(chunk.training for chunk in context.model)  # as Bridge has left them
            if context.total_loss_dict and is_last_rank():
                losses = {name: float(value) for name, value in context.total_loss_dict.items()}
                write_line(folder, "evaluations.jsonl", losses)

        on_test_end = on_eval_end

    return Recorder()


def train_megatron_lm(
    folder: str,
    data: str,
    ladder: dict[str, Any] | None = None,
    weights: str | None = None,
    load: str | None = None,
    save: bool = False,
    iterations: int = ITERATIONS,
    exit_interval: int | None = None,
    save_interval: int = 1,
    eval_iterations: int = 1,
    te: bool = False,
    local: bool = False,
) -> None:
    """Train with the Megatron-LM entry point, on one process.

    With ``local`` every other layer is one, as under `bridge_changes.local_layers`.
    """
    import sys

    from megatron_skyladder import pretrain_gpt

    flags = f"""
        --num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
        --group-query-attention --num-query-groups 2 --seq-length {SEQ}
        --max-position-embeddings {SEQ} --position-embedding-type rope --rotary-base 10000
        --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --micro-batch-size {ROWS} --global-batch-size {SAMPLES} --train-iters {iterations}
        --lr 1e-3 --min-lr 0 --weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.95
        --adam-eps 1e-8 --clip-grad 1.0 --use-distributed-optimizer --lr-decay-style constant
        --tokenizer-type NullTokenizer --vocab-size {VOCAB} --init-method-std 0.1 --split 8,1,1
        --num-workers 0 --log-interval 1 --eval-interval 4
        --eval-iters {eval_iterations} --seed 1
        --make-vocab-size-divisible-by 1 --data-path {data}
        --data-cache-path {Path(data).parent / "cache-megatron"}
    """
    if te:
        flags += " --transformer-impl transformer_engine --attention-backend unfused"
        flags += " --no-gradient-accumulation-fusion"
    if local:
        flags += " --window-size 11,0 --window-attn-skip-freq 2"
    if weights:
        flags += f" --load {weights} --finetune"
    if load:
        flags += f" --load {load}"
    if save:
        flags += f" --save {folder}/checkpoint --save-interval {save_interval}"
    if exit_interval:
        flags += f" --exit-interval {exit_interval}"
    for name, value in (ladder or {}).items():
        flag = f"--skyladder-{name.replace('_', '-')}"
        flags += f" {flag}" if value is True else f" {flag} {value}"
    _record_megatron_lm(folder)
    sys.argv = ["pretrain_gpt.py", *flags.split()]
    pretrain_gpt.main()


def _record_megatron_lm(folder: str) -> None:
    """Record what Megatron-LM logs; below SkyLadder's hooks, which wrap what they find."""
    from megatron.training import training

    log = training.training_log

    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(log).bind(*args, **kwargs).arguments
        if given["loss_dict"]:
            values = {
                "iteration": given["iteration"],
                "loss": float(given["loss_dict"]["lm loss"]),
                "grad_norm": float(given["grad_norm"]),
                "window": last_window(),
            }
            write_line(folder, "history.jsonl", values)
        return log(*args, **kwargs)

    training.training_log = _signed(training_log, log)


def _signed(function: Any, original: Callable[..., Any]) -> Any:
    function.__signature__ = inspect.signature(original)
    return function
