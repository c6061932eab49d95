#!/usr/bin/env bash
set -euo pipefail
# tests the promise
# the first run warms up, the second counts
vllm bench serve \
  --model /tmp/gpu/qwen3-30b/model \
  --port 8300 \
  --dataset-name random \
  --random-input-len 1000 \
  --random-output-len 300 \
  --request-rate 10 \
  --ignore-eos \
  --percentile-metrics ttft,tpot,itl,e2el \
  --metric-percentiles 50,90,99 \
  --num-prompts 100 \
  --seed "$RANDOM"
vllm bench serve \
  --model /tmp/gpu/qwen3-30b/model \
  --port 8300 \
  --dataset-name random \
  --random-input-len 1000 \
  --random-output-len 300 \
  --request-rate 10 \
  --ignore-eos \
  --percentile-metrics ttft,tpot,itl,e2el \
  --metric-percentiles 50,90,99 \
  --num-prompts 3000 \
  --seed "$RANDOM" \
  --save-result \
  --result-filename bench.json
