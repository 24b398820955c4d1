"""One case for each row of the table of Megatron's flags: what a launch with the flag is answered.

Written by hand, beside the table and not from it. `test_flag_rules` tries each case on the whole
table, where it has to hold, and on the table without the row, where it must not.
"""

from __future__ import annotations

from dataclasses import dataclass

# a launch that fits; nothing in it meets a rule
FITS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --position-embedding-type rope --tokenizer-type NullTokenizer "
    "--vocab-size 100 --micro-batch-size 1 --global-batch-size 2 --train-iters 100 --lr 1e-3 "
    "--attention-dropout 0 --skyladder-start-window 8"
)


@dataclass(frozen=True)
class Case:
    """What a flag does to a launch.

    Args:
        flags: added to those of a launch that fits.
        says: what is said of it.
        stops: whether training may not start.
        parser: how far Megatron 0.19's own parser gets with it: ``checks`` (all), ``parses`` (its
            checks want a GPU or more flags), or ``unknown`` (it has no such flag).
        model: whether the attention refuses a model with it as well, and by which name.
    """

    flags: str
    says: str
    stops: bool = True
    parser: str = "checks"
    model: str = ""


DRAWN = "--skyladder-init reference"
CASES = {
    "--init-method-std": Case(f"{DRAWN} --init-method-std 0.01", "says how weights are drawn, too"),
    "--embedding-init-method-std": Case(
        f"{DRAWN} --embedding-init-method-std 0.5", "says how weights are drawn, too"
    ),
    "--init-method-xavier-uniform": Case(
        f"{DRAWN} --init-method-xavier-uniform", "says how weights are drawn, too"
    ),
    "--use-mup": Case(f"{DRAWN} --use-mup", "says how weights are drawn, too", parser="parses"),
    "--attention-dropout": Case(
        "--attention-dropout 0.1", "--attention-dropout 0", model="attention_dropout"
    ),
    "--window-size": Case(
        "--window-size 16,1", "a token would see what comes after it", model="window_size"
    ),
    "--softmax-type": Case(
        "--softmax-type learnable",
        "te, fa4, flash, varlen and sdpa have",
        stops=False,
        parser="parses",
    ),
    "--qk-clip": Case("--qk-clip", "reports its largest logit", parser="parses", model="qk_clip"),
    "--log-max-attention-logit": Case(
        "--log-max-attention-logit",
        "Use --skyladder-attention-stats-interval",
        parser="parses",
        model="log_max_attention_logit",
    ),
    "--fp8-dot-product-attention": Case(
        "--fp8-dot-product-attention",
        "--fp8-dot-product-attention cannot",
        parser="unknown",
        model="fp8_dot_product_attention",
    ),
    "--fp8-multi-head-attention": Case(
        "--fp8-multi-head-attention",
        "--fp8-multi-head-attention cannot",
        parser="unknown",
        model="fp8_multi_head_attention",
    ),
    "--use-kitchen-attention": Case(
        "--use-kitchen-attention",
        "takes the place of Kitchen's",
        parser="parses",
        model="use_kitchen_attention",
    ),
    "--cuda-graph-impl": Case(
        "--cuda-graph-impl local",
        "--cuda-graph-impl=local cannot",
        parser="parses",
        model="cuda_graph_impl",
    ),
    "--enable-cuda-graph": Case(
        "--enable-cuda-graph",
        "--enable-cuda-graph cannot",
        parser="parses",
        model="enable_cuda_graph",
    ),
    "--external-cuda-graph": Case(
        "--external-cuda-graph",
        "--external-cuda-graph cannot",
        parser="parses",
        model="external_cuda_graph",
    ),
    "--sft": Case("--sft", "packs conversations into sequences", parser="parses"),
    "--fim-data": Case("--fim-data", "reorders the tokens of a document", parser="parses"),
    "--dataloader-inter-document-masking": Case(
        "--dataloader-inter-document-masking", "Megatron's own mask of documents", parser="parses"
    ),
    "--reset-attention-mask": Case("--reset-attention-mask", "dense mask of documents"),
    "--hybrid-context-parallel": Case(
        "--hybrid-context-parallel", "--hybrid-context-parallel cannot", parser="parses"
    ),
    "--dynamic-context-parallel": Case(
        "--dynamic-context-parallel", "--dynamic-context-parallel cannot", parser="unknown"
    ),
    "--sequence-packing-scheduler": Case(
        "--sequence-packing-scheduler dp_balanced",
        "--sequence-packing-scheduler=dp_balanced cannot",
        parser="unknown",
    ),
    "--max-seqlen-per-dp-cp-rank": Case(
        "--max-seqlen-per-dp-cp-rank 64", "--max-seqlen-per-dp-cp-rank=64 cannot"
    ),
    "--use-varlen-dataset": Case(
        "--use-varlen-dataset", "--use-varlen-dataset cannot", parser="unknown"
    ),
    "--cp-partition-mode": Case(
        "--cp-partition-mode contiguous", "gives context-parallel ranks other", parser="unknown"
    ),
    "--mtp-num-layers": Case(
        "--mtp-num-layers 1", "none is shown a token beyond a fragment", stops=False
    ),
    "--overlap-moe-expert-parallel-comm": Case(
        "--overlap-moe-expert-parallel-comm --mtp-num-layers 1",
        "would run apart from the batch",
        parser="parses",
    ),
    "--eod-mask-loss": Case(
        "--eod-mask-loss --mtp-num-layers 1 --context-parallel-size 2 --calculate-per-token-loss",
        "by the part's own count of tokens",
        parser="parses",
    ),
    "--multi-latent-attention": Case(
        "--multi-latent-attention",
        "keys that are wider than values",
        stops=False,
        parser="parses",
    ),
    "--cache-mla-latents": Case(
        "--cache-mla-latents", "it is for generating text", parser="parses"
    ),
    "--experimental-attention-variant": Case(
        "--experimental-attention-variant dsa", "choose what they see themselves", parser="parses"
    ),
    "--hybrid-layer-pattern": Case(
        "--hybrid-layer-pattern +-+-", "+ is multi-latent attention", parser="parses"
    ),
    "--hybrid-override-pattern": Case(
        "--hybrid-override-pattern D-*-", "D is sparse attention", parser="parses"
    ),
    "--use-legacy-models": Case(
        "--use-legacy-models", "do not come from megatron.core", parser="unknown"
    ),
    "--yaml-cfg": Case(
        "--yaml-cfg run.yaml", "reads no flag from the command line", parser="unknown"
    ),
    "--perform-rl-step": Case("--perform-rl-step", "its rollouts generate text", parser="parses"),
    "--inprocess-restart": Case(
        "--inprocess-restart", "go on with process groups that are gone", parser="checks"
    ),
    "--rampup-batch-size": Case(
        "--rampup-batch-size 1 1 100",
        'use --step-batch-size-schedule "0:SAMPLES TOKENS:SAMPLES',
        stops=False,
    ),
    "--logits-load-dir": Case(
        "--logits-load-dir logits", "loss from a teacher's logits", stops=False, parser="parses"
    ),
    "--logits-save-dir": Case(
        "--logits-save-dir logits", "within the window of each step", stops=False, parser="parses"
    ),
    "--fp8-format": Case(
        "--fp8-format hybrid", "attention stays in 16 bits", stops=False, parser="parses"
    ),
    "--fp4-format": Case(
        "--fp4-format e2m1", "runs the linear layers in FP4", stops=False, parser="parses"
    ),
    "--heterogeneous-layers-config-path": Case(
        "--heterogeneous-layers-config-path a.json",
        "gives layers that differ",
        stops=False,
        parser="parses",
    ),
    "--attention-backend": Case(
        "--attention-backend unfused", "SkyLadder's own choice is", stops=False
    ),
    "--cp-comm-type": Case(
        "--cp-comm-type a2a", "the exchange between context-parallel ranks", stops=False
    ),
    "--moe-expert-capacity-factor": Case(
        "--moe-expert-capacity-factor 1.5",
        "drops tokens among those that a rank holds",
        stops=False,
        parser="parses",
    ),
    "--moe-pad-expert-input-to-capacity": Case(
        "--moe-pad-expert-input-to-capacity", "pads what experts get", stops=False, parser="parses"
    ),
    "--moe-token-drop-policy": Case(
        "--moe-token-drop-policy position", "goes by the order", stops=False, parser="parses"
    ),
    "--moe-input-jitter-eps": Case(
        "--moe-input-jitter-eps 0.01", "draws the same noise", stops=False, parser="parses"
    ),
    "--window-attn-skip-freq": Case(
        "--window-attn-skip-freq 2", "has no effect without --window-size", stops=False
    ),
    "--apply-query-key-layer-scaling": Case(
        "--apply-query-key-layer-scaling", "divides logits and multiplies them", stops=False
    ),
    "--optimizer-cuda-graph": Case(
        "--optimizer-cuda-graph", "captures the optimizer alone", stops=False, parser="parses"
    ),
    "--cuda-graph-modules": Case(
        "--cuda-graph-impl local --cuda-graph-modules mlp",
        "leaves attention out of the CUDA graphs",
        stops=False,
        parser="parses",
    ),
    "--cuda-graph-scope": Case(
        "--cuda-graph-impl transformer_engine --cuda-graph-scope moe_router moe_preprocess",
        "leaves attention out of the CUDA graphs",
        stops=False,
        parser="parses",
    ),
    "--num-experts": Case("--num-experts 4", "adds experts behind attention", stops=False),
    "--tp-comm-overlap": Case(
        "--tp-comm-overlap",
        "overlaps the linear layers' communication",
        stops=False,
        parser="parses",
    ),
    "--use-megatron-fsdp": Case(
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
        "shards parameters; attention has none but a learnable sink",
        stops=False,
        parser="parses",
    ),
    "--use-torch-fsdp2": Case(
        "--use-torch-fsdp2", "was never run with SkyLadder", stops=False, parser="parses"
    ),
    "--fp8-recipe": Case(
        "--fp8-format e4m3 --fp8-recipe mxfp8",
        "is about the linear layers, MXFP8 too",
        stops=False,
        parser="parses",
    ),
    "--reset-position-ids": Case(
        "--reset-position-ids", "is honoured as without SkyLadder", stops=False
    ),
}
