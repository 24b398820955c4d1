r"""Recipes of Megatron Bridge for runs with SkyLadder; `docs/bridge.md` has their commands.

    torchrun --nproc-per-node 8 -m megatron_skyladder.megatron_bridge \
        --recipe examples/bridge/recipes.py:pretrain_1b_8k \
        skyladder.preset=1b-8k skyladder.intra_document=true \
        dataset.data_path=/data/cc_text_document

A recipe is Bridge's own with other numbers. All of them can be overridden on the command line.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

TOKENIZER = "meta-llama/Llama-3.2-1B"


def pretrain_1b_8k() -> Any:
    """Pretrain Llama 3.2 1B from scratch at 8K: the paper's 100B tokens in batches of 1M."""
    cfg = _llama(seq_length=8192, batch_tokens=2**20, tokens=100e9)
    cfg.optimizer.lr, cfg.optimizer.min_lr = 4e-4, 4e-5
    cfg.scheduler.lr_warmup_iters = 2000
    return cfg


def pretrain_1b_4k() -> Any:
    """Pretrain it at 4K: where the extension below begins."""
    cfg = _llama(seq_length=4096, batch_tokens=2**20, tokens=100e9)
    cfg.optimizer.lr, cfg.optimizer.min_lr = 4e-4, 4e-5
    cfg.scheduler.lr_warmup_iters = 2000
    return cfg


def extend_to_32k() -> Any:
    """Go from 4K to 32K in 2B tokens, on sequences that two ranks share."""
    cfg = _extension(seq_length=32768, tokens=2e9)
    cfg.model.context_parallel_size = 2
    return cfg


def extend_to_128k() -> Any:
    """Go from 32K to 128K in 2B tokens, on sequences that eight ranks share."""
    cfg = _extension(seq_length=131072, tokens=2e9)
    cfg.model.context_parallel_size = 8
    return cfg


def _extension(seq_length: int, tokens: float) -> Any:
    """Return a run that begins with the weights in checkpoint.pretrained_checkpoint.

    Its samples are counted from 0, and so is the ladder. Bridge takes the weights alone there, by
    setting checkpoint.finetune itself; set here, a run that was stopped would not go on either.
    The RoPE scaling of Llama 3.2 reaches
    131,072 tokens and stays; for another model set model.rotary_base for the new length.
    """
    cfg = _llama(seq_length=seq_length, batch_tokens=2**22, tokens=tokens)
    cfg.optimizer.lr, cfg.optimizer.min_lr = 2e-5, 2e-6
    cfg.scheduler.lr_warmup_iters = 20
    cfg.model.recompute_granularity, cfg.model.recompute_method = "full", "uniform"
    cfg.model.recompute_num_layers = 1
    return cfg


def _llama(seq_length: int, batch_tokens: int, tokens: float) -> Any:
    cfg = llama32_1b_pretrain_config()
    cfg.model.seq_length = cfg.dataset.seq_length = seq_length
    cfg.model.attention_dropout = 0.0  # the kernels have none
    cfg.train.global_batch_size = batch_tokens // seq_length
    cfg.train.micro_batch_size = 1
    cfg.train.train_iters = round(tokens / batch_tokens)
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "HuggingFaceTokenizer", TOKENIZER
    cfg.tokenizer.vocab_size = None
    return cfg
