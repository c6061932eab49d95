#!/usr/bin/env bash
# What one GPU can say: the whole calibration with one rank, offloading, dense rows an expert.
#
#   verification/hardware/run_one_gpu.sh [--in DIR] [--out DIR] [--only a,b] [--stop-after S]
#
# DIR given to --in is what prepare.py --no-plans wrote. Sections: environment, groups (collectives of
# torch process groups of one rank), calibrate, offload (three cache sizes of each model in DIR),
# offload-plans (the caches in DIR/olmoe-1b-7b/cache), rows (dense rows an expert, slots of a rank of two).
# OUT in the environment is the default of --out, PYTHON and DEVICE choose the interpreter and cpu.
set -u
in=out/h200x1/in out=${OUT:-/tmp/moesim-one-gpu} only="" stop=560
while [ $# -gt 0 ]; do
  case $1 in
    --in) in=$2 ;; --out) out=$2 ;; --only) only=$2 ;; --stop-after) stop=$2 ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export NCCL_GRAPH_REGISTER=0 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONPATH=.
python=${PYTHON:-python3} device=${DEVICE:-cuda} failed=0
ROWS=${ROWS:-1 2 3 4 6 8 12 16 20 24 28 32 40 48 56 64 80 96 112 124 128 132 144 160 192 224 256}
mkdir -p "$out"

# section NAME SECONDS COMMAND...: run within the time, note the outcome, go on whatever it is.
section() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  if [ -n "$only" ]; then case ",$only," in *",${name%%:*},"*) ;; *) return 0 ;; esac; fi
  if [ "$SECONDS" -ge "$stop" ]; then echo "== $name: skipped, $SECONDS s are over"; failed=1; return 0; fi
  timeout -k 10 "$limit" "$@" 2>&1 | grep -v -e '^\*\*\*' -e 'OMP_NUM_THREADS' -e FutureWarning
  code=${PIPESTATUS[0]}
  echo "== $name: exit $code, $((SECONDS - start)) s"
  [ "$code" -eq 0 ] || failed=1
}

rank() {
  echo "$python" -m torch.distributed.run --nnodes 1 --nproc-per-node 1 --master-addr 127.0.0.1 \
    --master-port $((29500 + RANDOM % 400)) "$@" --device "$device"
}

# half_shape FILE: the shape with half of its experts, as a rank of two has slots.
half_shape() {
  "$python" -c 'import json, sys
shape = json.load(open(sys.argv[1]))
print(json.dumps({**shape, "num_experts": shape["num_experts"] // 2}, separators=(",", ":")))' "$1"
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader
  "$python" -c 'import torch, numpy; print(torch.__version__, numpy.__version__, torch.version.cuda,
    torch.cuda.device_count(), torch.cuda.nccl.version() if torch.cuda.is_available() else "")'
}

export -f environment
export python
section environment 60 bash -c environment
section groups 90 $(rank verification/hardware/group_of_one.py --out "$out/groups.json")
section calibrate 290 $(rank -m moesim.replay calibrate) --time-limit 240 --timeout 90 \
  --out "$out/calibration.json"
for shape in "$in"/*/shape.json; do
  model=$(basename "$(dirname "$shape")")
  section "offload:$model" 120 $(rank -m moesim.replay offload) --time-limit 90 --timeout 90 \
    --shape "$shape" --trace "${shape%/*}/trace.npz" --out "$out/offload-$model.json"
done
caches=()
for schedule in "$in"/olmoe-1b-7b/cache/*.npz; do caches+=(--schedule "$schedule"); done
section offload-plans 120 $(rank -m moesim.replay offload) --time-limit 90 --timeout 90 \
  --shape "$in/olmoe-1b-7b/shape.json" "${caches[@]}" --out "$out/offload-plans.json"
shapes=()
for shape in "$in"/*/shape.json "$in"/*.json; do
  case $shape in */about.json) ;; *) shapes+=(--shape "$(half_shape "$shape")") ;; esac
done
section rows 290 $(rank -m moesim.replay calibrate) --section ffn "${shapes[@]}" --ffn-rows $ROWS \
  --time-limit 260 --timeout 90 --budget 0.04 --out "$out/rows.json"
exit $failed
