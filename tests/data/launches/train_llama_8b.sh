#!/bin/bash
# Pretrain a Llama-like 8B model with Megatron-LM 0.18, one call on each node.
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_IB_SL=1
export TORCH_NCCL_AVOID_RECORD_STREAMS=1

MEGATRON_DIR=${MEGATRON_DIR:-/opt/megatron-lm}
DATA_DIR=/lustre/data
CHECKPOINT_PATH=${1:-"checkpoints/llama_8b"}
TENSORBOARD_LOGS_PATH=${2:-"tensorboard/llama_8b"}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-"${DATA_DIR}/tokenizer"}

# the nodes; set by the scheduler
GPUS_PER_NODE=8
NUM_NODES=${NUM_NODES:-32}
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-6000}
NODE_RANK=${SLURM_NODEID:-0}
WORLD_SIZE=$((GPUS_PER_NODE * NUM_NODES))

TP_SIZE=2
PP_SIZE=1
CP_SIZE=2
MICRO_BATCH_SIZE=1
SEQ_LENGTH=8192
GLOBAL_BATCH_SIZE=$((WORLD_SIZE / (TP_SIZE * PP_SIZE * CP_SIZE) * 4))  # 256
DTYPE=${DTYPE:-bf16}

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --node_rank $NODE_RANK
    --master_addr $MASTER_ADDR
    --master_port $MASTER_PORT
)

MODEL_ARGS=(
    --use-mcore-models
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length $SEQ_LENGTH
    --max-position-embeddings $SEQ_LENGTH
    --position-embedding-type rope
    --rotary-base 500000
    --rotary-percent 1.0
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --swiglu
    --init-method-std 0.0134
    --normalization RMSNorm
    --disable-bias-linear
    --untie-embeddings-and-output-weights
)

TRAINING_ARGS=(
    --micro-batch-size $MICRO_BATCH_SIZE
    --global-batch-size $GLOBAL_BATCH_SIZE
    --train-samples 24414063
    --lr-decay-samples 24000000
    --lr-warmup-samples 300000
    --lr 3.0e-4
    --min-lr 3.0e-5
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --bf16
    --grad-reduce-in-bf16
    --cross-entropy-loss-fusion
    --manual-gc
    --empty-unused-memory-level 1
)

if [ "$DTYPE" = "fp8" ]; then
    TRAINING_ARGS+=(
        --fp8-format hybrid
        --fp8-amax-history-len 1024
        --fp8-amax-compute-algo max
        --fp8-param-gather
    )
fi

PARALLEL_ARGS=(
    --tensor-model-parallel-size $TP_SIZE
    --pipeline-model-parallel-size $PP_SIZE
    --context-parallel-size $CP_SIZE
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

if [[ -d "${DATA_DIR}/fineweb" ]]; then
    DATA_CACHE="${DATA_DIR}/cache"
fi
DATA_ARGS=(
    --data-path "${DATA_DIR}/fineweb_text_document"
    --data-cache-path "${DATA_CACHE:-/tmp/cache}"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model $TOKENIZER_MODEL
    --split '99,1,0'
    --no-create-attention-mask-in-dataloader
    --num-workers 1
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 1
    --eval-iters 32
    --eval-interval 100
    --save-interval 1000
    --log-throughput
    --ckpt-format torch_dist
    --distributed-timeout-minutes 60
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --tensorboard-dir "$TENSORBOARD_LOGS_PATH"
)

cd "$MEGATRON_DIR" || exit 1
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    ${TRAINING_ARGS[@]} \
    ${PARALLEL_ARGS[@]} \
    ${DATA_ARGS[@]} \
    ${EVAL_AND_LOGGING_ARGS[@]} 2>&1 | tee "logs/$(date +%Y%m%d_%H%M%S).log"
