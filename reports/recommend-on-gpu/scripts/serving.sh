#!/usr/bin/env bash
set -euo pipefail
# serving: 1 engine of 1 x h200-sxm
# several engines fit a node: give each its own GPUs (CUDA_VISIBLE_DEVICES)
vllm serve /tmp/gpu/qwen3-30b/model \
  --tensor-parallel-size 1 \
  --max-num-batched-tokens 8192 \
  --max-num-seqs 1024 \
  --gpu-memory-utilization 0.9 \
  --port 8300
