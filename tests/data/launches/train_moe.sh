#!/bin/bash
#SBATCH --job-name=moe-8x7b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00

# A mixture of experts under Slurm: one task a GPU, options in strings, the command put together.

export CUDA_DEVICE_MAX_CONNECTIONS=1
export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1)
export MASTER_PORT=29500

IMAGE=/images/megatron.sqsh
RUN=${RUN_NAME:-moe_8x7b}
TP=1; PP=4; EP=8

MODEL=" \
    --num-layers 32 \
    --hidden-size 4096 \
    --ffn-hidden-size 14336 \
    --num-attention-heads 32 \
    --group-query-attention \
    --num-query-groups 8 \
    --seq-length 4096 \
    --max-position-embeddings 32768 \
    --position-embedding-type rope \
    --rotary-base 1000000 \
    --no-position-embedding \
    --normalization RMSNorm \
    --swiglu \
    --disable-bias-linear \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
"
MOE=" \
    --num-experts 8 \
    --expert-model-parallel-size ${EP} \
    --moe-router-load-balancing-type aux_loss \
    --moe-router-topk 2 \
    --moe-aux-loss-coeff 1e-2 \
    --moe-grouped-gemm \
    --moe-token-dispatcher-type alltoall \
    --overlap-param-gather \
    --overlap-grad-reduce \
"
DATA="--tokenizer-type Llama2Tokenizer --tokenizer-model /data/tokenizer.model --data-path 0.7 /data/web_text_document 0.3 /data/code_text_document --split 99990,8,2"
TRAIN="--micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16"
PARALLEL="--tensor-model-parallel-size $TP --pipeline-model-parallel-size $PP --use-distributed-optimizer"

case "${VARIANT:-mixtral}" in
    mixtral) MOE="$MOE --moe-router-pre-softmax" ;;
    shared)
        MOE="$MOE --moe-shared-expert-intermediate-size 14336"
        ;;
    *) echo "unknown variant" >&2; exit 1 ;;
esac

LOG="--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save /ckpt/$RUN --load /ckpt/$RUN --no-load-optim"
if [ -n "${WANDB_API_KEY}" ]; then
    LOG="$LOG --wandb-project moe --wandb-exp-name $RUN"
fi

COMMAND="python -u pretrain_gpt.py $MODEL $MOE $DATA $TRAIN $PARALLEL $LOG $EXTRA_ARGS"
echo "$COMMAND"

srun --container-image "$IMAGE" --container-mounts /data:/data bash -c "
    cd /workspace/megatron-lm
    RANK=\$SLURM_PROCID LOCAL_RANK=\$SLURM_LOCALID WORLD_SIZE=\$SLURM_NTASKS $COMMAND
"
