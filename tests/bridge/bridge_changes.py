"""What tests change in the configuration before SkyLadder is applied, by name."""

from __future__ import annotations

import functools
import os
from typing import Any


def nothing(cfg: Any) -> None:
    """Leave it as it is."""


def local_attention_backend(cfg: Any) -> None:
    from megatron.core.transformer.enums import AttnBackend

    cfg.model.attention_backend = AttnBackend.local


def local_attention_backend_as_text(cfg: Any) -> None:
    cfg.model.attention_backend = "local"


def own_model(cfg: Any) -> None:
    from megatron.bridge.models.gemma.gemma_provider import GemmaModelProvider

    cfg.model = GemmaModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4)


def spec_object(cfg: Any) -> None:
    cfg.model.transformer_layer_spec = cfg.model.transformer_layer_spec(cfg.model)


def own_core_attention(cfg: Any) -> None:
    from megatron.bridge.models.gemma.gemma2_provider import Gemma2DotProductAttention
    from megatron.bridge.models.gpt_provider import local_layer_spec

    def layer_spec(config: Any) -> Any:
        spec = local_layer_spec(config)
        spec.submodules.self_attention.submodules.core_attention = Gemma2DotProductAttention
        return spec

    cfg.model.transformer_layer_spec = layer_spec


def partial_spec(cfg: Any) -> None:
    from megatron.bridge.models.gpt_provider import local_layer_spec

    cfg.model.transformer_layer_spec = functools.partial(local_layer_spec)


def short_pipeline(cfg: Any) -> None:
    cfg.model.overlap_p2p_comm, cfg.model.batch_p2p_comm = False, True


def peft(cfg: Any) -> None:
    from megatron.bridge.peft.lora import LoRA

    cfg.peft = LoRA()


def finetuning_data(cfg: Any) -> None:
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig

    cfg.dataset = GPTSFTDatasetConfig(seq_length=128)


def offline_packing(cfg: Any) -> None:
    cfg.dataset.enable_offline_packing = True


def in_batch_packing(cfg: Any) -> None:
    cfg.dataset.enable_in_batch_packing = True


def batch_loader(cfg: Any) -> None:
    cfg.dataset.dataloader_type = "batch"


def dense_masks(cfg: Any) -> None:
    cfg.dataset.skip_getting_attention_mask_from_dataset = False


def reset_attention_mask(cfg: Any) -> None:
    cfg.dataset.reset_attention_mask = True


def other_eval_cp(cfg: Any) -> None:
    cfg.dist.eval_context_parallel_size = 2


def decentralized_groups(cfg: Any) -> None:
    cfg.dist.use_decentralized_pg, cfg.dist.use_gloo_process_groups = True, False


def in_process_restart(cfg: Any) -> None:
    from megatron.bridge.training.config import InProcessRestartConfig

    cfg.inprocess_restart = InProcessRestartConfig(enabled=True)


def rampup(cfg: Any) -> None:
    cfg.train.rampup_batch_size = [2, 2, 16]


def cuda_graphs(cfg: Any) -> None:
    cfg.model.cuda_graph_impl = "local"


def attention_dropout(cfg: Any) -> None:
    cfg.model.attention_dropout = 0.1


def prediction_of_more_tokens(cfg: Any) -> None:
    cfg.model.mtp_num_layers = 1


def latent_attention(cfg: Any) -> None:
    cfg.model.multi_latent_attention = True


def filling_in_the_middle(cfg: Any) -> None:
    from megatron.bridge.training.config import GPTFIMDatasetConfig

    cfg.dataset.__class__ = GPTFIMDatasetConfig


def local_layers(cfg: Any) -> None:
    cfg.model.window_size, cfg.model.window_attn_skip_freq = (11, 0), 2


def masked_losses(cfg: Any) -> None:
    cfg.dataset.eod_mask_loss = True


def evaluation_alone(cfg: Any) -> None:
    cfg.validation.skip_train = True


def fully_reshardable(cfg: Any) -> None:
    cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True


def interim_checkpoints(cfg: Any) -> None:
    checkpoint = cfg.checkpoint
    checkpoint.non_persistent_ckpt_type, checkpoint.non_persistent_save_interval = "global", 2


def checkpoints_that_cannot_be_found(cfg: Any) -> None:
    """As under a later Bridge that puts them elsewhere."""
    from megatron_skyladder.megatron_bridge import checkpoints

    checkpoints._folders = lambda *_: []


def checkpoints_that_rank_1_cannot_find(cfg: Any) -> None:
    """As where a file system is slow to show another node what was written."""
    if os.environ["RANK"] == "1":
        checkpoints_that_cannot_be_found(cfg)


def experts(cfg: Any) -> None:
    model = cfg.model
    model.num_moe_experts, model.moe_router_topk, model.moe_ffn_hidden_size = 4, 2, 64
    model.moe_grouped_gemm, model.moe_token_dispatcher_type = False, "alltoall"
    model.moe_permute_fusion, model.moe_router_load_balancing_type = False, "none"
    model.moe_aux_loss_coeff = 0.0
    cfg.checkpoint.pretrained_checkpoint, cfg.checkpoint.finetune = None, False


def default_weights(cfg: Any) -> None:
    cfg.model.init_method_std = type(cfg.model).init_method_std
