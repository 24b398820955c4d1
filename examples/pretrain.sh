#!/usr/bin/env bash
# Train one of the paper's runs on this machine:
#
#   examples/pretrain.sh 1b-8k skyladder --data-path data/cc_text_document \
#       --tokenizer-model tokenizer.model --save runs/1b --load runs/1b
#   examples/pretrain.sh 1b-8k skyladder --shrink      # eight steps on the CPU (a GPU: SKYLADDER_DEVICE=)
#
# `skyladder example` lists the runs and variants, and prints each flag with where it comes from.
# What stands after RUN and VARIANT goes to Megatron and overrides. For several nodes: docs/slurm.md.
#
#   GPU             the layout: a100-40g (default) or h100
#   GPUS_PER_NODE   processes (default 8; with --shrink what the layout needs)
#   PYTHON          the interpreter (default python)
set -euo pipefail

if [ $# -lt 2 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
run=$1 variant=$2
shift 2
python=${PYTHON:-python}
options=(--gpu "${GPU:-a100-40g}")
if [ "${1:-}" = --shrink ]; then
    shift
    options+=(--shrink)
    export SKYLADDER_DEVICE=${SKYLADDER_DEVICE-cpu}
    : "${GPUS_PER_NODE:=$("$python" -m megatron_skyladder example "$run" "${options[@]}" --gpus-per-replica)}"
fi
flags=$("$python" -m megatron_skyladder example "$run" --variant "$variant" "${options[@]}" --flags-only)

# Megatron wants it where TP or CP is above 1: with one queue, kernels start in the order of the
# program, and communication is really overlapped with what was launched after it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# shellcheck disable=SC2086  # the flags are words
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "${GPUS_PER_NODE:-8}" \
    -m megatron_skyladder.pretrain_gpt $flags "$@"
