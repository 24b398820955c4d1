"""What Megatron's own scripts read and take, by release, and how our entry point treats it.

Names only. They were taken from the checkouts that `releases.RELEASES` lists, and where these are
at hand ``test_checkouts.py`` takes them again. Up to 0.18 the script builds the model as well, from
0.19 on Megatron's trainer does.
"""

from __future__ import annotations

import ast
from pathlib import Path

_MODEL_TOO = ("pretrain_gpt.py", "gpt_builders.py", "model_provider.py")
SCRIPTS = {
    "0.16": _MODEL_TOO,
    "0.17": _MODEL_TOO,
    "0.18": _MODEL_TOO,
    "0.19": ("pretrain_gpt.py",),
    "0.20": ("pretrain_gpt.py",),
}

_ALWAYS = """
    allow_ambiguous_pad_tokens check_for_nan_in_loss_and_grad check_for_spiky_loss
    context_parallel_size create_attention_mask_in_dataloader data_cache_path data_parallel_size
    dataloader_defer_npy_index_mmap dataloader_fast_cache_load eod_mask_loss fim_data fim_eod_token
    fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token fim_prefix_token fim_rate
    fim_split_sample fim_spm_rate fim_suffix_token full_validation hybrid_context_parallel
    mid_level_dataset_surplus mmap_bin_files mock_data modelopt_enabled multiple_validation_sets
    num_dataset_builder_threads object_storage_cache_path overlap_moe_expert_parallel_comm
    per_dataset_sequences_path reset_attention_mask reset_position_ids seed seq_length
    sequence_parallel sft split tensor_model_parallel_size untie_embeddings_and_output_weights
"""
_MODEL = """
    experimental_attention_variant fp16_lm_cross_entropy heterogeneous_layers_config_path
    max_position_embeddings memory_snapshot_path mtp_num_layers normalization num_experts
    padded_vocab_size position_embedding_type qk_l2_norm record_memory_history rotary_base
    rotary_percent spec transformer_impl use_rope_scaling yaml_cfg
"""
_BATCH = "micro_batch_size pipeline_model_parallel_size"
_IN_019 = """
    dataloader_inter_document_masking
    logits_load_decode_threads logits_load_dir logits_load_ignore_errors logits_load_kd_loss_alpha
    logits_load_msc_prefetch_depth logits_load_prefetch_factor
"""
_IN_016 = """
    legacy_tokenizer moe_grouped_gemm moe_use_legacy_grouped_gemm multi_latent_attention
    qk_layernorm
"""
READ = {  # from the arguments, by any of the release's scripts
    "0.16": {*_ALWAYS.split(), *_MODEL.split(), *_IN_016.split(), "use_legacy_models"},
    "0.17": {*_ALWAYS.split(), *_MODEL.split(), "use_legacy_models"},
    "0.18": {*_ALWAYS.split(), *_MODEL.split(), *_BATCH.split()},
    "0.19": {*_ALWAYS.split(), *_BATCH.split(), *_IN_019.split()},
    "0.20": {*_ALWAYS.split(), *_BATCH.split(), *_IN_019.split()},
}
SIGNATURES = {  # of the script's functions, as the trainer and the schedules call them
    "forward_step": ("data_iterator", "model", "return_schedule_plan"),
    "loss_func": ("loss_mask", "output_tensor", "model"),
    "train_valid_test_datasets_provider": ("train_val_test_num_samples", "vp_stage"),
    "get_embedding_ranks": ("pp_ranks",),
}
MODEL_PROVIDER = ("model_builder", "pre_process", "post_process", "vp_stage", "config")
MODEL_PROVIDER += ("pg_collection",)
_GPT_MODEL = """
    config transformer_layer_spec vocab_size max_sequence_length pre_process post_process
    fp16_lm_cross_entropy parallel_output share_embeddings_and_output_weights
    position_embedding_type rotary_percent rotary_base rope_scaling mtp_block_spec vp_stage
    pg_collection
"""
GPT_MODEL_KEYWORDS = {*_GPT_MODEL.split()}  # up to 0.18; later ones are Megatron's own business
PRETRAIN_KEYWORDS = {"store", "get_embedding_ranks", "args_defaults", "extra_args_provider"}

# --- what our entry point does not read, and why that loses nothing -------------------------------

REFUSED = {  # by the flag table or, up to 0.18, by the builder of the layers
    *("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking"),
    *("mtp_num_layers", "logits_load_dir", "heterogeneous_layers_config_path"),
    *("experimental_attention_variant", "record_memory_history", "use_legacy_models"),
}
ONLY_WITH = {  # of no effect without a flag that is refused
    "fim_data": "fim_",
    "logits_load_dir": "logits_load_",
    "record_memory_history": "memory_snapshot_path",
}
OTHERWISE = {
    "modelopt_enabled": "set by flags that the script adds to the parser; ours refuses them",
    "legacy_tokenizer": "Megatron's global tokenizer is the same one",
    "overlap_moe_expert_parallel_comm": "only asserted; the schedules ask for the plan",
    "moe_grouped_gemm": "the model's configuration has it",
    "moe_use_legacy_grouped_gemm": "the model's configuration has it",
    "multi_latent_attention": "the model's configuration has it",
    "qk_layernorm": "the model's configuration has it",
}


def names_read(path: Path, variable: str) -> set[str]:
    """Return the attributes that a file reads from a variable, ``getattr`` and ``hasattr`` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute, ctx=ast.Load()):
                found |= {attribute} if name == variable else set()
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"),
                args=[ast.Name(id=name), ast.Constant(value=attribute), *_],
            ):
                found |= {attribute} if name == variable else set()
    return found


def signatures(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the parameters of a file's functions."""
    functions = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        function.name: tuple(parameter.arg for parameter in function.args.args)
        for function in functions
        if isinstance(function, ast.FunctionDef)
    }


def keywords(path: Path, callee: str) -> set[str]:
    """Return the keywords with which a file calls a function."""
    return {
        str(keyword.arg)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == callee
        for keyword in node.keywords
    }
