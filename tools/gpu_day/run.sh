#!/usr/bin/env bash
# The GPU day in one call of less than nine minutes; README.md says what it does and in which order.
#   bash run.sh [--dry] [PROJECT]
# Writes to $OUT as it goes; no step begins without time left of $BUDGET seconds. --dry goes through every step on a CPU;
# SLOWER=4 gives every step four times its time there.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
DRY=; [ "${1:-}" = --dry ] && { DRY=1; shift; }
PROJECT=$(cd "${1:-$HERE/../..}" && pwd) || exit 2
OUT=${OUT:-$PWD/gpu-day-out}; mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}; BUDGET=${BUDGET:-525}
export DRY OUT PYTHON PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1
export PYTHONPATH="$PROJECT:${CARRIED:-$PROJECT/.gpu-day}/packages:${PYTHONPATH:-}"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${CARRIED:-$PROJECT/.gpu-day}/triton}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
cd "$PROJECT" || exit 2

# Eight files at most: more do not come back from the machine.
# phase NAME SECONDS FILE COMMAND...: for no longer than SECONDS, nor than is left. Its output goes into FILE, its end into
# phases.jsonl. ONLY names the phases to run, between spaces, where not all are wanted.
phase() {
  local name=$1 most=$(($2 * ${SLOWER:-1})) file=$3 begin=$SECONDS rc; shift 3
  if [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]]; then return 1; fi
  local left=$((BUDGET - SECONDS)); [ "$most" -gt "$left" ] && most=$left
  if [ "$most" -lt 8 ]; then echo "{\"phase\": \"$name\", \"left_out\": \"$left s left\"}" | tee -a "$OUT/phases.jsonl"; return 1; fi
  echo "=== $name" >>"$OUT/$file"
  timeout -k 3 "$most" "$@" >>"$OUT/$file" 2>&1; rc=$?
  echo "{\"phase\": \"$name\", \"rc\": $rc, \"s\": $((SECONDS - begin)), \"at\": $SECONDS}" | tee -a "$OUT/phases.jsonl"
  return $rc
}
day() { LINEARPATCH_BACKEND=${BACKEND:-cuda} exec "$PYTHON" -X faulthandler -m tools.gpu_day "$@"; }
triton_parts() { for i in 0 1 2 3 4 5 6 7; do BACKEND=triton day check $i 8 & done; wait; }
sanitizer() { # TOOL BACKEND KERNELS
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 LINEARPATCH_BACKEND=$2 exec compute-sanitizer --tool "$1" --print-limit 20 --error-exitcode 9 \
    --kernel-name "kernel_substring=$3" "$PYTHON" -m tools.gpu_day small
}
counters() {
  local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,smsp__inst_executed.sum,smsp__issue_active.avg.pct_of_peak_sustained_active,lts__t_sector_hit_rate.pct
  metrics+=,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum,l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread,launch__grid_size,launch__block_size
  for stall in barrier long_scoreboard short_scoreboard mio_throttle math_pipe_throttle not_selected wait lg_throttle no_instruction; do
    metrics+=,smsp__average_warps_issue_stalled_${stall}_per_issue_active.ratio
  done
  LINEARPATCH_BACKEND=cuda exec ncu --clock-control none --csv --page raw -k 'regex:patch_|slot_rows|add_parts|warp_rows|carry_part' \
    --launch-count 14 --metrics $metrics "$PYTHON" -m tools.gpu_day few
}
about() {
  date; uname -r; nproc; free -g | head -2; nvidia-smi; nvidia-smi -q -d CLOCK | head -40; nvcc --version; g++ --version | head -1
  for t in ncu compute-sanitizer cuobjdump ninja; do command -v $t; done
  "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|numpy|hypothesis|pytest|gguf|liger|peft|setuptools|fast)'
}
export -f day triton_parts sanitizer counters about

phase machine 20 machine.txt bash -c about
# 1. The extension: the one that was carried, or built here.
if ! phase hello 90 build.txt bash -c 'day hello' && [ -z "$DRY" ] && [ -z "${ONLY:-}" ]; then
  rm -f linearpatch_kernels/_C.abi3.so
  phase build 240 build.txt "$PYTHON" setup.py build_ext --inplace && phase hello 60 build.txt bash -c 'day hello'
fi
# 2. Right? 3. As fast as a copy? 4. Why? 5. A decoding step's share. 6. The rest.
phase check 75 checks.txt bash -c 'day check'
phase headline 60 times.txt bash -c 'day headline'
phase ncu 60 ncu.txt bash -c counters
phase decode 40 times.txt bash -c 'day decode'
phase others 75 times.txt bash -c 'day others'
phase losses 80 times.txt bash -c 'day losses'
phase host 30 ncu.txt bash -c 'day host'
phase memcheck 60 sanitizer.txt bash -c 'sanitizer memcheck cuda linearpatch'
phase racecheck 60 sanitizer.txt bash -c 'sanitizer racecheck cuda linearpatch'
phase model 120 model.txt bash -c 'day model'
phase triton-check 75 checks.txt bash -c triton_parts
phase triton-times 60 times.txt bash -c 'BACKEND=triton day triton'
phase triton-memcheck 45 sanitizer.txt bash -c 'sanitizer memcheck triton _kernel'
phase tests 100 build.txt "$PYTHON" -m pytest -q --maxfail 20 -m 'not slow' -p no:cacheprovider -n 8 tests/ops tests/test_backend.py
phase more 60 times.txt bash -c 'day more'
echo '--- wrong'; grep -h '"step": "wrong"' "$OUT/checks.txt" 2>/dev/null | cut -c1-500 | head -12
grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/sanitizer.txt" 2>/dev/null
echo '--- failed'; grep -hE '"step": "(failed|not captured|no cache)"' "$OUT"/*.txt | cut -c1-300 | head -20
echo '--- times'; "$PYTHON" -m tools.gpu_day.table "$OUT"/times.txt "$OUT"/model.txt
