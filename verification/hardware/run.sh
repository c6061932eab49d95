#!/usr/bin/env bash
# Calibrate and validate on one host's GPUs, in sections that can be run apart and resumed.
#
#   verification/hardware/run.sh [--in DIR] [--out DIR] [--gpus N] [--only a,b]
#     [--calibrate a,b] [--stop-after S]
#
# DIR given to --in is what prepare.py wrote. Sections: environment, smoke, calibrate, one a model in
# DIR (olmoe-1b-7b and so on), offload, offload-plans (where DIR has olmoe-1b-7b), summary. --calibrate names the only parts of the calibration to measure, as
# launch,all_to_all_v,permute,ffn.
# OUT in the environment is the default of --out, PYTHON and DEVICE choose the interpreter and cpu.
# A section that would start after S seconds is skipped and said so. NVLink multicast stays off.
set -u
in=.carry/hardware out=${OUT:-/tmp/moesim-hardware} gpus=2 only="" parts="" stop=540
while [ $# -gt 0 ]; do
  case $1 in
    --in) in=$2 ;; --out) out=$2 ;; --gpus) gpus=$2 ;; --only) only=$2 ;; --stop-after) stop=$2 ;;
    --calibrate) for part in ${2//,/ }; do parts="$parts --section $part"; done ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export NCCL_GRAPH_REGISTER=0 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONPATH=.
python=${PYTHON:-python3} device=${DEVICE:-cuda} failed=0
mkdir -p "$out"

wanted() { [ -z "$only" ] || case ",$only," in *",$1,"*) true ;; *) false ;; esac; }

# section NAME SECONDS COMMAND...: run within the time, note the outcome, go on whatever it is.
section() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  wanted "$name" || return 0
  if [ "$SECONDS" -ge "$stop" ]; then echo "== $name: skipped, $SECONDS s are over"; failed=1; return 0; fi
  timeout -k 10 "$limit" "$@" 2>&1 | grep -v -e '^\*\*\*' -e 'OMP_NUM_THREADS' -e FutureWarning
  code=${PIPESTATUS[0]}
  echo "== $name: exit $code, $((SECONDS - start)) s"
  [ "$code" -eq 0 ] || failed=1
}

ranks() {
  local n=$1
  shift
  echo "$python" -m torch.distributed.run --nnodes 1 --nproc-per-node "$n" --master-addr 127.0.0.1 \
    --master-port $((29500 + RANDOM % 400)) -m moesim.replay "$@" --device "$device"
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader
  nvidia-smi topo -m
  "$python" -c 'import torch, numpy; print(torch.__version__, numpy.__version__, torch.version.cuda,
    torch.cuda.device_count(), torch.cuda.nccl.version() if torch.cuda.is_available() else "")'
}

smoke() {
  local shape='{"name":"smoke","hidden_size":256,"moe_intermediate_size":128,"num_experts":32,"top_k":4,"dtype":"'
  local folder=$in/gpt-oss-20b
  for variant in "bf16 gpu split" "fp32 none nearest"; do
    set -- $variant
    $(ranks "$gpus" validate) --plan "$folder/linear.json" --plan "$folder/eplb.json" \
      --trace "$folder/trace.npz" --shape "$shape$1\"}" --dedup "$2" --replica-policy "$3" \
      --tokens 128 --batches 1 --layers 3 --budget 0.05 --timeout 60 --out "$out/smoke-$2.json" || return 1
  done
  "$python" verification/hardware/summary.py "$out"/smoke-*.json
  rm -f "$out"/smoke-*.json
}

validate() {
  local folder=$in/$1 plans=() plan
  shift
  for plan in "$folder"/*.json; do
    case $(basename "$plan") in shape.json | config.json) ;; *) plans+=(--plan "$plan") ;; esac
  done
  $(ranks "$gpus" validate) "${plans[@]}" --trace "$folder/trace.npz" --shape "$folder/shape.json" \
    --tokens 128 1024 8192 --batches 2 --layers 8 --budget 0.2 --max-reps 15 --timeout 90 "$@"
}

export -f environment smoke validate ranks
export in out gpus python device
section environment 60 bash -c environment
section smoke 120 bash -c smoke
for shape in "$in"/*/shape.json; do parts="$parts --shape $shape"; done
section calibrate 290 $(ranks "$gpus" calibrate) $parts --time-limit 230 --timeout 90 \
  --out "$out/calibration.json"
for shape in "$in"/*/shape.json; do
  model=$(basename "$(dirname "$shape")")
  section "$model" 130 bash -c "validate $model --time-limit 95 --out $out/$model.json"
done
[ -e "$in/olmoe-1b-7b/cache" ] || exit $failed
section offload 120 $(ranks 1 offload) --time-limit 90 --timeout 90 --shape "$in/olmoe-1b-7b/shape.json" \
  --trace "$in/olmoe-1b-7b/trace.npz" --out "$out/offload.json"
caches=()
for schedule in "$in"/olmoe-1b-7b/cache/*.npz; do caches+=(--schedule "$schedule"); done
section offload-plans 120 $(ranks 1 offload) --time-limit 90 --timeout 90 --shape "$in/olmoe-1b-7b/shape.json" \
  "${caches[@]}" --out "$out/offload-plans.json"
section summary 60 "$python" verification/hardware/summary.py "$out"/*.json
exit $failed
