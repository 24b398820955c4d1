#!/usr/bin/env bash
# Extend the context of a 4K model to 32K and then to 128K, each time with a ladder:
#
#   examples/bridge/extend_context.sh CHECKPOINT DATA OUTPUT [overrides of Bridge ...]
#
# CHECKPOINT is a folder of Bridge's or Megatron-LM's (torch_dist), such as that of
# recipes:pretrain_1b_4k; DATA a .bin/.idx pair without the suffix, of long documents. Windows grow
# from the length that the model has to that of the stage, over 40 % of it. A stage that was stopped
# goes on when the same command is given again. To train a part: STAGES=32k.
#
#   GPUS_PER_NODE   processes (default 8)
#   PYTHON          the interpreter (default python)
#   RECIPES         another file with extend_to_32k and extend_to_128k
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
checkpoint=$1 data=$2 output=$3
shift 3
recipes=${RECIPES:-$(dirname "$0")/recipes.py}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

extend() {  # STAGE START_WINDOW CHECKPOINT overrides
    local stage=$1 start=$2 from=$3
    shift 3
    "${PYTHON:-python}" -m torch.distributed.run --standalone \
        --nproc-per-node "${GPUS_PER_NODE:-8}" -m megatron_skyladder.megatron_bridge \
        --recipe "$recipes:extend_to_$stage" \
        skyladder.preset=extend-context skyladder.start_window="$start" \
        skyladder.intra_document=true \
        checkpoint.pretrained_checkpoint="$from" \
        checkpoint.save="$output/$stage" checkpoint.load="$output/$stage" \
        dataset.data_path="$data" "$@"
}

for stage in ${STAGES:-32k 128k}; do
    case $stage in
        32k) extend 32k 4096 "$checkpoint" "$@" ;;
        128k) extend 128k 32768 "$output/32k" "$@" ;;
        *) echo "STAGES: $stage is neither 32k nor 128k" >&2; exit 2 ;;
    esac
done
