#!/usr/bin/env bash
# Train the model of sample:debian-moe on one GPU and capture its routing with moesim.
#
#   verification/hardware/train_and_capture.sh [CORPUS] [OUT]
#
# CORPUS is what verification/samples/debian_corpus.py wrote. OUT (default: OUT in the environment) gets the
# trace, the loss curve, the training totals and the log; the model stays in a temporary folder.
# SECONDS_TO_TRAIN, TRAIN_ARGS, CAPTURE_ARGS, PYTHON and DEVICE change the run.
set -euo pipefail
corpus=${1:-.carry/train} out=${2:-${OUT:-/tmp/moesim-train}}
python=${PYTHON:-python3} device=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1 PYTHONPATH=. TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1
mkdir -p "$out"
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
exec > >(tee "$out/log.txt") 2>&1

"$python" -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
[ "$device" != cuda ] || nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
# shellcheck disable=SC2086
timeout -k 10 330 "$python" verification/samples/train_debian_moe.py --corpus "$corpus" --out "$model/debian-olmoe" \
  --seconds "${SECONDS_TO_TRAIN:-230}" --device "$device" ${TRAIN_ARGS:-}
echo "== trained after $SECONDS s"
cp "$model"/debian-olmoe/{loss.csv,training.json,config.json} "$out/"
# shellcheck disable=SC2086
timeout -k 10 120 "$python" -c 'from moesim.cli.main import main; main()' trace capture \
  --model "$model/debian-olmoe" --prompts "$corpus/prompts.jsonl" --out "$out/debian-moe.npz" \
  --max-prompt-tokens 384 --max-new-tokens 96 --batch-size 64 --no-gate-weights \
  --license CC0-1.0 --device "$device" ${CAPTURE_ARGS:-} --debug
echo "== captured after $SECONDS s"
ls -l "$out"
