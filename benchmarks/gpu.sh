#!/usr/bin/env bash
# make gpu: what only a GPU can show, in ten minutes, on a machine with torch, torchvision, Triton, pytest and no network.
# Builds the core in place, runs the battery of tests on CUDA tensors, compiled kernels and Triton's, one process for each
# operator, and times the quick cases. Logs: out/gpu; figures: benchmarks/results/<gpu>-<dtype>.json, those of float32 in
# README.md, too. TUNE=1 tunes Triton's first. Whatever fails, the rest runs.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
export PYTHONPATH=. CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch needs to be deterministic
mkdir -p "$OUT"
failed=0

step() { printf '\n=== %s (after %d s)\n' "$1" "$SECONDS"; }
left() { echo $(($1 > SECONDS + 10 ? $1 - SECONDS : 10)); } # seconds until the script has run for so many, but some
by() { timeout -k 5 "$(left "$1")" "${@:2}"; }              # SECONDS COMMAND...: ends it then
tell() {                                                    # the last line of a log, and whether all passed
  printf '%-32s %s\n' "$1" "$(tail -1 "$OUT/$1.txt")"
  grep -qE '^[0-9]+ passed' <(tail -1 "$OUT/$1.txt") || failed=1
}

gpu=$("$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch sees no GPU")
print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1

step "build"
by 150 "$PYTHON" setup.py -q build_ext --inplace >"$OUT/build.txt" 2>&1 || failed=1
tail -5 "$OUT/build.txt"
"$PYTHON" -m pyzoo info | tee "$OUT/info.txt"

step "tests on $gpu"
ops=$("$PYTHON" -c 'from tests.test_gpu_kernels import SPECS; print(*(spec.name for spec in SPECS))')
battery() { # BACKEND SECONDS: the operators side by side
  local op
  for op in $ops; do
    PYZOO_TEST_DEVICE=cuda PYZOO_BACKEND=$1 OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1 \
      by "$2" "$PYTHON" -m pytest tests/test_ops.py -k "[$op-" >"$OUT/$1_$op.txt" 2>&1 &
  done
  wait
  for op in $ops; do tell "$1_$op"; done
}
battery cuda 270
battery triton 350
by 390 "$PYTHON" -m pytest tests/test_gpu_device.py tests/test_cuda.py >"$OUT/device.txt" 2>&1
tell device
if command -v compute-sanitizer >/dev/null; then
  by 430 compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest tests/test_gpu_device.py -k stream >"$OUT/sanitizer.txt" 2>&1
  tail -1 "$OUT/sanitizer.txt"
fi

if [ "${TUNE:-0}" = 1 ]; then # takes some minutes more
  step "tune"
  timeout 120 "$PYTHON" -m pyzoo tune --quick -o kernels/configs
  SECONDS=$((SECONDS < 430 ? SECONDS : 430))
fi

bench() { # BACKEND DTYPE SECONDS FILE
  step "benchmarks of $1 in $2"
  by "$(($3 + 10))" "$PYTHON" -m benchmarks.gpu "$1" "$2" "$(left "$3")" "benchmarks/results/$gpu-$2$4.json" \
    >"$OUT/bench_$1_$2.txt" 2>&1 || failed=1
  tail -40 "$OUT/bench_$1_$2.txt"
}
bench cuda float32 500 ""
bench cuda bfloat16 550 ""
bench triton float32 585 -triton
"$PYTHON" -m benchmarks.readme_table "benchmarks/results/$gpu-float32.json" || failed=1
exit $failed
