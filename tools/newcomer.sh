#!/bin/sh
# What a newcomer does first: the base install in a fresh environment, then the commands of the
# first hour. Every one has to end as expected, without a traceback, in under two seconds.
#   tools/newcomer.sh [PYTHON ...]      default: each of python3.10 to python3.13 that is found
set -u
cd "$(dirname "$0")/.."
limit_ms=2000
launches=tests/data/launches
flags="--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 8192
  --micro-batch-size 1 --global-batch-size 512 --train-iters 1000 --vocab-size 32000"

found() {
  for version in 3.10 3.11 3.12 3.13; do
    for candidate in "$HOME/.pyenv/versions/$version".*/bin/python "$(command -v python$version)"; do
      [ -x "$candidate" ] && "$candidate" -c 'import venv, ensurepip' 2>/dev/null &&
        { echo "$candidate"; break; }
    done
  done
}

rm -rf build
work=$(mktemp -d)
trap 'rm -rf "$work" build' EXIT  # pip builds in the tree and would find old files there
failures=0
slurm=0  # an sbatch without a cluster behind it refuses every script
command -v sbatch >/dev/null && slurm=any

try() {  # EXPECTED_EXIT_CODE|any WORDS...
  expected=$1
  shift
  begin=$(date +%s%3N)
  "$work/venv/bin/skyladder" "$@" >"$work/out" 2>&1
  code=$?
  took=$(($(date +%s%3N) - begin))
  verdict=ok
  [ "$expected" = any ] || [ "$code" -eq "$expected" ] || verdict="exit code $code, expected $expected"
  grep -q Traceback "$work/out" && verdict=traceback
  [ "$took" -lt "$limit_ms" ] || verdict="over $limit_ms ms"
  printf '  %5d ms  %-50.50s  %s\n' "$took" "skyladder $*" "$verdict"
  [ "$verdict" = ok ] || { failures=$((failures + 1)); tail -5 "$work/out"; }
}

pythons=${*:-$(found)}
[ -n "$pythons" ] || { echo "no Python from 3.10 to 3.13 found: nothing was checked" >&2; exit 1; }
for python in $pythons; do
  "$python" --version
  rm -rf "$work/venv" && "$python" -m venv "$work/venv" || exit 1
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check . || exit 1
  "$work/venv/bin/python" -m compileall -q "$work"/venv/lib/python*/site-packages/megatron_skyladder
  try 0 --version
  try 1 doctor
  # shellcheck disable=SC2086
  try 0 plan torchrun --nproc-per-node 8 pretrain_gpt.py $flags
  try 0 plan --from-script "$launches/train_llama_8b.sh"
  try 0 plan --preset 1b-32k
  try 0 compare 1b-8k 1b-32k
  try 0 flags
  try 0 flags --megatron
  try 0 example 1b-8k
  try "$slurm" slurm examples/slurm/1b-8k.ini
  try 0 completion bash
done
[ "$failures" -eq 0 ] || { echo "$failures of these failed"; exit 1; }
